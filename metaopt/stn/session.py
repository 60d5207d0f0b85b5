"""``train``: the context in which a model and its best response are trained."""

from __future__ import annotations

__all__ = ["train"]

import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.optim import SGD, Optimizer, RMSprop

from metaopt.errors import ResponseError, whole
from metaopt.stn.fused import FusedSGD
from metaopt.stn.steps import Factory
from metaopt.stn.training import Tuner
from metaopt.stn.tuned import Tuned


def _sgd(parameters: Iterable[Tensor]) -> Optimizer:
    given = list(parameters)
    # One call for all of them, where torch has it: of a small model's step it is a notable part.
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in given)
    return FusedSGD(given, lr=0.01, momentum=0.9) if fused else SGD(given, lr=0.01, momentum=0.9)


def _rmsprop(parameters: Iterable[Tensor]) -> Optimizer:
    return RMSprop(parameters, lr=0.01)


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
        valid_loss: ``valid_loss(model, batch)``, without the regularisers; it is given ``values`` too if it has a third
            argument without a default.
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
        ResponseError: if ``tuned`` is another model, a number of steps, τ or a bound makes no sense, if a loss can't be
            called like that, or if an optimizer has other parameters than it was given.

    References:
        Bae and Grosse 2020, Alg. 1; MacKay et al. 2019, Alg. 1 and Eq. 15 (entropy).
    """
    if not isinstance(tuned, Tuned):
        raise ResponseError(
            "the model to train is what `metaopt.stn.transform(model, hyper)` returns, and this is "
            f"{type(tuned).__name__}."
        )
    train_steps = whole("train_steps", train_steps, 1, ResponseError)
    valid_steps = whole("valid_steps", valid_steps, 0, ResponseError)
    warmup = whole("warmup", warmup, 0, ResponseError)
    seed = None if seed is None else whole("seed", seed, 0, ResponseError)
    _check_numbers(scale_bounds, entropy_weight, clip)
    _check_factories(optimizer, response_optimizer or optimizer, hyper_optimizer, scale_optimizer or optimizer)
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


def _check_numbers(scale_bounds: tuple[float, float], entropy_weight: float, clip: float | None) -> None:
    pair = isinstance(scale_bounds, (tuple, list)) and len(scale_bounds) == 2
    given = (*(scale_bounds if pair else ()), entropy_weight)
    if not (pair and all(map(_is_number, given)) and 0 < scale_bounds[0] <= scale_bounds[1] and entropy_weight >= 0):
        raise ResponseError(
            "needs 0 < low <= high for scale_bounds, a pair, and entropy_weight >= 0, got "
            f"{scale_bounds}, {entropy_weight}."
        )
    if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
        raise ResponseError(f"clip is the largest norm of a gradient, above 0 (or None), not {clip}.")


def _is_number(given: object) -> bool:
    return isinstance(given, numbers.Real)


def _check_factories(*factories: Factory) -> None:
    for factory in factories:
        if not callable(factory):
            raise ResponseError(
                "an optimizer is given as a function that makes it from a list of parameters, such as `lambda p: "
                f"torch.optim.Adam(p, lr=1e-3)`, not as {type(factory).__name__}."
            )
