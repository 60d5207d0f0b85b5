"""RMSprop: steps divided by a running root mean square of the gradient.

``v' = αv + (1-α)g²``;  ``w' = w - lr · g/(√v' + eps)``, with ``g ← g + weight_decay · w`` before it. Centered: ``√(v' -
ḡ'²)`` with ``ḡ' = αḡ + (1-α)g`` in place of ``√v'``. With momentum: ``b' = momentum · b + g/(√v' + eps)``, ``w' = w -
lr · b'``.

Tieleman & Hinton 2012, lecture 6.5; Graves 2013, eq. 38-42 (centered), as ``torch.optim.RMSprop`` has them.
"""

from __future__ import annotations

__all__ = ["RMSprop"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.rules.rule import NONNEGATIVE, Rule, Setting, State, add_scaled, decayed, double, is_on, lerp, safe_sqrt


def update(
    w: Tensor,
    g: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    alpha: Setting,
    eps: Setting,
    weight_decay: Setting,
    momentum: Setting,
    centered: bool,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of RMSprop."""
    alpha, momentum = double(alpha), double(momentum)
    g = decayed(w, g, weight_decay, maximize)
    zero = torch.zeros_like(w)
    v, mean, b = state["square_avg"], state["grad_avg"], state["momentum_buffer"]
    v = add_scaled(alpha * (zero if v is None else v), g * g, 1 - alpha)
    variance = v
    if centered:
        mean = lerp(zero if mean is None else mean, g, 1 - alpha)
        variance = v - mean * mean
    scaled = g / (safe_sqrt(variance) + eps)
    if is_on(momentum):
        b = scaled if b is None else add_scaled(scaled, b, momentum)
        scaled = b
    return add_scaled(w, scaled, -lr), {"square_avg": v, "grad_avg": mean, "momentum_buffer": b}


def zeros(settings: Mapping[str, Any], differentiable: frozenset[str]) -> tuple[str, ...]:
    """The averages that these settings keep."""
    centered = ("grad_avg",) if settings["centered"] else ()
    return ("square_avg", *centered, *(("momentum_buffer",) if settings["momentum"] != 0 else ()))


RMSprop = Rule(
    torch.optim.RMSprop,
    update,
    settings={name: name for name in ("lr", "alpha", "eps", "weight_decay", "momentum")},
    flags=("centered", "maximize"),
    state=("square_avg", "grad_avg", "momentum_buffer"),
    zeros=zeros,
    elementwise=True,
    domain=dict.fromkeys(("lr", "alpha", "eps", "weight_decay", "momentum"), NONNEGATIVE),
)
