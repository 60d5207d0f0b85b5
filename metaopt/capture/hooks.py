"""The user's gradient hooks: the replay runs them, and so they must be functions of the gradient alone."""

from __future__ import annotations

__all__ = ["refuse_live_closure"]

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.tape import Tape


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
