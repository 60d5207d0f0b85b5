"""Where the steps of optimizers begin and end, and where they get weights: hooks among the user's own."""

from __future__ import annotations

__all__ = ["Home", "clearing", "elsewhere", "method_hooks", "step_hooks"]

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from metaopt.errors import CaptureError

# What runs before a step and what runs after it, as torch calls them.
_Hooks = tuple[Callable[[Optimizer, Any, Any], Any], Callable[[Optimizer, Any, Any], None]]
_Around = Callable[..., AbstractContextManager[Any]]


class Home:
    """The thread that opens a context; torch shows the calls of a loop to its own thread only."""

    def __init__(self) -> None:
        self._thread = threading.current_thread()  # the object: its number may be given to another

    def is_here(self) -> bool:
        """Whether this is it."""
        return threading.current_thread() is self._thread


def elsewhere(what: str) -> CaptureError:
    """The error for what a context met with in another thread."""
    return CaptureError(
        f"the context {what} in another thread than the one that opened it, and torch shows the calls of a loop to its "
        "own thread only, so a part of the training was not seen. Open the context and run the loop in one thread: "
        "all of it in a worker, or none. (A generator that is resumed by a pool of workers changes threads.) Other "
        "threads may load data."
    )


@contextmanager
def step_hooks(optimizers: Sequence[Optimizer], own: _Hooks, others: _Hooks) -> Iterator[None]:
    """While open, hooks run right before and right after the steps of these optimizers, and around all others.

    Args:
        optimizers: the optimizers that are watched.
        own: what runs before their steps, after the user's hooks; and after them, before the user's hooks.
        others: what runs around the steps of others, and around those in another thread.
    """
    first: dict[int, int] = {}
    home = Home()

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if id(optimizer) in first and home.is_here():
            # Ours follows, after all of the optimizer's own hooks: what they do is a part of the loop.
            cast("OrderedDict[int, Any]", optimizer._optimizer_step_pre_hooks).move_to_end(first[id(optimizer)])
            return None
        return others[0](optimizer, args, kwargs)

    with ExitStack() as stack:
        for optimizer in optimizers:
            began, ended = optimizer.register_step_pre_hook(own[0]), optimizer.register_step_post_hook(own[1])
            stack.callback(began.remove)
            stack.callback(ended.remove)
            first[id(optimizer)] = began.id
            _put_first(cast("OrderedDict[int, Any]", optimizer._optimizer_step_post_hooks), ended.id)
        stack.callback(register_optimizer_step_pre_hook(before).remove)
        stack.callback(register_optimizer_step_post_hook(others[1]).remove)
        yield


@contextmanager
def method_hooks(optimizers: Iterable[Optimizer], name: str, around: _Around) -> Iterator[None]:
    """While open, a context is entered around each call of a method of these optimizers that torch has no hook for.

    Args:
        optimizers: the optimizers that are watched.
        name: of the method.
        around: makes the context, of the call's arguments.
    """
    with ExitStack() as stack:
        for optimizer in optimizers:
            own = optimizer.__dict__.get(name)
            setattr(optimizer, name, _within(around, getattr(optimizer, name)))
            if own is None:
                stack.callback(optimizer.__dict__.pop, name, None)
            else:
                stack.callback(setattr, optimizer, name, own)
        yield


def clearing(optimizers: Iterable[Optimizer]) -> AbstractContextManager[None]:
    """While open, torch's ``zero_grad`` lets gradients go without a watcher's look at each of them."""
    torchs = [optimizer for optimizer in optimizers if type(optimizer).zero_grad is Optimizer.zero_grad]
    return method_hooks(torchs, "zero_grad", _unseen)


def _unseen(set_to_none: bool = True) -> AbstractContextManager[Any]:
    return torch._C.DisableTorchFunction() if set_to_none else nullcontext()


def _within(around: _Around, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def within(*args: Any, **kwargs: Any) -> Any:
        with around(*args, **kwargs):
            return call(*args, **kwargs)

    return within


def _put_first(hooks: OrderedDict[int, Any], key: int) -> None:
    # Our hook closes the iteration before the user's own hooks look at the weights; only what an optimizer itself
    # does to its state after the step comes earlier.
    own = [k for k, hook in hooks.items() if getattr(hook, "part_of_step", False)]
    for k in (key, *reversed(own)):
        hooks.move_to_end(k, last=False)
