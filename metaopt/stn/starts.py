"""Where the passes of an iteration start from, beside the weights: random generators, and what modules keep."""

from __future__ import annotations

__all__ = ["Start", "Starts"]

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from metaopt.stn.attributes import Attributes, Snapshot
from metaopt.stn.generators import State, other_state, random_state, set_random_state
from metaopt.stn.guards import unchanged
from metaopt.stn.tuned import Tuned


@dataclass(slots=True)
class Start:
    """A place to come back to.

    Args:
        generators: the random generators' states.
        kept: what modules kept in their attributes.
    """

    generators: State
    kept: Snapshot


class Starts:
    """Comes back to where a pass started, so that another one starts there too.

    Args:
        tuned: the model.

    Attributes:
        attributes: what its modules keep.
    """

    def __init__(self, tuned: Tuned) -> None:
        self.tuned = tuned
        self.attributes = Attributes(tuned.slots.modules)
        self._trained = False

    def now(self, before: Start | None = None) -> Start:
        """Where the next pass starts from.

        Args:
            before: where one before it did; most modules keep what they kept then.
        """
        others = self.tuned.draws is not False or not self._trained
        kept = self.attributes.now() if before is None else self.attributes.after(before.kept)
        return Start(random_state(self.tuned.device, others), kept)

    def moved(self, start: Start) -> bool:
        """Whether modules keep something else than they did."""
        return self.attributes.after(start.kept) is not start.kept

    def back(self, start: Start, now: Start | None = None) -> None:
        """Come back.

        Args:
            start: where to.
            now: where this is, if that is known.
        """
        set_random_state(self.tuned.device, start.generators)
        if now is None or now.kept is not start.kept:
            self.attributes.back(start.kept)

    def first(self, start: Start) -> AbstractContextManager[None]:
        """The first pass of training: what hooks do there, and from which generators the loss draws."""
        return nullcontext() if self._trained else self._watched(start)

    @contextmanager
    def _watched(self, start: Start) -> Iterator[None]:
        with unchanged(self.tuned.model.named_parameters()):
            yield
        self._trained = True
        if other_state() != start.generators[2]:
            self.tuned.draws = True
