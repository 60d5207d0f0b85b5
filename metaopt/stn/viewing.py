"""Views of weights, ``weight.t()`` and ``weight[:k]``, respond as these do: no weight of each example's own is built.

A view shows some entries of ``ΔP_b = diag(s_b) V``: the same view of ``V``, whose rows are some of the rows that were.
"""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaopt.stn.arguments import function_name
from metaopt.stn.calls import flat
from metaopt.stn.layouts import NeedsGroups
from metaopt.stn.passes import Pass
from metaopt.stn.responses import Active
from metaopt.stn.rules import register
from metaopt.stn.structures import Structure

_T: Any = torch.Tensor
TURNS = [
    *(_T.t, _T.T.__get__, _T.mT.__get__, _T.transpose, _T.swapaxes, _T.permute, _T.movedim),
    *(torch.t, torch.transpose, torch.swapaxes, torch.permute, torch.movedim),
]
CUTS = [_T.__getitem__, _T.narrow, _T.chunk, _T.split, torch.narrow, torch.chunk, torch.split]


@register(*TURNS, *CUTS)
def view(p: Pass, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A view of a weight; of anything else, what it was."""
    active = p.marks.get(id(x))
    if active is None:
        return p.plain(func, (x, *args), kwargs)
    p.mark_of(x)
    path, name = p.paths.get(id(x), active.entry.name), function_name(func)
    how = p.calls.get((path, name, 0, len(flat(((x, *args), kwargs)))))
    if isinstance(how, str):  # such as a part whose length is the number of examples
        raise NeedsGroups(active.entry.name, f"it is used by `{name}`, and {how}")
    found = _responses(active, func, x, args, kwargs)
    if not found and not p.recording and p.fixed is None:
        return p.each(func, (x, *args), kwargs)
    result = func(x, *args, **kwargs)
    for y, response in zip([result] if isinstance(result, Tensor) else result, found, strict=False):
        p.paths[id(y)] = f"{path}.{name}"
        p.mark(y, response)
    return result


def _responses(active: Active, func: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Active]:
    """The responses of the views; none where they can't be told."""
    own, turn = active.entry.structure, func in TURNS
    if own.view != tuple(x.shape) or not (turn or (_slices(func, args) and not active.mixers)):
        return []
    shown = _applied(func, _rows(x, own.axis), args, kwargs)
    bases = [None if base is None else _applied(func, base, args, kwargs) for base in active.bases]
    found = []
    for i, rows in enumerate(shown):
        response = _viewed(active, rows, tuple(None if base is None else base[i] for base in bases))
        if response is None:
            return []
        if active.constant is not None:
            response = replace(response, constant=partial(_constant, active.constant, i, func, x, args, kwargs))
        found.append(response)
    return found


def _constant(whole: Callable[[], Active], number: int, func: Any, x: Tensor, args: Any, kwargs: Any) -> Active:
    return _responses(whole(), func, x, args, kwargs)[number]


def _slices(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether all axes stay."""
    if func is not _T.__getitem__:
        return True
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    return all(isinstance(i, slice) or i is Ellipsis for i in index)


def _applied(func: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    result = func(x, *args, **kwargs)
    return [result] if isinstance(result, Tensor) else list(result)


def _rows(x: Tensor, axis: int | None) -> Tensor:
    """The number of its row at each entry; in memory it moves along the rows alone."""
    numbers = torch.arange(x.shape[axis or 0], device=x.device)
    return numbers.reshape([-1 if d == (axis or 0) else 1 for d in range(x.ndim)]).expand(x.shape)


def _viewed(active: Active, rows: Tensor, bases: tuple[Tensor | None, ...]) -> Active | None:
    """The response of a view, or None if its rows can't be told."""
    moving = [d for d in range(rows.ndim) if rows.stride(d)]
    if len(moving) != 1 or not rows.numel():
        return None
    axis, shape = moving[0], tuple(rows.shape)
    own = active.entry.structure
    structure = Structure(
        shape[axis],
        shape,
        tuple(n if d == axis else 1 for d, n in enumerate(shape)),
        None if own.axis is None else axis,
        own.mixable,
    )
    coefficients = active.coefficients
    if shape[axis] != own.rows:
        kept = rows.movedim(axis, 0).reshape(shape[axis], -1)[:, 0]
        coefficients = tuple(s.index_select(1, kept) for s in coefficients)
    return Active(replace(active.entry, structure=structure), coefficients, bases, active.mixers)
