"""The training algorithm: weights, response, hyperparameters and scales, in turn."""

from __future__ import annotations

__all__ = ["Tuner", "train"]

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer, RMSprop

from metaopt.errors import FallbackWarning, ResponseError, SkippedStepWarning, UnusedHyperparameterWarning
from metaopt.hyperparameters.transformed import Integer, Interval
from metaopt.stn.batches import size_of
from metaopt.stn.checks import uses_directly
from metaopt.stn.layouts import NeedsGroups
from metaopt.stn.perturbations import Perturbation, draw, entropy, inverse_softplus
from metaopt.stn.substitution import random_state, set_random_state
from metaopt.stn.tuned import GROUPS, Tuned

Factory = Callable[[Iterable[Tensor]], Optimizer]

# An interval's leaf is kept where its sigmoid still has a slope: a thousandth of the width from the bounds.
LEAF = 6.9


def _sgd(parameters: Iterable[Tensor]) -> Optimizer:
    return SGD(parameters, lr=0.01, momentum=0.9)


def _rmsprop(parameters: Iterable[Tensor]) -> Optimizer:
    return RMSprop(parameters, lr=0.01)


class Tuner:
    """The steps of the training algorithm; made by `train`.

    Attributes:
        tuned: the model with its response.
        optimizer: moves the weights.
        response_optimizer: moves the response.
        hyper_optimizer: moves the hyperparameters.
        scale_optimizer: moves the scales, or None where they are fixed.
        steps: how many training steps there were.
        skipped: how many steps of any kind were left out, since they were not finite.
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
        self.optimizer = optimizer(self.weights)
        self.response_optimizer = response_optimizer(self.response)
        self.hyper_optimizer = hyper_optimizer(self.leaves)
        self.scale_optimizer = None if scale_optimizer is None else scale_optimizer([tuned.rho])
        self.train_steps, self.valid_steps, self.warmup = train_steps, valid_steps, warmup
        self.entropy_weight, self.scale_bounds, self.clip = entropy_weight, scale_bounds, clip
        self.antithetic, self.linearize_valid = antithetic, linearize_valid
        self.generator = torch.Generator("cpu").manual_seed(torch.initial_seed() if seed is None else seed)
        self.steps = 0
        self.skipped = 0
        self._accepts_values = len(inspect.signature(valid_loss).parameters) > 2

    # -- the algorithm

    def run(self, train_batches: Iterable[Any], valid_batches: Iterable[Any], steps: int | None = None) -> None:
        """Warm up, then alternate: ``train_steps`` training steps, ``valid_steps`` validation steps, and so on.

        Args:
            train_batches: a pass over the training data; repeated if ``steps`` asks for more.
            valid_batches: the validation data, repeated as needed.
            steps: the number of training steps; by default one pass.
        """
        valid = cycle(valid_batches)
        batches = train_batches if steps is None else islice(cycle(train_batches), steps)
        for batch in batches:
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
            batch: what the loss function takes; its first tensor has the examples along its first axis.

        Returns:
            The training loss: of the weights' step, or of the joint one.

        Raises:
            ResponseError: if the loss is no scalar, or the batch does not fit.
        """
        self.steps += 1
        state = random_state(self.tuned.device)
        if self.tuned.method == "stn":
            return self._attempt(lambda: self._joint(batch), state)
        loss = self._weights(batch)
        after = random_state(self.tuned.device)
        self._attempt(lambda: self._response(batch), state)
        set_random_state(self.tuned.device, after)
        return loss

    def valid_step(self, batch: Any) -> float:
        """One step of the hyperparameters, and of the scales where they are tuned, on a batch of validation data.

        The model is in evaluation mode; weights and response are constants. A step whose loss or gradient is not finite
        is left out with a warning.

        Returns:
            The validation loss.
        """
        with evaluation(self.tuned):
            loss: float = self._attempt(lambda: self._validation(batch), random_state(self.tuned.device))
        return loss

    # -- the steps

    def _weights(self, batch: Any) -> float:
        examples = size_of(batch)
        point = self.tuned.coordinates.leaf().detach()
        at = Perturbation(None, self.tuned.coordinates.values(point.expand(examples, -1)), weights=True)
        loss = self._loss(self.train_loss, batch, at)
        self._descend(loss, self.weights, self.optimizer)
        return loss.item()

    def _response(self, batch: Any) -> float:
        z, point, groups = self._perturb(size_of(batch))
        at = Perturbation(z / self.tuned.reference, self.tuned.coordinates.values(point), groups)
        at.response, at.linearised = True, self.tuned.method == "delta"
        loss = self._loss(self.train_loss, batch, at)
        if self.steps == 1:
            self._first(loss, at)
        self._descend(loss, self.response, self.response_optimizer)
        return loss.item()

    def _joint(self, batch: Any) -> float:
        _, point, groups = self._perturb(size_of(batch))
        at = Perturbation(point, self.tuned.coordinates.values(point), groups, weights=True, response=True)
        loss = self._loss(self.train_loss, batch, at)
        if self.steps == 1:
            self._first(loss, at)
        self.optimizer.zero_grad()
        self._descend(loss, self.response, self.response_optimizer, (self.weights, self.optimizer))
        return loss.item()

    def _validation(self, batch: Any) -> float:
        tuned, examples = self.tuned, size_of(batch)
        leaf, sigma = tuned.coordinates.leaf(), tuned.scale
        origin = 0 if tuned.method == "stn" else leaf.detach()
        if self.scale_optimizer is None:
            groups: int | None = 1
            point = leaf.expand(examples, -1)
        else:
            groups = self._groups(examples)
            point = leaf + sigma * self._normal(examples, groups)
        z = (point - origin) / (tuned.reference if tuned.standardize else 1)
        at = Perturbation(z, tuned.coordinates.values(point.detach()), groups, linearised=self.linearize_valid)
        loss = self._loss(self.valid_loss, batch, at, values=self._accepts_values)
        objective = loss if self.scale_optimizer is None else loss - self.entropy_weight * entropy(sigma)
        wanted = [*self.leaves, tuned.rho]
        gradients = torch.autograd.grad(objective, wanted, allow_unused=True)
        if not _finite([objective, *gradients]):
            self._skip("hyperparameters")
            return loss.item()
        for leaf_, gradient in zip(wanted, gradients, strict=True):
            leaf_.grad = gradient
        self._clip(self.leaves)
        self.hyper_optimizer.step()
        self._keep_inside()
        if self.scale_optimizer is not None:
            self._clip([tuned.rho])
            self.scale_optimizer.step()
            self._clamp_scales()
        tuned.hyper.record()
        return loss.item()

    # -- parts of a step

    def _loss(self, function: Callable[..., Tensor], batch: Any, at: Perturbation, *, values: bool = True) -> Tensor:
        with self.tuned.perturbed(at):
            loss = function(self.tuned, batch, at.values) if values else function(self.tuned, batch)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ResponseError(f"a loss function returns a scalar tensor, got {what}; take the mean over the batch.")
        if not loss.requires_grad:
            raise ResponseError(
                "the loss does not depend on the model that the loss function was given; compute it from "
                "`model(x)`, where `model` is the function's first argument, without `no_grad`."
            )
        return loss

    def _attempt(self, step: Callable[[], float], state: Any) -> float:
        """Do a step; again, with groups of examples, where a parameter turns out not to respond per example."""
        while True:
            try:
                return step()
            except NeedsGroups as needs:
                if needs.name not in self.tuned.names:
                    raise ResponseError(
                        f"{needs.name}: {needs.why}. A dropout rate differs from example to example, so its module "
                        "must see the examples along an axis; name its hyperparameter in `per_batch`."
                    ) from needs
                told = self.tuned.fallback.get(needs.name)
                if told != needs.why or needs.name not in self.tuned.warned:
                    self.tuned.warned.add(needs.name)
                    warnings.warn(
                        f"parameter {needs.name!r} can't respond per example ({needs.why}): each group of examples has "
                        "one perturbation, which makes the response noisier. `groups` in `transform` says how many "
                        "groups, `metaopt.stn.structures.register` names a rule for a layer of your own.",
                        FallbackWarning,
                        stacklevel=4,
                    )
                self.tuned.fallback[needs.name] = needs.why
                set_random_state(self.tuned.device, state)

    def _groups(self, examples: int) -> int | None:
        tuned = self.tuned
        if not tuned.fallback:
            return None
        coupled = tuned.model.training and any(
            isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training for m in tuned.model.modules()
        )
        if tuned.groups is None:
            return 1 if coupled else min(GROUPS, examples)
        if tuned.groups > examples:
            raise ResponseError(
                f"a batch of {examples} examples can't be split into {tuned.groups} groups of perturbations; use "
                "larger batches (`drop_last=True` leaves out a short last one), or fewer `groups` in `transform`."
            )
        if coupled and tuned.groups > 1:
            raise ResponseError(
                "BatchNorm takes its statistics from the whole batch, which groups of examples would change; set "
                "`groups=1` in `transform`, so that the batch has one perturbation."
            )
        return tuned.groups

    def _normal(self, examples: int, groups: int | None) -> Tensor:
        coordinates = self.tuned.coordinates
        return draw(
            self.generator,
            examples,
            coordinates.size,
            groups=groups,
            shared=coordinates.shared,
            antithetic=self.antithetic,
            like=self.tuned.rho.detach(),
        )

    def _perturb(self, examples: int) -> tuple[Tensor, Tensor, int | None]:
        """``ε``, ``λ0 + ε``, and the number of groups."""
        groups = self._groups(examples)
        z = self.tuned.scale.detach() * self._normal(examples, groups)
        return z, self.tuned.coordinates.leaf().detach() + z, groups

    def _descend(
        self, loss: Tensor, parameters: list[Any], optimizer: Optimizer, more: tuple[list[Any], Optimizer] | None = None
    ) -> None:
        everything = [*parameters, *(more[0] if more else [])]
        gradients = torch.autograd.grad(loss, everything, allow_unused=True)
        if not _finite([loss, *gradients]):
            self._skip("weights or the response")
            return
        for parameter, gradient in zip(everything, gradients, strict=True):
            parameter.grad = gradient
        self._clip(parameters)
        optimizer.step()
        if more:
            self._clip(more[0])
            more[1].step()

    def _clip(self, parameters: list[Any]) -> None:
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)

    def _skip(self, what: str) -> None:
        self.skipped += 1
        warnings.warn(
            f"a step of the {what} was left out: its loss or gradient is not finite. Lower the learning rates, set "
            "`clip`, or bound the hyperparameters (a dropout rate by `interval(p, 0, 0.95)`).",
            SkippedStepWarning,
            stacklevel=4,
        )

    @torch.no_grad()
    def _keep_inside(self) -> None:
        for name, domain in self.tuned.hyper.domains.items():
            if isinstance(domain, (Interval, Integer)):
                self.tuned.hyper.get_leaf(name).clamp_(-LEAF, LEAF)

    @torch.no_grad()
    def _clamp_scales(self) -> None:
        tuned = self.tuned
        tuned.rho.copy_(inverse_softplus(tuned.scale.clamp(*self.scale_bounds)))
        if tuned.standardize:
            # The same response, fed with perturbations in the new unit.
            ratio = tuned.scale / tuned.reference
            tuned.responses.rescale_(ratio)
            tuned.reference.mul_(ratio)

    def _first(self, loss: Tensor, at: Perturbation) -> None:
        """What can be seen of a wrong loss function after the first step."""
        if not at.weights and uses_directly(loss, self.weights):
            raise ResponseError(
                "the training loss uses the model's parameters directly, and not through `model(x)`: that part would "
                "not see the perturbed weights. For weight decay use `metaopt.stn.l2(model, values.NAME)`."
            )
        unused = set(at.values) - at.values.read - at.uses
        if unused:
            functional = (
                " Its forward calls a functional dropout: make it a module, `self.drop = nn.Dropout()`, and bind that "
                "by `bind={'NAME': 'drop'}` in `transform`."
                if at.functional_dropout
                else ""
            )
            warnings.warn(
                f"hyperparameters that neither the model nor the training loss uses: {', '.join(sorted(unused))}. Read "
                "them from the loss function's third argument, or bind them to a dropout module by name." + functional,
                UnusedHyperparameterWarning,
                stacklevel=5,
            )

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on exactly: model, response, hyperparameters, optimizers and randomness."""
        return {
            "tuned": self.tuned.state_dict(),
            "fallback": dict(self.tuned.fallback),
            "optimizers": [None if o is None else o.state_dict() for o in self._optimizers()],
            "generator": self.generator.get_state(),
            "random": random_state(self.tuned.device),
            "steps": self.steps,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` kept."""
        self.tuned.load_state_dict(state["tuned"])
        self.tuned.fallback = dict(state["fallback"])
        for optimizer, kept in zip(self._optimizers(), state["optimizers"], strict=True):
            if optimizer is not None:
                optimizer.load_state_dict(kept)
        self.generator.set_state(state["generator"])
        set_random_state(self.tuned.device, state["random"])
        self.steps, self.skipped = state["steps"], state["skipped"]

    def _optimizers(self) -> list[Optimizer | None]:
        return [self.optimizer, self.response_optimizer, self.hyper_optimizer, self.scale_optimizer]


