"""Pushing tangents through one iteration: ``A Z + B``, all columns in one batched pass.

The engine is a reverse pass and its transpose. ``v(u) = Jᵀu`` is linear in ``u``, so its own reverse pass is ``J``: a
graph of ``v`` is made once, and one batched pass over it pushes all the tangents. It needs no forward-mode formula of
any operation.
"""

from __future__ import annotations

__all__ = ["Columns", "push_forward"]

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from metaopt.capture.bindings import leaves_of
from metaopt.capture.segment import Segment


class Columns:
    """Which column of ``Z`` belongs to which entry of which hyperparameter."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[Tensor, int]] = {}
        self.count = 0

    def discover(self, externals: Iterable[Tensor]) -> None:
        """Give columns to the leaves behind these tensors that have none yet."""
        for external in externals:
            for leaf in leaves_of(external):
                if id(leaf) not in self._places:
                    self._places[id(leaf)] = (leaf, self.count)
                    self.count += leaf.numel()

    def places(self) -> Iterator[tuple[Tensor, slice]]:
        """Every hyperparameter and its columns."""
        for leaf, start in self._places.values():
            yield leaf, slice(start, start + leaf.numel())

    def tangent(self, external: Tensor, rows: slice) -> Tensor:
        """``d external / dλ`` for some columns: the identity for a leaf, else the transform's derivative."""
        leaves = leaves_of(external)
        whole = external.new_zeros((self.count, *external.shape))
        for leaf in leaves:
            _, start = self._places[id(leaf)]
            whole[start : start + leaf.numel()] = _derivative(external, leaf)
        return whole[rows]


def _derivative(external: Tensor, leaf: Tensor) -> Tensor:
    if external is leaf:
        return torch.eye(leaf.numel(), dtype=leaf.dtype, device=leaf.device).view(leaf.numel(), *leaf.shape)
    basis = torch.eye(external.numel(), dtype=external.dtype, device=external.device)
    (rows,) = torch.autograd.grad(
        external, leaf, basis.view(external.numel(), *external.shape), retain_graph=True, is_grads_batched=True
    )
    return rows.view(external.numel(), leaf.numel()).T.reshape(leaf.numel(), *external.shape)


def push_forward(
    segment: Segment, keys: list[int], tangents: dict[int, Tensor], columns: Columns, chunk: int | None
) -> dict[int, Tensor]:
    """``Z`` of some outputs of an iteration, from ``Z`` of its inputs and the hyperparameters' own columns.

    Args:
        segment: the iteration.
        keys: which of its outputs.
        tangents: ``Z`` before it, by key; what is missing has none.
        columns: the layout of ``Z``.
        chunk: how many columns at once.
    """
    replay = segment.replay(keys)
    sources: list[tuple[Tensor, int | Tensor]] = [
        (x, key) for key, x in replay.inputs.items() if key in tangents and x.requires_grad
    ]
    sources += [(x, external.tensor) for external, x in replay.externals if x.requires_grad]
    outputs = [(key, out) for key, out in zip(keys, replay.outputs, strict=True) if out.requires_grad]
    if not sources or not outputs:
        return {}
    with torch.enable_grad():
        u = [torch.zeros_like(out, requires_grad=True) for _, out in outputs]
        v = torch.autograd.grad(
            [out for _, out in outputs], [x for x, _ in sources], u, create_graph=True, allow_unused=True
        )
    linear = [(place, part) for place, part in enumerate(v) if part is not None and part.requires_grad]
    if not linear:
        return {}
    size = chunk or columns.count
    chunks: list[tuple[Tensor | None, ...]] = []
    for start in range(0, columns.count, size):
        rows = slice(start, min(start + size, columns.count))
        given = []
        for place, _ in linear:
            _, source = sources[place]
            given.append(columns.tangent(source, rows) if isinstance(source, Tensor) else tangents[source][rows])
        chunks.append(_transposed([part for _, part in linear], u, given))
    pushed = {}
    for place, (key, _) in enumerate(outputs):
        parts = [part[place] for part in chunks]
        if all(part is not None for part in parts):
            pushed[key] = torch.cat([part for part in parts if part is not None])
    return pushed


def _transposed(v: list[Tensor], u: list[Tensor], tangents: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The reverse pass of ``v(u)``, for all tangents at once, or one by one where an operation can't be batched."""

    def reverse(given: list[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(v, u, given, is_grads_batched=batched, allow_unused=True, retain_graph=True)

    try:
        return reverse(tangents, batched=True)
    except RuntimeError:
        rows = [reverse([z[row] for z in tangents], batched=False) for row in range(len(tangents[0]))]
        stacked: list[Tensor | None] = []
        for parts in zip(*rows, strict=True):
            present = [part for part in parts if part is not None]
            stacked.append(torch.stack(present) if len(present) == len(parts) else None)
        return tuple(stacked)
