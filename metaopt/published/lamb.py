"""LAMB (You et al. 2020): Adam's direction, scaled layer by layer to the weights' norm."""

from __future__ import annotations

__all__ = ["LAMB"]

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from metaopt.published.settings import PublishedOptimizer, check_fractions, check_nonnegative


class LAMB(PublishedOptimizer):
    """Layer-wise adaptive moments for large batches.

    Args:
        params: weights or param groups; each tensor is a layer.
        lr: the learning rate.
        betas: of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: added to the direction, times the weights.
        maximize: ascend instead.

    Source:
        You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2, with φ the identity. Where the
        weights or the direction are exactly 0 the trust ratio is 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        check_nonnegative(lr=lr, eps=eps, weight_decay=weight_decay)
        check_fractions(*betas)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _update(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0, device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        step = state["step"].item()
        first = state["exp_avg"].lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        direction = (first / (1 - beta1**step)).div_((second / (1 - beta2**step)).sqrt_().add_(group["eps"]))
        direction.add_(weight, alpha=group["weight_decay"])
        size, length = weight.norm().item(), direction.norm().item()
        trust = size / length if size > 0 and length > 0 else 1.0
        weight.add_(direction, alpha=-group["lr"] * trust)
