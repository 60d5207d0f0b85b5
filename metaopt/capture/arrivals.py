"""Gradients that a weight has and that no backward pass of the loop made: some are meant, others were made unseen."""

from __future__ import annotations

__all__ = ["Arrivals", "read_gradient", "set_grad"]

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from metaopt.capture.trace import Val
from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.tape import Tape
    from metaopt.capture.watcher import Watcher


class Arrivals:
    """The gradients that came in sight: there before the context, or put there by the loop's own hand."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def note(self, grad: Tensor) -> None:
        """A gradient is there that is what it is."""
        self._known[id(grad)] = grad

    def note_present(self, weights: Iterable[Tensor]) -> None:
        """Weights that come under watch may have gradients from before."""
        for weight in weights:
            if weight.grad is not None:
                self.note(weight.grad)

    def refuse_unseen(self, tape: Tape, weight: Tensor) -> None:
        """Raise if the gradient of a weight came out of sight: it would be taken for a constant."""
        grad = weight.grad
        if grad is None or tape.find(grad) is not None or self._known.get(id(grad)) is grad:
            return
        if tape.alias(grad) is None:
            raise CaptureError(
                f"a weight of shape {tuple(weight.shape)} has a gradient of which metaopt did not see how it was "
                "computed: by a loss or a `backward` in another thread (a pool of workers, say), of a loss from before "
                "the context, or by code that hides from torch's function modes. It depends on the weights, and would "
                "be held constant. Compute losses and their gradients in the thread that opened the context, inside "
                "it; a gradient that is a constant is put there by hand, `weight.grad = gradient`."
            )


def read_gradient(tape: Tape, weight: Tensor) -> Val:
    """The number of a weight's gradient, as ``backward`` left it."""
    grad = weight.grad
    assert grad is not None
    binding = tape.find(grad)
    if binding is None:
        tape.arrivals.refuse_unseen(tape, weight)
        return tape.read(grad)
    return Val(tape.read_binding(binding, grad))


def set_grad(watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``weight.grad = gradient``, by hand."""
    func(*args, **kwargs)
    if isinstance(args[1], Tensor):
        watcher.tape.arrivals.note(args[1])
