"""The buffers of a model as they were before a pass that moves them: both steps of an iteration start from the same."""

from __future__ import annotations

__all__ = ["Kept", "Statistics", "copied"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Kept:
    """A buffer, and a copy of what it was.

    Args:
        store: where its module keeps it.
        place: the module's number, and the buffer's name.
        buffer: itself.
        version: how often it had been written.
        copy: what it was, or None if nothing writes on it.
    """

    store: dict[str, Any]
    place: tuple[int, str]
    buffer: Tensor
    version: int
    copy: Tensor | None

    @property
    def written(self) -> bool:
        """Whether it was written by now."""
        return self.buffer._version != self.version

    @property
    def moved(self) -> bool:
        """Whether it was, or there is another in its place."""
        return self.written or self.store.get(self.place[1]) is not self.buffer


class Statistics:
    """Keeps the buffers that a model writes in place, such as running statistics and codebooks.

    A pass shows which these are: tables and masks, which may be large, are not copied again.

    Args:
        modules: the model's.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._written: set[tuple[int, str]] | None = None

    def keep(self) -> list[Kept]:
        """Copies of them, before a pass."""
        known, copies = self._written, dict[int, Tensor]()
        return [
            Kept(
                module._buffers,
                (i, key),
                buffer,
                buffer._version,
                copied(buffer, copies) if known is None or (i, key) in known else None,
            )
            for i, module in enumerate(self._modules)
            if module._buffers
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]

    def note(self, kept: Sequence[Kept]) -> None:
        """Note which of them the pass wrote on."""
        self._written = (self._written or set()) | {k.place for k in kept if k.written}

    @staticmethod
    def stand_in(kept: Sequence[Kept]) -> None:
        """Let the copies stand in for them."""
        for k in kept:
            if k.copy is not None:
                k.store[k.place[1]] = k.copy

    @staticmethod
    def restore(kept: Sequence[Kept]) -> None:
        """Make them what they were."""
        for k in kept:
            if k.copy is not None and k.written:
                k.buffer.detach().copy_(k.copy)


def copied(buffer: Tensor, copies: dict[int, Tensor]) -> Tensor:
    """A copy of a buffer; one that several modules share has one copy."""
    found = copies.get(id(buffer))
    if found is None:
        found = copies[id(buffer)] = buffer.clone()
    return found
