"""What a function would be given for a batch of one: learnt from its calls in runs on two and on three examples.

A parameter that no rule knows may reach the examples in any way: expanded to the batch and joined to it, added to it,
as the weight of a function. Where the axes of examples in each of these calls are known, a call can be split into one
for each example, and each can have a parameter of its own (`metaopt.stn.instances`).
"""

from __future__ import annotations

__all__ = [
    "Call",
    "Noted",
    "Place",
    "confirmed",
    "flat",
    "follow",
    "has_views",
    "out_of_place",
    "placed",
    "plain_sizes",
    "written_in_place",
]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.stn.layouts import Layout, layout_of

# A use of what a parameter became: its name with the functions that it went through, the next function, which of the
# arguments it is, and of how many.
Place = tuple[str, str, int, int]

# Functions whose numbers are sizes: of a batch of one they are smaller.
SIZED = {"expand", "view", "reshape", "repeat", "tile", "unflatten", "broadcast_to", "repeat_interleave"}

# By which names torch's functions take their first tensor, and their second.
FIRST = ("input", "tensors", "tensor"), ("other", "mat2", "tensor2")
NAMED = frozenset(name for names in FIRST for name in names)


@dataclass
class Noted:
    """A call in one run, and what it returned; with the function's name."""

    name: str
    inputs: list[Any]
    outputs: list[Any]


@dataclass(frozen=True)
class Call:
    """How the examples lie in a call.

    Args:
        inputs: of each argument, as `torch.utils._pytree` flattens them: where the examples are, if anywhere.
        sizes: the arguments that are a multiple of the number of examples.
        outputs: where the examples are in each result; nowhere, if it depends on parameters and constants alone.
    """

    inputs: tuple[Layout | None, ...]
    sizes: frozenset[int]
    outputs: tuple[Layout | None, ...]


def placed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the tensors in front that torch's functions also take by name, ``F.softmax(input=x, dim=-1)``."""
    if NAMED.isdisjoint(kwargs):
        return args, kwargs
    for names in FIRST[len(args) :]:
        name = next((n for n in names if n in kwargs), None)
        if name is None:
            break
        args, kwargs = (*args, kwargs[name]), {k: v for k, v in kwargs.items() if k != name}
    return args, kwargs


def plain_sizes(value: Any) -> Any:
    """Arguments in which a ``torch.Size`` is a tuple of numbers."""
    if type(value) in (torch.Size, tuple):
        return tuple(plain_sizes(v) for v in value)
    if type(value) is list:
        return [plain_sizes(v) for v in value]
    return {k: plain_sizes(v) for k, v in value.items()} if type(value) is dict else value


def flat(value: Any) -> list[Any]:
    """The leaves of arguments, or of results."""
    return pytree.tree_leaves(plain_sizes(value))


def written_in_place(name: str) -> bool:
    """Whether a function of that name writes on its first argument."""
    last = name.rpartition(".")[2]
    if last.endswith("__"):
        return last == "__setitem__" or (last.startswith("__i") and last not in ("__invert__", "__int__", "__index__"))
    return last.endswith("_")


def has_views(target: Tensor) -> bool:
    """Whether another tensor lies on the same storage, or this one on another's."""
    # One of the two is the handle that is asked.
    return target._is_view() or torch._C._storage_Use_Count(target.untyped_storage()._cdata) > 2


def out_of_place(name: str) -> Any:
    """The function that gives a new tensor instead, or None if there is none."""
    last = name.rpartition(".")[2]
    if last == "__setitem__":
        return _set
    if last == "copy_":
        return _copy
    # Of a tensor of probabilities, not with a probability.
    if last == "bernoulli_":
        return None
    found = getattr(Tensor, f"__{last[3:]}" if last.endswith("__") else last[:-1], None)
    return found if callable(found) else None


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(target).expand_as(target)


def _set(target: Tensor, index: Any, value: Any) -> Tensor:
    masked = isinstance(index, Tensor) and index.dtype == torch.bool and isinstance(value, Tensor)
    if masked and value.ndim <= target.ndim - index.ndim:
        return torch.where(index.reshape(*index.shape, *[1] * (target.ndim - index.ndim)), value, target)
    target = target.clone()
    target[index] = value
    return target


def follow(
    two: Sequence[Noted], three: Sequence[Noted], starts: Sequence[Mapping[int, str]]
) -> dict[Place, Call | str]:
    """Follow parameters through the calls of two runs, until they meet the examples.

    Args:
        two: the calls of the first run, in order.
        three: those of the second.
        starts: for each run: the names of parameters by ``id``.

    Returns:
        How each use is called, or why that can't be told.
    """
    found: dict[Place, Call | str] = {}
    paths = [dict(start) for start in starts]
    together = True
    for a, b in zip_longest(two, three):
        together = together and a is not None and b is not None and a.name == b.name
        for known, call in zip(paths, (a, b), strict=True):
            index = None if call is None else next((i for i, v in enumerate(call.inputs) if id(v) in known), None)
            if call is None or index is None:
                continue
            path = known[id(call.inputs[index])]
            place = path, call.name, index, len(call.inputs)
            how = _compared(a, b) if together else "it is used a number of times that depends on the batch"
            before = found.setdefault(place, how)
            if before != how:
                reasons = [v for v in (before, how) if isinstance(v, str)]
                found[place] = [*reasons, "its uses see the examples along different axes"][0]
            if together and isinstance(how, Call):
                for x, layout in zip((v for v in call.outputs if isinstance(v, Tensor)), how.outputs, strict=True):
                    if layout is None:
                        known[id(x)] = f"{path}.{call.name}"
    return found


def confirmed(found: Mapping[Place, Call | str], known: Mapping[Place, Call | str]) -> dict[Place, Call | str]:
    """The calls of training that evaluation has too, where they are compared with examples one at a time.

    Args:
        found: the calls of training.
        known: those of evaluation.
    """
    # Which layers are used in training may be random.
    result = dict(known)
    for place, call in found.items():
        before = known.get(place, "it is used in training in a way that evaluation does not have")
        # Values that are random don't tell the order of a flattened axis.
        same = isinstance(call, str) or isinstance(before, str) or call == before
        result[place] = before if same else "it sees the examples in training along other axes than in evaluation"
    return result


def _compared(a: Noted, b: Noted) -> Call | str:
    if len(a.inputs) != len(b.inputs) or len(a.outputs) != len(b.outputs):
        return "it is used with a number of tensors that depends on the batch"
    inputs: list[Layout | None] = []
    sizes: set[int] = set()
    for i, (x, y) in enumerate(zip(a.inputs, b.inputs, strict=True)):
        layout = _layout(x, y)
        if isinstance(layout, str):
            return layout
        inputs.append(layout)
        if a.name.rpartition(".")[2] in SIZED and type(x) is int and type(y) is int and x != y and 3 * x == 2 * y:
            sizes.add(i)
    outputs: list[Layout | None] = []
    for x, y in zip(a.outputs, b.outputs, strict=True):
        if not isinstance(x, Tensor):
            continue
        layout = _layout(x, y)
        if isinstance(layout, str):
            return layout
        if (layout is None) != (not sizes and not any(inputs)):
            return "its result has examples and what it is given has none, or the other way round"
        outputs.append(layout)
    return Call(tuple(inputs), frozenset(sizes), tuple(outputs))


def _layout(x: Any, y: Any) -> Layout | str | None:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None
    return None if x.shape == y.shape else layout_of(x, y)
