"""Going back through iterations whose states were not kept.

Between two checkpoints the states are computed again, all at once if there is room, or by the binomial schedule of
Griewank & Walther 2000 (Revolve), which needs the fewest steps for the room there is.
"""

from __future__ import annotations

__all__ = ["walk"]

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from metaopt.checkpoints.levels import Keeping, intervals, schedules_of

if TYPE_CHECKING:
    from metaopt.capture.segment import Segment

State = Mapping[int, Tensor]


def walk(keeping: Keeping) -> Iterator[tuple[int, Segment]]:
    """The iterations with their states, the last one first, each with its place."""
    segments = keeping.segments
    if keeping.level != "checkpoints":
        for place in range(len(segments) - 1, -1, -1):
            yield place, segments[place]
        return
    stretches = intervals(keeping.marks, len(segments))
    for number, (start, end) in enumerate(stretches):
        kept = len(stretches) - number
        room = end - start if keeping.slots is None else max(1, keeping.slots - kept + 1)
        yield from _stretch(segments[start:end], start, min(room, end - start))


def _stretch(segments: list[Segment], start: int, room: int) -> Iterator[tuple[int, Segment]]:
    later = _read_later(segments)
    state: State = {}
    if room >= len(segments):
        states = [state]
        for place in range(len(segments) - 1):
            states.append(_advance(segments[place], states[place], later[place]))
        while states:
            state = states.pop()
            yield start + len(states), segments[len(states)].at(state)
        return
    schedules = schedules_of()
    saved: dict[int, State] = {}
    for action in schedules.Revolve(len(segments), room):
        if isinstance(action, schedules.Forward):
            if action.write_ics:
                saved[action.n0] = state
            if action.write_adj_deps:
                continue  # the reverse step that follows begins from here
            for place in range(action.n0, action.n1):
                state = _advance(segments[place], state, later[place])
        elif isinstance(action, schedules.Reverse):
            yield start + action.n0, segments[action.n0].at(state)
        elif isinstance(action, schedules.Copy):
            state = saved[action.n]
        elif isinstance(action, schedules.Move):
            state = saved.pop(action.n)
        elif isinstance(action, schedules.EndReverse):
            return


def _advance(segment: Segment, state: State, read: set[int]) -> State:
    """One iteration forward: what later ones read of the state before it, and of what it computes."""
    keys = [key for key in segment.outputs if key in read]
    after = dict(zip(keys, segment.at(state).values(keys), strict=True)) if keys else {}
    return {**{key: value for key, value in state.items() if key in read}, **after}


def _read_later(segments: list[Segment]) -> list[set[int]]:
    """For each iteration, the keys whose values the later ones lack."""
    found: set[int] = set()
    result: list[set[int]] = []
    for segment in reversed(segments):
        result.append(set(found))
        found |= segment.lacks()
    return result[::-1]
