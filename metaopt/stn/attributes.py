"""What modules keep in their attributes, such as the state of a recurrence between two batches; and back."""

from __future__ import annotations

__all__ = ["Attributes", "Snapshot"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_, itemgetter
from typing import Any

from torch import nn

from metaopt.stn.contents import Content, Contents, changeable

# What every module has, and no model replaces: its parameters, its parts, its hooks.
_TORCHS = frozenset(nn.Module().__dict__) - {"training"}

# Names in an order, and what reads them from a dict.
Names = tuple[str, ...]
Reader = Callable[[dict[str, Any]], Sequence[Any]]


@dataclass(frozen=True)
class _Own:
    """What is read of one module.

    Args:
        module: the module, and not its ``__dict__``: a copy of the model has another.
        sizes: how many attributes and buffers it has, by which new ones are noticed.
        names: those of its attributes and of its buffers.
        readers: what reads these.
    """

    module: nn.Module
    sizes: tuple[int, int]
    names: tuple[Names, Names]
    readers: tuple[Reader, Reader]


@dataclass(frozen=True)
class Snapshot:
    """What modules kept at one time.

    Args:
        own: what was read.
        values: what was found, one after another.
        contents: what was within these, of what is changed in place.
    """

    own: list[_Own]
    values: list[Any]
    contents: list[Content]


class Attributes:
    """Reads what modules keep, in attributes and in buffers: one may be a new tensor each time, or none at first.

    Args:
        modules: the modules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._own = [_look(module) for module in modules]
        self._contents = Contents()
        # What was found last, and what of it may change in place.
        self._last: list[Any] | None = None
        self._changeable: list[Any] = []

    def now(self) -> Snapshot:
        """What they keep now."""
        values = self._values()
        if values is None:
            # Some came or went.
            self._own, self._last = [_look(own.module) for own in self._own], None
            values = self._values()
        assert values is not None
        if self._last is None or not all(map(is_, self._last, values)):
            self._last, self._changeable = values, list(self._within(values))
        contents = self._contents.now(self._changeable) if self._changeable else []
        return Snapshot(self._own, values, contents)

    def after(self, before: Snapshot) -> Snapshot:
        """What they keep now: ``before`` itself, if that is what they kept then."""
        return before if self._same(before) else self.now()

    def back(self, kept: Snapshot) -> None:
        """Put back what they kept."""
        if self._same(kept):
            return
        values = iter(kept.values)
        for own in kept.own:
            for store, names in zip(_stores(own.module), own.names, strict=True):
                for name in [n for n in store.keys() if n not in names and n not in _TORCHS]:  # noqa: SIM118
                    del store[name]
                for name in names:
                    store[name] = next(values)
        for content in kept.contents:
            content.restore()

    def _same(self, before: Snapshot) -> bool:
        # By identity: tensors don't say whether they are equal.
        values = self._values() if before.own is self._own else None
        there = self._contents.note(before.contents)
        return there and values is not None and all(map(is_, before.values, values))

    def _within(self, values: Sequence[Any]) -> Iterator[Any]:
        """What may change in place of what was found; torch's own modules change nothing."""
        start = 0
        for own in self._own:
            names, buffers = own.names
            if not type(own.module).__module__.startswith("torch.nn."):
                yield from filter(changeable, values[start : start + len(names)])
            start += len(names) + len(buffers)

    def _values(self) -> list[Any] | None:
        values: list[Any] = []
        try:
            for own in self._own:
                module = own.module
                attributes, buffers = module.__dict__, module._buffers
                if own.sizes != (len(attributes), len(buffers)):
                    return None
                values += own.readers[0](attributes)
                if buffers:
                    values += own.readers[1](buffers)
        except KeyError:
            return None
        return values


def _stores(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module.__dict__, module._buffers


def _look(module: nn.Module) -> _Own:
    attributes, buffers = _stores(module)
    names = tuple(name for name in attributes if name not in _TORCHS), tuple(buffers.keys())
    return _Own(module, (len(attributes), len(buffers)), names, (_reader(names[0]), _reader(names[1])))


def _reader(names: Names) -> Reader:
    # Of one name it would give no sequence.
    return itemgetter(*names) if len(names) > 1 else partial(_read, names)


def _read(names: Names, store: dict[str, Any]) -> Sequence[Any]:
    return [store[name] for name in names]
