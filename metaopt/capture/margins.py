"""Margin losses in plain operations: torch's kernels have no second derivative, and say so."""

from __future__ import annotations

__all__ = ["MARGINS", "multi_margin_loss", "multilabel_margin_loss"]

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction


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


MARGINS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_margin_loss: multi_margin_loss,
    F.multilabel_margin_loss: multilabel_margin_loss,
}
