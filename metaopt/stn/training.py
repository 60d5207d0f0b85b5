"""The training algorithm: weights, response, hyperparameters and scales, in turn."""

from __future__ import annotations

__all__ = ["Factory", "Tuner"]

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metaopt.errors import ResponseError, whole
from metaopt.modes.progress import progressing
from metaopt.stn.aside import Aside
from metaopt.stn.batches import size_of
from metaopt.stn.bounds import keep_inside
from metaopt.stn.buffers import Kept, Statistics
from metaopt.stn.checks import (
    adds_up,
    check_curvature,
    check_first,
    check_trained,
    check_validation,
    groups_of,
    made,
    repeat,
    require_scalar,
    takes_values,
)
from metaopt.stn.descent import Descent, moving
from metaopt.stn.generators import random_state, set_random_state
from metaopt.stn.layouts import NeedsGroups
from metaopt.stn.modes import evaluation
from metaopt.stn.perturbations import Noise, Perturbation, draw, entropy
from metaopt.stn.starts import Start, Starts
from metaopt.stn.tuned import Tuned

Factory = Callable[[Iterable[Tensor]], Optimizer]
_TRAINING = "weights or the response"


class Tuner:
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

    def __init__(
        self,
        tuned: Tuned,
        train_loss: Callable[..., Tensor],
        valid_loss: Callable[..., Tensor],
        *,
        optimizer: Factory,
        response_optimizer: Factory,
        hyper_optimizer: Factory,
        scale_optimizer: Factory | None,
        train_steps: int,
        valid_steps: int,
        warmup: int,
        entropy_weight: float,
        scale_bounds: tuple[float, float],
        clip: float | None,
        antithetic: bool,
        linearize_valid: bool,
        seed: int | None,
    ) -> None:
        self.tuned, self.train_loss, self.valid_loss = tuned, train_loss, valid_loss
        self.weights = [p for p in tuned.model.parameters() if p.requires_grad]
        self.response = list(tuned.responses.parameters())
        self.leaves = list(tuned.hyper.parameters())
        self.optimizer = made(optimizer, self.weights, "weights")
        self.response_optimizer = made(response_optimizer, self.response, "response")
        self.hyper_optimizer = made(hyper_optimizer, self.leaves, "hyperparameters")
        self.scale_optimizer = None if scale_optimizer is None else made(scale_optimizer, [tuned.rho], "scales")
        self.train_steps, self.valid_steps, self.warmup = train_steps, valid_steps, warmup
        self.entropy_weight, self.scale_bounds = entropy_weight, scale_bounds
        self.descent = Descent(clip, tuned.slots.responding)
        self.antithetic, self.linearize_valid = antithetic, linearize_valid
        self.generator = torch.Generator("cpu").manual_seed(torch.initial_seed() if seed is None else seed)
        self.steps = 0
        self._noise: Noise | None = None
        self._at_bounds: set[str] = set()
        self._accepts_values = takes_values(train_loss, valid_loss)
        self.starts, self._validated = Starts(tuned), False
        self.statistics = Statistics(tuned.slots.modules)
        self._watched: set[int] = set()

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

    # -- the steps

    def _weights(self, batch: Any, point: Tensor) -> float:
        examples = size_of(batch, self.tuned.batch_dim)
        at = Perturbation(None, self.tuned.coordinates.present(examples, point), weights=True)
        loss = self._loss(self.train_loss, batch, at)
        self._noise = at.noise
        self.descent.step(_TRAINING, loss, (self.weights, self.optimizer))
        return loss.item()

    def _response(self, batch: Any, point: Tensor) -> float:
        tuned = self.tuned
        z, point, groups = self._perturb(size_of(batch, tuned.batch_dim), point)
        values = tuned.coordinates.values(point)
        at = Perturbation(z / tuned.reference, values, groups, tuned.method == "delta", response=True)
        at.noise = Noise(self._noise)
        first, before = self.steps == 1, self.starts.now() if self.steps == 1 else None
        at.watched = first and at.linearised
        loss = self._loss(self.train_loss, batch, at)
        if first:
            check_first(loss, at, self.weights, self.tuned.bound)
        if before is not None and at.outputs and adds_up(loss, at.outputs):
            check_curvature(at.outputs, loss, self._moved(batch, at, before))
        self.descent.step(_TRAINING, loss, (self.response, self.response_optimizer))
        return loss.item()

    def _moved(self, batch: Any, at: Perturbation, state: Start) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Outputs and loss of the same pass, but for what the model returns: moved by little, and by much."""
        for offset in (0.5, 1e2, 1e4):
            self.starts.back(state)
            again = replace(at, noise=Noise(self._noise), outputs=[], aliases=[], offset=offset)
            loss = self._loss(self.train_loss, batch, again)
            yield again.outputs, loss

    def _joint(self, batch: Any, point: Tensor, state: Start, kept: Sequence[Kept]) -> float:
        _, point, groups = self._perturb(size_of(batch, self.tuned.batch_dim), point)
        at = Perturbation(point, self.tuned.coordinates.values(point), groups, weights=True, response=True)
        loss = self._loss(self.train_loss, batch, at)
        if groups not in (None, 1) and (any(k.moved for k in kept) or self.starts.moved(state)):
            # Each group moved them, by its own examples.
            self.tuned.mixes = True
            raise NeedsGroups(*next(iter(self.tuned.fallback.items())))
        if self.steps == 1:
            check_first(loss, at, self.weights, self.tuned.bound)
        self.optimizer.zero_grad()
        moves = (self.response, self.response_optimizer), (self.weights, self.optimizer)
        self.descent.step(_TRAINING, loss, *moves)
        return loss.item()

    def _validation(self, batch: Any) -> float:
        tuned, examples = self.tuned, size_of(batch, self.tuned.batch_dim)
        leaf, sigma = tuned.coordinates.leaf(), tuned.scale
        origin = 0 if tuned.method == "stn" else leaf.detach()
        if self.scale_optimizer is None:
            groups: int | None = 1
            point = leaf.expand(examples, -1)
        else:
            groups = groups_of(self.tuned, examples)
            point = leaf + sigma * self._normal(examples, groups)
        z = (point - origin) / (tuned.reference if tuned.standardize else 1)
        at = Perturbation(z, tuned.coordinates.values(point.detach()), groups, linearised=self.linearize_valid)
        loss = self._loss(self.valid_loss, batch, at, values=self._accepts_values)
        objective = loss if self.scale_optimizer is None else loss - self.entropy_weight * entropy(sigma)
        if not self._validated:
            check_validation(loss, self.weights)
            self._validated = True
        moves = (moving(self.leaves), self.hyper_optimizer), (moving([tuned.rho]), self.scale_optimizer)
        if not self.descent.step("hyperparameters", objective, *moves):
            return loss.item()
        keep_inside(tuned.hyper, self._at_bounds)
        if self.scale_optimizer is not None:
            tuned.keep_scale(*self.scale_bounds)
        tuned.hyper.record()
        return loss.item()

    # -- parts of a step

    def _loss(self, function: Callable[..., Tensor], batch: Any, at: Perturbation, *, values: bool = True) -> Tensor:
        at.attributes = self.starts.attributes
        # Looked at until a step went well: the mode sees every function that the model calls.
        watch = Aside(at) if at.linearised and id(function) not in self._watched else nullcontext()
        with self.tuned.perturbed(at), watch:
            loss = function(self.tuned, batch, at.values) if values else function(self.tuned, batch)
        self._watched |= {id(function)} if at.linearised else set()
        require_scalar(loss)
        return loss

    def _attempt(self, step: Callable[[], float], back: Callable[[], None]) -> float:
        """Do a step; go back and do it again, with groups, where a parameter turns out not to respond per example."""
        while True:
            try:
                return step()
            except NeedsGroups as needs:
                if needs.name not in self.tuned.names:
                    raise ResponseError(
                        f"{needs.name}: {needs.why}. A dropout rate differs from example to example, so its module "
                        "must see the examples along an axis (a `VariationalDropout` of `(B, T, ...)` needs "
                        "`batch_first=True`); name its hyperparameter in `per_batch` where it can't."
                    ) from needs
                self.tuned.fallback[needs.name] = needs.why
                back()

    def _normal(self, examples: int, groups: int | None) -> Tensor:
        coordinates = self.tuned.coordinates
        return draw(
            self.generator,
            examples,
            coordinates.size,
            groups=groups,
            shared=coordinates.shared,
            antithetic=self.antithetic,
            like=self.tuned.rho,
        )

    def _perturb(self, examples: int, point: Tensor) -> tuple[Tensor, Tensor, int | None]:
        """``ε``, ``λ0 + ε``, and the number of groups."""
        groups = groups_of(self.tuned, examples)
        with torch.no_grad():
            z = self.tuned.scale * self._normal(examples, groups)
            return z, point + z, groups

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
