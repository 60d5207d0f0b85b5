"""Resilient backpropagation: each weight has a step size, and the gradient says only which way.

``s' = clip(s · η, step_size_min, step_size_max)`` from ``s = lr``, with ``η = etaplus`` where ``g`` and the last
gradient agree in sign, ``etaminus`` (and then ``g ← 0``) where they differ, else 1;  ``w' = w - sign(g) · s'``.

Riedmiller & Braun 1993, as ``torch.optim.Rprop`` has it. Signs are piecewise constant: between their jumps the weights
are linear in lr and polynomial in the etas, and those derivatives are exact; what acts through the gradient (a penalty,
example weights) has derivative 0.
"""

from __future__ import annotations

__all__ = ["Rprop"]

import torch
from torch import Tensor

from metaopt.rules.rule import ABOVE_ZERO, NONNEGATIVE, Rule, Setting, State


def update(
    w: Tensor,
    g: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    etaminus: Setting,
    etaplus: Setting,
    step_size_min: Setting,
    step_size_max: Setting,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of Rprop."""
    g = -g if maximize else g
    before, size = state["prev"], state["step_size"]
    size = torch.zeros_like(w) + lr if size is None else size
    agree = torch.zeros_like(w) if before is None else (g * before).sign()
    size = size * torch.where(agree > 0, _like(etaplus, w), torch.where(agree < 0, _like(etaminus, w), _like(1.0, w)))
    size = size.clamp(min=_like(step_size_min, w)).clamp(max=_like(step_size_max, w))
    g = torch.where(agree < 0, 0.0, g)
    return w - g.sign() * size, {"prev": g, "step_size": size}


def _like(value: Setting, w: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=w.dtype, device=w.device)


Rprop = Rule(
    torch.optim.Rprop,
    update,
    settings={
        "lr": "lr",
        "etaminus": ("etas", 0),
        "etaplus": ("etas", 1),
        "step_size_min": ("step_sizes", 0),
        "step_size_max": ("step_sizes", 1),
    },
    flags=("maximize",),
    state=("prev", "step_size"),
    elementwise=True,
    domain={
        "lr": NONNEGATIVE,
        "etaminus": (lambda x: 0 < x < 1, "above 0 and below 1"),
        "etaplus": (lambda x: x > 1, "above 1"),
        "step_size_min": NONNEGATIVE,
        "step_size_max": ABOVE_ZERO,
    },
    blind="takes only its sign",
)
