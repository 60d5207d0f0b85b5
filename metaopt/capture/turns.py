"""Calls that turn a tensor into another view of its memory (``x.t_()``, ``x.squeeze_()``), and write nothing."""

from __future__ import annotations

__all__ = ["TURNS", "turn"]

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt.capture.bindings import BASE, View
from metaopt.capture.cells import version_of

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher

_NAMES = ("squeeze", "unsqueeze", "t", "transpose", "swapaxes", "swapdims")
# What makes such a view of a tensor, by what makes one of it in place.
TURNS: dict[Callable[..., Any], Callable[..., Any]] = {getattr(Tensor, f"{n}_"): getattr(torch, n) for n in _NAMES}


def turn(watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view is another view from here on, of what it was; its base, and other views of that, are what they were."""
    tape, tensor = watcher.tape, args[0]
    binding = tape.find(tensor)
    if binding is None or binding.base is None:
        result = watcher.call(func, args, kwargs)
        for view in tape.living() if binding is not None else ():
            if view.base is binding:
                view.via = None  # it is one of what this tensor was
        return result
    tape.read_binding(binding, tensor)
    tape.before_write(tensor)
    result = func(*args, **kwargs)
    binding.turn(View(TURNS[func], (BASE, *args[1:]), kwargs, 1, 0, not torch.is_grad_enabled()))
    if (owner := binding.root.ref()) is not None:
        binding.root.version = version_of(owner)  # which torch counts for the memory, though nothing was written
    return result
