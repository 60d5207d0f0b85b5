"""The user's gradient hooks: the replay runs them, and so they must be functions of the gradient alone.

What a hook keeps of the gradients that it is shown comes out of the middle of a backward pass, of which the tape knows
the results only. It may be logged, and no hypergradient may go through it.
"""

from __future__ import annotations

__all__ = ["Observed", "observe_module_hooks", "refuse_live_closure"]

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt.capture.bindings import Unseen
from metaopt.capture.primitives import flatten
from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.tape import Tape
    from metaopt.capture.watcher import Watcher

_SHOWN = Unseen(
    "that a gradient hook was shown, and kept",
    "To use the gradient of an activation, call `x.retain_grad()` and read `x.grad` after `backward`.",
)


class Observed:
    """A gradient hook, of which the tape sees what it computes while the loop's backward pass runs."""

    def __init__(self, watcher: Watcher, hook: Callable[..., Any]) -> None:
        self._watcher = watcher
        self._hook = hook

    def __call__(self, *given: Any) -> Any:
        watcher = self._watcher
        if not watcher.in_backward:
            return self._hook(*given)
        for tensor in flatten(given):
            if watcher.tape.find(tensor) is None:
                watcher.tape.shade(tensor, _SHOWN)
        watcher.paused = False
        try:
            with watcher:  # which is out of the way while it handles the call of `backward`
                return self._hook(*given)
        finally:
            watcher.paused = True


def observe_module_hooks(watcher: Watcher) -> None:
    """See the hooks of ``register_full_backward_hook`` that are being set up for one call of a module."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name != "_apply_on_tensors":
        frame = frame.f_back
    setup = frame.f_locals.get("self")
    for name in ("user_hooks", "user_pre_hooks"):
        hooks = getattr(setup, name, None) or []
        setattr(setup, name, [hook if isinstance(hook, Observed) else Observed(watcher, hook) for hook in hooks])


def refuse_live_closure(tape: Tape, hook: Callable[..., Any]) -> None:
    """Refuse a gradient hook that reads weights or hyperparameters: the replay can't give it others to read."""
    code = getattr(hook, "__code__", None)
    held = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or () if cell.cell_contents is not hook]
    held += list(getattr(hook, "__defaults__", None) or ())
    held += [getattr(hook, "__self__", None), *getattr(hook, "args", ()), *getattr(hook, "keywords", {}).values()]
    if code is not None:
        held += [hook.__globals__[name] for name in code.co_names if name in hook.__globals__]
    while held:
        entry = held.pop()
        if isinstance(entry, (list, tuple)):
            held += entry
        elif isinstance(entry, dict):
            held += entry.values()
        elif isinstance(entry, torch.nn.Module):
            held += entry.parameters()
        elif isinstance(entry, Tensor) and tape.is_live(entry):
            raise CaptureError(
                f"a gradient hook reads a tensor of shape {tuple(entry.shape)} that is trained or a hyperparameter. "
                "The replay runs the hook, and can't show it that tensor as it was. Change the gradients in the loop "
                "instead, after `loss.backward()`."
            )
