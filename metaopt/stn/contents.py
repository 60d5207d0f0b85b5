"""What a module's attributes hold and change in place: lists, dictionaries, tensors that are no buffers, generators."""

from __future__ import annotations

__all__ = ["Content", "Contents", "changeable"]

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy
import torch
from torch import Tensor, nn

# What is larger is copied when it is first seen, and then only if it was written on: a vocabulary, a table, a mask.
SMALL = 2**12
# A container of more than this is a record that grows, whose entries stay as they are.
FEW = 2**6

_MAPPINGS = frozenset({dict, OrderedDict, defaultdict, Counter})
_CONTAINERS = frozenset({list, set, deque}) | _MAPPINGS
_GENERATORS = (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)


def changeable(value: Any) -> bool:
    """Whether something may have other contents later, and still be the same object."""
    return type(value) is Tensor or type(value) in _CONTAINERS or isinstance(value, _GENERATORS)


@dataclass(frozen=True)
class Content:
    """What one object held.

    Args:
        owner: the object.
        copy: a copy of its contents; None of a tensor that is large and never written on.
        version: how often a tensor had been written.
    """

    owner: Any
    copy: Any
    version: int = 0

    @property
    def same(self) -> bool:
        """Whether it holds that still; things are compared by identity, as tensors don't say whether they are equal."""
        owner, copy = self.owner, self.copy
        if isinstance(owner, Tensor):
            return bool(owner._version == self.version)
        if isinstance(owner, _GENERATORS):
            return isinstance(owner, torch.Generator) and torch.equal(owner.get_state(), copy)
        if type(owner) in _MAPPINGS:
            return (
                len(owner) == len(copy) and all(map(is_, owner, copy)) and all(map(is_, owner.values(), copy.values()))
            )
        if isinstance(owner, set):
            return bool(owner == copy)
        return len(owner) == len(copy) and all(map(is_, owner, copy))

    def restore(self) -> None:
        """Let it hold that again."""
        owner, copy = self.owner, self.copy
        if copy is None or self.same:
            return
        if isinstance(owner, Tensor):
            with torch.no_grad():
                owner.copy_(copy)
            return
        if isinstance(owner, _GENERATORS):
            _set_state(owner, copy)
            return
        if any(isinstance(item, nn.Module) for item in _items(owner)):
            return  # a network that is made at the first call, such as a teacher, is not made again
        owner.clear()
        add: Callable[[Any], None] = owner.extend if isinstance(owner, (list, deque)) else owner.update
        add(copy)


def _items(container: Any) -> list[Any]:
    return list(container.values() if type(container) in _MAPPINGS else container)


def _state(generator: Any) -> Any:
    """The state of a generator of a module's own."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, numpy.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


class Contents:
    """Copies what objects hold, and what those hold in turn."""

    def __init__(self) -> None:
        self._first = True
        # Those that were written on, by ``id``: kept, so that no other takes their place.
        self._written: dict[int, Any] = {}

    def now(self, values: Iterable[Any]) -> list[Content]:
        """What some objects hold now."""
        found: dict[int, Content | None] = {}
        for value in values:
            self._add(value, found)
        self._first = False
        return [content for content in found.values() if content is not None]

    def note(self, contents: Sequence[Content]) -> bool:
        """Whether objects hold what they held; those that don't are noted."""
        changed = [content.owner for content in contents if not content.same]
        self._written.update((id(owner), owner) for owner in changed)
        return not changed

    def _add(self, value: Any, found: dict[int, Content | None]) -> None:
        key = id(value)
        if key in found:
            return
        if isinstance(value, Tensor):
            if not value.is_inference():
                found[key] = Content(value, self._copied(value), value._version)
        elif isinstance(value, _GENERATORS):
            found[key] = Content(value, _state(value))
        elif self._wanted(value, len(value)):
            found[key] = Content(value, dict(value) if type(value) in _MAPPINGS else type(value)(value))
            for item in _items(value) if len(value) <= FEW else ():
                if changeable(item):
                    self._add(item, found)

    def _copied(self, value: Tensor) -> Tensor | None:
        return value.detach().clone() if self._wanted(value, value.numel()) else None

    def _wanted(self, value: Any, size: int) -> bool:
        return self._first or size <= SMALL or id(value) in self._written
