"""Custom functions as the replay calls them, where their own backward would not do."""

from __future__ import annotations

__all__ = ["Custom", "Flagged", "Plain", "Surrogate", "true_forward"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.capture.flags import Flags, held
from metaopt.capture.primitives import Phase, seeded


class _Own(torch.autograd.Function):
    """A custom function, whose last arguments are the phase, if the sweep goes through its forward, and what it is.

    Its backward may do with gradients what it likes, and add to them; then it must not be called in the sweep: not even
    with zeros, nor for what its saved outputs depend on.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        *args, phase, custom = given
        known = [torch.default_generator]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            known += list(torch.cuda.default_generators)
        ctx.metaopt = phase, custom, args, tuple((g, g.get_state()) for g in known)
        function = custom.function
        with held(custom.flags):
            if not _is_split(function):
                return function.forward(ctx, *args)
            output = function.forward(*args)
            function.setup_context(ctx, tuple(args), output)
            return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        phase, custom, args, states = ctx.metaopt
        if phase is None or phase.inner:
            with held(custom.flags):
                found = custom.function.backward(ctx, *grads)
            found = found if isinstance(found, tuple) else (found,)
            return (*found[: len(args)], None, None)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), held(custom.flags):
            places = [place for place, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
            aliases = {place: args[place].view_as(args[place]) for place in places}
            result = seeded(states, true_forward, custom.function, [aliases.get(i, a) for i, a in enumerate(args)], {})
        outputs = result if isinstance(result, tuple) else (result,)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if isinstance(o, Tensor) and o.requires_grad]
        pairs = [(o, g) for o, g in pairs if g is not None]
        pulled: dict[int, Tensor | None] = {}
        if pairs:
            true = torch.autograd.grad(
                [o for o, _ in pairs],
                list(aliases.values()),
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            pulled = dict(zip(aliases, true, strict=True))
        return (*(pulled.get(place) for place in range(len(args))), None, None)


class Custom:
    """A custom function as the replay calls it.

    Args:
        function: the function.
        flags: what the loop's call found in Python besides its arguments.
    """

    def __init__(self, function: type, flags: Flags = ()) -> None:
        self.function: Any = function
        self.flags = flags
        self.__name__ = function.__name__


class Flagged(Custom):
    """A custom function, with what it looks at in Python as it was."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            with held(self.flags):
                return self.function.apply(*args, **kwargs)
        return _Own.apply(*args, None, self)


class Surrogate(Custom):
    """A custom function whose backward is, on purpose, not the derivative of its forward.

    The loop's gradients go through its own backward. The trajectory depends on the values that it computes, so the
    sweep differentiates its forward.
    """

    def __call__(self, phase: Phase, *args: Any) -> Any:
        return _Own.apply(*args, phase, self)


class Plain(Custom):
    """A custom function whose backward can't be differentiated, and is what autograd makes of its forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with held(self.flags):
            return true_forward(self.function, args, kwargs)


class _Context:
    """What a custom function's forward may write to, and nobody reads."""

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def save_for_forward(self, *tensors: Tensor) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...

    needs_input_grad = (False,) * 64


def true_forward(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The forward of a custom function as ordinary, differentiable torch operations."""
    with torch.enable_grad():
        if _is_split(function):
            return function.forward(*args, **kwargs)
        return function.forward(_Context(), *args, **kwargs)


def _is_split(function: Any) -> bool:
    """Whether a custom function's forward has no context, which another method sets up."""
    return function.setup_context is not torch.autograd.function._SingleLevelFunction.setup_context
