"""Whose memory is whose: tensors that were made out of sight in the memory of one that is followed."""

from __future__ import annotations

__all__ = ["Memory", "overlap", "part_of"]

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from metaopt.capture.bindings import BASE, Binding, Geometry, View, tensor_geometry
from metaopt.capture.cells import version_of
from metaopt.capture.primitives import stop
from metaopt.errors import CaptureError


class _Exposed(NamedTuple):
    """A tensor whose memory arrays of numpy's share, as it was seen last."""

    tensor: weakref.ref[Tensor]
    arrays: list[weakref.ref[Any]]
    value: Tensor
    version: int


class Memory:
    """The owners of memory, and what ``x.data = y`` would have exchanged."""

    def __init__(self) -> None:
        self._owners: dict[int, tuple[StorageWeakRef, Binding, Geometry]] = {}
        # Memory that a tensor's `.data` was given, and did not get; and that which it would have left.
        self.parted: dict[int, tuple[StorageWeakRef, list[tuple[weakref.ref[Tensor], int]]]] = {}
        self._left: dict[int, StorageWeakRef] = {}
        # Views that were alive then: in the bare loop they keep the old values.
        self.stale: dict[int, weakref.ref[Tensor]] = {}
        self._exposed: dict[int, _Exposed] = {}
        # That of results with a graph, of which a parameter may be made out of sight.
        self._passing: dict[int, StorageWeakRef] = {}
        self._purge_at = 64

    def own(self, tensor: Tensor, binding: Binding | None) -> None:
        """Other tensors in this one's memory, made out of sight, are views of it."""
        if tensor.layout is torch.strided and binding is not None:
            storage = tensor.untyped_storage()
            # The weak reference also keeps the address from being given to another storage.
            self._owners[storage._cdata] = (StorageWeakRef(storage), binding, tensor_geometry(tensor))

    def passes(self, tensor: Tensor) -> None:
        """Note a result that has a graph."""
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            self._passing[storage._cdata] = StorageWeakRef(storage)

    def has_passed(self, leaf: Tensor) -> bool:
        """Whether a leaf lies in the memory of a result that had a graph."""
        if leaf.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(leaf):
            return False
        known = self._passing.get(leaf.untyped_storage()._cdata)
        return known is not None and not known.expired()

    def is_owned(self, tensor: Tensor) -> bool:
        """Whether somebody owns the memory that a tensor lies in."""
        if tensor.layout is not torch.strided:
            return False
        known = self._owners.get(tensor.untyped_storage()._cdata)
        return known is not None and not known[0].expired()

    def owner(self, tensor: Tensor) -> tuple[Binding, Geometry] | None:
        """Whose memory a tensor lies in, if that is another's."""
        if tensor.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return None
        key = tensor.untyped_storage()._cdata
        known = self._owners.get(key)
        if known is None or known[0].expired() or known[1].ref() is tensor:
            return None
        if key in self._left:
            raise _parted(tensor)
        return known[1], known[2]

    def outlived(self) -> Iterator[Binding]:
        """The owners that are gone, and whose memory is not."""
        for storage, binding, _ in self._owners.values():
            if binding.ref() is None and not storage.expired():
                yield binding

    def part(self, source: Tensor, target: Tensor, views: Iterable[Tensor]) -> None:
        """In the bare loop ``target`` has left its memory, and these views, for that of ``source``; here it has not."""
        self.stale.update((id(view), weakref.ref(view)) for view in views)
        new, old = source.untyped_storage(), target.untyped_storage()
        self._left[old._cdata] = StorageWeakRef(old)
        _, targets = self.parted.setdefault(new._cdata, (StorageWeakRef(new), []))
        targets.append((weakref.ref(target), version_of(target)))

    def refuse_parted(self, tensors: Iterable[Tensor], written: Sequence[Tensor]) -> None:
        """Raise if a tensor in memory that the bare loop would share is written, or is read after the other was.

        So is one raised that the bare loop would have left with the old values.
        """
        for tensor in tensors:
            if (stale := self.stale.get(id(tensor))) is not None and stale() is tensor:
                raise _parted(tensor)
            known = self.parted.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None
            if known is None:
                continue
            moved = any((target := ref()) is not None and version_of(target) != version for ref, version in known[1])
            if moved or any(target is tensor for target in written):
                raise _parted(tensor)

    def expose(self, tensor: Tensor, array: Any) -> None:
        """An array of numpy's shares a tensor's memory, and may be written without a trace."""
        self.refuse_written()
        known = self._exposed.get(id(tensor))
        arrays = [] if known is None or known.tensor() is not tensor else known.arrays
        self._exposed[id(tensor)] = _Exposed(weakref.ref(tensor), [*arrays, weakref.ref(array)], *_seen(tensor))

    def refuse_written(self) -> None:
        """Raise if memory was written through an array of numpy's."""
        for key, exposed in list(self._exposed.items()):
            tensor = exposed.tensor()
            arrays = [array for array in exposed.arrays if array() is not None]
            if tensor is None or not arrays:
                del self._exposed[key]
            if tensor is None:
                continue
            if version_of(tensor) == exposed.version and not torch.equal(exposed.value, _bytes(tensor)):
                raise CaptureError(
                    f"a tensor of shape {tuple(tensor.shape)} that depends on the weights was written through a numpy "
                    "array that shares its memory (`x.detach().numpy()`), which leaves no trace. Write it with torch, "
                    "`with torch.no_grad(): x.mul_(0.9)`, or give numpy a copy, `x.detach().clone().numpy()`."
                )
            if arrays:
                self._exposed[key] = _Exposed(exposed.tensor, arrays, *_seen(tensor))

    def purge(self) -> None:
        """Forget memory that is gone."""
        # A look at each of them costs more than a few that are gone.
        if len(self._owners) + len(self._passing) > self._purge_at:
            self._owners = {key: known for key, known in self._owners.items() if not known[0].expired()}
            self._passing = {key: known for key, known in self._passing.items() if not known.expired()}
            self._purge_at = max(64, 2 * (len(self._owners) + len(self._passing)))
        self.parted = {key: known for key, known in self.parted.items() if not known[0].expired()}
        self._left = {key: known for key, known in self._left.items() if not known.expired()}
        self.stale = {key: known for key, known in self.stale.items() if known() is not None}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _seen(tensor: Tensor) -> tuple[Tensor, int]:
    return _bytes(tensor).clone(), version_of(tensor)


