"""Lion: the sign of an interpolated momentum.

``c = β₁m + (1-β₁)g``;  ``w' = (1 - lr · weight_decay)w - lr · sign(c)``;  ``m' = β₂m + (1-β₂)g``.

Chen et al. 2023, algorithm 2. The sign is piecewise constant: both betas, and whatever acts through the gradient, have
derivative 0 between its jumps and none at them; lr and weight_decay have the exact one.
"""

from __future__ import annotations

__all__ = ["Lion"]

import torch
from torch import Tensor

from metaopt.published.lion import Lion as Optimizer
from metaopt.rules.rule import FRACTION, NONNEGATIVE, Rule, Setting, State, add_scaled, always, double, lerp


def update(
    w: Tensor,
    g: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    beta1: Setting,
    beta2: Setting,
    weight_decay: Setting,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of Lion."""
    g = -g if maximize else g
    m = state["exp_avg"]
    m = torch.zeros_like(w) if m is None else m
    direction = lerp(m, g, 1 - beta1).sign()
    w = add_scaled(w * (1 - double(lr) * double(weight_decay)), direction, -lr)
    return w, {"exp_avg": lerp(m, g, 1 - beta2)}


_FLAT = "the weights depend on it through a sign, whose derivative is 0 wherever it has one."

Lion = Rule(
    Optimizer,
    update,
    settings={"lr": "lr", "beta1": ("betas", 0), "beta2": ("betas", 1), "weight_decay": "weight_decay"},
    flags=("maximize",),
    state=("exp_avg",),
    zeros=always("exp_avg"),
    elementwise=True,
    domain={"lr": NONNEGATIVE, "beta1": FRACTION, "beta2": FRACTION, "weight_decay": NONNEGATIVE},
    flat={"beta1": _FLAT, "beta2": _FLAT},
    blind="takes only a sign of it",
)
