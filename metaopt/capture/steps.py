"""What the replay calls in place of torch's functions inside the step of a wrapped optimizer.

Two things that training loops rarely do and optimizers always: roots of what may be exactly 0, and factors
(``alpha=``, ``value=``) that torch takes as Python numbers and that are hyperparameters here.
"""

from __future__ import annotations

__all__ = ["FOREACH", "ROOTS", "in_step"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Number = Tensor | float
Many = Sequence[Tensor]


def _root(x: Tensor) -> Tensor:
    # 0 · ∞ otherwise: Adam's `m/(√v + eps)` is differentiable at v = 0, and the part through the root vanishes there.
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def sqrt(x: Tensor) -> Tensor:
    """The root, with derivative 0 at 0."""
    return _root(x)


def sqrt_(x: Tensor) -> Tensor:
    """The same in place."""
    return x.copy_(_root(x))


def power(x: Tensor, exponent: Number) -> Tensor:
    """``x ** exponent``; a half is a root."""
    return _root(x) if not isinstance(exponent, Tensor) and exponent == 0.5 else torch.pow(x, exponent)


def power_(x: Tensor, exponent: Number) -> Tensor:
    """The same in place."""
    return sqrt_(x) if not isinstance(exponent, Tensor) and exponent == 0.5 else x.pow_(exponent)


def foreach_sqrt(xs: Many) -> list[Tensor]:
    """`sqrt` of each."""
    return [_root(x) for x in xs]


def foreach_sqrt_(xs: Many) -> None:
    """The same in place."""
    for x in xs:
        sqrt_(x)


def foreach_pow(xs: Many, exponent: Any) -> list[Tensor]:
    """`power` of each."""
    return [power(x, e) for x, e in zip(xs, _each(exponent, xs), strict=True)]


def foreach_pow_(xs: Many, exponent: Any) -> None:
    """The same in place."""
    for x, e in zip(xs, _each(exponent, xs), strict=True):
        power_(x, e)


def add(x: Tensor, other: Number, *, alpha: Number = 1) -> Tensor:
    """``x + alpha · other``."""
    return torch.add(x, _scaled(other, alpha))


def add_(x: Tensor, other: Number, *, alpha: Number = 1) -> Tensor:
    """The same in place."""
    return x.add_(_scaled(other, alpha))


def sub(x: Tensor, other: Number, *, alpha: Number = 1) -> Tensor:
    """``x - alpha · other``."""
    return torch.sub(x, _scaled(other, alpha))


def sub_(x: Tensor, other: Number, *, alpha: Number = 1) -> Tensor:
    """The same in place."""
    return x.sub_(_scaled(other, alpha))


def addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: Number = 1) -> Tensor:
    """``x + value · a · b``."""
    return torch.addcmul(x, _scaled(a, value), b)


def addcmul_(x: Tensor, a: Tensor, b: Tensor, *, value: Number = 1) -> Tensor:
    """The same in place."""
    return x.addcmul_(_scaled(a, value), b)


def addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: Number = 1) -> Tensor:
    """``x + value · a / b``."""
    return torch.addcdiv(x, _scaled(a, value), b)


def addcdiv_(x: Tensor, a: Tensor, b: Tensor, *, value: Number = 1) -> Tensor:
    """The same in place."""
    return x.addcdiv_(_scaled(a, value), b)


def maximum_(x: Tensor, other: Number) -> Tensor:
    """The larger of two, in place."""
    return x.clamp_(min=other)


def minimum_(x: Tensor, other: Number) -> Tensor:
    """The smaller of two, in place."""
    return x.clamp_(max=other)


def _scaled(x: Any, factor: Number) -> Any:
    return x if not isinstance(factor, Tensor) and factor == 1 else x * factor


def _each(given: Any, xs: Many) -> list[Any]:
    """A list as long as the tensors, of a list, of one number for all, or of a tensor with one entry for each."""
    if isinstance(given, (list, tuple)):
        return list(given)
    return list(given) if isinstance(given, Tensor) and given.dim() == 1 else [given] * len(xs)


