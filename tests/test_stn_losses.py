"""What a user gives to `train`: losses and optimizers that are wrong say so, and right ones are called right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from metaopt.errors import ResponseError
from metaopt.stn import l2, train, transform
from tests.stn_models import hyperparameters
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


class Own(nn.Module):
    """A model that returns its loss, of the batch or of each example, beside what it predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        each = F.cross_entropy(y, x.argmax(1) % 3, reduction="none")
        return {"logits": y, "logs": y.log_softmax(1), "each": each, "loss": each.mean()}


class Fused(torch.autograd.Function):
    """A cross entropy that saves its gradient, which autograd takes for a constant."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.slope = y.softmax(1) / len(y)
        return y.logsumexp(1).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        slope: Tensor = gradients[0] * ctx.slope
        return slope


OUTPUTS: dict[str, tuple[Callable[[dict[str, Tensor]], Tensor], bool]] = {
    "loss": (lambda o: 2 * o["loss"] + 1, True),
    "each": (lambda o: o["each"].mean(), True),
    "log-probabilities": (lambda o: F.nll_loss(o["logs"], torch.zeros(len(o["logs"]), dtype=torch.long)), True),
    "both": (lambda o: o["loss"] + o["logits"].square().mean(), False),
    "logits": (lambda o: o["logits"].logsumexp(1).mean(), False),
    "absolute": (lambda o: (o["logits"] - 1).abs().mean(), False),
    "hinge": (lambda o: (50 - o["logits"]).relu().mean(), False),
    "fused": (lambda o: Fused.apply(o["logits"]), False),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(OUTPUTS))
def test_a_loss_that_is_linear_in_a_linearised_output_is_refused(name: str, method: str) -> None:
    """The response of a model that returns its loss had nothing to settle in."""
    torch.manual_seed(0)
    loss, linear = OUTPUTS[name]
    tuned, x = transform(Own(), metaopt.Hyperparameters(decay=metaopt.positive(0.1)), method), torch.randn(6, 4)

    def penalised(model: Any, batch: Tensor, values: Any) -> Tensor:
        return loss(model(batch)) + l2(model, values.decay)

    with train(tuned, penalised, lambda model, batch: loss(model(batch))) as tuner:
        if linear and method == "delta":
            with pytest.raises(ResponseError, match=r"linear in its output.*`model\(x, labels=y\).loss`"):
                tuner.train_step(x)
            return
        tuner.train_step(x)
        tuner.train_step(x)
        tuner.valid_step(x)


@pytest.mark.filterwarnings("ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("stopped", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", ["manual", "forward", "double"])
def test_what_a_loss_computes_without_gradients_is_of_the_perturbed_weights(stopped: Any, engine: str) -> None:
    """Pseudo-labels were those of w0 where the output is linearised, or had a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    tuned = transform(model, hyperparameters(), engine=engine)
    with torch.no_grad():
        tuned.responses.weight.normal_()
    found: list[tuple[Tensor, Tensor]] = []

    def loss(model: Any, batch: Tensor, values: Any = None) -> Tensor:
        with stopped():
            target = model(batch)
        output = model(batch)
        found.append((target, output))
        return F.mse_loss(output, 1 + target.clone())

    with train(tuned, loss, loss, linearize_valid=True) as tuner:
        tuner.train_step(torch.randn(5, 3))
        tuner.valid_step(torch.randn(5, 3))
    assert len(found) >= 3
    for target, output in found:
        assert not target.requires_grad
        torch.testing.assert_close(target, output.detach(), rtol=1e-12, atol=1e-12)
