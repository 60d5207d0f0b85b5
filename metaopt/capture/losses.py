"""Losses in plain operations, where torch's kernels have no derivative that the sweep needs.

``F.multi_margin_loss`` and ``F.multilabel_margin_loss`` have no second derivative, and say so.

``F.cross_entropy``, ``F.nll_loss`` and the binary ones have no derivative by their weights, nor has
``F.soft_margin_loss`` by its target. The loop may give them what it computed under ``no_grad``, which the trajectory
depends on (classes weighted by the model's own predictions).

``F.binary_cross_entropy`` divides its gradient by ``max(p (1 - p), 1e-12)``, and its second derivative by something
else: that is wrong, by any factor, for probabilities nearer than 1e-11 to 0 or 1 (torch 2.13).

``F.cross_entropy`` and ``F.nll_loss`` with more than two dimensions: the kernel behind them refuses gradients that
are not contiguous, which the transposed pass of forward mode has (torch 2.13: "grad_input must be contiguous").
"""

from __future__ import annotations

__all__ = [
    "LOSSES",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "nll_loss",
    "soft_margin_loss",
]

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction


def nll_loss(
    input: Tensor,  # noqa: A002 (torch's name for it)
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``F.nll_loss`` by ``gather``: ``-weight[target] · input[target]``, over axis 1."""
    if input.dim() <= 2 and not _moves(weight):
        return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    picked, factor = _picked(input, target, weight, ignore_index)
    return _mean(-factor * picked, factor, size_average, reduce, reduction)


def cross_entropy(
    input: Tensor,  # noqa: A002 (torch's name for it)
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy``; with class indices, `nll_loss` of the log-softmax, mixed with that of all classes."""
    if target.is_floating_point() or not (_moves(weight) or (input.dim() > 2 and label_smoothing == 0.0)):
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing=label_smoothing
        )
    axis = min(1, input.dim() - 1)
    picked, factor = _picked(F.log_softmax(input, axis), target, weight, ignore_index)
    loss = -factor * picked
    if label_smoothing:
        scores = F.log_softmax(input, axis).movedim(axis, -1)
        every = -(scores if weight is None else scores * weight).mean(-1)
        every = torch.where(target != ignore_index, every, 0.0)
        loss = (1 - label_smoothing) * loss + label_smoothing * every
    return _mean(loss, factor, size_average, reduce, reduction)


def _picked(scores: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The score of each target, and its weight: 0 where it is to be ignored."""
    axis = min(1, scores.dim() - 1)
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    factor = kept.to(scores.dtype) if weight is None else torch.where(kept, weight[index], 0.0)
    return scores.gather(axis, index.unsqueeze(axis)).squeeze(axis), factor


def _mean(loss: Tensor, factor: Tensor, size_average: bool | None, reduce: bool | None, reduction: str) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    return loss.sum() / factor.sum() if reduction == "mean" else _reduced(loss, None, None, reduction)


def binary_cross_entropy(
    input: Tensor,  # noqa: A002 (torch's name for it)
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``F.binary_cross_entropy``, times a weight that may have a derivative."""
    loss: Tensor = _BinaryCrossEntropy.apply(input, target)
    return _reduced(loss if weight is None else weight * loss, size_average, reduce, reduction)


class _BinaryCrossEntropy(torch.autograd.Function):
    """That of each entry, with torch's gradient, in operations that have its derivative."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(p, target)
        return F.binary_cross_entropy(p, target, reduction="none")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        p, target = ctx.saved_tensors
        by_p = gradient * (p - target) / (p * (1 - p)).clamp_min(1e-12) if ctx.needs_input_grad[0] else None
        return by_p, gradient * (torch.log1p(-p) - p.log()) if ctx.needs_input_grad[1] else None


def binary_cross_entropy_with_logits(
    input: Tensor,  # noqa: A002 (torch's name for it)
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """``F.binary_cross_entropy_with_logits``: ``-w (p y ln σ(x) + (1 - y) ln σ(-x))``."""
    if not (_moves(weight) or _moves(pos_weight)):
        return F.binary_cross_entropy_with_logits(
            input, target, weight, size_average, reduce, reduction, pos_weight=pos_weight
        )
    positive = target if pos_weight is None else pos_weight * target
    loss = -(positive * F.logsigmoid(input) + (1 - target) * F.logsigmoid(-input))
    return _reduced(loss if weight is None else weight * loss, size_average, reduce, reduction)


def soft_margin_loss(
    input: Tensor,  # noqa: A002 (torch's name for it)
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``F.soft_margin_loss``: ``ln(1 + exp(-y x))``."""
    if not _moves(target):
        return F.soft_margin_loss(input, target, size_average, reduce, reduction)
    return _reduced(-F.logsigmoid(target * input), size_average, reduce, reduction)


def multi_margin_loss(
    input: Tensor,  # noqa: A002 (torch's name for it)
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``F.multi_margin_loss``: ``w_y Σ_{j≠y} max(0, margin - x_y + x_j)^p / C``."""
    x, y = torch.atleast_2d(input), torch.atleast_1d(target).unsqueeze(1)
    short = torch.relu(margin - x.gather(1, y) + x)
    others = torch.ones_like(short).scatter(1, y, 0.0)
    loss = (others * (short if p == 1 else short * short)).sum(1) / x.shape[1]
    if weight is not None:
        loss = loss * weight[y.squeeze(1)]
    return _reduced(loss.reshape(target.shape), size_average, reduce, reduction)


def multilabel_margin_loss(
    input: Tensor,  # noqa: A002 (torch's name for it)
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``F.multilabel_margin_loss``: ``Σ_{j∈y, i∉y} max(0, 1 - x_j + x_i) / C``; the labels y end with the first -1."""
    x, y = torch.atleast_2d(input), torch.atleast_2d(target)
    named = (y < 0).cumsum(1) == 0
    times = torch.zeros_like(x).scatter_add(1, torch.where(named, y, 0), named.to(x.dtype))  # a label may be repeated
    pairs = times.unsqueeze(2) * (times == 0).unsqueeze(1)
    short = pairs * torch.relu(1.0 - x.unsqueeze(2) + x.unsqueeze(1))
    return _reduced(short.sum((1, 2)).div(x.shape[1]).reshape(input.shape[:-1]), size_average, reduce, reduction)


def _reduced(loss: Tensor, size_average: bool | None, reduce: bool | None, reduction: str) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def _moves(weight: Tensor | None) -> bool:
    return weight is not None and weight.requires_grad


LOSSES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.binary_cross_entropy: binary_cross_entropy,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
    F.cross_entropy: cross_entropy,
    F.nll_loss: nll_loss,
    F.soft_margin_loss: soft_margin_loss,
    F.multi_margin_loss: multi_margin_loss,
    F.multilabel_margin_loss: multilabel_margin_loss,
}