Pair = tuple[Callable[..., list[Tensor]], Callable[..., None]]


def _foreach(single: Callable[..., Tensor], single_: Callable[..., Tensor], factor: str | None, lists: int) -> Pair:
    """Many tensors in one call: ``lists`` arguments are lists, then comes a factor for all or for each."""

    def calls(xs: Many, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[list[Any], dict[str, Any]]]:
        others = [_each(argument, xs) for argument in args[:lists]]
        given = args[lists] if len(args) > lists else next(iter(kwargs.values()), None)
        named = [{}] * len(xs) if given is None or factor is None else [{factor: f} for f in _each(given, xs)]
        return [([x, *rest], options) for x, *rest, options in zip(xs, *others, named, strict=True)]

    def out_of_place(xs: Many, *args: Any, **kwargs: Any) -> list[Tensor]:
        return [single(*rest, **options) for rest, options in calls(xs, args, kwargs)]

    def in_place(xs: Many, *args: Any, **kwargs: Any) -> None:
        # By functions that write in place: autograd keeps what they overwrite.
        for rest, options in calls(xs, args, kwargs):
            single_(*rest, **options)

    return out_of_place, in_place


def _named(name: str, func: Callable[..., Any]) -> Callable[..., Any]:
    func.__name__ = name
    return func


ROOTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((torch.sqrt, Tensor.sqrt), sqrt),
    **dict.fromkeys((torch.sqrt_, Tensor.sqrt_), sqrt_),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), power),
    **dict.fromkeys((Tensor.pow_, Tensor.__ipow__), power_),
    torch._foreach_sqrt: foreach_sqrt,
    torch._foreach_sqrt_: foreach_sqrt_,
    torch._foreach_pow: foreach_pow,
    torch._foreach_pow_: foreach_pow_,
}
_SCALED: dict[Callable[..., Any], Callable[..., Any]] = {}
for _single, _single_ in ((add, add_), (sub, sub_), (addcmul, addcmul_), (addcdiv, addcdiv_)):
    _name = _single.__name__
    _SCALED |= dict.fromkeys((getattr(torch, _name), getattr(Tensor, _name)), _single)
    _SCALED[getattr(Tensor, f"{_name}_")] = _single_
_PAIRS: dict[str, Pair] = {
    "add": _foreach(add, add_, "alpha", 1),
    "sub": _foreach(sub, sub_, "alpha", 1),
    "mul": _foreach(torch.mul, Tensor.mul_, None, 1),
    "div": _foreach(torch.div, Tensor.div_, None, 1),
    "addcmul": _foreach(addcmul, addcmul_, "value", 2),
    "addcdiv": _foreach(addcdiv, addcdiv_, "value", 2),
    "lerp": _foreach(torch.lerp, Tensor.lerp_, "weight", 1),
    "maximum": _foreach(torch.maximum, maximum_, None, 1),
    "minimum": _foreach(torch.minimum, minimum_, None, 1),
}
FOREACH = {
    getattr(torch, f"_foreach_{name}{suffix}"): _named(f"foreach_{name}{suffix}", func)
    for name, pair in _PAIRS.items()
    for suffix, func in zip(("", "_"), pair, strict=True)
}


def in_step(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """What the replay calls in place of a function, if anything."""
    root = ROOTS.get(func)
    if root is not None:
        return root
    factors = [kwargs.get(name) for name in ("alpha", "value", "scalars", "weight", "other")]
    if func in FOREACH:
        # One tensor for all of a list: the derivative of torch's own function fails, or takes it for a number.
        return (
            FOREACH[func]
            if any(isinstance(entry, Tensor) for entry in _flat([*args[3:], *factors, *_alone(args)]))
            else None
        )
    return _SCALED.get(func) if any(isinstance(factor, Tensor) for factor in factors) else None


def _alone(args: tuple[Any, ...]) -> list[Any]:
    return [argument for argument in args if isinstance(argument, Tensor)]


def _flat(arguments: list[Any]) -> list[Any]:
    return [e for argument in arguments for e in (argument if isinstance(argument, (list, tuple)) else [argument])]
