"""Seeing ``torch.autograd.Function.apply``, which torch's function modes don't show.

The calls inside a custom function's forward are not what its gradient is made of, so the function must be recorded as
one. Its ``apply`` is often bound long before the context (``relu6 = MyReLU6.apply``); all of them end in the base
class, where this looks in while a context is open and in no other thread.
"""

from __future__ import annotations

__all__ = ["see_functions"]

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch.autograd import Function


class Watcher(Protocol):
    """Who is shown custom functions."""

    def apply(self, cls: type, original: Any, args: Any, kwargs: Any) -> Any:
        """Call one; ``original`` is its ``apply``."""
        ...


_watchers = threading.local()
_lock = threading.Lock()
_users = 0
# `Function.apply` calls `super().apply`: the next class in line is where every bound `apply` passes.
_NEXT: Any = Function.__mro__[1]


def _apply(cls: type, *args: Any, **kwargs: Any) -> Any:
    original = super(_NEXT, cls).apply
    active = getattr(_watchers, "stack", None)
    if not active:
        return original(*args, **kwargs)
    return active[-1].apply(cls, original, args, kwargs)


@contextmanager
def see_functions(watcher: Watcher) -> Iterator[None]:
    """While open, custom functions called in this thread are shown to the watcher."""
    global _users
    with _lock:
        if _users == 0:
            _NEXT.apply = classmethod(_apply)
        _users += 1
    stack = _watchers.__dict__.setdefault("stack", [])
    stack.append(watcher)
    try:
        yield
    finally:
        stack.remove(watcher)
        with _lock:
            _users -= 1
            if _users == 0:
                del _NEXT.apply
