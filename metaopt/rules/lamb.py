"""LAMB: Adam's direction, scaled layer by layer to the weights' norm.

``r = m'/(1-β₁ᵗ) / (√(v'/(1-β₂ᵗ)) + eps) + weight_decay · w`` with Adam's ``m'`` and ``v'``;
``w' = w - lr · ‖w‖/‖r‖ · r``, and with 1 for the ratio where ``w`` or ``r`` is 0.

You et al. 2020, algorithm 2, with φ the identity. At ``w = 0`` and ``r = 0`` the step jumps; the derivative there is
the one with the ratio held at 1.
"""

from __future__ import annotations

__all__ = ["LAMB"]

import torch
from torch import Tensor

from metaopt.published.lamb import LAMB as Optimizer
from metaopt.rules.moments import ADAM_DOMAIN, ADAM_SETTINGS
from metaopt.rules.rule import Rule, Setting, State, add_scaled, always, double, lerp, norm, safe_sqrt


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
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of LAMB."""
    g = -g if maximize else g
    beta1, beta2 = double(beta1), double(beta2)
    zero = torch.zeros_like(w)
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m = lerp(zero if m is None else m, g, 1 - beta1)
    v = add_scaled(beta2 * (zero if v is None else v), g * g, 1 - beta2)
    r = m / (1 - beta1**step) / (safe_sqrt(v / (1 - beta2**step)) + eps)
    r = add_scaled(r, w, weight_decay)
    size, length = norm(w), norm(r)
    zero_ratio = (size == 0) | (length == 0)
    trust = torch.where(zero_ratio, 1.0, size / torch.where(zero_ratio, 1.0, length))
    return w - double(lr) * trust * r, {"exp_avg": m, "exp_avg_sq": v}


LAMB = Rule(
    Optimizer,
    update,
    settings=ADAM_SETTINGS,
    flags=("maximize",),
    state=("exp_avg", "exp_avg_sq"),
    zeros=always("exp_avg", "exp_avg_sq"),
    domain=ADAM_DOMAIN,
)
