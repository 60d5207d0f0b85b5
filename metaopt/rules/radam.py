"""RAdam: Adam whose adaptive rate waits until its variance can be trusted.

``ρ∞ = 2/(1-β₂) - 1``, ``ρₜ = ρ∞ - 2tβ₂ᵗ/(1-β₂ᵗ)``;  where ``ρₜ > 5``:
``w' = w - lr · m'/(1-β₁ᵗ) · √(1-β₂ᵗ)/(√v' + eps) · √((ρₜ-4)(ρₜ-2)ρ∞ / ((ρ∞-4)(ρ∞-2)ρₜ))``, else
``w' = w - lr · m'/(1-β₁ᵗ)``. The step jumps where ``ρₜ`` passes 5, at some values of β₂; elsewhere β₂ has a derivative.

Liu et al. 2020, algorithm 2, as ``torch.optim.RAdam`` has it.
"""

from __future__ import annotations

__all__ = ["RAdam"]

import torch
from torch import Tensor

from metaopt.rules.moments import ADAM_DOMAIN, ADAM_SETTINGS
from metaopt.rules.rule import Rule, Setting, State, add_scaled, always, decayed, double, lerp, safe_sqrt


def update(
    w: Tensor,
    g: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    beta1: Setting,
    beta2: Setting,
    eps: Setting,
    weight_decay: Setting,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of RAdam."""
    lr, beta1, beta2 = double(lr), double(beta1), double(beta2)
    if decoupled_weight_decay:
        g = -g if maximize else g
        w = w * (1 - lr * double(weight_decay))
    else:
        g = decayed(w, g, weight_decay, maximize)
    zero = torch.zeros_like(w)
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m = lerp(zero if m is None else m, g, 1 - beta1)
    v = add_scaled(beta2 * (zero if v is None else v), g * g, 1 - beta2)
    correction = 1 - beta2**step
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * step * beta2**step / correction
    direction = m / (1 - beta1**step)
    rectifies = length > 5
    if isinstance(rectifies, Tensor):  # both ways, so that one graph of calls does for every step
        length, limit = torch.where(rectifies, length, 6.0), torch.where(rectifies, limit + 0 * length, 7.0)
        adapted = direction / (safe_sqrt(v) + eps) * (correction**0.5 * _rectified(length, limit))
        direction = torch.where(rectifies, adapted, direction)
    elif rectifies:
        direction = direction / (safe_sqrt(v) + eps) * (correction**0.5 * _rectified(length, limit))
    return add_scaled(w, direction, -lr), {"exp_avg": m, "exp_avg_sq": v}


def _rectified(length: Setting, limit: Setting) -> Setting:
    return ((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)) ** 0.5


RAdam = Rule(
    torch.optim.RAdam,
    update,
    settings=ADAM_SETTINGS,
    flags=("decoupled_weight_decay", "maximize"),
    state=("exp_avg", "exp_avg_sq"),
    zeros=always("exp_avg", "exp_avg_sq"),
    elementwise=True,
    domain=ADAM_DOMAIN,
)
