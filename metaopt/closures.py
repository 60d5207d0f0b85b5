"""The closure that a ``step`` may be given."""

from __future__ import annotations

__all__ = ["closure_of", "with_closure"]

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
