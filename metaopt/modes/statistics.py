"""Derivatives with respect to running statistics, of an objective computed in evaluation mode outside of a context.

Autograd treats the statistics of batch norm as constants. They follow the training, so the hypergradient needs
``∂E/∂mean`` and ``∂E/∂var``: with ``y = (x - mean) · (var + eps)^(-1/2) · weight + bias`` and ``γ = ∂E/∂y · weight``,
``∂E/∂mean = -Σ γ (var + eps)^(-1/2)`` and ``∂E/∂var = -½ Σ γ (x - mean) (var + eps)^(-3/2)``.
"""

from __future__ import annotations

__all__ = ["statistics_gradients"]

from typing import Any

import torch
from torch import Tensor

from metaopt.capture.bindings import leaves_of, nodes_of
from metaopt.capture.tape import Tape


def statistics_gradients(outer: Tensor, tape: Tape) -> dict[int, Tensor]:
    """``∂E/∂s`` for the running statistics in ``E``'s graph that the tape carries, by their keys."""
    carried = {
        (tensor.data_ptr(), tensor.numel()): binding.key
        for binding in tape.bindings()
        if (tensor := binding.ref()) is not None and not tensor.requires_grad and tensor.dim() == 1
    }
    found: dict[int, Tensor] = {}
    nodes = [node for node in nodes_of(outer) if _reads_statistics(node)]
    handles = [node.register_prehook(_collector(node, carried, found)) for node in nodes]
    if not handles:
        return {}
    try:
        leaves = leaves_of(outer)
        torch.autograd.grad(outer, leaves, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _collector(node: Any, carried: dict[tuple[int, int], int], found: dict[int, Tensor]) -> Any:
    def collect(grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[0]
        if grad is None:
            return
        x, mean, var = node._saved_input, node._saved_running_mean, node._saved_running_var
        shape = [1, -1] + [1] * (x.dim() - 2)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        weight = node._saved_weight
        gamma = grad if weight is None else grad * weight.detach().view(shape)
        scale = (var + node._saved_eps).rsqrt()
        parts = {
            (mean.data_ptr(), mean.numel()): -(gamma.sum(axes) * scale),
            (var.data_ptr(), var.numel()): -0.5 * ((gamma * (x - mean.view(shape))).sum(axes) * scale**3),
        }
        for place, part in parts.items():
            key = carried.get(place)
            if key is not None:
                part = part.detach().to(mean.dtype)
                found[key] = found[key] + part if key in found else part

    return collect


def _reads_statistics(node: Any) -> bool:
    return "BatchNorm" in node.name() and getattr(node, "_saved_training", True) is False
