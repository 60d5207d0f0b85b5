"""Custom ``autograd.Function``s of a model: how their values change, and which gradient they hand on.

Many have a backward that is on purpose no derivative of their forward: it passes rounding straight through, reverses,
scales or clips a gradient, or adds to it. Training goes by the backward as it is, so ``w0`` and ``Θ`` have its
gradients. What the weights' change does to a value is another matter: the linearised output takes the derivative of the
forward, and so does the validation loss, which λ is to descend. A forward that has steps has no derivative of use;
there the backward's stands for it.
"""

from __future__ import annotations

__all__ = ["Call", "Unsupported", "by_value", "nature_of", "pushed"]

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from metaopt.capture.custom import true_forward
from metaopt.capture.stand_ins import Nature, nature
from metaopt.errors import ResponseError
from metaopt.stn.forward_mode import dual_level
from metaopt.stn.generators import random_state, set_random_state

_known: weakref.WeakKeyDictionary[type, dict[Any, Nature]] = weakref.WeakKeyDictionary()


class Unsupported(Exception):
    """This engine can't differentiate a function."""


def nature_of(cls: type, args: Sequence[Any], kwargs: dict[str, Any]) -> Nature:
    """What a function's backward is to its forward; looked at once for each choice of its options."""
    # A number of bits may make a step of what is none; a factor does not.
    options = tuple(a if isinstance(a, (int, str, type(None))) else type(a).__name__ for a in args)
    found = _known.setdefault(cls, {})
    if options not in found:
        with torch._C.DisableTorchFunction():
            found[options] = nature(cls, pytree.tree_map(_primal, tuple(args)), kwargs)
    return found[options]


