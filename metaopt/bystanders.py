"""Optimizers that step inside a context and are not watched: those of hyperparameters, or of other models."""

from __future__ import annotations

__all__ = ["Bystanders"]

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from metaopt.capture.watcher import Watcher
from metaopt.errors import CaptureError


class Bystanders:
    """Looks at the steps of optimizers that are not watched: their updates are not recorded.

    Args:
        watcher: what sees the loop.
        inside: whether a step belongs to the watched loop nevertheless.
        protected: whether a leaf is known to be a hyperparameter.
    """

    def __init__(
        self, watcher: Watcher, inside: Callable[[Optimizer], bool], protected: Callable[[Tensor], bool]
    ) -> None:
        self.watcher = watcher
        self.inside = inside
        self.protected = protected
        # Tensors that were given a hypergradient.
        self.given: set[int] = set()

    def before(self, optimizer: Optimizer) -> None:
        """Such a step is about to run.

        Raises:
            CaptureError: if it moves what the watched loop trains.
        """
        if self.inside(optimizer):
            return
        self.watcher.paused = True
        try:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    self._look_at(weight, type(optimizer).__name__)
        except CaptureError:
            self.watcher.paused = False
            raise

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """It has run."""
        if not self.inside(optimizer):
            self.watcher.paused = False

    def _look_at(self, weight: Tensor, name: str) -> None:
        tape = self.watcher.tape
        if id(weight) in tape.trained:
            raise CaptureError(
                f"{name}, which is not watched, steps weights of the watched optimizer inside the context. Let one "
                "optimizer train them."
            )
        if id(weight) not in self.given and self.watcher.lacks_gradient(weight) and not self.protected(weight):
            raise CaptureError(
                f"{name}, which is not watched, steps a tensor of shape {tuple(weight.shape)} that took part in the "
                "watched training. It is taken for a hyperparameter, which gets no training gradient, so the training "
                "inside the context would not be the bare one. If it is a weight (of a second network, of a head), "
                "watch both optimizers, `metaopt.record([first, second])`. If it is a hyperparameter, make it one of "
                "`metaopt.Hyperparameters`, or call `run.backward` before its optimizer steps."
            )
        tape.lead(weight)
        # A hyperparameter, or the weight of another model: whoever needs its old value has it.
        tape.before_write(weight)
