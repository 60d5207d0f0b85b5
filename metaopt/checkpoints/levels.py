"""What is kept of each iteration: as much as was asked for, and as the budget allows.

``graphs``       its state, and what it computed on the way
``states``       its state ``s_{t-1}``
``checkpoints``  the state of some iterations; those between are computed again from the last one before
"""

from __future__ import annotations

__all__ = ["LEVELS", "Keeping", "intervals", "schedules_of"]

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from metaopt.checkpoints.memory import Memory, inputs_of
from metaopt.errors import MetaoptWarning, require, warn

if TYPE_CHECKING:
    from metaopt.capture.segment import Segment
    from metaopt.checkpoints.stores import Store

LEVELS = ("graphs", "states", "checkpoints")


class Keeping:
    """Decides, iteration by iteration, what is kept; the number of iterations need not be known.

    Checkpoints are every ``stride`` iterations. When there are too many of them, every other one is given up and the
    stride doubles (Stumm & Walther 2010 call it online checkpointing): without a budget when they are more than two
    strides, so that there are between √T and √(2T) or so; with one, when they fill half of it, the other half being
    for the states between two of them.

    Args:
        level: one of `LEVELS`, to begin with.
        budget: bytes for states and values, beyond which the level falls.
        store: where the states lie.
    """

    def __init__(self, level: str, budget: int | None, store: Store) -> None:
        self.store = store
        self.level = level
        self.budget = budget
        self.stride = 1
        self.marks: list[int] = []
        self.segments: list[Segment] = []
        self._states = 0
        self._values = 0
        self._state = 0
        self._said = False
        self._producer: dict[int, int] = {}
        self._sources: dict[int, dict[int, int]] = {}
        if level == "checkpoints":
            store.scatter()
            if budget is not None:
                schedules_of()

    def add(self, segment: Segment) -> None:
        """Take an iteration."""
        place = len(self.segments)
        self.segments.append(segment)
        size = segment.state_bytes()
        self._state = max(self._state, size)
        self._states += size
        self._values += segment.value_bytes()
        self._sources[place] = {key: self._producer.get(key, -1) for key, _ in segment.inputs}
        self._producer.update(dict.fromkeys(segment.outputs, place))
        if self.budget is not None and not self._said and 2 * size > self.budget:
            self._said = True
            warn(
                f"the budget of {self.budget:,} bytes is less than two states of {size:,} bytes each, the least that a "
                "sweep needs; two are kept all the same. Give a larger budget, or `offload=` the states.",
                MetaoptWarning,
            )
        if self.level == "checkpoints":
            self._thin()
        elif self.budget is not None and self._states + self._values > self.budget:
            self._fall()

    def forget_first(self) -> None:
        """Give up the first iteration; not together with checkpoints, which others may depend on."""
        segment = self.segments.pop(0)
        self._states -= segment.state_bytes()
        self._values -= segment.value_bytes()

    @property
    def slots(self) -> int | None:
        """How many states may be kept at once, if there is a limit."""
        return None if self.budget is None else max(2, self.budget // max(1, self._state))

    def memory(self, steps: int, last: int | None = None) -> Memory:
        """What is kept of so many steps, or of the last of them."""
        states = {id(cell): cell.nbytes for segment in self.segments for cell in segment.copies()}
        inputs, lasting = inputs_of([segment.held() for segment in self.segments])
        return Memory(
            self.level,
            steps,
            states=sum(states.values()),
            state=self._state,
            checkpoints=len(self.marks) if self.level == "checkpoints" else len(self.segments),
            values=self._values,
            inputs=inputs,
            lasting=lasting,
            budget=self.budget,
            last=last,
        )

    def clear(self) -> None:
        """Keep nothing any more."""
        self.segments.clear()
        self.marks.clear()
        self._sources.clear()
        self._states = self._values = 0
        self.store.clear()

    # -- giving up ---------------------------------------------------------------------------------------------------

    def _fall(self) -> None:
        if self.level == "graphs":
            for segment in self.segments:
                segment.drop_values()
            self._values = 0
            self.level = "states"
        if self._states > (self.budget or 0):
            schedules_of()
            self.level = "checkpoints"
            self.store.scatter()
            segments, self.segments = self.segments, []
            self._states, self.marks = 0, []
            for segment in segments:
                self.segments.append(segment)
                self._states += segment.state_bytes()
                self._thin()
            # What is left lies beside what was given up, and would keep its memory.
            left = {id(cell): cell for segment in self.segments for cell in (*segment.copies(), *segment.constants)}
            for cell in left.values():
                cell.settle(self.store.copy)

    def _thin(self) -> None:
        last = len(self.segments) - 1
        if last % self.stride:
            self._drop(last)
            return
        self.marks.append(last)
        limit = 2 * self.stride if self.slots is None else max(1, self.slots // 2)
        while len(self.marks) > limit:
            self.stride *= 2
            given_up = [mark for mark in self.marks if mark % self.stride]
            self.marks = [mark for mark in self.marks if not mark % self.stride]
            for mark in given_up:
                self._drop(mark)

    def _drop(self, place: int) -> None:
        """Give up the state of an iteration, but for what the iterations since the last checkpoint don't compute."""
        start = place // self.stride * self.stride
        lost = {key for key, producer in self._sources[place].items() if producer >= start}
        segment = self.segments[place]
        before = segment.state_bytes()
        segment.drop_state(lost)
        self._states -= before - segment.state_bytes()


def schedules_of() -> ModuleType:
    """The package of schedules, by which states are computed again where there is no room for all of them."""
    return require("checkpoint_schedules", "checkpoints", "a recording whose budget has no room for every state")


def intervals(marks: Sequence[int], count: int) -> list[tuple[int, int]]:
    """The stretches from one checkpoint to the next, the last one first."""
    ends = [*marks[1:], count] if marks else []
    return list(zip(marks, ends, strict=True))[::-1]
