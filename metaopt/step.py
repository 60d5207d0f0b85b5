"""``Φ_t = rule ∘ gradient``: the watched loop, cut into iterations where the optimizer steps."""

from __future__ import annotations

__all__ = ["Loop"]

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from metaopt.bystanders import Bystanders
from metaopt.capture.applied import see_functions
from metaopt.capture.bindings import leaves_of
from metaopt.capture.program import Library
from metaopt.capture.seams import see_variables
from metaopt.capture.segment import Segment
from metaopt.capture.tape import Tape
from metaopt.capture.verify import Verifier
from metaopt.capture.watcher import Watcher
from metaopt.closures import closure_of, weakly, with_closure
from metaopt.errors import CaptureError
from metaopt.hyperparameters import owner_of
from metaopt.links import links_of
from metaopt.rules import rule_of
from metaopt.stepping import Home, clearing, elsewhere, method_hooks, step_hooks
from metaopt.update import RuledUpdate, sparse
from metaopt.watched import WatchedWeights, listed, weights_of
from metaopt.wrapping import steps_on_stack, wrapped

_open: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class Loop:
    """A training loop under watch: each ``optimizer.step()`` ends an iteration, which goes to ``on_segment``.

    Args:
        optimizers: the optimizers that train the weights; the last one's steps end the iterations.
        on_segment: receives every finished iteration, and whether a step ended it.
        verify: ``"first"`` replays the first iteration of each structure and compares, ``"all"`` every one, ``"never"``
            none.
        moving: whether hyperparameters may change from one iteration to the next.
    """

    def __init__(
        self,
        optimizers: Optimizer | Sequence[Optimizer],
        on_segment: Callable[[Segment, bool], None],
        *,
        verify: str = "first",
        moving: bool = False,
    ) -> None:
        self.optimizers = listed(optimizers)
        self.optimizer = self.optimizers[-1]
        self.on_segment = weakly(on_segment)
        self.steps = 0
        self.stepped_at = -1
        self.tape = Tape(self.weights(), moving=moving)
        self.guard = WatchedWeights(self.optimizers, self.tape)
        # A wrapped optimizer's step is recorded call by call, and needs no rule.
        wraps = [found for optimizer in self.optimizers if (found := wrapped(optimizer)) is not None]
        self.updates = {
            id(optimizer): RuledUpdate(optimizer, rule_of(optimizer), self.tape)
            for optimizer in self.optimizers
            if wrapped(optimizer) is None
        }
        self.tape.protected = weakly(self._is_hyperparameter)
        self.library = Library()
        self.watcher = Watcher(self.tape)
        self.verifier = Verifier(verify, self.optimizers)
        self.watcher.check_functions = verify != "never"
        if wraps:
            self.watcher.stepping = weakly(self._is_stepping)
            self.watcher.numbers_held = all(wrap.hold_numbers for wrap in wraps)
        self._in_closure = False
        self._exit: ExitStack | None = None
        self._home = Home()
        self._bystanders = Bystanders(self.watcher, weakly(self._is_inside), self.tape.protected)
        # What the loop may have caught (`except RuntimeError: continue`), though a part of it is missing since.
        self._error: CaptureError | None = None

    def weights(self) -> list[Tensor]:
        """Every weight of the optimizers, in their order."""
        return weights_of(self.optimizers)

    def states(self) -> list[dict[str, Any]]:
        """What the optimizers hold of each weight."""
        found = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return [state for state in found if isinstance(state, dict)]  # some keep numbers of their own there

    def _is_hyperparameter(self, leaf: Tensor) -> bool:
        links = [link for optimizer in self.optimizers for named in links_of(optimizer) for link in named.values()]
        return owner_of(leaf) is not None or any(leaf is found for link in links for found in leaves_of(link.fixed))

    def give(self, leaves: Iterable[Tensor]) -> None:
        """These are given a hypergradient, and are therefore no weights of somebody else."""
        self._bystanders.given.update(map(id, leaves))

    # -- opening and closing ----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin to watch."""
        if any(optimizer in _open for optimizer in self.optimizers):
            raise CaptureError(
                "this optimizer is watched already: contexts on one optimizer can't be nested. Close the outer one "
                "first, or use its run."
            )
        modes = torch.overrides._get_current_function_mode_stack()
        if any(isinstance(mode, Watcher) and not mode.left for mode in modes):
            raise CaptureError(
                "another context of metaopt is open in this thread; the one would see what the other does. If the two "
                "optimizers train together, watch both in one context, `metaopt.record([first, second])`; if not, open "
                "the contexts one after the other."
            )
        self.guard.begin()
        self._home = Home()
        self.tape.begin()
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for optimizer in self.optimizers:
                _open.add(optimizer)
                stack.callback(_open.discard, optimizer)
            others = (self._bystanders.before, self._bystanders.after)
            stack.enter_context(step_hooks(self.optimizers, (self._pre_step, self._post_step), others))
            stack.enter_context(method_hooks(self.optimizers, "add_param_group", self._growing))
            stack.enter_context(clearing(self.optimizers))
            stack.enter_context(see_functions(self.watcher))
            stack.enter_context(see_variables())
            stack.enter_context(self.watcher)
            self._exit = stack.pop_all()

    def close(self, *, failed: bool = False) -> None:
        """Stop watching, whatever happened; the calls since the last step become a last iteration."""
        self._note_failed_step()
        if self._exit is not None:
            if not self._home.is_here():
                self._error = elsewhere("was left")
            self._exit.close()
            self._exit = None
        if self._error is not None and not failed:
            raise self._error
        if not failed:
            with torch._C.DisableTorchFunction():
                self.verifier.settle(self.tape)
            self._seal(check=False)
        self.guard.end()

    def flush(self) -> None:
        """End the iteration here, without a step, so that what it computed can be differentiated."""
        if self._exit is not None:
            self._refuse_failed_step()
            self._seal(check=False)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, nothing is recorded."""
        before, self.watcher.paused = self.watcher.paused, True
        try:
            yield
        finally:
            self.watcher.paused = before

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """While open inside `paused`, calls are recorded again."""
        self.watcher.paused = False
        try:
            yield
        finally:
            self.watcher.paused = True

    @contextmanager
    def _growing(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """While open, an optimizer gets weights that it trains from then on."""
        with self.paused(), torch._C.DisableTorchFunction():
            yield
            self.guard.grow()

    # -- the optimizer's step -----------------------------------------------------------------------------------------

    def _pre_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if not self._home.is_here():
            self._error = elsewhere("saw `optimizer.step()`")
            raise self._error
        closure = closure_of(args, kwargs)
        update = self.updates.get(id(optimizer))
        if update is None:
            return self._pre_wrapped_step(optimizer, closure, args, kwargs)
        self._refuse_failed_step()
        self.watcher.paused = True
        if closure is None:
            self._begin(update)
            return None

        def watched() -> Any:
            self.watcher.paused = False
            with torch.enable_grad():
                value = closure()
            self.watcher.paused = True
            self._begin(update)
            return value

        return with_closure(watched, args, kwargs)

    def _pre_wrapped_step(self, optimizer: Optimizer, closure: Any, args: Any, kwargs: Any) -> Any:
        """What the update calls is recorded as it runs; all there is to do is to look for what can't be."""
        if steps_on_stack(optimizer) > 1:
            return None  # a class that calls the step of its base
        with self.paused():
            self.guard.check()
            for weight in self.weights():
                if weight.grad is not None and weight.grad.is_sparse:
                    raise sparse(weight)
                self.tape.arrivals.refuse_unseen(self.tape, weight)
        if not callable(closure):
            return None

        def watched() -> Any:
            self._in_closure = True
            try:
                return closure()
            finally:
                self._in_closure = False

        return with_closure(watched, args, kwargs)

    def _begin(self, update: RuledUpdate) -> None:
        with torch._C.DisableTorchFunction():
            self.guard.check()
        update.begin()

    def _note_failed_step(self) -> None:
        if self._bystanders.away:
            self._error = _failed_step()
        for update in self.updates.values():
            if update.running:
                update.stop()
                self._error = _failed_step()

    def _refuse_failed_step(self) -> None:
        self._note_failed_step()
        if self._error is not None:
            raise self._error

    def _is_stepping(self) -> bool:
        return not self._in_closure and any(
            id(optimizer) not in self.updates and steps_on_stack(optimizer) for optimizer in self.optimizers
        )

    def _post_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        update = self.updates.get(id(optimizer))
        if update is None and steps_on_stack(optimizer) > 1:
            return
        if update is not None:
            update.stop()
        self.watcher.paused = True
        try:
            with torch._C.DisableTorchFunction():
                if update is not None:
                    update.after(last=optimizer is self.optimizer)
                if optimizer is self.optimizer:
                    self.steps += 1
                    self.stepped_at = self.tape.epoch
                    self._seal(check=True)
        finally:
            self.watcher.paused = False

    def _is_inside(self, optimizer: Optimizer) -> bool:
        """Whether a step belongs to the watched loop: another optimizer's may run within a wrapped one's."""
        within = any(id(own) not in self.updates and steps_on_stack(own) for own in self.optimizers)
        return within or optimizer in self.optimizers or not self._home.is_here()

    # -- iterations -------------------------------------------------------------------------------------------------

    def _seal(self, *, check: bool) -> None:
        self.tape.memory.refuse_written()
        if not self.tape.trace.code:
            self.tape.begin()
            return
        segment = self.tape.end(self.library.seal)
        if not segment.outputs:
            return
        with torch._C.DisableTorchFunction():  # what is called for the segment's sake need not pass by the watcher
            if check:
                self._verify(segment)
            self.on_segment(segment, check)

    def _verify(self, segment: Segment) -> None:
        try:
            begins = any(update.begins for update in self.updates.values())
            for update in self.updates.values():
                update.begins = False
            self.verifier.check(segment, self.tape, self.steps, last=not begins)
        except CaptureError as error:
            self._error = error
            raise


def _failed_step() -> CaptureError:
    return CaptureError(
        "an `optimizer.step()` inside the context raised an exception, which the loop caught, and went on. What it did "
        "since was not seen. Let the exception end the context."
    )
