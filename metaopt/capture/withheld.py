"""Training gradients that hyperparameters don't get inside a context, and the loop that looks for them."""

from __future__ import annotations

__all__ = ["Withheld", "get_grad"]

import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from metaopt.capture.tape import Tape
from metaopt.capture.trace import Trace, Val
from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher


class Withheld:
    """The leaves that got no training gradient, where the bare loop's would have."""

    def __init__(self) -> None:
        self._leaves: set[int] = set()
        # The last losses that may reach such.
        self._reaching: deque[tuple[Trace, tuple[Val, ...]]] = deque(maxlen=4)

    def add(self, tape: Tape, losses: tuple[Val, ...]) -> None:
        """``backward`` of these reaches the trained weights alone, and none of the hyperparameters behind them."""
        self._leaves.update(tape.externals)
        self._reaching.append((tape.trace, losses))

    def has(self, tape: Tape, leaf: Tensor) -> bool:
        """Whether a leaf may be one of them."""
        external = tape.externals.get(id(leaf)) if id(leaf) in self._leaves else None
        return external is not None and external.tensor is leaf and leaf.is_leaf

    def lacks(self, tape: Tape, leaf: Tensor) -> bool:
        """Whether the bare loop's training would give a leaf a gradient that it does not have here."""
        external = tape.externals.get(id(leaf))
        if external is None or id(leaf) not in self._leaves:
            return False
        return any(
            external.value in trace.externals and external.value in trace.behind(losses)
            for trace, losses in self._reaching
        )

    def forget(self, leaf: Tensor) -> None:
        """What a leaf lacks would be gone by now."""
        self._leaves.discard(id(leaf))


def get_grad(watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Tensor.grad``: where the bare loop would see a gradient that is not there, it is an error."""
    grad = func(*args, **kwargs)
    tensor = args[0]
    if watcher.withheld.has(watcher.tape, tensor):
        reader = _reader()
        if reader == "zero_grad":
            watcher.withheld.forget(tensor)
        elif grad is None and reader not in ("record", "accumulate"):
            raise CaptureError(
                f"the `.grad` of a tensor of shape {tuple(tensor.shape)} was read inside the context, and is not "
                "there: the tensor requires grad and the watched optimizer does not train it, so it is taken for a "
                "hyperparameter, which gets no training gradient. If it is a part of the model, freeze it "
                "(`requires_grad_(False)`) or give it to the optimizer; if the loop updates it by hand, or takes "
                "gradients at it, make it inside the context by `x.requires_grad_()`: a `Parameter` can't be told "
                "from a hyperparameter."
            )
    return grad


def _reader() -> str:
    """The name of the function that looks."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("metaopt.capture"):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else frame.f_code.co_name
