"""Euclidean projections onto the feasible sets of projected hyper-gradient descent."""

from __future__ import annotations

__all__ = ["project_box", "project_l1_box", "sum_slack", "widen"]

import math

import torch
from torch import Tensor

from metaopt.errors import DomainError


def project_box(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """Project onto a box, ``P(x)_i = min(max(x_i, low), high)``.

    Args:
        x: any shape.
        low: the lower bound, ``-inf`` for none.
        high: the upper bound, ``inf`` for none.

    Returns:
        The projection, detached, of the shape and dtype of ``x``; a NaN stays a NaN.

    Raises:
        DomainError: if the box is empty.
    """
    if not low <= high:
        raise DomainError(f"a box needs low <= high, got low={low:g}, high={high:g}; swap or widen them.")
    return x.detach().clamp(low, high)


def project_l1_box(x: Tensor, radius: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Project onto the L1 ball in a box, ``{low ≤ x ≤ high, Σ_i x_i ≤ R}``.

    With ``u = clip(x)``, the projection is ``u`` where ``Σ_i u_i ≤ R``, else

    ``P(x)_i = clip(x_i - τ)``, with ``τ > 0`` such that ``Σ_i clip(x_i - τ) = R``.

    The sum is piecewise linear in ``τ``, so ``τ`` is found exactly, between two of its sorted
    kinks. Entries that end on a bound are equal to it: zeros are true zeros. The arithmetic is float64; for a
    narrower ``x`` the sum meets ``radius`` to the rounding of its dtype.

    Args:
        x: any shape; all its entries share the one radius.
        radius: the bound ``R`` on the sum, finite.
        low: the lower bound, at least 0: only there is the sum the L1 norm.
        high: the upper bound, ``inf`` for none.

    Returns:
        The projection, detached, of the shape and dtype of ``x``; NaN everywhere if an entry is not finite.

    Raises:
        DomainError: if ``low < 0``, or the set is empty.

    References:
        Franceschi et al., *Forward and Reverse Gradient-Based Hyperparameter Optimization*, 2017, Sec. 5.1,
        where the set bounds the example weights of data hyper-cleaning.
    """
    check_l1_box(x.numel(), radius, low, high)
    if not torch.isfinite(x).all():
        return torch.full_like(x, math.nan, requires_grad=False)
    wide = widen(x)
    clipped = wide.clamp(low, high)
    if float(clipped.sum()) <= radius * (1 + sum_slack(x.dtype)):
        return clipped.to(x)
    threshold = _threshold(wide.flatten(), radius, low, high)
    return _meet_sum((wide - threshold).clamp(low, high), radius, low, high).to(x)


def check_l1_box(count: int, radius: float, low: float, high: float) -> None:
    """Refuse bounds for which the set is empty, or its sum is no L1 norm."""
    if low < 0:
        raise DomainError(
            f"l1_box needs low >= 0, got {low:g}: below 0 the sum of the entries is not their L1 norm. "
            "Use low=0, or `box` if only the bounds matter."
        )
    if not low <= high or not math.isfinite(low):
        raise DomainError(f"l1_box needs a finite low <= high, got {low:g} and {high:g}; widen the bounds.")
    if not (math.isfinite(radius) and count * low <= radius):
        raise DomainError(
            f"l1_box needs a finite radius >= {count * low:g}, the least sum that {count} entries >= {low:g} "
            f"can have, got {radius:g}; raise the radius, or use `box` for no bound on the sum."
        )


def sum_slack(dtype: torch.dtype) -> float:
    """The relative error up to which a sum of entries stored in ``dtype`` is taken as met."""
    # Each stored entry is rounded by eps / 2, and the float64 sum adds a few roundings of its own.
    return max(torch.finfo(dtype).eps, 64 * torch.finfo(torch.float64).eps)


def widen(x: Tensor) -> Tensor:
    """A detached float64 copy, on the CPU where the device has no float64."""
    return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def _threshold(x: Tensor, radius: float, low: float, high: float) -> Tensor:
    """The root τ > 0 of Σ clip(x - τ) = R, for a vector whose clipped sum exceeds R."""
    leaves_high, meets_low = x - high, x - low
    kinks = torch.cat([x.new_zeros(1), leaves_high, meets_low])
    kinks = kinks[kinks >= 0].sort().values
    left, right = 0, len(kinks) - 1
    # Bisection over the kinks, not a running sum along them: a fresh sum for each, so no rounding builds up.
    while right - left > 1:
        middle = (left + right) // 2
        if float((x - kinks[middle]).clamp(low, high).sum()) > radius:
            left = middle
        else:
            right = middle
    start, end = kinks[left], kinks[right]
    at_high = leaves_high >= end
    free = (meets_low >= end) & ~at_high
    count_high, count_free = int(at_high.sum()), int(free.sum())
    if count_free == 0:
        return end
    # `high` may be infinite, and 0 * inf is NaN.
    fixed = (high * count_high if count_high else 0.0) + low * (x.numel() - count_high - count_free)
    root: Tensor = (x[free].sum() - (radius - fixed)) / count_free
    return root.clamp(start, end)


def _meet_sum(x: Tensor, radius: float, low: float, high: float) -> Tensor:
    """Share the rounding of τ, which is absolute and so matters where τ is large, among the free entries."""
    free = (x > low) & (x < high)
    share = (x.sum() - radius) / free.sum().clamp(min=1)
    return torch.where(free, (x - share).clamp(low, high), x)
