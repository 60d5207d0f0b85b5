"""Where copies of states lie: in memory, in the host's memory, on disk.

A state is copied when the optimizer is about to overwrite it. Copies of a step follow one another in large chunks of
memory, which the system maps faster than many small ones, and can write to disk as they are.
"""

from __future__ import annotations

__all__ = ["Disk", "Host", "Store", "store_of"]

import contextlib
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SMALL = 2**14  # bytes; below this, a chunk is not worth its bookkeeping
_FIRST, _LARGEST = 2**22, 2**26
_ALIGNED = 64


# Chunks that no copy lies in any more, for the next training: mapping new memory takes longer than to fill it. The
# system may take their pages whenever it needs some.
_idle: list[mmap.mmap] = []


def _retire(chunk: mmap.mmap) -> None:
    _advise(chunk, "MADV_FREE")
    _idle.append(chunk)


def _advise(chunk: mmap.mmap, advice: str, *where: int) -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not Linux, or the kernel does not know it
        chunk.madvise(getattr(mmap, advice), *where)


class Store:
    """Copies in memory, on the tensors' own device."""

    def __init__(self) -> None:
        self._chunk: memoryview | None = None
        self._used = 0
        self._size = _FIRST
        self._together = True

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy that nobody writes to."""
        tensor = tensor.detach()
        if not self._together or tensor.device.type != "cpu" or not self._fits(tensor):
            return tensor.clone()
        return self._place(tensor).copy_(tensor)

    def scatter(self) -> None:
        """From now on some copies will go before others: no two of them share their memory."""
        self._together = False

    def prefetch(self, copies: Sequence[Tensor]) -> None:
        """These are about to be read."""

    def clear(self) -> None:
        """No more copies of this training are needed."""
        self._chunk = None

    def _fits(self, tensor: Tensor) -> bool:
        size = tensor.numel() * tensor.element_size()
        return size >= _SMALL and tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.is_conj()

    def _place(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if self._chunk is None or self._used + size > len(self._chunk):
            self._chunk, self._used = self._map(max(self._size, size)), 0
            self._size = min(2 * self._size, _LARGEST)
        place = torch.frombuffer(self._chunk, dtype=tensor.dtype, count=tensor.numel(), offset=self._used)
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return place.view(tensor.shape)

    def _map(self, size: int) -> memoryview:
        chunk = next((chunk for chunk in _idle if len(chunk) >= size), None)
        if chunk is None:
            chunk = mmap.mmap(-1, size)
            _advise(chunk, "MADV_HUGEPAGE")
        else:
            _idle.remove(chunk)
        view = memoryview(chunk)
        weakref.finalize(view, _retire, chunk).atexit = False  # when the last copy in it is gone
        return view


class Host(Store):
    """Copies in the host's memory, pinned, so that an accelerator fetches them while it computes."""

    def copy(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return super().copy(tensor)
        place = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        # In the order of the device's work: what overwrites the tensor comes later.
        return place.copy_(tensor.detach(), non_blocking=True)


class Disk(Store):
    """Copies in files that are mapped into memory, written by the system while training goes on.

    The files have no name, so that nothing is left of them, whatever happens.

    Args:
        folder: where they are; None for the system's temporary folder.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._chunks: dict[int, memoryview] = {}

    def scatter(self) -> None:
        pass

    def clear(self) -> None:
        super().clear()
        self._chunks.clear()

    def copy(self, tensor: Tensor) -> Tensor:
        return super().copy(tensor.detach().to("cpu"))

    def _fits(self, tensor: Tensor) -> bool:
        return tensor.numel() > 0 and tensor.layout is torch.strided and tensor.is_contiguous()

    def _map(self, size: int) -> memoryview:
        if self._chunk is not None:
            # Its pages are the file's: the system writes them, and this process needs them no more.
            _advise(self._chunk.obj, "MADV_DONTNEED")  # type: ignore[arg-type]
        with tempfile.TemporaryFile(dir=self.folder, prefix="metaopt-") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise OSError(
                    f"there is no room for {size / 2**20:.0f} MiB of states in {self.folder or tempfile.gettempdir()} "
                    f"({error.strerror}). Give `offload=` another folder, or keep checkpoints."
                ) from error
            chunk = mmap.mmap(file.fileno(), size)
        view = memoryview(chunk)
        self._chunks[torch.frombuffer(view, dtype=torch.uint8).data_ptr()] = view
        return view

    def prefetch(self, copies: Sequence[Tensor]) -> None:
        for copy in copies:
            where = copy.data_ptr()
            for first, chunk in self._chunks.items():
                if first <= where < first + len(chunk):
                    start = (where - first) // mmap.PAGESIZE * mmap.PAGESIZE
                    length = where - first - start + copy.nbytes
                    _advise(chunk.obj, "MADV_WILLNEED", start, length)  # type: ignore[arg-type]


def store_of(offload: Any) -> Store:
    """The store that `metaopt.record`'s ``offload`` names."""
    if offload is None:
        return Store()
    if offload == "cpu":
        return Host()
    return Disk(None if offload == "disk" else offload)
