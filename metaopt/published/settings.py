"""What the published optimizers share: checking numbers, and the loop over weights that have a gradient."""

from __future__ import annotations

__all__ = ["PublishedOptimizer", "check_fractions", "check_nonnegative"]

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def check_nonnegative(**settings: float) -> None:
    """Raise as torch's optimizers do if a setting is negative or not a number."""
    for name, number in settings.items():
        if not number >= 0.0:
            raise ValueError(f"Invalid {name}: {number}; it must be at least 0.")


def check_fractions(*betas: float) -> None:
    """Raise as torch's optimizers do if a beta lies outside [0, 1)."""
    for place, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {place}: {beta}; it must be at least 0 and below 1.")


class PublishedOptimizer(torch.optim.Optimizer):
    """An optimizer whose step is a formula per weight."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if weight.grad.is_sparse or weight.is_complex():
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients and complex weights; use dense, real "
                        "ones."
                    )
                grad = -weight.grad if group["maximize"] else weight.grad
                self._update(weight, grad, self.state[weight], group)
        return loss

    def _update(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError
