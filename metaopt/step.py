"""``Φ_t = rule ∘ gradient``: the watched loop, cut into iterations where the optimizer steps."""

from __future__ import annotations

__all__ = ["Loop"]

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from metaopt.capture.bindings import leaves_of
from metaopt.capture.cells import version_of
from metaopt.capture.functions import see_functions
from metaopt.capture.program import Library
from metaopt.capture.segment import Segment
from metaopt.capture.tape import Tape
from metaopt.capture.verify import Verifier
from metaopt.capture.watcher import Watcher
from metaopt.errors import CaptureError, RuleError
from metaopt.hyperparameters import owner_of
from metaopt.rules import rule_of
from metaopt.update import RuledUpdate, WatchedWeights, sparse
from metaopt.wrapping import steps_on_stack, wrapped

_open: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class Loop:
    """A training loop under watch: each ``optimizer.step()`` ends an iteration, which goes to ``on_segment``.

    Args:
        optimizer: the optimizer that trains the weights.
        on_segment: receives every finished iteration, and whether a step ended it.
        verify: ``"first"`` replays the first iteration of each structure and compares, ``"all"`` every one, ``"never"``
            none.
        moving: whether hyperparameters may change from one iteration to the next.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        on_segment: Callable[[Segment, bool], None],
        *,
        verify: str = "first",
        moving: bool = False,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise RuleError(
                f"a training is told by its optimizer, a torch.optim.Optimizer, and this is {optimizer!r:.60}. Give "
                "the object that the loop calls `step()` of."
            )
        self.optimizer = optimizer
        self.wrapped = wrapped(optimizer)
        self.on_segment = _weakly(on_segment)
        self.steps = 0
        self.tape = Tape(self.weights(), moving=moving)
        self.guard = WatchedWeights(optimizer, self.tape)
        # A wrapped optimizer's step is recorded call by call, and needs no rule.
        self.update = RuledUpdate(optimizer, rule_of(optimizer), self.tape) if self.wrapped is None else None
        self.tape.protected = _weakly(self._is_hyperparameter)
        self.library = Library()
        self.watcher = Watcher(self.tape)
        self.verifier = Verifier(verify)
        self.watcher.check_functions = verify != "never"
        if self.wrapped is not None:
            self.watcher.stepping = _weakly(self._is_stepping)
            self.watcher.numbers_held = self.wrapped.hold_numbers
        self._in_closure = False
        self.trainable: set[int] = set()
        self._exit: ExitStack | None = None
        self._thread = 0
        self._sums: list[Tensor] = []
        self._quiet: Any = None
        # What the loop may have caught (`except RuntimeError: continue`), though a part of it is missing since.
        self._error: CaptureError | None = None

    def weights(self) -> list[Tensor]:
        """Every weight of the optimizer, in its order."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def _is_hyperparameter(self, leaf: Tensor) -> bool:
        links = getattr(self.optimizer, "_links", {}).values()
        behind = [found for named in links for link in named.values() for found in leaves_of(link.fixed)]
        return owner_of(leaf) is not None or any(leaf is found for found in behind)

    # -- opening and closing ----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin to watch."""
        if self.optimizer in _open:
            raise CaptureError(
                "this optimizer is watched already: contexts on one optimizer can't be nested. Close the outer one "
                "first, or use its run."
            )
        self._check_weights()
        self.trainable = {id(weight) for weight in self.weights() if weight.requires_grad}
        self._thread = threading.get_ident()
        self.tape.begin()
        with ExitStack() as stack:
            _open.add(self.optimizer)
            stack.callback(_open.discard, self.optimizer)
            stack.enter_context(_eager())
            after = self.optimizer.register_step_post_hook(self._post_step)
            _put_first(cast("OrderedDict[int, Any]", self.optimizer._optimizer_step_post_hooks), after.id)
            for handle in (
                self.optimizer.register_step_pre_hook(self._pre_step),
                after,
                register_optimizer_step_pre_hook(self._pre_foreign_step),
                register_optimizer_step_post_hook(self._post_foreign_step),
            ):
                stack.callback(handle.remove)
            stack.enter_context(see_functions(self.watcher))
            stack.enter_context(self.watcher)
            self._exit = stack.pop_all()

    def close(self, *, failed: bool = False) -> None:
        """Stop watching, whatever happened; the calls since the last step become a last iteration."""
        if self._quiet is not None:
            self._error = _failed_step()
        self._be_quiet(False)
        if self._exit is not None:
            self._exit.close()
            self._exit = None
        if self._error is not None and not failed:
            raise self._error
        if not failed:
            self._seal(check=False)
        self._sums = [weight.detach().sum() for weight in self.weights()]

    def changed_since(self) -> Tensor | None:
        """A weight that was changed since the context ended, if there is one."""
        for weight, total in zip(self.weights(), self._sums, strict=False):
            binding = self.tape.find(weight)
            written = binding is not None and version_of(weight) != binding.version
            # Writes through `.data` leave no trace in the version.
            if written or not torch.allclose(weight.detach().sum(), total, rtol=0, atol=0, equal_nan=True):
                return weight
        return None

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

    def _check_weights(self) -> None:
        self.guard.check_memory()
        for weight in self.weights():
            if weight.is_complex():
                raise CaptureError("complex weights are not supported; train their real and imaginary parts.")
            if getattr(weight, "_post_accumulate_grad_hooks", None):
                raise CaptureError(
                    "a weight has a post-accumulate-grad hook, which runs code inside `backward` that metaopt does "
                    "not see. Remove the hook and do the same in the loop, after `loss.backward()`."
                )

    # -- the optimizer's step -----------------------------------------------------------------------------------------

    def _pre_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self.wrapped is not None:
            return self._pre_wrapped_step(closure, args, kwargs)
        self._refuse_failed_step()
        self.watcher.paused = True
        if closure is None:
            self._before_update()
            self._be_quiet(True)
            return None

        def watched() -> Any:
            self.watcher.paused = False
            with torch.enable_grad():
                value = closure()
            self.watcher.paused = True
            self._before_update()
            self._be_quiet(True)
            return value

        return _with_closure(watched, args, kwargs)

    def _pre_wrapped_step(self, closure: Any, args: Any, kwargs: Any) -> Any:
        """What the update calls is recorded as it runs; all there is to do is to look for what can't be."""
        if steps_on_stack(self.optimizer) > 1:
            return None  # a class that calls the step of its base
        with self.paused():
            self.guard.check()
            for weight in self.weights():
                if weight.grad is not None and weight.grad.is_sparse:
                    raise sparse(weight)
        if not callable(closure):
            return None

        def watched() -> Any:
            self._in_closure = True
            try:
                return closure()
            finally:
                self._in_closure = False

        return _with_closure(watched, args, kwargs)

    def _before_update(self) -> None:
        assert self.update is not None
        with torch._C.DisableTorchFunction():  # while a mode is open, each look at a tensor's attribute costs a call
            self.guard.check()
            self.update.before()

    def _be_quiet(self, quiet: bool) -> None:
        # The rule says what the update does: while it runs, not even the watcher's glance at each call is paid for.
        if quiet and self._quiet is None:
            assert self.update is not None
            self.update.lend_numbers()
            self._quiet = torch._C.DisableTorchFunction()
            self._quiet.__enter__()
        elif not quiet and self._quiet is not None:
            self._quiet.__exit__(None, None, None)
            self._quiet = None
            assert self.update is not None
            self.update.take_numbers_back()

    def _refuse_failed_step(self) -> None:
        if self._quiet is not None:
            self._be_quiet(False)
            self._error = _failed_step()
        if self._error is not None:
            raise self._error

    def _is_stepping(self) -> bool:
        return not self._in_closure and steps_on_stack(self.optimizer) > 0

    def _post_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.wrapped is not None and steps_on_stack(self.optimizer) > 1:
            return
        self._be_quiet(False)
        self.watcher.paused = True
        try:
            with torch._C.DisableTorchFunction():
                if self.update is not None:
                    self.update.after()
                self.steps += 1
                self._seal(check=True)
        finally:
            self.watcher.paused = False

    def _post_foreign_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        inside = self.wrapped is not None and steps_on_stack(self.optimizer) > 0
        if optimizer is not self.optimizer and threading.get_ident() == self._thread and not inside:
            self.watcher.paused = False

    def _pre_foreign_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is self.optimizer or threading.get_ident() != self._thread:
            return  # `_pre_step` follows, after the optimizer's own hooks
        if self.wrapped is not None and steps_on_stack(self.optimizer):
            return  # an optimizer inside the wrapped one, as Lookahead has it
        self.watcher.paused = True
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if id(weight) in self.tape.trained:
                    self.watcher.paused = False
                    raise CaptureError(
                        f"{type(optimizer).__name__}, which is not watched, steps weights of the watched optimizer "
                        "inside the context. Let one optimizer train them."
                    )
                # A hyperparameter, or the weight of another model: whoever needs its old value has it.
                self.tape.before_write(weight)

    # -- iterations -------------------------------------------------------------------------------------------------

    def _seal(self, *, check: bool) -> None:
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
            self.verifier.check(segment, self.tape, self.steps)
        except CaptureError as error:
            self._error = error
            raise


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose object may go: what was recorded is freed with the run, and not when Python looks for cycles."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        there = reference()
        assert there is not None
        return there(*args)

    return call


def _failed_step() -> CaptureError:
    return CaptureError(
        "an `optimizer.step()` inside the context raised an exception, which the loop caught, and went on. What it did "
        "since was not seen. Let the exception end the context."
    )


def _with_closure(closure: Callable[[], Any], args: Any, kwargs: Any) -> Any:
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs


def _put_first(hooks: OrderedDict[int, Any], key: int) -> None:
    # Our hook closes the iteration before the user's own hooks look at the weights; only what an optimizer itself
    # does to its state after the step comes earlier.
    own = [k for k, hook in hooks.items() if getattr(hook, "part_of_step", False)]
    for k in (key, *reversed(own)):
        hooks.move_to_end(k, last=False)


def _eager() -> AbstractContextManager[Any]:
    return torch.compiler.set_stance("force_eager")
