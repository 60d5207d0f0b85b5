"""Running the user's training again and again, from the same beginning: bare, or under watch."""

from __future__ import annotations

__all__ = ["Outer", "Train", "Training", "Watch", "refuse_arguments"]

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import CheckError, HeldConstantWarning, MetaoptWarning, whole
from metaopt.modes import Recording, Streaming, record, stream
from metaopt.modes.run import Run, Watchable
from metaopt.modes.start import random_states, set_random_states
from metaopt.watched import listed

# What ``train`` is given, to be used where `metaopt.record` would be.
Watch = Callable[[Watchable], AbstractContextManager[Any]]
Train = Callable[[Watch], Any] | Callable[[], Any]
Outer = Callable[[Any], Tensor] | Callable[[], Tensor]


def refuse_arguments(train: Any, outer: Any, entries: Any, step: Any, rtol: Any, atol: Any) -> None:
    """Raise if arguments of a check are of the wrong kind: the training would be blamed for them."""
    for name, given in (("train", train), ("outer", outer)):
        if not callable(given):
            raise CheckError(
                f"{name} is {type(given).__name__}, and no function: hypergradcheck(train, outer, hyper) runs the "
                "training, `train(watch)`, many times, and asks `outer` for the objective of what it returned."
            )
    whole("entries", entries, 0, CheckError)
    for name, number, zero in (("step", step, False), ("rtol", rtol, True), ("atol", atol, True)):
        fits = isinstance(number, (int, float)) and math.isfinite(number) and (number > 0 or (zero and number == 0))
        if not fits:
            raise CheckError(f"{name} must be a finite number {'of at least' if zero else 'above'} 0, not {number!r}.")


class _Bare:
    """What ``with watch(optimizer) as run`` gives in a bare run."""

    def __getattr__(self, name: str) -> Any:
        raise CheckError(
            f"the training uses `run.{name}`, but the check runs it bare too, where there is no run. Leave the run out "
            "of the training, and give the outer objective to the check."
        )


class Training:
    """The training, the outer objective, and the beginning that every run starts from."""

    def __init__(
        self, train: Train, outer: Outer, optimizer: Watchable | None, verify: str, leaves: Sequence[Tensor]
    ) -> None:
        self.train = train
        self.outer = outer
        self.optimizer = optimizer
        self.verify = verify
        self.leaves = leaves
        self.runs = 0
        self.dtypes: set[torch.dtype] = set()
        self.start: list[Tensor] = []
        self.end: list[Tensor] = []
        self.constants: list[str] = []
        self._random = random_states()
        self._first: Run | None = None
        self._watched = 0

    def value(self) -> float:
        """The outer objective of the bare loop: nothing of the capture is there."""
        with self._running(), warnings.catch_warnings():
            warnings.simplefilter("ignore", MetaoptWarning)
            outer = self._objective(self._train(self._bare))
            with torch.no_grad():
                return float(outer().detach())

    def reverse(self, wrt: list[Tensor]) -> tuple[float, tuple[Tensor, ...]]:
        """The outer objective and its hypergradient by `metaopt.record`."""
        return self._gradient(wrt, lambda optimizer: record(optimizer, verify=self.verify))

    def forward(self, wrt: list[Tensor]) -> tuple[float, tuple[Tensor, ...]]:
        """The same by `metaopt.stream`."""
        return self._gradient(wrt, lambda optimizer: stream(optimizer, verify=self.verify))

    def _gradient(
        self, wrt: list[Tensor], mode: Callable[[Watchable], Recording | Streaming]
    ) -> tuple[float, tuple[Tensor, ...]]:
        runs: list[Recording | Streaming] = []
        values: list[Tensor] = []

        def watch(optimizer: Watchable) -> AbstractContextManager[Any]:
            self._note(optimizer)
            runs.append(mode(optimizer))
            return runs[-1]

        with self._running(), self._listening():
            outer = self._objective(self._train(watch))

            def objective() -> Tensor:
                values.append(outer())
                return values[-1]

            gradients = runs[0].hypergradient(objective, wrt)
            self._look_at(runs[0])
        if self._first is None:
            self._first = runs[0]
        runs[0].rewind()
        return float(values[0].detach()), gradients

    def _look_at(self, run: Run) -> None:
        self.dtypes |= {tensor.dtype for tensor in (*self.start, *run.hyperparameters)}

    # -- one run -------------------------------------------------------------------------------------------------------

    def _train(self, watch: Watch) -> Any:
        self._watched = 0
        if self.optimizer is None:
            result = self.train(watch)  # type: ignore[call-arg]
        else:
            with watch(self.optimizer):
                result = self.train()  # type: ignore[call-arg]
        if self._watched != 1:
            raise CheckError(
                f"the training entered `watch(optimizer)` {self._watched} times, and must do so once: "
                "`with watch(optimizer): ...` around the loop, where `with metaopt.record(optimizer)` would be. (A "
                "training without arguments goes with `optimizer=`.)"
            )
        return result

    @contextmanager
    def _bare(self, optimizer: Watchable) -> Iterator[_Bare]:
        self._note(optimizer)
        yield _Bare()
        self.end = _weights(optimizer)

    def _note(self, optimizer: Watchable) -> None:
        self._watched += 1
        self.start = _weights(optimizer)

    def _objective(self, result: Any) -> Callable[[], Tensor]:
        try:
            wants = bool(inspect.signature(self.outer).parameters)
        except ValueError:  # a callable of C, which says nothing
            wants = True
        return lambda: self.outer(result) if wants else self.outer()  # type: ignore[call-arg]

    @contextmanager
    def _running(self) -> Iterator[None]:
        """A run from the beginning; what lives outside of it is put back afterwards."""
        self.runs += 1
        set_random_states(self._random)
        grads = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None  # a bare `loss.backward()` reaches the hyperparameters too
        try:
            yield
        finally:
            for leaf, grad in zip(self.leaves, grads, strict=True):
                leaf.grad = grad
            if self._first is not None:
                # The first run saw every tensor that the training writes; those that are still there are put back.
                self._first.rewind()
            set_random_states(self._random)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Keep what capture warns of for the report, and pass on the rest."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MetaoptWarning)
            yield
        for entry in caught:
            if issubclass(entry.category, HeldConstantWarning):
                place = f"{entry.filename}:{entry.lineno}"
                if place not in self.constants:
                    self.constants.append(place)
            elif not issubclass(entry.category, MetaoptWarning):
                warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)


def _weights(optimizers: Watchable) -> list[Tensor]:
    """Copies of what the optimizers train."""
    groups = [group for optimizer in listed(optimizers) for group in optimizer.param_groups]
    return [weight.detach().clone() for group in groups for weight in group["params"]]
