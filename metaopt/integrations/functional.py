"""What the integrations share: a functional update of another library as a ``torch.optim.Optimizer``."""

from __future__ import annotations

__all__ = ["FunctionalOptimizer"]

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FunctionalOptimizer(torch.optim.Optimizer):
    """An optimizer whose step writes what a function of weights, gradients and state returns.

    ``step`` takes what ``torch.optim`` takes, nothing or a closure, and besides the loss itself, as differentiable
    optimizers do: it is differentiated, and the gradients of the last step are forgotten.
    """

    def step(self, closure: Tensor | Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: the loss, a function that computes gradients and returns it, or None where ``loss.backward()``
                was called before.
        """
        loss: Any = closure
        if isinstance(closure, Tensor):
            self.zero_grad()
            closure.backward()
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for place, group in enumerate(self.param_groups):
                self._write(place, group["params"])
        return loss

    def _write(self, place: int, weights: list[Tensor]) -> None:
        for weight, new in zip(weights, self._updated(place, weights), strict=True):
            if new is not weight:
                weight.copy_(new)

    @abstractmethod
    def _updated(self, place: int, weights: list[Tensor]) -> list[Tensor]:
        """The new weights of a group; those that stay may be returned as they are."""
