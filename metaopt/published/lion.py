"""Lion (Chen et al. 2023): the sign of an interpolated momentum."""

from __future__ import annotations

__all__ = ["Lion"]

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from metaopt.published.settings import PublishedOptimizer, check_fractions, check_nonnegative


class Lion(PublishedOptimizer):
    """Symbolic discovery's optimizer: ``w ← w - lr · (sign(β₁m + (1-β₁)g) + weight_decay · w)``.

    Args:
        params: weights or param groups.
        lr: the learning rate; the paper's are 3-10 times smaller than AdamW's.
        betas: for the direction, and for the momentum.
        weight_decay: decoupled, times lr.
        maximize: ascend instead.

    Source:
        Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        check_nonnegative(lr=lr, weight_decay=weight_decay)
        check_fractions(*betas)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    def _update(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(weight)
        momentum = state["exp_avg"]
        direction = momentum.lerp(grad, 1 - beta1).sign_()
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        momentum.lerp_(grad, 1 - beta2)