@contextmanager
def train(
    tuned: Tuned,
    train_loss: Callable[..., Tensor],
    valid_loss: Callable[..., Tensor],
    *,
    optimizer: Factory = _sgd,
    response_optimizer: Factory | None = None,
    hyper_optimizer: Factory = _rmsprop,
    scale_optimizer: Factory | None = _rmsprop,
    train_steps: int = 5,
    valid_steps: int = 1,
    warmup: int = 0,
    entropy_weight: float = 1e-3,
    scale_bounds: tuple[float, float] = (1e-3, 2.0),
    clip: float | None = None,
    antithetic: bool = False,
    linearize_valid: bool = False,
    seed: int | None = None,
) -> Iterator[Tuner]:
    """Train a model and its best response, and tune its hyperparameters along the way.

    Args:
        tuned: what `transform` gave.
        train_loss: ``train_loss(model, batch, values)`` returns a scalar; it is called with the present and with
            perturbed hyperparameters. ``values`` holds each hyperparameter's value for each example, as a constant.
        valid_loss: ``valid_loss(model, batch)``, without the regularisers; or with ``values`` as a third argument.
        optimizer: makes the optimizer of the weights from their list.
        response_optimizer: makes the response's; by default like ``optimizer``.
        hyper_optimizer: makes the hyperparameters'.
        scale_optimizer: makes the scales'; None keeps σ fixed, and validates without perturbation.
        train_steps: T_train, training steps between validations.
        valid_steps: T_valid, validation steps in turn.
        warmup: training steps before the first validation.
        entropy_weight: τ, the weight of the perturbations' entropy.
        scale_bounds: between which σ is kept: where the response is flat, σ would grow without end.
        clip: the largest norm of a gradient, of weights, response, hyperparameters and scales each.
        antithetic: whether perturbations come in pairs of opposite sign.
        linearize_valid: whether the output is linearised in validation too.
        seed: of the perturbations; by default torch's initial seed.

    Yields:
        The tuner. The model is in training mode within, and in the mode that it had before, afterwards.

    Raises:
        ResponseError: if a number of steps, τ or a bound makes no sense.

    References:
        Bae and Grosse 2020, Alg. 1; MacKay et al. 2019, Alg. 1 and Eq. 15 (entropy).
    """
    if train_steps < 1 or valid_steps < 0 or warmup < 0:
        raise ResponseError(
            f"train_steps >= 1, valid_steps >= 0 and warmup >= 0, got {train_steps}, {valid_steps}, {warmup}."
        )
    if not 0 < scale_bounds[0] <= scale_bounds[1] or entropy_weight < 0:
        raise ResponseError(
            f"needs 0 < low <= high for scale_bounds and entropy_weight >= 0, got {scale_bounds}, {entropy_weight}."
        )
    modes = [(module, module.training) for module in tuned.modules()]
    tuned.train()
    try:
        yield Tuner(
            tuned,
            train_loss,
            valid_loss,
            optimizer=optimizer,
            response_optimizer=response_optimizer or optimizer,
            hyper_optimizer=hyper_optimizer,
            scale_optimizer=scale_optimizer,
            train_steps=train_steps,
            valid_steps=valid_steps,
            warmup=warmup,
            entropy_weight=entropy_weight,
            scale_bounds=scale_bounds,
            clip=clip,
            antithetic=antithetic,
            linearize_valid=linearize_valid,
            seed=seed,
        )
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluation(tuned: Tuned) -> Iterator[None]:
    """Evaluation mode, and back to the mode of each module."""
    modes = [(module, module.training) for module in tuned.modules()]
    tuned.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _finite(tensors: list[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if t is not None)
