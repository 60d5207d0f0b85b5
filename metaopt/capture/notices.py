"""What the loop's author is told: where a derivative ends in a Python number, and that compiled code runs eagerly."""

from __future__ import annotations

__all__ = ["Notices", "name_of"]

import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from metaopt.errors import EagerWarning, HeldConstantWarning, user_frame, warn


def name_of(func: Callable[..., Any]) -> str:
    """A function's plain name."""
    return getattr(func, "__name__", None) or type(func).__name__


# What to do in place of functions of torch that take numbers out of what they are given, by module.
_INSTEAD = {
    "torch.nn.utils.clip_grad": (
        " A threshold for clipping that is a hyperparameter is followed where the loop scales the gradients itself: "
        "docs, gotchas, 'A threshold for clipping' has the lines."
    )
}


class Notices:
    """Warnings about a loop, each once a line of the user's."""

    def __init__(self) -> None:
        self._said: set[tuple[CodeType, int]] = set()

    def number_given(self, func: Callable[..., Any]) -> None:
        """A call was given a number that carries its derivative, and has no use for that."""
        if self._is_new():
            warn(
                f"`{name_of(func)}` was called with a number of the optimizer's param group that comes from a "
                "hyperparameter; metaopt holds the number constant there, so what this call does has no derivative by "
                "it. Use the hyperparameter itself, a tensor, in place of the group's number. To silence: "
                "`warnings.simplefilter('ignore', metaopt.HeldConstantWarning)`.",
                HeldConstantWarning,
            )

    def number_taken(self, name: str) -> None:
        """A value that depends on the weights became a Python number."""
        if self._is_new():
            callers = {frame.f_globals.get("__name__") for frame in _frames(user_frame())}
            warn(
                f"`{name}` took a Python number out of a tensor that depends on the weights or hyperparameters; "
                "metaopt holds that number constant. This is right for logging; if it goes back into the training, "
                "keep it a tensor (`x.detach()`). To silence: "
                "`warnings.simplefilter('ignore', metaopt.HeldConstantWarning)`."
                + "".join(cure for module, cure in _INSTEAD.items() if module in callers),
                HeldConstantWarning,
            )

    def compiled(self) -> bool:
        """Look whether the present call comes from a compiled function, and say that it runs eagerly."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "compile_wrapper":
            frame = frame.f_back
        if frame is not None:
            warn(
                "a compiled model or function runs eagerly inside the context: compiled code can't be differentiated "
                "twice.",
                EagerWarning,
            )
        return frame is not None

    def _is_new(self) -> bool:
        frame = sys._getframe(user_frame())
        place = (frame.f_code, frame.f_lineno)
        new = place not in self._said
        self._said.add(place)
        return new


def _frames(count: int) -> Iterator[FrameType]:
    """The frames above the caller, so many of them."""
    frame = sys._getframe(1)
    for _ in range(count):
        if frame is None or frame.f_back is None:
            return
        frame = frame.f_back
        yield frame
