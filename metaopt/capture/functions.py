"""Custom ``torch.autograd.Function``s, which torch's function modes don't show.

The calls inside a custom function's forward are not what its gradient is made of, so the function must be recorded as
one. Its ``apply`` is often bound long before the context (``relu6 = MyReLU6.apply``); all of them end in the base
class, where this looks in while a context is open and in no other thread.
"""

from __future__ import annotations

__all__ = ["apply_function", "see_functions"]

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.autograd import Function
from torch.nn.modules._functions import BackwardHookFunction

from metaopt.capture.cells import version_of
from metaopt.capture.chosen import chosen
from metaopt.capture.custom import Surrogate
from metaopt.capture.hooks import module_hooks, observe_module_hooks
from metaopt.capture.primitives import flatten
from metaopt.capture.replacements import FUNCTIONS, rejection_sampler
from metaopt.capture.seams import Seam
from metaopt.capture.surroundings import generators
from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher


class _Sees(Protocol):
    """Who is shown custom functions."""

    def apply(self, cls: type, original: Any, args: Any, kwargs: Any) -> Any:
        """Call one; ``original`` is its ``apply``."""
        ...


_watchers = threading.local()
# `Function.apply` calls `super().apply`: the next class in line is where every bound `apply` passes.
_NEXT: Any = Function.__mro__[1]


def _apply(cls: type, *args: Any, **kwargs: Any) -> Any:
    original = super(_NEXT, cls).apply
    active = getattr(_watchers, "stack", None)
    if not active:
        return original(*args, **kwargs)
    return active[-1].apply(cls, original, args, kwargs)


_SEAM = Seam(_NEXT, "apply", classmethod(_apply))


@contextmanager
def see_functions(watcher: _Sees) -> Iterator[None]:
    """While open, custom functions called in this thread are shown to the watcher."""
    stack = _watchers.__dict__.setdefault("stack", [])
    with _SEAM.open():
        stack.append(watcher)
        try:
            yield
        finally:
            stack.remove(watcher)


def apply_function(
    watcher: Watcher, cls: type, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Record an ``autograd.Function`` as one call, so that the replay goes through its own backward."""
    tape = watcher.tape
    sources = flatten(args)
    if not any(tape.is_live(tensor) for tensor in sources):
        return apply(*args, **kwargs)
    if cls is BackwardHookFunction:
        hooks = observe_module_hooks(watcher)
        result = apply(*args, **kwargs)
        watcher.record(module_hooks, (hooks, *args), kwargs, result, phased=True)
        return result
    if cls.__name__ == "CheckpointFunction":
        raise CaptureError(
            "`torch.utils.checkpoint` with `use_reentrant=True` runs a second backward pass inside the first one, "
            "which can't be differentiated. Pass `use_reentrant=False`."
        )
    replacement = FUNCTIONS.get((cls.__module__, cls.__qualname__))
    if replacement is None:
        inner = any(tape.inner_of(tensor) for tensor in sources)
        replacement = chosen(cls, args, kwargs, inner=inner, check=watcher.check_functions)
    if cls is torch.distributions.dirichlet._Dirichlet:
        raise rejection_sampler()
    seed = generators(apply, kwargs)
    versions = [version_of(tensor) for tensor in sources]
    result = apply(*args, **kwargs)
    if versions != [version_of(tensor) for tensor in sources]:
        raise CaptureError(
            f"`{cls.__name__}` (a torch.autograd.Function) writes its arguments in place; let it return new tensors."
        )
    watcher.record(replacement, args, kwargs, result, seed, phased=isinstance(replacement, Surrogate))
    return result
