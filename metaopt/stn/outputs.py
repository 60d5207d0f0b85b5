"""What a model returned: compared, up to rounding."""

from __future__ import annotations

__all__ = ["close", "moved", "rows", "shapes"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.stn.trees import leaves


def moved(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether random numbers were drawn from torch's generators between two states."""
    pairs = zip(before[:2], after[:2], strict=True)
    return any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs)


def shapes(output: Any) -> list[Any]:
    """The shapes of its tensors."""
    return [leaf.shape for leaf in leaves(output) if isinstance(leaf, Tensor)]


def rows(output: Any, examples: int, index: int, dim: int) -> list[Tensor]:
    """One example of each output that has examples."""
    found = (y for y in leaves(output) if isinstance(y, Tensor) and y.ndim > dim)
    return [y.select(dim, index) for y in found if y.shape[dim] == examples]


def close(a: Any, b: Any, epsilon: float) -> bool:
    """Whether two outputs agree up to the rounding of the lowest precision within."""
    for x, y in zip(leaves(a), leaves(b), strict=True):
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
            rounding = max(epsilon, torch.finfo(x.dtype).eps)
            tolerance = 1e-8 if rounding < 1e-15 else 2e-3 if rounding < 1e-6 else 1e-1
            bound = tolerance * float(y.detach().abs().nan_to_num().max() if y.numel() else 0) + 1e-12
            if x.shape != y.shape or not torch.allclose(
                x.detach(), y.detach(), rtol=tolerance, atol=bound, equal_nan=True
            ):
                return False
    return True
