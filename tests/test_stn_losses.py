"""What a user gives to `train`: losses and optimizers that are wrong say so, and right ones are called right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaopt.errors import ResponseError
from metaopt.stn import train
from tests.test_stn_training import METHODS, data, problem, train_loss, valid_loss


def closed(model: nn.Module) -> Callable[..., Tensor]:
    return lambda _, batch, *values: valid_loss(model, batch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["penalty", "model", "validation"])
def test_a_loss_of_the_plain_weights_is_refused(method: str, kind: str) -> None:
    """A validation loss of the original model tuned nothing, and a joint step could not tell a direct penalty."""
    tuned = problem(method)
    direct = closed(tuned.model)

    def penalised(model: Any, batch: Any, values: Any) -> Tensor:
        return train_loss(model, batch, values) + values.decay.mean() * tuned.model.get_parameter("one.weight").norm()

    losses = {"penalty": (penalised, valid_loss), "model": (direct, valid_loss), "validation": (train_loss, direct)}
    with train(tuned, *losses[kind]) as tuner, pytest.raises(ResponseError, match="model's parameters directly"):
        tuner.train_step(data())
        tuner.valid_step(data())


def test_values_are_given_to_a_validation_loss_that_needs_them() -> None:
    """An optional third argument was taken for ``values``: a factor, or the regularisers of a shared function."""
    seen: list[Any] = []

    def shared(model: Any, batch: Any, values: Any = None) -> Tensor:
        seen.append(values)
        return valid_loss(model, batch) if values is None else train_loss(model, batch, values)

    def needed(model: Any, batch: Any, values: Any) -> Tensor:
        return shared(model, batch, values)

    for loss, given in ((shared, False), (needed, True)):
        with train(problem(), shared, loss) as tuner:
            tuner.train_step(data())
            tuner.valid_step(data())
        assert (seen[-1] is not None) == given


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ((valid_loss, valid_loss), r"called as `train_loss\(model, batch, values\)`"),
        ((train_loss, lambda model: 0), r"called as `valid_loss\(model, batch\)`"),
    ],
    ids=["training", "validation"],
)
def test_losses_of_other_arguments_say_what_to_do(losses: Any, text: str) -> None:
    with pytest.raises(ResponseError, match=text), train(problem(), *losses):
        pass


def test_optimizers_are_of_the_parameters_that_they_are_made_for() -> None:
    """One that took the model's own moved the weights twice, and the response never."""
    tuned = problem()
    wrong: list[tuple[Any, str]] = [
        (lambda p: torch.optim.SGD(tuned.model.parameters(), lr=0.1), "optimizer of the response was made of other"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS evaluates the loss several times"),
        (lambda p: None, "returned NoneType; let it return a torch optimizer"),
    ]
    for optimizer, text in wrong:
        with pytest.raises(ResponseError, match=text), train(tuned, train_loss, valid_loss, optimizer=optimizer):
            pass


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_hyperparameter_stays(method: str) -> None:
    tuned = problem(method)
    tuned.hyper.get_leaf("decay").requires_grad_(False)
    before = {name: tuned.hyper.get_leaf(name).clone() for name in tuned.hyper}
    with train(tuned, train_loss, valid_loss) as tuner:
        for _ in range(2):
            tuner.train_step(data())
            tuner.valid_step(data())
    assert [n for n in tuned.hyper if torch.equal(before[n], tuned.hyper.get_leaf(n))] == ["decay"]
