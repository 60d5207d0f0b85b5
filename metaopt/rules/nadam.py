"""NAdam: Adam with Nesterov's momentum, whose weight ``μₜ`` grows with time.

``μₜ = β₁(1 - ½ · 0.96^(t·momentum_decay))``, ``Mₜ = Mₜ₋₁μₜ`` from ``M₀ = 1``; ``m' = β₁m + (1-β₁)g``;
``v' = β₂v + (1-β₂)g²``;  ``w' = w - lr · ((1-μₜ)g/(1-Mₜ) + μₜ₊₁m'/(1-Mₜμₜ₊₁)) / (√(v'/(1-β₂ᵗ)) + eps)``.

Dozat 2016, algorithm 2, as ``torch.optim.NAdam`` has it. ``M`` is part of the state: it remembers β₁ and momentum_decay
of every step so far.
"""

from __future__ import annotations

__all__ = ["NAdam"]

import torch
from torch import Tensor

from metaopt.rules.rule import (
    FRACTION,
    NONNEGATIVE,
    Rule,
    Setting,
    State,
    add_scaled,
    decayed,
    double,
    lerp,
    safe_sqrt,
    scalar,
)


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
    momentum_decay: Setting,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of NAdam."""
    lr, beta1, beta2, momentum_decay = double(lr), double(beta1), double(beta2), double(momentum_decay)
    if decoupled_weight_decay:
        g = -g if maximize else g
        w = w * (1 - lr * double(weight_decay))
    else:
        g = decayed(w, g, weight_decay, maximize)
    zero = torch.zeros_like(w)
    m, v, before = state["exp_avg"], state["exp_avg_sq"], state["mu_product"]
    mu = beta1 * (1.0 - 0.5 * 0.96 ** (step * momentum_decay))
    mu_next = beta1 * (1.0 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    product = scalar(mu if before is None else before * mu, before, w)
    m = lerp(zero if m is None else m, g, 1 - beta1)
    v = add_scaled(beta2 * (zero if v is None else v), g * g, 1 - beta2)
    denominator = safe_sqrt(v / (1 - beta2**step)) + eps
    w = add_scaled(w, g / denominator, -lr * (1.0 - mu) / (1.0 - double(product)))
    w = add_scaled(w, m / denominator, -lr * mu_next / (1.0 - double(product) * mu_next))
    return w, {"exp_avg": m, "exp_avg_sq": v, "mu_product": product}


NAdam = Rule(
    torch.optim.NAdam,
    update,
    settings={
        "lr": "lr",
        "beta1": ("betas", 0),
        "beta2": ("betas", 1),
        "eps": "eps",
        "weight_decay": "weight_decay",
        "momentum_decay": "momentum_decay",
    },
    flags=("decoupled_weight_decay", "maximize"),
    state=("exp_avg", "exp_avg_sq", "mu_product"),
    scalars=("mu_product",),
    domain=dict.fromkeys(("lr", "eps", "weight_decay", "momentum_decay"), NONNEGATIVE)
    | dict.fromkeys(("beta1", "beta2"), FRACTION),
)
