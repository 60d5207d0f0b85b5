"""What schedule-free optimizers share: the iterate that steps, its weighted average, and the point between."""

from __future__ import annotations

__all__ = ["averaged", "refuse"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import DomainError
from metaopt.rules.rule import Setting, State, add_scaled, double, lerp, scalar


def averaged(
    y: Tensor,
    direction: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    interpolation: Setting,
    warmup_steps: int,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """``z' = z - lrₜ · direction``, ``x' = x + lrₜ²/Σlrᵢ² · (z' - x)``, ``y' = z' + interpolation · (x' - z')``."""
    z, x, before = state["z"], state["x"], state["weight_sum"]
    warmth = step / max(warmup_steps, 1)
    rate = double(lr) * (warmth.clamp(max=1.0) if isinstance(warmth, Tensor) else min(1.0, warmth))
    total = scalar(rate**2 if before is None else before + rate**2, before, torch.zeros((), device="cpu"))
    idle = total == 0
    share = torch.where(idle, 0.0, rate**2 / torch.where(idle, 1.0, total))
    z = add_scaled(y if z is None else z, direction, -rate)
    x = lerp(y if x is None else x, z, share)
    return lerp(z, x, interpolation), {"z": z, "x": x, "weight_sum": total}


def refuse(settings: Mapping[str, Any], differentiable: frozenset[str]) -> None:
    """The weights of the average are ratios of squared rates, which have no derivative where all are 0."""
    if "lr" in differentiable and settings["lr"] == 0:
        raise DomainError("a schedule-free lr of exactly 0 has no derivative. Start it from a small positive value.")
