"""Norms and distances whose second derivative torch does not have: at zero, where it is infinite times zero, or at all.

torch's gradient of ``‖x‖`` is 0 at ``x = 0``, by convention, but the derivative of that gradient is not a number there.
Vectors are exactly zero where they always are (padding, dropped features, weights that start from zero), so that
0 is the derivative of the training, and the replay has it.

``torch.cdist`` and ``F.pdist`` have no second derivative, and say so.
"""

from __future__ import annotations

__all__ = ["NORMS", "distances", "length", "root", "vector_norm"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Dims = int | Sequence[int] | None
_HALVES = (torch.float16, torch.bfloat16)
_MANY = 25  # vectors, from which on torch computes distances by products of matrices


def root(x: Tensor) -> Tensor:
    """``√x``, all derivatives of which are 0 at zero; what is not a number stays none."""
    zero = x <= 0  # a square that was computed as a difference may come out below
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def length(x: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """The Euclidean norm, all derivatives of which are 0 at zero."""
    dtype = x.dtype
    if dtype in _HALVES:  # its squares overflow where the norm does not, and torch adds them up in single precision
        x = x.float()
    square = (x * x.conj()).real if x.is_complex() else x * x
    axes = range(x.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
    found = root(square.sum(tuple(axes), keepdim=keepdim))
    return found.to(dtype) if dtype in _HALVES else found


def _euclidean(x: Tensor, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    return length(x if dtype is None else x.to(dtype), dim, keepdim)


def _other(x: Tensor, order: float, dim: Dims, keepdim: bool) -> Tensor:
    """A norm of another order, likewise 0 with all its derivatives at zero, where it is a root."""
    if not 1 < order < float("inf"):
        return torch.linalg.vector_norm(x, order, dim, keepdim)
    axes = tuple(range(x.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim)
    zero = (x != 0).sum(axes, keepdim=True) == 0
    lengths = torch.linalg.vector_norm(torch.where(zero, 1.0, x), order, axes, keepdim=True)
    lengths = torch.where(zero, 0.0, lengths)
    return lengths if keepdim else lengths.squeeze(axes)


def _is_euclidean(order: Any) -> bool:
    return order is None or order in (2, "fro")


def norm(
    input: Tensor,  # noqa: A002 (torch's name for it)
    p: float | str | None = "fro",
    dim: Dims = None,
    keepdim: bool = False,
    out: None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch.norm``."""
    if isinstance(p, str) and p != "fro":
        return torch.norm(input, p, dim, keepdim, dtype=dtype)
    return vector_norm(input, 2.0 if p is None or p == "fro" else p, dim, keepdim, dtype=dtype)  # type: ignore[arg-type]


def vector_norm(
    x: Tensor,
    ord: float = 2,  # noqa: A002 (torch's name for it)
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch.linalg.vector_norm``."""
    if not _is_euclidean(ord):
        return _other(x if dtype is None else x.to(dtype), ord, dim, keepdim)
    return _euclidean(x, dim, keepdim, dtype)


def matrix_norm(
    A: Tensor,
    ord: float | str = "fro",  # noqa: A002 (torch's name for it)
    dim: tuple[int, int] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch.linalg.matrix_norm``."""
    if ord != "fro":
        return torch.linalg.matrix_norm(A, ord, dim, keepdim, dtype=dtype)
    return _euclidean(A, dim, keepdim, dtype)


def linalg_norm(
    A: Tensor,
    ord: float | str | None = None,  # noqa: A002 (torch's name for it)
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch.linalg.norm``, which of a matrix and of the order 2 is another one."""
    axes = A.dim() if dim is None else 1 if isinstance(dim, int) else len(dim)
    if not _is_euclidean(ord) or (ord == 2 and axes > 1):
        return torch.linalg.norm(A, ord, dim, keepdim, dtype=dtype)
    return _euclidean(A, dim, keepdim, dtype)


def dist(input: Tensor, other: Tensor, p: float = 2) -> Tensor:  # noqa: A002 (torch's name for it)
    """``torch.dist``."""
    return vector_norm(input - other, p)


def normalize(
    input: Tensor,  # noqa: A002 (torch's name for it)
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: None = None,
) -> Tensor:
    """``F.normalize``."""
    return input / vector_norm(input, p, dim, keepdim=True).clamp_min(eps)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """``F.cosine_similarity``, whose axis is one of the common shape."""
    x1, x2 = torch.broadcast_tensors(x1, x2)
    first, second = (_euclidean(x, dim, keepdim=True).clamp_min(eps) for x in (x1, x2))
    return ((x1 / first) * (x2 / second)).sum(dim)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary") -> Tensor:
    """``torch.cdist``; of many vectors by a product of matrices, as torch does."""
    always = compute_mode == "use_mm_for_euclid_dist"
    many = compute_mode == "use_mm_for_euclid_dist_if_necessary" and max(x1.shape[-2], x2.shape[-2]) > _MANY
    if p != 2 or not (always or many):
        return distances(x1, x2, p)
    squares = (x.square().sum(-1, keepdim=True) for x in (x1, x2))
    ones = (torch.ones_like(x[..., :1]) for x in (x1, x2))
    (first, second), (left, right) = squares, ones
    return root(torch.cat([-2 * x1, first, left], -1) @ torch.cat([x2, right, second], -1).mT)


def distances(x1: Tensor, x2: Tensor, p: float = 2.0) -> Tensor:
    """`cdist`, of every difference."""
    return vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def pdist(input: Tensor, p: float = 2) -> Tensor:  # noqa: A002 (torch's name for it)
    """``F.pdist``."""
    rows, columns = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return vector_norm(input[rows] - input[columns], p, 1)


NORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((torch.norm, Tensor.norm), norm),
    torch.linalg.vector_norm: vector_norm,
    torch.linalg.matrix_norm: matrix_norm,
    torch.linalg.norm: linalg_norm,
    **dict.fromkeys((torch.dist, Tensor.dist), dist),
    F.normalize: normalize,
    **dict.fromkeys((torch.cosine_similarity, F.cosine_similarity), cosine_similarity),
    torch.cdist: cdist,
    **dict.fromkeys((torch.pdist, F.pdist), pdist),
}
