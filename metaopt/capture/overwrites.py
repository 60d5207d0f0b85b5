"""Writes at an index that names an entry twice: the last one stays, and the derivative is its own.

``buffer[index] = values`` with indices drawn with replacement is the case. torch gives the derivative of the entry to
all that were written there (its result is defined for unique indices only), so the replay finds out which one stayed,
by a write of their numbers.
"""

from __future__ import annotations

__all__ = ["OVERWRITES", "last_written"]

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def _by_item(target: Tensor, index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _by_indices(target: Tensor, indices: Any) -> tuple[Any, ...]:
    return tuple(indices)


def _by_place(target: Tensor, dim: int, index: Tensor) -> tuple[Any, ...]:
    return (*[slice(None)] * (dim % target.dim()), index)


def _by_scatter(target: Tensor, dim: int, index: Tensor) -> tuple[Any, ...]:
    grid = torch.meshgrid([torch.arange(size, device=index.device) for size in index.shape], indexing="ij")
    return tuple(index if axis == dim % target.dim() else places for axis, places in enumerate(grid))


# The calls that overwrite (target, index …, source), and their index as ``target[index]`` has it.
OVERWRITES: dict[Callable[..., Any], Callable[..., tuple[Any, ...]]] = {
    Tensor.__setitem__: _by_item,
    **dict.fromkeys((torch.index_put, torch.index_put_, Tensor.index_put, Tensor.index_put_), _by_indices),
    **dict.fromkeys((torch.index_copy, Tensor.index_copy, Tensor.index_copy_), _by_place),
    **dict.fromkeys((torch.scatter, Tensor.scatter, Tensor.scatter_), _by_scatter),
}


def last_written(func: Callable[..., Any], target: Tensor, *rest: Any) -> Callable[..., Any] | None:
    """What the replay calls where one of `OVERWRITES` writes an entry twice; None where it does not."""
    *given, source = rest
    if not isinstance(source, Tensor):
        return None
    index = OVERWRITES[func](target, *given)
    places = [entry for entry in index if hasattr(entry, "dtype") or isinstance(entry, list)]  # numpy's arrays too
    if not places or any("bool" in str(getattr(entry, "dtype", "")) for entry in places):
        return None
    # What is not indexed need not be looked at.
    shape = target.shape[: len(index)] if len(places) == len(index) else target.shape
    written = torch.zeros(shape, dtype=torch.bool, device=target.device)
    count = written[index].numel()
    written[index] = True
    return _overwriting(func) if int(written.sum()) < count else None


@cache
def _overwriting(func: Callable[..., Any]) -> Callable[..., Any]:
    def overwrite(target: Tensor, *rest: Any) -> Tensor:
        *index, source = rest
        numbers = torch.arange(source.numel(), device=target.device).view(source.shape)
        places = torch.full(target.shape, -1, dtype=numbers.dtype, device=target.device)
        result = func(places, *index, numbers)
        places = places if result is None else result  # an item is set without a result
        new = source.reshape(-1)[places.clamp(min=0)].to(target.dtype)
        stayed = torch.where(places >= 0, new, target)
        return stayed if places is result and not func.__name__.endswith("_") else target.copy_(stayed)

    overwrite.__name__ = func.__name__
    return overwrite
