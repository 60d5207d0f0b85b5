"""Functions that are handed on: the closure that a ``step`` may be given, and methods that hold nothing alive."""

from __future__ import annotations

__all__ = ["closure_of", "weakly", "with_closure"]

import weakref
from collections.abc import Callable
from typing import Any


def closure_of(args: Any, kwargs: Any) -> Any:
    """What a ``step`` with these arguments, of which the optimizer is the first, gets as its closure."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def with_closure(closure: Callable[[], Any], args: Any, kwargs: Any) -> Any:
    """The same arguments with another closure."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose object may go: what was recorded is freed with the run, and not when Python looks for cycles."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        there = reference()
        assert there is not None
        return there(*args)

    return call
