"""What the tape knows of a tensor: which value it holds, and what it is a view of."""

from __future__ import annotations

__all__ = [
    "BASE",
    "Binding",
    "Geometry",
    "Unseen",
    "View",
    "leaves_of",
    "nodes_of",
    "one_of_many",
    "tensor_geometry",
]

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt.capture.cells import Cell, version_of
from metaopt.errors import CaptureError

Geometry = tuple[torch.Size, tuple[int, ...], int, torch.dtype, bool]


def tensor_geometry(tensor: Tensor) -> Geometry:
    """Where a tensor lies in its memory, and whether it fills it without gaps."""
    dense = tensor.numel() == 0 or tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    return tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype, dense


BASE = object()


class View(NamedTuple):
    """How a view is made of its base: a call in which `BASE` stands for the base, and which of its results it is."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: int
    position: int
    stopped: bool


def one_of_many(base: Tensor, part: Tensor) -> View | None:
    """How one of several views (of ``unbind``, ``split``, ``chunk``) is made by itself; None if it is no slice.

    Autograd refuses to write to views that were made together.
    """

    def same(made: Tensor) -> bool:
        return (made.shape, made.stride(), made.storage_offset()) == (part.shape, part.stride(), part.storage_offset())

    behind = part.storage_offset() - base.storage_offset()
    with torch._C.DisableTorchFunction():
        for axis, (size, stride) in enumerate(zip(base.shape, base.stride(), strict=True)):
            first = behind // stride if stride else 0
            if part.dim() == base.dim() - 1 and 0 <= first < size and same(base.select(axis, first)):
                return View(torch.select, (BASE, axis, first), {}, 1, 0, False)
            if part.dim() != base.dim() or not 0 <= first <= size - part.shape[axis]:
                continue
            if same(base.narrow(axis, first, part.shape[axis])):
                return View(torch.narrow, (BASE, axis, first, part.shape[axis]), {}, 1, 0, False)
    return None


class Unseen(NamedTuple):
    """How a value came about that depends on what is followed in a way that was not seen, and what to do about it."""

    what: str
    cure: str


class Binding:
    """One tensor object that is followed: which value of the present iteration it holds.

    ``value`` is that number if ``epoch`` is the present iteration; else the binding carries its value over from an
    earlier one, and reading it makes it an input. A view knows its ``base`` and how it was made of it, since a write
    to the one changes the other. ``inner`` says whether the loop's own gradients reach trained weights through it:
    0 no, 1 yes, 2 they would, but through an earlier iteration's graph, which is gone. ``halted`` says that the
    replay's value does have a graph to them, which a reader must not follow: a gradient, as ``backward`` leaves it.
    ``opaque`` is set if the value depends on what is followed in a way that was not seen.
    ``buffer`` says that a tensor that was no weight got a live value: 1, or 2 if it is a batch norm's statistic.
    """

    __slots__ = (
        "base",
        "base_value",
        "buffer",
        "cell",
        "epoch",
        "fresh",
        "halted",
        "inner",
        "key",
        "leaf",
        "leaves",
        "opaque",
        "ref",
        "value",
        "version",
        "via",
    )

    def __init__(self, key: int, tensor: Tensor) -> None:
        self.key = key
        self.ref = weakref.ref(tensor)
        self.version = version_of(tensor)
        self.value = -1
        self.epoch = -1
        self.fresh = False
        self.halted = False
        self.buffer = 0
        self.opaque: Unseen | None = None
        self.cell: Cell | None = None
        self.inner = 0
        self.leaf = False
        self.leaves: list[int] = []
        self.base: Binding | None = None
        self.base_value = -1
        self.via: View | None = None

    def turn(self, via: View) -> None:
        """This view is a view of what it was."""
        before = copy.copy(self)
        self.base, self.base_value, self.via = before, -1, via

    def recipe(self) -> View:
        """How this view is made of its base; raise if that was given another shape in place since."""
        if self.via is None:
            raise CaptureError(
                "a view of a tensor was used after the tensor itself was given another shape in place (`x.t_()`, "
                "`x.unsqueeze_(0)`), which can't be followed. Write `x = x.t()`: what the view was made of stays as it "
                "is."
            )
        return self.via

    @property
    def root(self) -> Binding:
        """The binding whose memory this one is a view of."""
        return self if self.base is None else self.base.root


def nodes_of(tensor: Tensor) -> list[Any]:
    """The nodes of a tensor's autograd graph."""
    seen: dict[Any, None] = {}
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen[node] = None
        stack.extend(following for following, _ in node.next_functions)
    return list(seen)


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaf tensors that a tensor's autograd graph leads to (itself, if it is one)."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    variables = [getattr(node, "variable", None) for node in nodes_of(tensor)]
    return [variable for variable in variables if isinstance(variable, Tensor)]
