"""Adafactor: Adam's second moment from its row and column means, and steps relative to the weights.

``b = t^beta2_decay``;  ``R' = R + b(mean_row g² - R)``, ``C' = C + b(mean_col g² - C)``, ``V = R'C'/max(mean R',
eps1)`` (a vector: ``V' = V + b(g² - V)``);  ``U = g/√max(V, eps1²)``; ``w' = (1 - lr · weight_decay)w - max(eps2,
rms(w)) · min(lr, 1/√t) · U/max(1, rms(U)/d)``.

Shazeer & Stern 2018, algorithms 4-6, with the lr, the decay and the eps1 that ``torch.optim.Adafactor`` has. Where a
minimum, a maximum or a clip changes sides there is no derivative; elsewhere it follows the side in force.
"""

from __future__ import annotations

__all__ = ["Adafactor"]

import torch
from torch import Tensor

from metaopt.rules.rule import NONNEGATIVE, Rule, Setting, State, double, lerp, norm


def update(
    w: Tensor,
    g: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    beta2_decay: Setting,
    eps1: Setting | None = None,
    eps2: Setting,
    d: Setting,
    weight_decay: Setting,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of Adafactor; without eps1 it is the precision's."""
    g = -g if maximize else g
    lr, d = double(lr), double(d)
    smallest = torch.finfo(w.dtype).eps if eps1 is None else double(eps1)
    size = max(w.numel(), 1) ** 0.5
    rate = _at_most(lr, step**-0.5) * _at_least(norm(w) / size, eps2)
    w = w * (1 - lr * double(weight_decay))
    weight = step ** double(beta2_decay)
    after = dict(state)
    if g.dim() > 1:
        row, column = state["row_var"], state["col_var"]
        square = g * g
        means = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)
        row = lerp(torch.zeros_like(means[0]) if row is None else row, means[0], weight)
        column = lerp(torch.zeros_like(means[1]) if column is None else column, means[1], weight)
        after["row_var"], after["col_var"] = row, column
        v = row @ column / _at_least(row.mean(-2, keepdim=True), smallest)
    else:
        before = state["variance"]
        v = after["variance"] = lerp(torch.zeros_like(w) if before is None else before, g * g, weight)
    u = _at_least(v, smallest * smallest).rsqrt() * g
    return w - rate / _at_least(norm(u) / (size * d), 1.0) * u, after


def _at_least(x: Tensor, bound: Setting) -> Tensor:
    return x.clamp(min=bound.to(x) if isinstance(bound, Tensor) else bound)


def _at_most(x: Setting, bound: float) -> Setting:
    return x.clamp(max=bound) if isinstance(x, Tensor) else min(x, bound)


Adafactor = Rule(
    torch.optim.Adafactor,
    update,
    settings={
        "lr": "lr",
        "beta2_decay": "beta2_decay",
        "eps1": ("eps", 0),
        "eps2": ("eps", 1),
        "d": "d",
        "weight_decay": "weight_decay",
    },
    flags=("maximize",),
    state=("row_var", "col_var", "variance"),
    domain=dict.fromkeys(("lr", "eps1", "eps2", "weight_decay"), NONNEGATIVE)
    | {"beta2_decay": (lambda x: x <= 0, "at most 0"), "d": (lambda x: x >= 1, "at least 1")},
)
