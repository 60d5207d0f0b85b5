"""Optimizers that step inside a context and are not watched: those of hyperparameters, or of other models.

Where the loop made what is stepped (a copy of the model, say), the tape follows it, and the step is recorded call by
call, as a wrapped optimizer's is.
"""

from __future__ import annotations

__all__ = ["Bystanders"]

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from metaopt.capture.watcher import Watcher
from metaopt.closures import closure_of, with_closure
from metaopt.errors import CaptureError
from metaopt.links import links_of


class Bystanders:
    """Looks at the steps of optimizers that are not watched: their updates are not recorded, or call by call.

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
        # Whether a step is running unseen.
        self.away = False
        self._stepping: Callable[[], bool] | None = None

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Such a step is about to run.

        Returns:
            The arguments to call it with in place of these, as a hook does, or nothing.

        Raises:
            CaptureError: if it moves what the watched loop trains.
        """
        if self.inside(optimizer):
            return None
        closure = closure_of(args, kwargs)
        if self._is_followed(optimizer, closure is not None):
            _refuse_linked(optimizer)
            self._stepping, self.watcher.stepping = self.watcher.stepping, lambda: True
            return None if closure is None else with_closure(self._in_loop(closure), args, kwargs)
        self.away = self.watcher.paused = True
        try:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    self._look_at(weight, type(optimizer).__name__)
        except CaptureError:
            self.away = self.watcher.paused = False
            raise
        return None

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """It has run."""
        if self._stepping is not None:
            self.watcher.stepping, self._stepping = self._stepping, None
        if not self.inside(optimizer):
            self.away = self.watcher.paused = False

    def _in_loop(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that a followed step calls, which is a part of the loop as any other."""

        def called() -> Any:
            step, self.watcher.stepping = self.watcher.stepping, self._stepping or self.watcher.stepping
            try:
                return closure()
            finally:
                self.watcher.stepping = step

        return called

    def _is_followed(self, optimizer: Optimizer, closed: bool) -> bool:
        """Whether all that is stepped are leaves that the loop made; a closure is yet to make their gradients."""
        tape = self.watcher.tape
        with torch._C.DisableTorchFunction():
            weights = [w for group in optimizer.param_groups for w in group["params"]]
            moved = [w for w in weights if w.grad is not None or (closed and w.requires_grad)]
            if any(map(tape.is_trained, moved)):
                return False
            # A copy that was not used yet is known by its memory.
            found = [tape.find(weight) or tape.alias(weight) for weight in moved]
        return bool(found) and all(b is not None and b.leaf for b in found)

    def _look_at(self, weight: Tensor, name: str) -> None:
        tape = self.watcher.tape
        if tape.is_trained(weight):
            raise CaptureError(
                f"{name}, which is not watched, steps weights of the watched optimizer inside the context. Name both, "
                "`metaopt.record([first, second])`; or, if it is kept inside the watched one, which never steps itself "
                "(SAM's `base_optimizer`), name it in place of that."
            )
        if id(weight) not in self.given and self.watcher.withheld.lacks(tape, weight) and not self.protected(weight):
            raise CaptureError(
                f"{name}, which is not watched, steps a tensor of shape {tuple(weight.shape)} that took part in the "
                "watched training. It is taken for a hyperparameter, which gets no training gradient, so the training "
                "inside the context would not be the bare one. If it is a weight (of a second network, of a head), "
                "watch both optimizers, `metaopt.record([first, second])`. If the loop makes it inside the context (a "
                "fresh head, latent codes), say so there: `head.requires_grad_(False).requires_grad_(True)`. If it is "
                "a hyperparameter, make it one of `metaopt.Hyperparameters`, or call `run.backward` before its "
                "optimizer steps."
            )
        if not self.protected(weight):
            tape.lead(weight)
        # A hyperparameter, or the weight of another model: whoever needs its old value has it.
        tape.before_write(weight)


def _refuse_linked(optimizer: Optimizer) -> None:
    """A step that is recorded call by call takes linked settings for the numbers that they are to torch."""
    names = sorted({name for links in links_of(optimizer) for name in links})
    if names:
        raise CaptureError(
            f"{type(optimizer).__name__} steps tensors that the loop made inside the context (a copy of the model, "
            f"say), and has hyperparameters among its settings ({', '.join(names)}), whose derivative its step would "
            "lose. Give torch's own class the tensor (`torch.optim.SGD(copy.parameters(), lr=hyper.lr)`), or write the "
            "update in the loop."
        )
