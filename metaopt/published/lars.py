"""LARS (You, Gitman & Ginsburg 2017): momentum, with a learning rate for each layer."""

from __future__ import annotations

__all__ = ["LARS"]

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from metaopt.published.settings import PublishedOptimizer, check_nonnegative


class LARS(PublishedOptimizer):
    """Layer-wise adaptive rate scaling.

    Args:
        params: weights or param groups; each tensor is a layer.
        lr: the global learning rate.
        momentum: the momentum.
        weight_decay: added to the gradient, times the weights, and its size to the gradient's.
        trust_coefficient: the share of its norm by which a layer is trusted to move.
        maximize: ascend instead.

    Source:
        You, Gitman & Ginsburg 2017, "Large Batch Training of Convolutional Networks", algorithm 1. Where the weights,
        or gradient and decay, are exactly 0 the local rate is 1; as printed, such weights would never move.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        *,
        maximize: bool = False,
    ) -> None:
        check_nonnegative(lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _update(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        decay = group["weight_decay"]
        size = weight.norm().item()
        total = grad.norm().item() + decay * size
        local = group["trust_coefficient"] * size / total if size > 0 and total > 0 else 1.0
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer = state["momentum_buffer"].mul_(group["momentum"])
        buffer.add_(grad.add(weight, alpha=decay), alpha=group["lr"] * local)
        weight.sub_(buffer)
