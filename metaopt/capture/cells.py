"""A tensor's value at one moment: a reference until somebody is about to write, a copy from then on."""

from __future__ import annotations

__all__ = ["LOST", "Cell", "Cells", "Copy", "Kept", "Lost", "size_of", "version_of", "versions_of"]

import weakref
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from metaopt.errors import StaleError


class Kept(Protocol):
    """A copy of a tensor's value, of which a tensor is made when it is read."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    def tensor(self) -> Tensor:
        """The value."""


Copy = Callable[[Tensor], "Tensor | Kept"]


def version_of(tensor: Tensor) -> int:
    """The count of writes into a tensor's memory; tensors made under ``inference_mode`` keep none."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """`version_of` of each."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [version_of(tensor) for tensor in tensors]


def size_of(tensor: Tensor) -> int:
    """The bytes of a tensor, those of a sparse one's indices included; torch has no ``nbytes`` for these."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices().nbytes + tensor.col_indices().nbytes + tensor.values().nbytes
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices().nbytes + tensor.row_indices().nbytes + tensor.values().nbytes
    return tensor.nbytes


class Cell:
    """The value that a tensor had when the cell was made.

    While nobody writes into the tensor the cell is a reference and costs nothing; ``commit`` turns it into a copy.
    """

    __slots__ = ("__weakref__", "_held", "device", "owned", "version")

    def __init__(self, tensor: Tensor, *, owned: bool = False) -> None:
        self._held: Tensor | Kept = tensor
        self.version = version_of(tensor)
        self.owned = owned
        self.device = tensor.device

    @property
    def tensor(self) -> Tensor:
        """The tensor that it refers to, or its copy."""
        held = self._held
        return held if isinstance(held, Tensor) else held.tensor()

    @property
    def kept(self) -> Kept | None:
        """The copy, where that is no tensor."""
        return None if isinstance(self._held, Tensor) else self._held

    @property
    def nbytes(self) -> int:
        """The size of the value."""
        return size_of(self._held) if isinstance(self._held, Tensor) else self._held.nbytes

    def commit(self, copy: Copy) -> None:
        """Copy the value, so that the tensor may be overwritten; the copy may lie on another device."""
        if not self.owned:
            self.check()
            self._held = copy(self.tensor)
            self.owned = True

    def settle(self, copy: Copy) -> None:
        """Copy a copy to another place, so that others which lie beside it may go."""
        if self.owned:
            self._held = copy(self.tensor)

    def check(self) -> None:
        """Raise if the tensor was overwritten without the cell being told."""
        if not self.owned and version_of(self.tensor) != self.version:
            raise StaleError(
                f"a tensor of shape {tuple(self.tensor.shape)} was modified in place after the loop used it, and its "
                "earlier value is needed to differentiate that step. Leave the loop's inputs, the weights and the "
                "hyperparameters as they are until the sweep is done, or give the loop a copy (`x.clone()`)."
            )

    def value(self) -> Tensor:
        """The value, detached from every graph; shares the tensor's memory."""
        self.check()
        tensor = self.tensor
        if tensor.device != self.device:
            return tensor.to(self.device, non_blocking=True)
        return tensor.clone() if tensor.is_inference() else tensor.detach()


class Lost(Cell):
    """The place of a value that was given up, since it can be computed again."""

    __slots__ = ()

    def value(self) -> Tensor:
        raise AssertionError("a state that was given up was read before it was computed again")


LOST = Lost(torch.empty(0), owned=True)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Cells:
    """The cells that still are references, found by the memory that they refer to."""

    def __init__(self) -> None:
        self.copy: Copy = lambda tensor: tensor.detach().clone()
        self._by_storage: dict[int, list[weakref.ref[Cell]]] = {}
        self._snapshots: dict[int, tuple[weakref.ref[Tensor], Cell]] = {}
        self._purge_at = 1024

    def keep(self, tensor: Tensor) -> Cell:
        """A cell for the tensor's present value."""
        if tensor.layout is not torch.strided:
            return Cell(tensor)
        storage = tensor.untyped_storage()
        if not storage.resizable():
            return self._snapshot(tensor)
        cell = Cell(tensor)
        self._by_storage.setdefault(storage._cdata, []).append(weakref.ref(cell))
        if len(self._by_storage) > self._purge_at:
            self._purge()
        return cell

    def before_write(self, tensor: Tensor) -> None:
        """Copy every value that lies in this tensor's memory, since it is about to be overwritten."""
        if tensor.layout is not torch.strided:
            return
        for reference in self._by_storage.pop(_storage(tensor), ()):
            cell = reference()
            if cell is not None:
                cell.commit(self.copy)

    def _snapshot(self, tensor: Tensor) -> Cell:
        # Memory that torch does not own (numpy's, say) changes without a version counter: copy it, but only when
        # it differs from the last copy.
        known = self._snapshots.get(id(tensor))
        if known is not None and known[0]() is tensor and torch.equal(known[1].tensor, tensor):
            return known[1]
        cell = Cell(tensor.detach().clone(), owned=True)
        self._snapshots[id(tensor)] = (weakref.ref(tensor), cell)
        if len(self._snapshots) > 256:
            self._snapshots = {k: v for k, v in self._snapshots.items() if v[0]() is not None}
        return cell

    def _purge(self) -> None:
        alive = {}
        for key, references in self._by_storage.items():
            kept = [r for r in references if (cell := r()) is not None and not cell.owned]
            if kept:
                alive[key] = kept
        self._by_storage = alive
        self._purge_at = max(1024, 2 * len(alive))
