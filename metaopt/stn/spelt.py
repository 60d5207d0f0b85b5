"""Functions in terms of others, where torch's own derivatives or vectorised forms have gaps (torch 2.13).

The backward of forward mode's softmax, and of all that contains it, fails where the primal has a graph too: a saved
value is written in place; that of norms is NaN at zero. The forward derivatives of ``glu`` and ``hardsigmoid`` have no
backward, and ``cdist`` and ``weight_norm`` no forward derivative. What is asked for something rare returns
``NotImplemented``, and torch's own is called.
"""

from __future__ import annotations

__all__ = ["SPELT_OUT", "spell_out"]

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.capture.norms import distances, length
from metaopt.capture.replacements import weight_norm

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
    if len(args) > 1 or isinstance(dim, str):
        return NotImplemented
    input = input if dtype is None else input.to(dtype)  # noqa: A001
    exponentials = torch.exp(input - input.amax(_axis(input, dim), keepdim=True).detach())
    return exponentials / exponentials.sum(_axis(input, dim), keepdim=True)


@spell_out(F.softmin)
def _softmin(input: Tensor, dim: int | None = None, *args: Any, **options: Any) -> Tensor:  # noqa: A002
    return _softmax(-input, dim, *args, **options)


@spell_out(F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax)
def _log_softmax(input: Tensor, dim: int | None = None, *args: Any, dtype: Any = None, **_: Any) -> Tensor:  # noqa: A002
    if len(args) > 1 or isinstance(dim, str):
        return NotImplemented
    input = input if dtype is None else input.to(dtype)  # noqa: A001
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
    return (F.nll_loss if input.ndim < 3 else _nll_loss)(
        logarithms, target, weight, ignore_index=ignore_index, reduction=reduction
    )


@spell_out(F.nll_loss)
def _nll_loss(
    input: Tensor,  # noqa: A002
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if input.ndim < 3 or size_average is not None or reduce is not None:
        return NotImplemented
    # Torch's loss of pictures takes no second derivative by what has the channels last.
    counted = target != ignore_index
    classes = torch.where(counted, target, 0)
    weights = counted.to(input) if weight is None else weight[classes] * counted
    losses = torch.where(counted, -input.gather(1, classes.unsqueeze(1)).squeeze(1), 0) * weights
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / weights.sum()


@spell_out(F.glu)
def _glu(input: Tensor, dim: int = -1) -> Tensor:  # noqa: A002
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


@spell_out(F.hardsigmoid)
def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    return NotImplemented if inplace else F.relu6(input + 3) / 6


def _real(*values: Any) -> bool:
    return all(isinstance(v, Tensor) and v.is_floating_point() for v in values)


@spell_out(torch.linalg.vector_norm)
def _vector_norm(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:  # noqa: A002
    if ord not in (1, 2) or options or not _real(x) or (dim is None and keepdim):
        return NotImplemented
    if ord == 1:
        return x.abs().sum() if dim is None else x.abs().sum(dim, keepdim=keepdim)
    return length(x, dim, keepdim)


@spell_out(torch.linalg.norm)
def _norm_of_either(x: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:  # noqa: A002
    # Of two axes an order of 2 is the spectral norm.
    if not (ord is None or (ord == 2 and isinstance(dim, int))):
        return NotImplemented
    return _vector_norm(x, 2, dim, keepdim, **options)


@spell_out(torch.norm, torch.Tensor.norm)
def _norm(input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:  # noqa: A002
    if p not in (None, "fro", 1, 2):
        return NotImplemented
    return _vector_norm(input, 1 if p == 1 else 2, dim, keepdim, **{k: v for k, v in options.items() if v is not None})


@spell_out(F.normalize)
def _normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Tensor:  # noqa: A002
    if p != 2 or out is not None or not _real(input):
        return NotImplemented
    return input / length(input, dim, True).clamp_min(eps)


@spell_out(F.cosine_similarity)
def _cosine(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    if not _real(x1, x2):
        return NotImplemented
    one, two = (x / length(x, dim, True).clamp_min(eps) for x in (x1, x2))
    return (one * two).sum(dim)


@spell_out(torch.cdist)
def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return distances(x1, x2, p)


spell_out(torch._weight_norm)(weight_norm)
