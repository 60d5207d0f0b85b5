"""Powers, deviations and lengths whose second derivative torch does not have at zero, where it is infinite times zero.

``|x| ** 1.5`` has the gradient 0 at ``x = 0``, and so has, in torch, the standard deviation of equal numbers; the
derivative of that gradient is not a number. What is exactly zero is so because it always is (a mask, a dead unit,
padding), so that 0 is the derivative of the training there, as for `norms`.

A root has an infinite gradient at 0, which a training survives where something behind it selects (``x.relu().sqrt()``
where x is negative, ``torch.where``). What is selected away is a constant, and so has the replay's gradient there.
"""

from __future__ import annotations

__all__ = [
    "POWERS",
    "acos",
    "asin",
    "deviation",
    "deviation_mean",
    "entr",
    "float_power",
    "hypot",
    "power",
    "renorm",
    "sqrt",
    "xlogy",
]

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaopt.capture.norms import root, vector_norm

Number = Tensor | float


class _Steep(torch.autograd.Function):
    """Zeros with an infinite slope, or none, in some places; the gradient there is a constant, and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(places)
        ctx.slope = slope
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return torch.where(places, gradient.detach() * ctx.slope, 0.0), None, None


def _steep(x: Tensor, places: Tensor, slope: float) -> Tensor:
    steep: Tensor = _Steep.apply(x, places, slope)
    return steep


def sqrt(input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
    """``torch.sqrt``."""
    if not input.is_floating_point():
        return torch.sqrt(input)
    zero = input == 0
    return torch.where(zero, _steep(input, zero, float("inf")), torch.where(zero, 1.0, input).sqrt())


def entr(input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
    """``torch.special.entr``, ``-x log x``."""
    zero = input == 0
    return torch.where(zero, _steep(input, zero, float("inf")), torch.special.entr(torch.where(zero, 1.0, input)))


def xlogy(x: Number, y: Number) -> Tensor:
    """``torch.xlogy``, ``x log y``."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return torch.xlogy(x, y)  # type: ignore[arg-type]  # which takes numbers too
    first, second = torch.broadcast_tensors(x, y)
    zero = (first == 0) & (second == 0)
    steep = _steep(first, zero, -float("inf")) + _steep(second, zero, float("nan"))
    return torch.where(zero, steep, torch.xlogy(first, torch.where(zero, 1.0, second)))


def acos(input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
    """``torch.acos``, infinitely steep at 1 and -1."""
    ends = input.abs() == 1
    steep = _steep(input, ends, -float("inf")) + torch.acos(input.detach())
    return torch.where(ends, steep, torch.acos(torch.where(ends, 0.0, input)))


def asin(input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
    """``torch.asin``, likewise."""
    ends = input.abs() == 1
    steep = _steep(input, ends, float("inf")) + torch.asin(input.detach())
    return torch.where(ends, steep, torch.asin(torch.where(ends, 0.0, input)))


def power(x: Number, exponent: Number) -> Tensor:
    """``x ** exponent``: with an exponent above 1 that is not whole, all derivatives are 0 at zero."""
    if not isinstance(x, Tensor):
        return torch.pow(x, exponent)  # type: ignore[arg-type]  # which takes numbers too
    if not isinstance(exponent, (Tensor, complex)) and 0 < exponent < 1 and x.is_floating_point():
        zero = x == 0
        return torch.where(zero, _steep(x, zero, float("inf")), torch.where(zero, 1.0, x).pow(exponent))
    if isinstance(exponent, Tensor):
        if not exponent.is_floating_point():
            return torch.pow(x, exponent)
        zero = (x == 0) & (exponent > 1)
        # Of a power of 0 all derivatives by its exponent are 0; so are those by 0 itself, if the exponent is not whole.
        whole = zero & (exponent == exponent.round())
        at_zero = torch.where(whole, torch.where(whole, x, 1.0).pow(exponent.detach()), 0.0)
        return torch.where(zero, at_zero, torch.where(zero, 1.0, x).pow(exponent))
    if isinstance(exponent, complex) or exponent <= 1 or exponent == round(exponent):
        return torch.pow(x, exponent)
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).pow(exponent))


def float_power(x: Number, exponent: Number) -> Tensor:
    """``torch.float_power``, in double precision."""
    if isinstance(x, Tensor) and not x.is_complex():
        return power(x.double(), exponent.double() if isinstance(exponent, Tensor) else exponent)
    return torch.float_power(x, exponent)  # type: ignore[arg-type]  # which takes numbers too


def hypot(input: Tensor, other: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
    """``torch.hypot``."""
    zero = (input == 0) & (other == 0)
    return torch.where(zero, 0.0, torch.hypot(*(torch.where(zero, 1.0, x) for x in (input, other))))


def deviation(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``x.std()``."""
    return root(torch.var(x, *args, **kwargs))


def deviation_mean(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """``torch.std_mean``."""
    return deviation(x, *args, **kwargs), torch.var_mean(x, *args, **kwargs)[1]


def renorm(input: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:  # noqa: A002 (torch's name for it)
    """``torch.renorm``: slices along an axis that are longer than ``maxnorm`` are scaled down to it."""
    axes = [axis for axis in range(input.dim()) if axis != dim % input.dim()]
    lengths = vector_norm(input, p, axes, keepdim=True)
    return input * torch.where(lengths > maxnorm, maxnorm / (lengths + 1e-7), 1.0)


POWERS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), power),
    **dict.fromkeys((torch.float_power, Tensor.float_power), float_power),
    **dict.fromkeys((torch.sqrt, Tensor.sqrt), sqrt),
    torch.special.entr: entr,
    **dict.fromkeys((torch.acos, Tensor.acos, torch.arccos, Tensor.arccos), acos),
    **dict.fromkeys((torch.asin, Tensor.asin, torch.arcsin, Tensor.arcsin), asin),
    **dict.fromkeys((torch.xlogy, Tensor.xlogy, torch.special.xlogy), xlogy),
    **dict.fromkeys((torch.hypot, Tensor.hypot), hypot),
    **dict.fromkeys((torch.std, Tensor.std), deviation),
    torch.std_mean: deviation_mean,
    **dict.fromkeys((torch.renorm, Tensor.renorm), renorm),
}
