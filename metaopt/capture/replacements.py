"""Functions of torch whose second derivative is wrong, and what the replay calls in their place.

``torch._weight_norm`` (behind ``nn.utils.weight_norm`` and its parametrization): its backward treats the norms that
the forward saved as constants, so its second derivative lacks a term (torch 2.13, seen against finite differences).
"""

from __future__ import annotations

__all__ = ["REPLACEMENTS", "weight_norm"]

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g · v / ‖v‖``, with the norm over every axis but ``dim``."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {torch._weight_norm: weight_norm}
