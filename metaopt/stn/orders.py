"""Whether examples are where the axes say: a model may sort or select them, in one batch and not in another.

Where the examples are is found out on the first batch. A model that reads them at indices computed from the data, as
masked words of a sentence or sequences by their length, may have them in order there, and not in the next batch. So the
functions that read at indices are noted, and what they read is followed through a pass until the order is the batch's
again.
"""

from __future__ import annotations

__all__ = ["Key", "Orders", "noted", "reads"]

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree

from metaopt.stn.layouts import Layout, layout_of

# A function that reads at indices, the number of axes of what it is given, and the axis that it reads along.
Key = tuple[str, int, int]
Read = tuple[Key, Tensor, Tensor | None]

# They write at indices: the result has the order of what is written on.
WRITING = {"index_add", "index_copy", "index_put", "scatter", "scatter_add", "scatter_reduce", "__setitem__"}
WRITING |= {f"{name}_" for name in WRITING}
SORTING = {"sort", "topk"}
ALONG = {"gather", "take_along_dim", "msort", *SORTING}


def reads(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[Read]:
    """The axes along which a function reads at indices, with the indices if they can be told."""
    name = getattr(func, "__name__", "")
    if not args or (isinstance(args[0], Tensor) and is_functorch_wrapped_tensor(args[0])):
        # Within the model's own `vmap` an axis of examples can't be told.
        return
    if name == "__getitem__" and isinstance(args[0], Tensor):
        yield from _subscript(name, args[0], args[1] if isinstance(args[1], tuple) else (args[1],))
    elif name == "index_select":
        x, dim, index = _bind(("input", "dim", "index"), args, kwargs)
        yield (name, x.ndim, dim % max(x.ndim, 1)), x, index
    elif name in ALONG and isinstance(args[0], Tensor) and args[0].ndim:
        place = 0 if name == "msort" else kwargs.get("dim", next((a for a in args[_place(name) :] if _whole(a)), -1))
        if _whole(place):
            yield (name, args[0].ndim, place % args[0].ndim), args[0], None


def _place(name: str) -> int:
    return 2 if name in ("topk", "take_along_dim") else 1


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bind(names: Sequence[str], args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | {("input" if k == "self" else k): v for k, v in kwargs.items()}
    return [given[name] for name in names]


def _subscript(name: str, x: Tensor, index: tuple[Any, ...]) -> Iterator[Read]:
    axis = 0
    used = sum(_axes(i) for i in index)
    found: list[tuple[int, Tensor]] = []
    for i in index:
        if i is Ellipsis:
            axis += x.ndim - used
            continue
        rows = torch.as_tensor(i) if (isinstance(i, list) and i) or hasattr(i, "__array__") else i
        if isinstance(rows, Tensor) and rows.ndim:
            parts = rows.nonzero(as_tuple=True) if rows.dtype == torch.bool else (rows,)
            found += [(axis + k, part.to(x.device)) for k, part in enumerate(parts)]
        axis += _axes(i)
    together = torch.broadcast_tensors(*(rows for _, rows in found)) if found else ()
    for (d, _), rows in zip(found, together, strict=True):
        yield (name, x.ndim, d), x, rows


def _axes(index: Any) -> int:
    """How many axes of a tensor an entry of a subscript takes."""
    if index is None or index is Ellipsis or isinstance(index, bool):
        return 0
    return index.ndim if isinstance(index, Tensor) and index.dtype == torch.bool else 1


def noted(two: Sequence[Read], three: Sequence[Read]) -> dict[Key, Layout | str]:
    """The axes of examples along which a model reads at indices, from runs on two and on three examples."""
    found: dict[Key, Layout | str] = {}
    for (key, a, _), (other, b, _) in zip(two, three, strict=False):
        if key == other and a.ndim == b.ndim and a.shape[key[2]] != b.shape[key[2]]:
            found[key] = layout_of(a, b)
    return found


class Orders:
    """Which tensors of a pass have the examples in another order than the batch.

    Args:
        known: where a model reads examples at indices.
        examples: how many there are.
    """

    def __init__(self, known: Mapping[Key, Layout | str], examples: int) -> None:
        self.known, self.examples = known, examples
        # By ``id``: for each row, which one it was; None where that is not known.
        self.moved: dict[int, Tensor | None] = {}
        self._kept: list[Tensor] = []

    def __contains__(self, value: Any) -> bool:
        """Whether a tensor has its examples in another order."""
        return id(value) in self.moved

    def follow(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """Note what a function made of the order."""
        name = getattr(func, "__name__", "")
        inputs = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        given = [self.moved[id(v)] for v in inputs if id(v) in self.moved]
        if name in WRITING:
            values = any(id(v) in self.moved for v in inputs[1:])
            plain = name == "__setitem__" and not list(_subscript(name, args[0], _tuple(args[1])))
            given = given if id(args[0]) in self.moved else [None] if values and plain else []
            result = args[0] if name == "__setitem__" else result
        found = [read for read in reads(func, args, kwargs) if read[0] in self.known]
        if name in SORTING:
            # Indices are no examples; a vector is sorted as they say.
            result, places = result
            found = [(key, x, places if x.ndim == 1 else rows) for key, x, rows in found]
        read = [self._read(*each) for each in found]
        if read:
            given = [order for order, right in read if not right]
        elif given:
            same = all(g is not None and given[0] is not None and torch.equal(g, given[0]) for g in given)
            given = [given[0] if same else None]
        for y in pytree.tree_leaves(result):
            if not isinstance(y, Tensor):
                continue
            if given:
                self._kept.append(y)
                self.moved[id(y)] = given[0]
            elif read:
                self.moved.pop(id(y), None)

    def _read(self, key: Key, x: Tensor, rows: Tensor | None) -> tuple[Tensor | None, bool]:
        """The order of what is read, and whether it is the batch's."""
        size, layout = x.shape[key[2]], self.known[key]
        before = self.moved.get(id(x))
        if rows is None or size % self.examples or (id(x) in self.moved and (before is None or len(before) != size)):
            # Of another size it is no axis of examples: a table has the same number of axes.
            return None, rows is not None and bool(size % self.examples) and id(x) not in self.moved
        rows = torch.where(rows < 0, rows + size, rows)
        rows = rows if before is None else before[rows]
        if torch.equal(rows.reshape(-1), torch.arange(size, device=rows.device)):
            return None, True
        repeat = size // self.examples
        if isinstance(layout, str) or (repeat > 1 and layout.repeat == 1):
            return rows if rows.ndim == 1 else None, False
        whose = rows // repeat if layout.outer else rows % self.examples
        return rows if rows.ndim == 1 else None, self._in_order(whose, outer=layout.outer)

    def _in_order(self, whose: Tensor, *, outer: bool) -> bool:
        each = torch.arange(self.examples, device=whose.device)
        for d, n in enumerate(whose.shape):
            if n == self.examples and bool(
                (whose == each.reshape([-1 if k == d else 1 for k in range(whose.ndim)])).all()
            ):
                return True
        number = whose.numel() // self.examples
        if whose.ndim != 1 or whose.numel() % self.examples:
            return False
        return torch.equal(whose, each.repeat_interleave(number) if outer else each.repeat(number))


def _tuple(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)
