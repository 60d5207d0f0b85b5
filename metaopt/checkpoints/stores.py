"""Where copies of states lie: in memory, in the host's memory, on disk.

A state is copied when the optimizer is about to overwrite it. Copies of a step follow one another in large chunks of
memory, which the system maps faster than many small ones, and can write to disk as they are. They become tensors when
they are read: thousands of small objects that stay, between a training's large ones that come and go, would leave holes
in the process's memory that take more than the copies do.
"""

from __future__ import annotations

__all__ = ["Disk", "Host", "Place", "Store", "store_of"]

import contextlib
import ctypes
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_FIRST, _LARGEST = 2**22, 2**26  # bytes of a chunk
_LARGE = 2**21  # bytes, from which torch's copy, by all threads, is worth its call
_ALIGNED = 64
_NO_FOLDERS = ("", "cpu", "disk", "gpu", "host", "memory")
# Python shares a mapping with the processes that are forked, which would write their states into each other's; and the
# system takes no page back that is shared.
_OWN = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}

# Chunks that no copy lies in any more, for the next training: mapping new memory takes longer than to fill it. The
# system may take their pages whenever it needs some.
_idle: list[mmap.mmap] = []
_choosing = threading.Lock()  # trainings of several threads want one each


def _retire(chunk: mmap.mmap) -> None:
    _advise(chunk, "MADV_FREE")
    _idle.append(chunk)


def _advise(chunk: mmap.mmap, advice: str, *where: int) -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not Linux, or the kernel does not know it
        chunk.madvise(getattr(mmap, advice), *where)


class Place:
    """Bytes of a chunk that hold a tensor's value."""

    __slots__ = ("chunk", "dtype", "nbytes", "offset", "shape")

    def __init__(self, chunk: memoryview, offset: int, tensor: Tensor) -> None:
        self.chunk = chunk
        self.offset = offset
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.nbytes = tensor.nbytes

    def tensor(self) -> Tensor:
        """The value, in the memory where it lies."""
        count = self.nbytes // self.dtype.itemsize
        return torch.frombuffer(self.chunk, dtype=self.dtype, count=count, offset=self.offset).view(self.shape)


class Store:
    """Copies in memory, on the tensors' own device."""

    def __init__(self) -> None:
        self._chunk: memoryview | None = None
        self._address = 0
        self._used = 0
        self._size, self._largest = _FIRST, _LARGEST
        self._together = True

    def copy(self, tensor: Tensor) -> Tensor | Place:
        """A copy that nobody writes to."""
        if not self._together or not _fits(tensor):
            return tensor.detach().clone()
        size = tensor.nbytes
        chunk = self._chunk
        if chunk is None or self._used + size > len(chunk):
            chunk = self._begin(max(self._size, size))
        place = Place(chunk, self._used, tensor)
        if size < _LARGE:
            ctypes.memmove(self._address + self._used, tensor.data_ptr(), size)
        else:
            place.tensor().copy_(tensor.detach())
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return place

    def scatter(self) -> None:
        """From now on some copies will go before others: no two of them share their memory."""
        self._together = False

    def prefetch(self, copies: Iterable[object]) -> None:
        """These are about to be read."""

    def clear(self) -> None:
        """No more copies of this training are needed."""
        self._chunk = None

    def _begin(self, size: int) -> memoryview:
        self._chunk, self._used = self._map(size), 0
        self._address = torch.frombuffer(self._chunk, dtype=torch.uint8).data_ptr()
        self._size = min(2 * self._size, self._largest)
        return self._chunk

    def _map(self, size: int) -> memoryview:
        with _choosing:
            chunk = min((chunk for chunk in _idle if len(chunk) >= size), key=len, default=None)
            if chunk is not None:
                _idle.remove(chunk)
        if chunk is None:
            chunk = mmap.mmap(-1, size, **_OWN)
            # In pages of 2 MiB where the system has them: the first touch of a page takes longer than to fill it.
            _advise(chunk, "MADV_HUGEPAGE")
        view = memoryview(chunk)
        weakref.finalize(view, _retire, chunk).atexit = False  # when the last copy in it is gone
        return view


class Host(Store):
    """Copies in the host's memory, pinned, so that an accelerator fetches them while it computes."""

    def copy(self, tensor: Tensor) -> Tensor | Place:
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
        self.folder = None if folder is None else Path(folder).expanduser()
        self._process = os.getpid()
        try:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._file().close()
        except OSError as error:
            raise self._unusable("is none that can be written to", error) from error

    def scatter(self) -> None:
        # A file stays as long as any copy in it does.
        self._chunk = None
        self._size = self._largest = _FIRST

    def copy(self, tensor: Tensor) -> Tensor | Place:
        process = os.getpid()
        if process != self._process:
            # The files are those of the process that this one was forked from, which goes on to write there too.
            self._chunk, self._process = None, process
        return super().copy(tensor.detach().to("cpu"))

    def _map(self, size: int) -> memoryview:
        if self._chunk is not None:
            # Its pages are the file's: the system writes them, and this process needs them no more.
            _advise(self._chunk.obj, "MADV_DONTNEED")  # type: ignore[arg-type]
        try:
            with self._file() as file:
                _reserve(file, size)
                return memoryview(mmap.mmap(file.fileno(), size))
        except OSError as error:
            raise self._unusable(f"can't take {size / 2**20:.0f} MiB of states", error) from error

    def _file(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self.folder, prefix="metaopt-")

    def _unusable(self, why: str, error: OSError) -> OSError:
        where = self.folder or tempfile.gettempdir()
        text = f"the folder {where} {why} ({error.strerror}). Give `offload=` another one, or keep checkpoints."
        return OSError(error.errno, text)

    def prefetch(self, copies: Iterable[object]) -> None:
        for place in copies:
            if not isinstance(place, Place):
                continue
            start = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
            length = place.offset - start + place.nbytes
            _advise(place.chunk.obj, "MADV_WILLNEED", start, length)  # type: ignore[arg-type]


def _reserve(file: IO[bytes], size: int) -> None:
    """Make a file so large, with room on the disk where the system can promise it."""
    if hasattr(os, "posix_fallocate"):  # not macOS, not Windows
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _fits(tensor: Tensor) -> bool:
    """Whether the value is its bytes, one after the other, which are there to be copied."""
    kind = type(tensor)
    plain = (kind is Tensor or kind is torch.nn.Parameter) and tensor.is_cpu and tensor.layout is torch.strided
    return plain and tensor.is_contiguous() and tensor.numel() > 0 and not (tensor.is_conj() or tensor.is_neg())


def store_of(offload: Any) -> Store:
    """The store that `metaopt.record`'s ``offload`` names."""
    if offload is None:
        return Store()
    if offload == "cpu":
        return Host()
    if offload == "disk":
        return Disk()
    # A folder of such a name would be made, without a word.
    mistaken = isinstance(offload, str) and (offload.strip().lower() in _NO_FOLDERS or _is_device(offload))
    if mistaken or not isinstance(offload, (str, os.PathLike)):
        such = f' (a folder of that name is "./{offload}")' if mistaken and offload.strip() else ""
        raise ValueError(f'offload must be None, "cpu", "disk" or a folder, not {offload!r}{such}.')
    return Disk(offload)


def _is_device(name: str) -> bool:
    with contextlib.suppress(RuntimeError):
        return bool(torch.device(name).type)
    return False