def part_of(tensor: Tensor, geometry: Geometry, *, whole: bool = False, stopped: bool = True) -> View:
    """A tensor as a view, by its strides, of another one.

    Args:
        tensor: the view.
        geometry: where the other one lies.
        whole: whether it must be all of it.
        stopped: whether gradients don't pass from the one to the other.
    """
    shape, stride, start, dtype, dense = geometry
    if whole and tensor_geometry(tensor) != geometry:
        raise _shared(tensor, shape)
    offset = tensor.storage_offset() - start
    outside = offset < 0 or offset + _reach(tensor.shape, tensor.stride()) > _reach(shape, stride)
    if outside or not dense or tensor.dtype != dtype:
        raise _shared(tensor, shape)
    if stopped and tensor.shape == shape and tensor.stride() == stride and offset == 0:
        return View(stop, (BASE,), {}, 1, 0, True)
    return View(torch.as_strided, (BASE, tuple(tensor.shape), tensor.stride(), offset), {}, 1, 0, stopped)


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in one place, partly at least."""
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return False
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    (start, end), (first, last) = (
        (x.storage_offset(), x.storage_offset() + _reach(x.shape, x.stride())) for x in (one, other)
    )
    return start < last and first < end


def _reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if all(shape) else 0


def _parted(tensor: Tensor) -> CaptureError:
    return CaptureError(
        f"a tensor of shape {tuple(tensor.shape)} was used whose memory `x.data = …` has given to `x`, or taken from "
        "it: a write to the one may change the other. Use copies (`x.data = y.clone()`, `old = x.detach().clone()`), "
        "or write `with torch.no_grad(): x.copy_(y)`."
    )


def _shared(tensor: Tensor, shape: Sequence[int]) -> CaptureError:
    return CaptureError(
        f"a tensor of shape {tuple(tensor.shape)} shares memory with one of shape {tuple(shape)} that depends on the "
        "weights, in a way that can't be followed. Give it memory of its own (`x.clone()`)."
    )
