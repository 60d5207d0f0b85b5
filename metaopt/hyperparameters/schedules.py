"""Learned schedules with few knots: one hyperparameter shared by a window of steps."""

from __future__ import annotations

__all__ = ["schedule"]

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import DomainError, whole

_KINDS = ("constant", "linear")


def schedule(knots: Tensor, steps: int, *, kind: str = "constant") -> Tensor:
    r"""A value for each step of a training, from a few hyperparameters.

    With K knots and T steps, ``kind="constant"`` shares knot ``⌊t K / T⌋`` within each of K windows of equal length;
    ``kind="linear"`` interpolates between knots at equal distances, of which the first is step 0's and the last is
    step T - 1's. Forward mode carries a tangent for each knot, and not for each step.

    Args:
        knots: a hyperparameter of shape (K,): a leaf, or what `Hyperparameters` gives for a name.
        steps: T, the number of steps.
        kind: ``"constant"`` or ``"linear"``.

    Returns:
        The values, of shape (T,). As a setting of a drop-in optimizer it follows the knots when they move; used in a
        loss (``values[t]``), it is computed anew for each training.

    Raises:
        DomainError: if ``knots`` is not a vector, or there are more knots than steps.
    """
    if kind not in _KINDS:
        raise ValueError(f'kind must be "constant" or "linear", not {kind!r}.')
    steps = whole("steps", steps, 1)
    if not isinstance(knots, Tensor):
        raise DomainError(f"the knots are a hyperparameter, a tensor of shape (K,), and not {type(knots).__name__}.")
    if knots.dim() != 1 or not 1 <= len(knots) <= steps:
        raise DomainError(
            f"a schedule of {steps} steps needs a vector of 1 to {steps} knots, not a tensor of shape "
            f"{tuple(knots.shape)}."
        )
    values = _spread(knots, steps, kind)
    source = getattr(knots, "_metaopt_source", None)
    again: Callable[[], Tensor] = partial(_spread, knots, steps, kind)
    if source is not None:
        owner, name = source.args
        again = partial(_spread_of, owner, name, steps, kind)
    values._metaopt_source = again  # type: ignore[attr-defined]
    return values


def _spread_of(owner: Any, name: str, steps: int, kind: str) -> Tensor:
    return _spread(getattr(owner, name), steps, kind)


def _spread(knots: Tensor, steps: int, kind: str) -> Tensor:
    count = len(knots)
    t = torch.arange(steps, device=knots.device)
    if kind == "constant" or count == 1:
        return knots[t * count // steps]
    place = t.to(knots.dtype) * ((count - 1) / (steps - 1))
    left = place.floor().long().clamp(max=count - 2)
    return torch.lerp(knots[left], knots[left + 1], place - left)
