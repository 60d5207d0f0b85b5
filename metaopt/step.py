"""``Φ_t = rule ∘ gradient``: the watched loop, cut into iterations where the optimizer steps."""

from __future__ import annotations

__all__ = ["Loop"]

import threading
import warnings
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
from metaopt.capture.trace import Group, Instruction, Val
from metaopt.capture.verify import Verifier
from metaopt.capture.watcher import Watcher
from metaopt.errors import CaptureError, UnusedHyperparameterWarning
from metaopt.hyperparameters import name_of, owner_of
from metaopt.rules import Rule, Update, rule_of
from metaopt.wrapping import refuse_filled, steps_on_stack, wrapped

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
        self.optimizer = optimizer
        self.wrapped = wrapped(optimizer)
        self.rule: Rule = rule_of(optimizer) if self.wrapped is None else _NO_RULE
        self.on_segment = on_segment
        self.steps = 0
        self.tape = Tape(self.weights(), moving=moving)
        self.tape.protected = self._is_hyperparameter
        self.library = Library()
        self.watcher = Watcher(self.tape)
        self.verifier = Verifier(verify)
        self.watcher.check_functions = verify != "never"
        if self.wrapped is not None:
            self.watcher.stepping = self._is_stepping
            self.watcher.numbers_held = self.wrapped.hold_numbers
        self._in_closure = False
        self._exit: ExitStack | None = None
        self._thread = 0
        self._sums: list[Tensor] = []
        self._blind: set[int] = set()
        self._pending: list[tuple[dict[str, Any], list[Tensor], Update, dict[str, Any]]] = []
        self._known = 0
        self._received: set[int] = set()

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
        if self._exit is not None:
            self._exit.close()
            self._exit = None
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
        self.watcher.paused = True
        if closure is None:
            self._before_update()
            return None

        def watched() -> Any:
            self.watcher.paused = False
            with torch.enable_grad():
                value = closure()
            self.watcher.paused = True
            self._before_update()
            return value

        return _with_closure(watched, args, kwargs)

    def _pre_wrapped_step(self, closure: Any, args: Any, kwargs: Any) -> Any:
        """What the update calls is recorded as it runs; all there is to do is to look for what can't be."""
        if steps_on_stack(self.optimizer) > 1:
            return None  # a class that calls the step of its base
        with self.paused():
            self._refuse_other_weights()
            self._refuse_replaced()
            for weight in self.weights():
                if weight.grad is not None and weight.grad.is_sparse:
                    raise _sparse(weight)
        if not callable(closure):
            return None

        def watched() -> Any:
            self._in_closure = True
            try:
                return closure()
            finally:
                self._in_closure = False

        return _with_closure(watched, args, kwargs)

    def _is_stepping(self) -> bool:
        return not self._in_closure and steps_on_stack(self.optimizer) > 0

    def _post_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.wrapped is not None and steps_on_stack(self.optimizer) > 1:
            return
        self.watcher.paused = True
        try:
            self._after_update()
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

    def _before_update(self) -> None:
        """Note what the update reads, and save what it is about to overwrite."""
        self._pending = []
        self._refuse_other_weights()
        self._refuse_replaced()
        for group in self.optimizer.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            self._pending.append(self._read_group(group, weights))
        for group_entry in self._pending:
            for weight in group_entry[1]:
                self.tape.before_write(weight)
                for name in self.rule.state:
                    tensor = self.optimizer.state.get(weight, {}).get(name)
                    if tensor is not None:
                        self.tape.before_write(tensor)

    def _refuse_other_weights(self) -> None:
        if {id(weight) for weight in self.weights()} != set(self.tape.trained):
            raise CaptureError(
                "parameters were added to or removed from the optimizer inside the context. Build the optimizer "
                "before the context, or open a new context for the new parameters."
            )

    def _refuse_replaced(self) -> None:
        # A parameter that was replaced in the model looks like a new hyperparameter, while the old one, which the
        # optimizer still holds, gets no gradient any more.
        known, self._known = self._known, len(self.tape.externals)
        trained, self._received = self._received, {id(w) for w in self.weights() if w.grad is not None}
        new = [external.tensor for external in list(self.tape.externals.values())[known:]]
        made = [b.ref() for b in self.tape.bindings() if b.leaf]
        new += [tensor for tensor in made if tensor is not None and id(tensor) not in self.tape.trained]
        lost = [weight for weight in self.weights() if id(weight) in trained and weight.grad is None]
        shapes = {tensor.shape for tensor in new if isinstance(tensor, torch.nn.Parameter)}
        replaced = [weight for weight in lost if weight.shape in shapes]
        if replaced:
            raise CaptureError(
                f"a parameter of shape {tuple(replaced[0].shape)} was replaced inside the context: the optimizer "
                "still holds the old one, which gets no gradient any more, and the new one is not trained. Change "
                "the values in place, `with torch.no_grad(): parameter.copy_(new)`."
            )

    def _read_group(
        self, group: dict[str, Any], weights: list[Tensor]
    ) -> tuple[dict[str, Any], list[Tensor], Update, dict[str, Any]]:
        tape, rule = self.tape, self.rule
        grads = []
        for weight in weights:
            grad = weight.grad
            assert grad is not None
            if grad.is_sparse:
                raise _sparse(weight)
            grads.append(self._raw(grad))
        update = Update(rule, tuple((flag, group.get(flag, False)) for flag in rule.flags))
        arguments = {
            "weights": Group(list, tuple(self._raw(weight) for weight in weights)),
            "grads": Group(list, tuple(grads)),
            "states": Group(list, tuple(self._states(weight) for weight in weights)),
            "steps": Group(list, tuple(tape.trace.number(self._count(weight) + 1) for weight in weights)),
            "settings": self._settings(group),
        }
        if rule.blind:
            self._warn_blind(arguments)
        return group, weights, update, arguments

    def _warn_blind(self, arguments: dict[str, Any]) -> None:
        # A hypergradient of exactly 0 through a sign is right, and of no use to anybody who does not know why.
        tape = self.tape
        through = tape.trace.behind(arguments["grads"])
        through -= tape.trace.behind((arguments["weights"], arguments["states"], arguments["settings"]))
        for external in tape.externals.values():
            if external.epoch != tape.epoch or external.value not in through or id(external.tensor) in self._blind:
                continue
            self._blind.add(id(external.tensor))
            name = name_of(external.tensor) or f"of shape {tuple(external.tensor.shape)}"
            warnings.warn(
                f"the hyperparameter {name} acts through the gradient, and {self.rule.optimizer.__name__} "
                f"{self.rule.blind}: its derivative through these steps is 0. Train with an optimizer that follows the "
                "gradient (SGD, AdamW, …), or make hyperparameters of the optimizer's own settings.",
                UnusedHyperparameterWarning,
                stacklevel=2,
            )

    def _raw(self, tensor: Tensor) -> Val:
        binding = self.tape.find(tensor)
        return self.tape.read(tensor) if binding is None else Val(self.tape.read_binding(binding, tensor))

    def _states(self, weight: Tensor) -> tuple[Val | None, ...]:
        state = self.optimizer.state.get(weight, {})
        values: list[Val | None] = []
        for name in self.rule.state:
            tensor = state.get(name)
            if tensor is None:
                values.append(None)
                continue
            if self.tape.find(tensor) is None:
                self.tape.bind(tensor)
            values.append(self._raw(tensor))
        return tuple(values)

    def _count(self, weight: Tensor) -> int:
        step = self.optimizer.state.get(weight, {}).get("step", 0)
        return int(step)

    def _settings(self, group: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
        """Every continuous setting: a number, or its hyperparameter times the scheduler's factor."""
        tape, rule = self.tape, self.rule
        linked = getattr(self.optimizer, "linked_settings", None)
        links: dict[str, tuple[Tensor, float, float]] = linked(group) if linked is not None else {}
        found = {name: rule.number(group, name) for name in rule.settings}
        numbers = {name: number for name, number in found.items() if number is not None}
        plain = {n: float(v.detach() if isinstance(v, Tensor) else v) for n, v in numbers.items()}
        for name, number in plain.items():
            rule.check(name, number)
        differentiable = frozenset(links) | {
            name for name, number in numbers.items() if isinstance(number, Tensor) and self.tape.is_live(number)
        }
        for name in differentiable:
            rule.refuse_flat(name)
        if rule.refuse is not None:
            rule.refuse({**group, **plain}, differentiable)
        settings: list[tuple[str, Any]] = []
        for name, number in numbers.items():
            if name in links and not (isinstance(number, Tensor) and tape.is_live(number)):
                spec: Any = self._scheduled(*links[name], plain[name])
            elif isinstance(number, Tensor) and tape.is_live(number):
                refuse_filled(number)
                spec = self._raw(number)
            else:
                spec = tape.trace.number(plain[name])
            settings.append((name, spec))
        return tuple(settings)

    def _scheduled(self, value: Tensor, slope: float, rest: float, number: float) -> Any:
        """``slope · λ + rest``, what a scheduler made of a hyperparameter."""
        tape = self.tape
        if slope == 0.0:
            return tape.trace.number(number)
        spec: Any = tape.read(value)
        if slope != 1.0:
            spec = Val(tape.trace.emit(torch.mul, spec, tape.trace.number(slope))[0])
        if rest != 0.0:
            spec = Val(tape.trace.emit(torch.add, spec, tape.trace.number(rest))[0])
        return spec

    def _after_update(self) -> None:
        """Record the update, now that the optimizer has made its state."""
        tape = self.tape
        for _, weights, update, given in self._pending:
            places: list[tuple[Tensor, int]] = []
            for weight in weights:
                places.append((weight, tape.trace.new()))
                state = self.optimizer.state.get(weight, {})
                for name in self.rule.state:
                    tensor = state.get(name)
                    if tensor is not None:
                        places.append((tensor, tape.trace.new()))
            args = (given["weights"], given["grads"], given["states"], given["steps"])
            outs = tuple(value for _, value in places)
            tape.trace.code.append(Instruction(update, args, given["settings"], outs, many=True))
            trained = {id(weight) for weight in weights}
            for tensor, value in places:
                is_weight = id(tensor) in trained
                tape.define(tensor, value, inner=int(is_weight), leaf=is_weight)
        self._pending = []

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
                self.verifier.check(segment, self.tape, self.steps)
            self.on_segment(segment, check)


def _with_closure(closure: Callable[[], Any], args: Any, kwargs: Any) -> Any:
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs


def _sparse(weight: Tensor) -> CaptureError:
    return CaptureError(
        f"a weight of shape {tuple(weight.shape)} has a sparse gradient, which has no second derivative. Use dense "
        "gradients (`nn.Embedding(..., sparse=False)`)."
    )


def _no_update(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a wrapped optimizer has no rule")


_NO_RULE = Rule(Optimizer, _no_update, settings={})


def _put_first(hooks: OrderedDict[int, Any], key: int) -> None:
    # Our hook closes the iteration before the user's own hooks look at the weights; only what an optimizer itself
    # does to its state after the step comes earlier.
    own = [k for k, hook in hooks.items() if getattr(hook, "part_of_step", False)]
    for k in (key, *reversed(own)):
        hooks.move_to_end(k, last=False)


def _eager() -> AbstractContextManager[Any]:
    return torch.compiler.set_stance("force_eager")
