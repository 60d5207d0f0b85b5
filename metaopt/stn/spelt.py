"""Functions in terms of others, where torch's own derivatives or vectorised forms have gaps (torch 2.13).

The backward of forward mode's softmax, and of all that contains it, fails where the primal has a graph too: a saved
value is written in place. The forward derivatives of ``glu`` and ``hardsigmoid`` have no backward, and ``cdist`` and
``weight_norm`` no forward derivative. What is asked for something rare returns ``NotImplemented``, and torch's own is
called.
"""

from __future__ import annotations

__all__ = ["SPELT_OUT", "spell_out"]

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SPELT_OUT: dict[Any, Callable[..., Any]] = {}


def spell_out(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function of Python stand for functions of torch where these have gaps."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        SPELT_OUT.update(dict.fromkeys(functions, function))
        return function

    return add


def _axis(x: Tensor, dim: int | None) -> int:
    # As torch chooses where nothing is said.
    return (0 if x.ndim in (0, 1, 3) else 1) if dim is None else dim


@spell_out(F.softmax, torch.softmax, torch.Tensor.softmax)
def _softmax(input: Tensor, dim: int | None = None, *args: Any, dtype: Any = None, **_: Any) -> Tensor:  # noqa: A002
    if dtype is not None or len(args) > 1 or isinstance(dim, str):
        return NotImplemented
    exponentials = torch.exp(input - input.amax(_axis(input, dim), keepdim=True).detach())
    return exponentials / exponentials.sum(_axis(input, dim), keepdim=True)


@spell_out(F.softmin)
def _softmin(input: Tensor, dim: int | None = None, *args: Any, **options: Any) -> Tensor:  # noqa: A002
    return _softmax(-input, dim, *args, **options)


@spell_out(F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax)
def _log_softmax(input: Tensor, dim: int | None = None, *args: Any, dtype: Any = None, **_: Any) -> Tensor:  # noqa: A002
    if dtype is not None or len(args) > 1 or isinstance(dim, str):
        return NotImplemented
    return input - _logsumexp(input, _axis(input, dim), keepdim=True)


@spell_out(torch.logsumexp, torch.Tensor.logsumexp)
def _logsumexp(input: Tensor, dim: Any, keepdim: bool = False) -> Tensor:  # noqa: A002
    largest = input.amax(dim, keepdim=True).detach()
    # Where all entries are minus infinity, so is the result.
    largest = torch.where(largest.isfinite(), largest, torch.zeros_like(largest))
    total = torch.exp(input - largest).sum(dim, keepdim=True).log() + largest
    return total if keepdim else total.squeeze(dim)


@spell_out(F.cross_entropy)
def _cross_entropy(
    input: Tensor,  # noqa: A002
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if target.is_floating_point() or label_smoothing or size_average is not None or reduce is not None:
        return NotImplemented
    logarithms = _log_softmax(input, 0 if input.ndim == 1 else 1)
    return F.nll_loss(logarithms, target, weight, ignore_index=ignore_index, reduction=reduction)


@spell_out(F.glu)
def _glu(input: Tensor, dim: int = -1) -> Tensor:  # noqa: A002
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


@spell_out(F.hardsigmoid)
def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    return NotImplemented if inplace else F.relu6(input + 3) / 6


@spell_out(torch.cdist)
def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, *_: Any, **__: Any) -> Tensor:
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    # The square root has no derivative at zero; torch's is zero there.
    if p != 2:
        return torch.linalg.vector_norm(difference, p, dim=-1)
    square = difference.square().sum(-1)
    apart = square > 0
    return torch.where(apart, torch.where(apart, square, torch.ones_like(square)).sqrt(), torch.zeros_like(square))


@spell_out(torch._weight_norm)
def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())
