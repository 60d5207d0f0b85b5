"""Tensors within what a user's model or loader gives: containers, data classes, distributions, objects of any kind.

`torch.utils._pytree` opens the containers that it knows and takes anything else for a leaf. A tangent of a tensor that
lies in such a leaf would be lost in silence, so here objects are opened too, and copied with other tensors inside.
"""

from __future__ import annotations

__all__ = ["leaves", "mapped", "objects"]

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

# What has attributes, and none of a batch's or an output's own.
CLOSED = (Tensor, nn.Module, type, ModuleType, FunctionType, MethodType, str, bytes, int, float)


def leaves(value: Any) -> list[Any]:
    """All that lies within, objects opened: tensors, numbers and what can't be opened."""
    if isinstance(value, Tensor):
        return [value]
    if type(value) in (tuple, list) and all(isinstance(leaf, Tensor) for leaf in value):
        # What most models and loaders give, without the time that it takes to look for anything else.
        return list(value)
    return [leaf for leaf, _ in _open(value, ())]


def objects(value: Any) -> list[Any]:
    """The objects with tensors within that are more than their fields, as a distribution is, which keeps its sizes."""
    owners = {id(o): o for leaf, path in _open(value, ()) if isinstance(leaf, Tensor) for o in path}
    return [o for o in owners.values() if not (dataclasses.is_dataclass(o) or isinstance(o, (dict, UserDict)))]


def mapped(function: Callable[..., Any], value: Any, *others: Any) -> Any:
    """The same with a function of each leaf, and of the leaves in their place in others like it."""
    return _mapped(function, (value, *others), ())


def _mapped(function: Callable[..., Any], values: tuple[Any, ...], around: tuple[tuple[Any, Any], ...]) -> Any:
    def one(leaf: Any, *same: Any) -> Any:
        within, itself = _contents(leaf), next((new for old, new in around if old is leaf), None)
        if itself is not None:
            return itself
        if within is None or not any(isinstance(x, Tensor) for x in leaves(leaf)):
            return function(leaf, *same)
        new = None if isinstance(leaf, tuple) else copy.copy(leaf)
        return _filled(leaf, new, _mapped(function, (within, *map(_contents, same)), (*around, (leaf, new))))

    return pytree.tree_map(one, *values)


def _open(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    for leaf in pytree.tree_leaves(value):
        within = _contents(leaf)
        if within is None or any(leaf is owner for owner in path):
            yield leaf, path
        else:
            yield from _open(within, (*path, leaf))


def _contents(leaf: Any) -> Any:
    """What an object holds, as containers; None where it can't be opened."""
    if isinstance(leaf, CLOSED):
        return None
    if isinstance(leaf, tuple):  # such as a packed sequence, whose type is derived from a named one
        return tuple(leaf)
    attributes = dict(getattr(leaf, "__dict__", {}))
    if dataclasses.is_dataclass(leaf):
        attributes |= {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if hasattr(leaf, f.name)}
    items = dict(leaf) if isinstance(leaf, dict) else {}
    return (attributes, items) if attributes or items else None


def _filled(leaf: Any, new: Any, within: Any) -> Any:
    if isinstance(leaf, tuple):
        return type(leaf)(*within) if hasattr(leaf, "_fields") else type(leaf)(within)
    for name, value in within[0].items():
        # As a frozen data class does it itself.
        object.__setattr__(new, name, value)
    for key, value in within[1].items():
        dict.__setitem__(new, key, value)
    return new
