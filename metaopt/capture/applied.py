"""Where calls of custom ``torch.autograd.Function``s are seen.

Their ``apply`` is often bound long before the context (``relu6 = MyReLU6.apply``). Until torch 2.14 all of them end in
a method of a base class, where this looks in while a context is open and in no other thread. Since torch 2.15 ``apply``
is C's own, and nothing passes there; so it is a method again as soon as metaopt is imported, and what was bound before
is found out by what C looks up in the class, and refused.
"""

from __future__ import annotations

__all__ = ["see_functions"]

import threading
from collections.abc import Callable
from functools import cache, wraps
from types import BuiltinMethodType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import DisableTorchFunction
from torch.autograd import Function
from torch.autograd.function import FunctionMeta

from metaopt.capture.primitives import flatten
from metaopt.capture.seams import Seam
from metaopt.errors import CaptureError


class _Sees(Protocol):
    """Who is shown custom functions."""

    def apply(self, cls: type, original: Any, args: Any, kwargs: Any) -> Any:
        """Call one; ``original`` is its ``apply``."""
        ...


class _Here(threading.local):
    """What goes on in a thread.

    Attributes:
        watchers: who is shown custom functions, the last one first.
        shown: how many calls that were shown are being computed.
        unseen: the class whose ``apply`` C began to compute without one.
    """

    def __init__(self) -> None:
        self.watchers: list[_Sees] = []
        self.shown = 0
        self.unseen: type | None = None


_here = _Here()
_IN_C = isinstance(Function.apply, BuiltinMethodType)
# `Function.apply` calls `super().apply`: the next class in line is where every bound `apply` passes.
_PLACE: Any = Function if _IN_C else Function.__mro__[1]


def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Call a custom function; who watches in this thread is shown it."""
    original = super(_PLACE, cls).apply
    if not _here.watchers:
        return original(*args, **kwargs)
    return _here.watchers[-1].apply(cls, _shown(original) if _IN_C else original, args, kwargs)


def _shown(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        _here.shown += 1
        try:
            return original(*args, **kwargs)
        finally:
            _here.shown -= 1

    return call


def _looked_up(cls: type, name: str) -> Any:
    """An attribute of a class of functions; of those that C looks up in turn, the last one is the forward."""
    value = type.__getattribute__(cls, name)
    if name == "_backward_cls":
        _here.unseen = cls if _here.watchers and not _here.shown else None
    elif name == "forward" and _here.unseen is cls:
        _here.unseen = None
        return _refusing(cls, value)
    return value


def _refusing(cls: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a function whose call was not shown. Of no floating-point tensors it does no harm."""

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = flatten([a for a in (*args, *kwargs.values()) if isinstance(a, (Tensor, list, tuple, dict))])
        if any(tensor.dtype.is_floating_point for tensor in tensors):
            raise CaptureError(
                f"`{cls.__name__}.apply` (of a torch.autograd.Function) was bound to a name before metaopt was "
                "imported, and this version of torch does not show calls of it. Import metaopt before the module that "
                f"binds it, or write `{cls.__name__}.apply(...)` where it is called."
            )
        return forward(*args, **kwargs)

    return call


if _IN_C:
    Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
_SEAM = Seam(FunctionMeta, "__getattribute__", _looked_up) if _IN_C else Seam(_PLACE, "apply", classmethod(apply))


class _Probe(Function):
    """A function that does nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Counts:
    """Counts what it is shown."""

    calls = 0

    def apply(self, cls: type, original: Any, args: Any, kwargs: Any) -> Any:
        self.calls += 1
        return original(*args, **kwargs)


_bound = _Probe.apply


@cache
def _require_sight() -> None:
    """Raise if this torch calls custom functions in a way that is not seen: they would be followed wrongly, in silence.

    Raises:
        CaptureError: with the versions that do.
    """
    counts, x = _Counts(), torch.zeros(1, device="cpu")
    with _SEAM.open(), DisableTorchFunction():
        _here.watchers.append(counts)
        try:
            _bound(x)
            _Probe.apply(x)
        finally:
            _here.watchers.remove(counts)
    if counts.calls != 2:
        raise CaptureError(
            f"torch {torch.__version__} calls custom torch.autograd.Functions in a way that metaopt does not see, so "
            "that their backward would be left out. Use torch 2.6 to 2.15, or a later version of metaopt."
        )


class see_functions:
    """While open, custom functions called in this thread are shown to the watcher."""

    def __init__(self, watcher: _Sees) -> None:
        self._watcher = watcher

    def __enter__(self) -> None:
        _require_sight()
        self._watchers = _here.watchers  # this thread's, wherever the context is left
        _SEAM.__enter__()
        self._watchers.append(self._watcher)

    def __exit__(self, *_: object) -> None:
        self._watchers.remove(self._watcher)
        _SEAM.__exit__()
