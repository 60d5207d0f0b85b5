"""A reverse pass of autograd, for one cotangent or for several at once."""

from __future__ import annotations

__all__ = ["reverse_pass"]

from collections.abc import Sequence

import torch
from torch import Tensor


def reverse_pass(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    retain: bool = True,
    strictly: bool = False,
) -> list[Tensor | None]:
    """The gradients for cotangents with a leading dimension: all at once, or one by one where that can't be.

    Args:
        outputs: what is differentiated.
        inputs: with respect to what.
        cotangents: those of the outputs, each with as many rows as there are passes.
        retain: keep the graph.
        strictly: at once, or not at all.
    """
    count = len(cotangents[0])

    def once(given: Sequence[Tensor], *, batched: bool, last: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            outputs, inputs, given, is_grads_batched=batched, allow_unused=True, retain_graph=retain or not last
        )

    if count > 1:
        try:
            return list(once(cotangents, batched=True, last=strictly))
        except RuntimeError:
            if strictly:
                raise
            # no batching rule
    rows = [once([z[row] for z in cotangents], batched=False, last=row == count - 1) for row in range(count)]
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*rows, strict=True)]
