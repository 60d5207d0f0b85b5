"""Adadelta: steps in the weights' own unit.

``v' = ρv + (1-ρ)g²``;  ``Δ = √(d + eps)/√(v' + eps) · g``;  ``d' = ρd + (1-ρ)Δ²``;  ``w' = w - lr · Δ``, with
``g ← g + weight_decay · w`` before it.

Zeiler 2012, algorithm 1, as ``torch.optim.Adadelta`` has it.
"""

from __future__ import annotations

__all__ = ["Adadelta"]

import torch
from torch import Tensor

from metaopt.rules.rule import NONNEGATIVE, Rule, Setting, State, add_scaled, always, decayed, double, safe_sqrt


def update(
    w: Tensor,
    g: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    rho: Setting,
    eps: Setting,
    weight_decay: Setting,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of Adadelta."""
    rho = double(rho)
    g = decayed(w, g, weight_decay, maximize)
    zero = torch.zeros_like(w)
    v, d = state["square_avg"], state["acc_delta"]
    d = zero if d is None else d
    v = add_scaled(rho * (zero if v is None else v), g * g, 1 - rho)
    delta = safe_sqrt(d + eps) / safe_sqrt(v + eps) * g
    d = add_scaled(rho * d, delta * delta, 1 - rho)
    return add_scaled(w, delta, -lr), {"square_avg": v, "acc_delta": d}


Adadelta = Rule(
    torch.optim.Adadelta,
    update,
    settings={name: name for name in ("lr", "rho", "eps", "weight_decay")},
    flags=("maximize",),
    state=("square_avg", "acc_delta"),
    zeros=always("square_avg", "acc_delta"),
    elementwise=True,
    domain=dict.fromkeys(("lr", "eps", "weight_decay"), NONNEGATIVE)
    | {"rho": (lambda x: 0 <= x <= 1, "between 0 and 1")},
)
