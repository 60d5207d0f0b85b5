"""The steps of the training algorithm: of weights, response, both at once, and hyperparameters."""

from __future__ import annotations

__all__ = ["Factory", "Steps"]

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metaopt.errors import ResponseError
from metaopt.stn.aside import Aside
from metaopt.stn.batches import size_of
from metaopt.stn.bounds import keep_inside
from metaopt.stn.buffers import Kept, Statistics
from metaopt.stn.checks import (
    adds_up,
    check_curvature,
    check_first,
    check_validation,
    groups_of,
    made,
    require_scalar,
    takes_values,
)
from metaopt.stn.descent import Descent, moving
from metaopt.stn.layouts import NeedsGroups
from metaopt.stn.perturbations import Noise, Perturbation, draw, entropy
from metaopt.stn.starts import Start, Starts
from metaopt.stn.tuned import Tuned

Factory = Callable[[Iterable[Tensor]], Optimizer]
_TRAINING = "weights or the response"


class Steps:
    """What a training run has, and each of its steps by itself."""

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
