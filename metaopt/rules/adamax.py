"""Adamax: Adam with the infinity norm.

``m' = β₁m + (1-β₁)g``;  ``u' = max(β₂u, |g| + eps)``;  ``w' = w - lr/(1-β₁ᵗ) · m'/u'``, with ``g ← g + weight_decay ·
w`` before it. Where the maximum changes sides there is no derivative; elsewhere it follows the side in force.

Kingma & Ba 2015, algorithm 2, as ``torch.optim.Adamax`` has it.
"""

from __future__ import annotations

__all__ = ["Adamax"]

import torch
from torch import Tensor

from metaopt.rules.moments import ADAM_DOMAIN, ADAM_SETTINGS
from metaopt.rules.rule import Rule, Setting, State, add_scaled, always, decayed, double, lerp


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
    """One step of Adamax."""
    lr, beta1, beta2 = double(lr), double(beta1), double(beta2)
    g = decayed(w, g, weight_decay, maximize)
    zero = torch.zeros_like(w)
    m, u = state["exp_avg"], state["exp_inf"]
    m = lerp(zero if m is None else m, g, 1 - beta1)
    u = torch.maximum(beta2 * (zero if u is None else u), g.abs() + eps)
    return add_scaled(w, m / u, -lr / (1 - beta1**step)), {"exp_avg": m, "exp_inf": u}


Adamax = Rule(
    torch.optim.Adamax,
    update,
    settings=ADAM_SETTINGS,
    flags=("maximize",),
    state=("exp_avg", "exp_inf"),
    zeros=always("exp_avg", "exp_inf"),
    elementwise=True,
    domain=ADAM_DOMAIN,
)
