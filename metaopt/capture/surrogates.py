"""Functions of torch whose backward is, on purpose, not the derivative of their forward.

The loop's gradients go through torch's backward; the sweep differentiates the values that the loop computes.

``F.gumbel_softmax(hard=True)``: its gradient is that of the soft sample.

``torch.fake_quantize_per_tensor_affine`` and its kin: their backward takes rounding for the identity.

``F.embedding`` with a ``padding_idx``: its backward leaves that row out, though the forward reads it. With
``scale_grad_by_freq`` it divides each row's gradient by how often the row was read; so does ``F.embedding_bag``'s.
"""

from __future__ import annotations

__all__ = ["embedding", "embedding_bag", "fake_quantize", "hard_gumbel_softmax"]

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.capture import replacements
from metaopt.capture.primitives import Phase, choose, stop


def hard_gumbel_softmax(phase: Phase, logits: Tensor, tau: float = 1, dim: int = -1) -> Tensor:
    """``F.gumbel_softmax(hard=True)``, whose ``detach`` stops the loop's gradient and not the sweep's."""
    noise = -torch.empty_like(logits, memory_format=torch.legacy_contiguous_format).exponential_().log()
    soft = ((logits + noise) / tau).softmax(dim)
    index = soft.max(dim, keepdim=True)[1]
    hard = torch.zeros_like(logits, memory_format=torch.legacy_contiguous_format).scatter_(dim, index, 1.0)
    return hard - stop(phase, soft) + soft


def fake_quantize(
    phase: Phase, func: Callable[..., Tensor], x: Tensor, scale: Tensor | float, zero_point: Any, *rest: int
) -> Tensor:
    """A fake quantisation, which passes the loop's gradient straight through: the sweep sees steps, and their scale."""
    # In the loop the scale is none that requires grad, which torch refuses.
    own = func(x, scale.detach() if isinstance(scale, Tensor) else scale, zero_point, *rest)
    # A scale for each channel lies along an axis, which comes before the bounds.
    step = scale.reshape(-1, *[1] * (x.dim() - 1 - rest[0])) if isinstance(scale, Tensor) and len(rest) > 2 else scale
    with torch.no_grad():
        level = (own / step).round()
    return choose(phase, own, level * step)


def embedding(
    phase: Phase,
    input: Tensor,  # noqa: A002 (torch's name for it)
    weight: Tensor,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
) -> Tensor:
    """``F.embedding``, whose options change the loop's gradient of the rows that are read, and not the sweep's."""
    words = F.embedding(input, weight)
    if padding_idx is not None:
        row = padding_idx % len(weight)
        words = torch.where((input == row).unsqueeze(-1), stop(phase, weight[row]), words)
    if scale_grad_by_freq:
        counts = input.new_zeros(len(weight)).index_add(0, input.flatten(), torch.ones_like(input.flatten()))
        share = counts[input].unsqueeze(-1).to(words.dtype).reciprocal()
        held = stop(phase, words)
        words = held + share * (words - held)
    return words


def embedding_bag(phase: Phase, shares: Tensor, *, weight: Tensor, **options: Any) -> Tensor:
    """``F.embedding_bag(scale_grad_by_freq=True)``: the loop's gradient of each row is a share of the sweep's."""
    held = stop(phase, weight)
    return replacements.embedding_bag(weight=held + shares * (weight - held), **options)
