"""The training algorithm: weights, response, hyperparameters and scales, in turn."""

from __future__ import annotations

__all__ = ["Tuner"]

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

from torch.optim import Optimizer

from metaopt.errors import ResponseError, whole
from metaopt.modes.progress import progressing
from metaopt.stn.buffers import Kept
from metaopt.stn.checks import check_trained, repeat
from metaopt.stn.generators import random_state, set_random_state
from metaopt.stn.modes import evaluation
from metaopt.stn.steps import Steps


class Tuner(Steps):
    """The steps of the training algorithm; made by `train`.

    Attributes:
        tuned: the model with its response.
        optimizer: moves the weights.
        response_optimizer: moves the response.
        hyper_optimizer: moves the hyperparameters.
        scale_optimizer: moves the scales, or None where they are fixed.
        steps: how many training steps there were.
        descent: takes the steps, and leaves out those that are not finite.
    """

    def __repr__(self) -> str:
        return f"Tuner({self.tuned.method!r}: {self.steps} training steps, {self.skipped} steps left out)"

    @property
    def skipped(self) -> int:
        """How many steps of any kind were left out, since they were not finite."""
        return self.descent.skipped

    # -- the algorithm

    def run(
        self,
        train_batches: Iterable[Any],
        valid_batches: Iterable[Any],
        steps: int | None = None,
        *,
        progress: bool = False,
    ) -> None:
        """Warm up, then alternate: ``train_steps`` training steps, ``valid_steps`` validation steps, and so on.

        Args:
            train_batches: a pass over the training data; repeated if ``steps`` asks for more.
            valid_batches: the validation data, repeated as needed.
            steps: the number of training steps; by default one pass.
            progress: show a progress bar of the training steps (needs tqdm).
        """
        steps = None if steps is None else whole("steps", steps, 0, ResponseError)
        valid = repeat(valid_batches)
        batches = train_batches if steps is None else islice(repeat(train_batches), steps)
        count = len(train_batches) if steps is None and isinstance(train_batches, Sized) else steps
        for batch in progressing(batches, count, progress, "training"):
            self.train_step(batch)
            after = self.steps - self.warmup
            if after > 0 and after % self.train_steps == 0:
                for _ in range(self.valid_steps):
                    self.valid_step(next(valid))

    def train_step(self, batch: Any) -> float:
        """One step of the weights and one of the response, on the same examples and the same randomness.

        The joint step of ``method="stn"`` moves both at perturbed hyperparameters. The others move ``w0`` at the
        present ones, and then ``Θ`` at perturbed ones, where w0 is a constant.

        Args:
            batch: what the loss function takes; its first tensor with a ``batch_dim`` has the examples there.

        Returns:
            The training loss: of the weights' step, or of the joint one.

        Raises:
            ResponseError: if the loss is no scalar, or the batch does not fit.
        """
        self.steps += 1
        point, state, kept = self.tuned.coordinates.point(), self.starts.now(), self.statistics.keep()

        def back(then: Callable[[Sequence[Kept]], None]) -> None:
            self.starts.back(state)
            then(kept)

        with self.starts.first(state):
            if self.tuned.method == "stn":
                loss: float = self._attempt(
                    lambda: self._joint(batch, point, state, kept), lambda: back(self.statistics.restore)
                )
            else:
                loss = self._weights(batch, point)
        self.statistics.note(kept)
        if self.tuned.method == "stn":
            return loss
        after = self.starts.now(state)
        self.starts.back(state, after)
        self.statistics.stand_in(kept)
        try:
            self._attempt(lambda: self._response(batch, point), lambda: back(self.statistics.stand_in))
        finally:
            self.starts.back(after)
        return loss

    def valid_step(self, batch: Any) -> float:
        """One step of the hyperparameters, and of the scales where they are tuned, on a batch of validation data.

        The model is in evaluation mode; weights and response are constants. A step whose loss or gradient is not finite
        is left out with a warning.

        Returns:
            The validation loss.
        """
        check_trained(self.tuned.model, self.weights)
        with evaluation(self.tuned.model):
            state = self.starts.now()
            loss: float = self._attempt(lambda: self._validation(batch), lambda: self.starts.back(state))
        return loss

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on exactly: model, response, hyperparameters, optimizers and randomness."""
        return {
            "tuned": self.tuned.state_dict(),
            "fallback": dict(self.tuned.fallback),
            "mixes": self.tuned.mixes,
            "optimizers": [None if o is None else o.state_dict() for o in self._optimizers()],
            "generator": self.generator.get_state(),
            "random": random_state(self.tuned.device, others=True),
            "steps": self.steps,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` kept."""
        self.tuned.load_state_dict(state["tuned"])
        self.tuned.fallback, self.tuned.mixes = dict(state["fallback"]), state.get("mixes", False)
        for optimizer, kept in zip(self._optimizers(), state["optimizers"], strict=True):
            if optimizer is not None:
                optimizer.load_state_dict(kept)
        self.generator.set_state(state["generator"])
        set_random_state(self.tuned.device, state["random"])
        self.steps, self.descent.skipped = state["steps"], state["skipped"]

    def _optimizers(self) -> list[Optimizer | None]:
        return [self.optimizer, self.response_optimizer, self.hyper_optimizer, self.scale_optimizer]
