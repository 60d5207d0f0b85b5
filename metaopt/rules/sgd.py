"""Stochastic gradient descent with momentum.

``g ← g + weight_decay · w``;  ``v' = momentum · v + (1 - dampening) · g`` (the first step: ``v' = g``);
``w' = w - lr · v'``, or with nesterov ``w' = w - lr · (g + momentum · v')``.

Polyak 1964; Sutskever et al. 2013, as ``torch.optim.SGD`` has them; Franceschi et al. 2017, eq. 3-4.
"""

from __future__ import annotations

__all__ = ["SGD"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import DomainError
from metaopt.rules.rule import Rule, Setting, add_scaled


def update(
    w: Tensor,
    g: Tensor,
    state: Mapping[str, Tensor | None],
    step: int,
    *,
    lr: Setting,
    momentum: Setting,
    dampening: Setting,
    weight_decay: Setting,
    nesterov: bool,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of SGD."""
    g = -g if maximize else g
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        g = add_scaled(g, w, weight_decay)
    v = state["momentum_buffer"]
    if isinstance(momentum, Tensor) or momentum != 0:
        undamped = not isinstance(dampening, Tensor) and dampening == 0
        v = g if v is None else add_scaled(g if undamped else (1 - dampening) * g, v, momentum)
        g = add_scaled(g, v, momentum) if nesterov else v
    return add_scaled(w, g, -lr), {"momentum_buffer": v}


def refuse(settings: Mapping[str, Any], differentiable: frozenset[str]) -> None:
    """Torch's first step copies the gradient undampened, and without momentum every step is a first step."""
    if "momentum" in differentiable and settings["momentum"] == 0 and settings["dampening"] != 0:
        raise DomainError(
            "SGD is discontinuous in its momentum at 0 when dampening is not 0, so there is no derivative. "
            "Start the momentum above 0, or set dampening to 0."
        )


def zeros(settings: Mapping[str, Any], differentiable: frozenset[str]) -> tuple[str, ...]:
    """The buffer, unless the first step is another one than the rest: dampening leaves it out."""
    damped = settings["dampening"] != 0 or "dampening" in differentiable
    return () if damped or settings["momentum"] == 0 else ("momentum_buffer",)


SGD = Rule(
    torch.optim.SGD,
    update,
    settings={name: name for name in ("lr", "momentum", "dampening", "weight_decay")},
    flags=("nesterov", "maximize"),
    state=("momentum_buffer",),
    zeros=zeros,
    elementwise=True,
    domain={
        "lr": (lambda x: x >= 0, "at least 0"),
        "momentum": (lambda x: x >= 0, "at least 0"),
        "weight_decay": (lambda x: x >= 0, "at least 0"),
    },
    refuse=refuse,
)
