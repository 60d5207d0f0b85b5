"""Adagrad: each weight's steps divided by the root of the sum of its squared gradients.

``s' = s + g²`` from ``s = initial_accumulator_value``;  ``w' = w - lr/(1 + (t-1) · lr_decay) · g/(√s' + eps)``, with
``g ← g + weight_decay · w`` before it.

Duchi, Hazan & Singer 2011, fig. 1 (diagonal), as ``torch.optim.Adagrad`` has it.
"""

from __future__ import annotations

__all__ = ["Adagrad"]

import torch
from torch import Tensor

from metaopt.rules.rule import NONNEGATIVE, Rule, Setting, State, add_scaled, decayed, double, safe_sqrt


def update(
    w: Tensor,
    g: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    lr_decay: Setting,
    weight_decay: Setting,
    initial_accumulator_value: Setting,
    eps: Setting,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of Adagrad; the accumulator begins at its hyperparameter, whatever number the optimizer made of it."""
    g = decayed(w, g, weight_decay, maximize)
    s = state["sum"]
    if s is None or (isinstance(initial_accumulator_value, Tensor) and step == 1):
        s = torch.zeros_like(w) + initial_accumulator_value
    s = s + g * g
    rate = double(lr) / (1 + (step - 1) * double(lr_decay))
    return add_scaled(w, g / (safe_sqrt(s) + eps), -rate), {"sum": s}


_SETTINGS = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

Adagrad = Rule(
    torch.optim.Adagrad,
    update,
    settings={name: name for name in _SETTINGS},
    flags=("maximize",),
    state=("sum",),
    elementwise=True,
    domain=dict.fromkeys(_SETTINGS, NONNEGATIVE),
)
