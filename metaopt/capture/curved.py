"""Functions whose second derivative torch does not have, or not everywhere, though the gradient is finite.

``F.hardsigmoid`` has none, and says so. That of ``torch.sinc`` at 0, of ``torch.logit`` beyond its ``eps`` and of
``torch.logaddexp`` of numbers far apart (in single precision, by 88) is zero times infinity, or infinity by infinity;
so is that of ``F.mish`` of large numbers.
"""

from __future__ import annotations

__all__ = ["CURVED", "hardsigmoid", "logaddexp", "logaddexp2", "logit", "mish", "sinc"]

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002 (torch's name for it)
    """``F.hardsigmoid``."""
    result = F.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


def mish(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002 (torch's name for it)
    """``F.mish``, which is the identity for large numbers."""
    large = input > 40
    result = torch.where(large, input, F.mish(torch.where(large, 0.0, input)))
    return input.copy_(result) if inplace else result


def sinc(input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
    """``torch.sinc``, at 0 by its series."""
    zero = input == 0
    return torch.where(zero, 1 - (math.pi * input).square() / 6, torch.sinc(torch.where(zero, 1.0, input)))


def logit(input: Tensor, eps: float | None = None) -> Tensor:  # noqa: A002 (torch's name for it)
    """``torch.logit``, constant beyond ``eps``."""
    if eps is None:
        return torch.logit(input)
    outside = (input < eps) | (input > 1 - eps)
    return torch.where(outside, torch.logit(input.detach(), eps), torch.logit(torch.where(outside, 0.5, input)))


def logaddexp(input: Tensor, other: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
    """``torch.logaddexp``."""
    return torch.logsumexp(torch.stack(torch.broadcast_tensors(input, other)), 0)


def logaddexp2(input: Tensor, other: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
    """``torch.logaddexp2``, the same to the base 2."""
    two = math.log(2.0)
    return logaddexp(input * two, other * two) / two


CURVED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.hardsigmoid: hardsigmoid,
    F.mish: mish,
    **dict.fromkeys((torch.sinc, Tensor.sinc, torch.special.sinc), sinc),
    **dict.fromkeys((torch.logit, Tensor.logit, torch.special.logit), logit),
    **dict.fromkeys((torch.logaddexp, Tensor.logaddexp), logaddexp),
    **dict.fromkeys((torch.logaddexp2, Tensor.logaddexp2), logaddexp2),
}
