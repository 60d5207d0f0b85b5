"""What every mode shares: a context around the loop, and what can be asked of it afterwards."""

from __future__ import annotations

__all__ = ["Run", "Watchable"]

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NoReturn, Self, SupportsIndex, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from metaopt.capture.program import Program
from metaopt.capture.segment import Segment
from metaopt.errors import SweepError
from metaopt.modes.adjoint import Adjoint
from metaopt.modes.hypergradients import leaves_behind
from metaopt.modes.outer import Objective, adjoint_of
from metaopt.modes.start import Start
from metaopt.step import Loop

# What trains: an optimizer, or several of which each has its own weights.
Watchable: TypeAlias = Optimizer | Sequence[Optimizer]


class Run(ABC):
    """A watched training loop, as the ``as`` target of a context.

    A mode says what it does with a finished iteration (`_receive`) and when the context is left (`_forget`).
    """

    def __init__(self, optimizer: Watchable, *, verify: str, moving: bool = False) -> None:
        self._loop = Loop(optimizer, self._receive, verify=verify, moving=moving)
        self._start: Start | None = None
        self._open = False
        self._freed = False

    @abstractmethod
    def _receive(self, segment: Segment, is_step: bool) -> None:
        """Take a finished iteration; ``is_step`` says whether the optimizer's step ended it."""

    @abstractmethod
    def _forget(self) -> None:
        """Free what was kept."""

    # -- the context ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._start is not None:
            raise SweepError(
                "this run was used already. Open a new context, `with metaopt.record(optimizer) as run:`; training "
                "goes on from where it is, or from the start after `run.rewind()`."
            )
        start = Start(self._loop.optimizers)  # before anything is watched, in case it fails
        self._loop.open()
        self._start = start
        self._loop.tape.before_first_write = self._start.remember
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        assert self._start is not None
        try:
            self._loop.close(failed=kind is not None)
        except BaseException:
            self._free()  # a part of the loop is missing
            raise
        finally:
            self._start.close()
        if kind is not None:
            self._free()

    def _free(self) -> None:
        self._forget()
        self._freed = True

    def rewind(self) -> None:
        """Put weights, buffers, the optimizer and its groups, and the random generators back to the beginning."""
        if self._open:
            raise SweepError("`rewind` was called inside the context; call it after the `with` block.")
        if self._start is None:
            raise SweepError("`rewind` was called before the context was entered; there is no start to go back to.")
        self._start.restore()

    # -- what was watched --------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """The number of optimizer steps that were watched."""
        return self._loop.steps

    @property
    def programs(self) -> list[Program]:
        """The programs that the iterations share; print one to see what was captured."""
        return list(self._loop.library.programs)

    @property
    def hyperparameters(self) -> list[Tensor]:
        """The leaves that the watched steps were found to depend on, besides the trained weights."""
        return leaves_behind(self._loop)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"the run of a context ({type(self).__name__}) can't be copied or pickled: what it recorded belongs to the "
            "model and the optimizer that it watched. Copy these two, or save the `state_dict` of model, optimizer, "
            "scheduler and hyperparameters, and keep the hypergradients (`run.hypergradient`); a new context goes on "
            "from there, without the past's derivative unless `stream`'s `run.state_dict()` is saved along."
        )

    def __repr__(self) -> str:
        state = "open" if self._open else "freed" if self._freed else "not entered" if self._start is None else "closed"
        names = " and ".join(type(optimizer).__name__ for optimizer in self._loop.optimizers)
        count = len(self.programs)
        return (
            f"{type(self).__name__}({names}, {state}: {self.steps} steps, "
            f"{count} program{'s' if count != 1 else ''}, {len(self.hyperparameters)} hyperparameters)"
        )

    # -- the outer objective -----------------------------------------------------------------------------------------

    def _adjoint(self, outer: Objective) -> Adjoint:
        if self._start is None:
            raise SweepError("nothing was recorded yet: run the training loop inside the `with` block.")
        if self._freed:
            raise SweepError(
                "what the context recorded was freed, by an earlier `backward` or because the context was left by an "
                "exception. Pass `retain=True` to the earlier call to differentiate several objectives; where an "
                "exception is to end the training early, catch it inside the `with` block."
            )
        return adjoint_of(outer, self._loop, self._watched)

    def _watched(self, outer: Callable[[], Tensor]) -> Tensor:
        """Evaluate an objective given as a function, under watch, as a last iteration without a step."""
        if self._open:
            with self._loop.resumed():
                value = outer()
            self._loop.flush()
            return value
        self._loop.open()
        try:
            with self._loop.resumed():
                value = outer()
        except BaseException:
            self._loop.close(failed=True)
            raise
        self._loop.close()
        return value
