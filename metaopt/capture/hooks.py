"""The user's gradient hooks: the replay runs them, and so they must be functions of the gradient alone.

What a hook keeps of the gradients that it is shown comes out of the middle of a backward pass, of which the tape knows
the results only. It may be logged, and no hypergradient may go through it.
"""

from __future__ import annotations

__all__ = ["ModuleHooks", "Observed", "in_forward", "module_hooks", "observe_module_hooks", "observed"]

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import BackwardHook

from metaopt.capture.bindings import Unseen
from metaopt.capture.primitives import Phase, flatten
from metaopt.capture.trace import needed
from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.tape import Tape
    from metaopt.capture.watcher import Watcher

_SHOWN = Unseen(
    "that a gradient hook was shown, and kept",
    "To use the gradient of an activation, call `x.retain_grad()` and read `x.grad` after `backward`.",
)


class Observed:
    """A gradient hook, of which the tape sees what it computes while the loop's backward pass runs.

    Args:
        watcher: who shows it to the tape.
        hook: the hook.
        inside: whether a model's ``forward`` set it, so that an objective that the model computes has it too.
    """

    def __init__(self, watcher: Watcher, hook: Callable[..., Any], *, inside: bool = False) -> None:
        self._watcher = watcher
        self._hook = hook
        self._inside = inside
        self.changes = False

    def __call__(self, *given: Any) -> Any:
        watcher = self._watcher
        if not watcher.in_backward:
            return self._hook(*given)
        tape = watcher.tape
        shown = flatten(given)
        for tensor in shown:
            if tape.find(tensor) is None:
                tape.shade(tensor, _SHOWN)
        start, held = len(tape.trace.code), tape.numbers_of(shown)
        watcher.paused = False
        try:
            with watcher:  # which is out of the way while it handles the call of `backward`
                result = self._hook(*given)
        finally:
            watcher.paused = True
        if result is not None:
            self.changes = True
            tape.hooked_inside = tape.hooked_inside or self._inside
        # A hook that returns nothing may have written what it was shown.
        left = tape.numbers_of(shown if result is None else flatten([result]))
        _refuse_live(tape, start, held | tape.entered(shown), left)
        return result


def in_forward() -> bool:
    """Whether a module is being called."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is torch.nn.Module._call_impl.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def observe_module_hooks(watcher: Watcher) -> ModuleHooks:
    """See the hooks of ``register_full_backward_hook`` that are being set up for one call of a module."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name != "_apply_on_tensors":
        frame = frame.f_back
    setup = frame.f_locals["self"]
    for name in ("user_hooks", "user_pre_hooks"):
        hooks = getattr(setup, name, None) or []
        setattr(setup, name, [hook if isinstance(hook, Observed) else Observed(watcher, hook) for hook in hooks])
    above = frame.f_back
    return ModuleHooks(setup, leaves=above is not None and above.f_code.co_name == "setup_output_hook")


class ModuleHooks:
    """The gradient hooks of one call of a module, where it is entered, or where it is left (``leaves``)."""

    def __init__(self, setup: BackwardHook, *, leaves: bool) -> None:
        self._setup = setup
        self._leaves = leaves

    def attach(self, phase: Phase, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Put the hooks that changed gradients of the loop between these tensors and what comes after them."""
        setup = self._setup
        again = phase.modules.get(id(setup))
        if again is None:
            again = phase.modules[id(setup)] = BackwardHook(
                setup.module, _changing(phase, setup.user_hooks), _changing(phase, setup.user_pre_hooks)
            )
            again.n_inputs = setup.n_inputs
        if not (again.user_hooks or again.user_pre_hooks):
            return tensors
        count, found = setup.n_inputs, setup.input_tensors_index
        if self._leaves:
            count, found = setup.n_outputs, setup.output_tensors_index
        places: list[int] = found or []
        args: list[Any] = [None] * count
        for place, tensor in zip(places, tensors, strict=True):
            args[place] = tensor
        results = (again.setup_output_hook if self._leaves else again.setup_input_hook)(tuple(args))
        return tuple(results[place] for place in places)


def _changing(phase: Phase, hooks: Iterable[Observed]) -> list[Callable[..., Any]]:
    """The hooks that changed the loop's gradients, for the loop's gradients only; the others look on, and have."""
    found = [hook for hook in hooks if hook.changes]
    return [lambda *given, hook=hook: hook(*given) if phase.inner else None for hook in found]


def module_hooks(phase: Phase, hooks: ModuleHooks, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What the replay calls where a module with gradient hooks is entered or left."""
    return hooks.attach(phase, tensors)


@contextmanager
def observed(watcher: Watcher, leaves: Iterable[Tensor]) -> Iterator[None]:
    """While open, the hooks that these tensors were given before the context are seen as well."""
    seen = []
    for leaf in leaves:
        hooks: dict[int, Any] = leaf._backward_hooks or {}
        for key, hook in hooks.items():
            if not isinstance(hook, Observed):
                seen.append((hooks, key, hook))
    for hooks, key, hook in seen:
        hooks[key] = Observed(watcher, hook)
    try:
        yield
    finally:
        for hooks, key, hook in seen:
            if key in hooks:  # a hook may remove itself
                hooks[key] = hook


def _refuse_live(tape: Tape, start: int, shown: set[int], left: set[int]) -> None:
    """Refuse a hook that leaves a gradient which depends on more than it was shown: the replay has no other to read."""
    code = tape.trace.code[start:]
    used = left.union(*(code[index].used() for index in needed(code, left, shown)))
    made = {value for instruction in code for value in instruction.defined()}
    if used - made - shown - set(tape.trace.constants):
        raise CaptureError(
            "a gradient hook reads a tensor that is trained or a hyperparameter, or was computed from one, and changes "
            "the gradient by it. The replay runs the hook, and can't show it that tensor as it was. Change the "
            "gradients in the loop instead, after `loss.backward()`."
        )