def _primal(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (forward_ad.unpack_dual(value).primal if forward_ad._current_level >= 0 else value).detach()


def by_value(known: Nature, cls: type, own: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a function, with the derivative of its forward.

    Raises:
        ResponseError: if torch has none.
    """
    if known.linear and (known.own or known.steps):
        return own(*args, **kwargs)
    if not known.forward or known.steps:
        raise ResponseError(
            f"the backward of {cls.__name__} (a torch.autograd.Function) is not the derivative of its forward, and its "
            "forward is not made of operations that torch can differentiate. Training goes by the one, and the "
            "hyperparameters, which descend the validation loss, by the other. Write the forward with torch "
            "operations, without `detach` and numpy."
        )
    return true_forward(cls, args, kwargs)


@dataclass(frozen=True)
class Call:
    """A call of a function of values that have tangents.

    Args:
        cls: the function.
        args: its arguments.
        kwargs: the same.
        tangents: those of its arguments.
    """

    cls: type
    args: Sequence[Any]
    kwargs: dict[str, Any]
    tangents: Sequence[Tensor | None]


def pushed(call: Call, known: Nature, own: Callable[..., Any]) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Call a function of values that have tangents.

    Args:
        call: what is called.
        known: what its backward is to its forward.
        own: what calls it.

    Returns:
        Its result, and each tensor of that with its tangent. A gradient goes through the function's own backward.

    Raises:
        Unsupported: if it writes in place, or neither derivative is to be had.
    """
    device = next(t.device for t in call.tangents if t is not None)
    before = random_state(device)
    with torch._C.DisableTorchFunction():
        given = [a.detach() if isinstance(a, Tensor) else a for a in call.args]
        pairs = [
            (x.requires_grad_(), t.expand_as(x)) for x, t in zip(given, call.tangents, strict=True) if t is not None
        ]
    try:
        result = own(*given, **call.kwargs)
    except RuntimeError as error:
        if "in-place" not in str(error):
            raise
        raise Unsupported(f"`{call.cls.__name__}`, which writes in place") from error
    with torch._C.DisableTorchFunction():
        leaves, spec = pytree.tree_flatten(result)
        places = [i for i, y in enumerate(leaves) if isinstance(y, Tensor) and y.requires_grad]
        live = [leaves[i] for i in places]
        if known.forward and not known.steps:
            after = random_state(device)
            set_random_state(device, before)
            values = _by_forward_ad(call)
            set_random_state(device, after)
            changes = [values[i] for i in places]
        elif known.linear and (known.own or known.steps):
            changes = _by_backward(call.cls, live, pairs)
        else:
            raise Unsupported(f"`{call.cls.__name__}`, whose backward is no derivative of its forward")
        found = _Handed.apply(live, [x for x, _ in pairs], changes, *(t for _, t in pairs)) if live else ()
        for i in places:
            leaves[i] = leaves[i].detach()
        return pytree.tree_unflatten(leaves, spec), [(leaves[i], t) for i, t in zip(places, found, strict=True)]


class _Handed(torch.autograd.Function):
    """Tangents of a function's results, with the gradient that its own backward hands on."""

    @staticmethod
    def forward(ctx: Any, results: list[Tensor], inputs: list[Tensor], changes: list[Tensor], *_: Tensor) -> Any:
        ctx.graph = results, inputs
        return tuple(changes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        results, inputs = ctx.graph
        return None, None, None, *torch.autograd.grad(results, inputs, gradients, retain_graph=True, allow_unused=True)


def _by_forward_ad(call: Call) -> list[Tensor]:
    with dual_level():
        duals = [
            (a.detach() if isinstance(a, Tensor) else a)
            if t is None
            else forward_ad.make_dual(a.detach().contiguous(), t.detach().expand_as(a).contiguous())
            for a, t in zip(call.args, call.tangents, strict=True)
        ]
        try:
            result = true_forward(call.cls, duals, call.kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error).lower():
                raise
            raise Unsupported(f"`{call.cls.__name__}`, which has no forward-mode derivative") from error
        return [_tangent(y) if isinstance(y, Tensor) else y for y in pytree.tree_leaves(result)]


def _tangent(value: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(value)
    return (torch.zeros_like(primal) if tangent is None else tangent).detach()


def _by_backward(cls: type, live: list[Tensor], pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The derivative of ``vᵀ J`` by ``v`` is ``J``."""
    if not live:
        return []
    adjoints = [torch.cos(torch.arange(y.numel(), device=y.device)).to(y).reshape(y.shape) for y in live]
    adjoints = [v.detach().requires_grad_() for v in adjoints]
    inputs, moves = [x for x, _ in pairs], [t.detach() for _, t in pairs]
    hidden = f"`{cls.__name__}`, whose backward can't be differentiated"
    try:
        pulled = torch.autograd.grad(live, inputs, adjoints, create_graph=True, allow_unused=True)
        kept = [(p, t) for p, t in zip(pulled, moves, strict=True) if p is not None and p.requires_grad]
        if not kept:
            raise Unsupported(hidden)
        found = torch.autograd.grad([p for p, _ in kept], adjoints, [t for _, t in kept], allow_unused=True)
    except RuntimeError as error:
        if "once_differentiable" not in str(error) and "not implemented" not in str(error):
            raise
        raise Unsupported(hidden) from error
    changes = [torch.zeros_like(y) if c is None else c.detach() for y, c in zip(adjoints, found, strict=True)]
    _require_adjoint(list(zip(adjoints, changes, strict=True)), list(zip(pulled, moves, strict=True)), hidden)
    return changes


@torch.no_grad()
def _require_adjoint(there: list[tuple[Tensor, Tensor]], back: list[tuple[Tensor | None, Tensor]], why: str) -> None:
    """Raise `Unsupported` if ``v · (J t)`` is not ``(Jᵀ v) · t``: a backward may hide how it depends on ``v``."""
    pulled = [(p, t) for p, t in back if p is not None]
    difference = torch.stack([(v * c).sum() for v, c in there] + [-(p * t).sum() for p, t in pulled]).sum()
    size = torch.stack([p.norm() * t.norm() for p, t in pulled]).sum()
    if bool(difference.abs() > float(torch.finfo(size.dtype).eps) ** 0.5 * size):
        raise Unsupported(why)
