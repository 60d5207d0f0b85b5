"""Custom ``torch.autograd.Function``s, which torch's function modes don't show.

The calls inside a custom function's forward are not what its gradient is made of, so the function must be recorded as
one.
"""

from __future__ import annotations

__all__ = ["apply_function"]

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules._functions import BackwardHookFunction

from metaopt.capture.cells import version_of
from metaopt.capture.chosen import chosen
from metaopt.capture.custom import Surrogate
from metaopt.capture.hooks import module_hooks, observe_module_hooks
from metaopt.capture.primitives import flatten
from metaopt.capture.replacements import FUNCTIONS, rejection_sampler
from metaopt.capture.surroundings import generators
from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher


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
