"""LARS: momentum, with a learning rate for each layer.

``v' = momentum · v + lr · λ · (g + weight_decay · w)`` with ``λ = trust_coefficient · ‖w‖/(‖g‖ + weight_decay · ‖w‖)``;
``w' = w - v'``, and with 1 for λ where it would be 0 or 0/0.

You, Gitman & Ginsburg 2017, algorithm 1. At ``w = 0`` the step jumps; the derivative there is the one with λ held at 1.
"""

from __future__ import annotations

__all__ = ["LARS"]

import torch
from torch import Tensor

from metaopt.published.lars import LARS as Optimizer
from metaopt.rules.rule import NONNEGATIVE, Rule, Setting, State, add_scaled, always, double, norm


def update(
    w: Tensor,
    g: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    momentum: Setting,
    weight_decay: Setting,
    trust_coefficient: Setting,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of LARS."""
    g = -g if maximize else g
    v = state["momentum_buffer"]
    v = torch.zeros_like(w) if v is None else v
    size = norm(w)
    total = norm(g) + weight_decay * size
    still = (size == 0) | (total == 0)
    local = torch.where(still, 1.0, trust_coefficient * size / torch.where(still, 1.0, total))
    v = momentum * v + double(lr) * local * add_scaled(g, w, weight_decay)
    return w - v, {"momentum_buffer": v}


_SETTINGS = ("lr", "momentum", "weight_decay", "trust_coefficient")

LARS = Rule(
    Optimizer,
    update,
    settings={name: name for name in _SETTINGS},
    flags=("maximize",),
    state=("momentum_buffer",),
    zeros=always("momentum_buffer"),
    domain=dict.fromkeys(_SETTINGS, NONNEGATIVE),
)
