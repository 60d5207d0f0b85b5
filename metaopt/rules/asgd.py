"""Averaged stochastic gradient descent.

``w' = (1 - lambd · η) w - ηg``, with ``g ← g + weight_decay · w`` before it;  ``a' = a + μ(w' - a)``; then
``η' = lr/(1 + lambd · lr · t)^alpha`` and ``μ' = 1/max(1, t - t0)``, from ``η = lr`` and ``μ = 1``.

Polyak & Juditsky 1992, as ``torch.optim.ASGD`` has it. ``t0`` acts on the average ``a`` (``state["ax"]``) alone, and an
objective of the weights has derivative 0 in it; at a whole number the average has a kink.
"""

from __future__ import annotations

__all__ = ["ASGD"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import DomainError
from metaopt.rules.rule import NONNEGATIVE, Rule, Setting, State, add_scaled, decayed, double, lerp, scalar


def update(
    w: Tensor,
    g: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    lambd: Setting,
    alpha: Setting,
    t0: Setting,
    weight_decay: Setting,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of ASGD."""
    lr, lambd, alpha, t0 = double(lr), double(lambd), double(alpha), double(t0)
    eta, mu, average = state["eta"], state["mu"], state["ax"]
    rate = lr if eta is None else double(eta)
    g = decayed(w, g, weight_decay, maximize)
    w = add_scaled(w * (1 - lambd * rate), g, -rate)
    average = w if average is None or mu is None else lerp(average, w, mu)
    eta = scalar(lr / (1 + lambd * lr * step) ** alpha, eta, w)
    late = step - t0
    mu = scalar(1 / (late.clamp(min=1) if isinstance(late, Tensor) else max(1.0, late)), mu, w)
    return w, {"eta": eta, "mu": mu, "ax": average}


def refuse(settings: Mapping[str, Any], differentiable: frozenset[str]) -> None:
    """The averaging begins at a step; between two steps its start can be differentiated, on one it has a kink."""
    if "t0" in differentiable and settings["t0"] >= 0 and settings["t0"] == int(settings["t0"]):
        raise DomainError(
            f"t0 of ASGD is {settings['t0']:g}: at whole numbers its derivative jumps. Start it between two, from "
            f"{settings['t0'] + 0.5:g} say."
        )


ASGD = Rule(
    torch.optim.ASGD,
    update,
    settings={name: name for name in ("lr", "lambd", "alpha", "t0", "weight_decay")},
    flags=("maximize",),
    state=("eta", "mu", "ax"),
    scalars=("eta", "mu"),
    domain=dict.fromkeys(("lr", "lambd", "alpha", "weight_decay"), NONNEGATIVE),
    refuse=refuse,
)
