"""Loops that differentiate their own gradients (a gradient penalty), so that the sweep takes third derivatives.

torch's of the normalisation layers are wrong: the backward of their backward takes the mean and the variance that were
saved for constants (torch 2.13, seen against finite differences; 2.15 refuses that of batch norm). Such loops are
replayed with the layers written out, which costs a few more operations.
"""

from __future__ import annotations

__all__ = ["WRITTEN_OUT", "batch_norm", "instance_norm", "layer_norm", "written_out"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.capture.primitives import inner_gradient, leaf, stop
from metaopt.capture.trace import Instruction, values_in


def batch_norm(
    input: Tensor,  # noqa: A002 (torch's name for it)
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm`` of plain operations, without running statistics where it is given none."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y = _standardised(input, [axis for axis in range(input.dim()) if axis != 1], eps)
    return _by_channel(y, weight, bias).to(input.dtype)


def instance_norm(
    input: Tensor,  # noqa: A002 (torch's name for it)
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm``, likewise."""
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    y = _standardised(input, list(range(2, input.dim())), eps)
    return _by_channel(y, weight, bias).to(input.dtype)


def layer_norm(
    input: Tensor,  # noqa: A002 (torch's name for it)
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """``F.layer_norm``, likewise."""
    axes = list(range(-len(normalized_shape), 0))
    return _scaled(_standardised(input, axes, eps), weight, bias).to(input.dtype)


def _standardised(x: Tensor, axes: list[int], eps: float) -> Tensor:
    return (x - x.mean(axes, keepdim=True)) * (x.var(axes, unbiased=False, keepdim=True) + eps).rsqrt()


def _by_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [-1] + [1] * (x.dim() - 2)
    return _scaled(x, None if weight is None else weight.view(shape), None if bias is None else bias.view(shape))


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


WRITTEN_OUT: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
}


def written_out(code: Sequence[Instruction]) -> list[Instruction]:
    """The instructions, with the layers written out if a gradient of the loop's goes through another one."""
    if not _nests(code):
        return list(code)
    return [ins._replace(func=WRITTEN_OUT[ins.func]) if ins.func in WRITTEN_OUT else ins for ins in code]


def _nests(code: Sequence[Instruction]) -> bool:
    within: set[int] = set()  # what the loop's own gradients pass to one of its gradients
    for instruction in code:
        reached = not within.isdisjoint(instruction.used())
        if instruction.func is inner_gradient:
            if reached and not within.isdisjoint(values_in(instruction.args[0])):
                return True
            within.update(instruction.defined())
        elif reached and instruction.func not in (stop, leaf):
            within.update(instruction.defined())
    return False
