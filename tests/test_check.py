"""The check of a user's own loop: right loops pass, and wrong ones are found and told why."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from metaopt.check import Report, hypergradcheck
from metaopt.check.differences import difference
from tests.cases import CASES, Case, Trained, data, mlp

Watch = Callable[[torch.optim.Optimizer], AbstractContextManager[Any]]
RIGHT = ("momentum_zero", "adam", "teacher", "convolution", "initial_weights")


def outer(model: nn.Module) -> Tensor:
    _, _, x, y = data()
    return F.cross_entropy(model(x), y)


def trainer(
    hyper: dict[str, Tensor],
    *,
    model: Callable[[], nn.Module] = lambda: mlp(5, 6, 3),
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = lambda model, x, y: F.cross_entropy(model(x), y),
    optimizer: Callable[..., torch.optim.Optimizer] = metaopt.optim.SGD,
    steps: int = 3,
) -> Callable[[Watch], nn.Module]:
    """A training as users write it."""

    def train(watch: Watch) -> nn.Module:
        net = model()
        x, y, _, _ = data()
        x = x.to(next(net.parameters()).dtype)
        trained = optimizer(net.parameters(), **{name: hyper[name] for name in hyper if name != "scale"})
        with watch(trained):
            for _ in range(steps):
                trained.zero_grad()
                loss(net, x, y).backward()
                trained.step()
        return net

    return train


def report(*args: Any, **options: Any) -> Report:
    found = hypergradcheck(*args, **options, raise_exception=False)
    assert isinstance(found, Report)
    return found


def kinds(found: Report) -> list[str]:
    return [cause.kind for cause in found.causes]


def leaf(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value).clone().requires_grad_()


# -- right loops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.name in RIGHT], ids=str)
def test_right_loops_pass(case: Case) -> None:
    hyper = case.hyper()

    def objective(trained: Trained) -> Tensor:
        return trained.outer() if callable(trained.outer) else trained.outer

    assert hypergradcheck(lambda watch: case.train(hyper, watch), objective, hyper) is True
    assert all(value.grad is None for value in hyper.values())


def test_a_model_that_is_made_outside_is_put_back() -> None:
    x, y, _, _ = data()
    model = nn.Sequential(mlp(5, 6, 3), nn.BatchNorm1d(3))
    hyper = metaopt.Hyperparameters(lr=metaopt.positive(0.1), weights=metaopt.interval(torch.full((12,), 0.5), 0, 1))
    optimizer = metaopt.optim.SGD(model.parameters(), lr=hyper.lr, momentum=0.9)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def train() -> None:
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            (hyper.weights * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
            optimizer.step()
        model.eval()

    found = report(train, lambda: outer(model), hyper, optimizer=optimizer)
    assert found, found
    assert {row.name for row in found.rows} == {"lr", "weights"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modules_of_hyperparameters_may_be_among_several() -> None:
    hyper = metaopt.Hyperparameters(lr=torch.tensor(0.1))
    assert hypergradcheck(trainer({"lr": hyper.lr}), outer, [hyper])


def test_the_hyperparameters_and_the_generators_are_as_they_were() -> None:
    lr = leaf(0.1)
    random = torch.get_rng_state()
    hypergradcheck(trainer({"lr": lr}), outer, lr)
    assert lr.item() == 0.1
    assert lr.grad is None
    assert torch.equal(random, torch.get_rng_state())


def test_the_report_prints_a_table() -> None:
    lr = leaf(0.1)
    found = report(trainer({"lr": lr}), outer, {"lr": lr}, forward=False)
    assert found
    text = str(found)
    assert "all derivatives agree" in text
    assert "lr" in text
    assert "forward mode was left out" in text


# -- loops that are wrong ----------------------------------------------------------------------------------------------


class Slow(torch.optim.SGD):
    """An optimizer with a rule that forgets half of its derivative."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for w in group["params"]:
                    w.sub_(group["lr"] * w.grad)


def wrong_update(w: Tensor, g: Tensor, state: Any, step: int, *, lr: Any) -> tuple[Tensor, dict[str, Any]]:
    return w - lr * (0.5 * g + 0.5 * g.detach()), {}


def test_a_rule_with_a_wrong_derivative() -> None:
    metaopt.rules.register(metaopt.rules.Rule(Slow, wrong_update, settings={"lr": "lr"}))
    lr = leaf(0.1)
    train = trainer({"lr": lr}, optimizer=Slow)
    found = report(train, outer, {"lr": lr}, verify="never")
    assert kinds(found) == ["unknown"]
    assert found.rows[0].verdict == "differs"
    with pytest.raises(metaopt.CheckError, match=r"1 of 1 derivatives disagree(.|\n)*lr(.|\n)*wrong derivative"):
        hypergradcheck(train, outer, {"lr": lr}, verify="never")


class Wrong(torch.autograd.Function):
    """A square whose backward is that of another function, and can't be told from its forward by the tape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.detach() ** 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 2 * x.detach()


def test_a_custom_function_with_a_wrong_derivative() -> None:
    lr = leaf(0.1)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return Wrong.apply(model(x)).mean()

    with pytest.raises(metaopt.CaptureError, match="Wrong"):
        hypergradcheck(trainer({"lr": lr}, loss=loss), outer, {"lr": lr})
    found = report(trainer({"lr": lr}, loss=loss), outer, {"lr": lr}, verify="never")
    assert kinds(found) == ["unknown"]


def test_one_wrong_entry_among_many_is_found() -> None:
    weights = leaf(torch.full((40,), 0.5))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen = torch.cat([weights[:17], weights[17:18].detach(), weights[18:]])
        return (seen[:12] * F.cross_entropy(model(x), y, reduction="none")).mean() + (seen**2 @ torch.ones(40)) * (
            model(x) ** 2
        ).mean()

    found = report(trainer({"lr": torch.tensor(0.05)}, loss=loss, steps=2), outer, {"weights": weights})
    # `detach` of a hyperparameter is its value: the trajectory depends on it.
    assert found, found

    def cut(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen = torch.cat([weights[:17], torch.tensor([weights.tolist()[17]]), weights[18:]])
        return (seen**2 @ torch.ones(40)) * (model(x) ** 2).mean()

    found = report(trainer({"lr": torch.tensor(0.05)}, loss=cut, steps=2), outer, {"weights": weights})
    assert [row.place for row in found.wrong] == [" along a random direction", "[17]"]
    assert kinds(found) == ["constant"]
    assert "test_check.py:" in found.causes[0].text


def test_a_number_that_was_taken_by_item() -> None:
    scale = leaf(0.5)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = model(x)
        return scale * F.cross_entropy(out, y) * (1 + out.pow(2).mean().item())

    found = report(trainer({"lr": torch.tensor(0.1)}, loss=loss), outer, {"scale": scale})
    assert kinds(found) == ["constant"]
    assert ".item()" not in str(found.rows)


def test_a_hyperparameter_that_became_a_number_before_the_loop() -> None:
    lr = leaf(0.1)

    def train(watch: Watch) -> nn.Module:
        return trainer({"lr": lr.detach()})(watch)

    found = report(train, outer, {"lr": lr})
    assert kinds(found) == ["number"]
    assert "lr moves the objective, but metaopt saw no tensor" in found.causes[0].text


def test_a_hyperparameter_that_moves_nothing() -> None:
    lr, other = leaf(0.1), leaf(torch.ones(3))
    found = report(trainer({"lr": lr}), outer, {"lr": lr, "other": other})
    assert not found
    assert kinds(found) == ["unused"]
    assert "other moves nothing" in found.causes[0].text


def test_a_value_that_was_computed_before_the_training() -> None:
    lr = leaf(0.1)
    rate = 2 * lr
    found = report(trainer({"lr": rate}), outer, {"lr": lr})
    assert kinds(found) == ["stale"]


def test_a_loop_that_is_not_deterministic() -> None:
    lr, counter = leaf(0.1), itertools.count()

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y) * (1 + 0.01 * next(counter))

    found = report(trainer({"lr": lr}, loss=loss), outer, {"lr": lr})
    assert kinds(found) == ["random"]
    assert "not deterministic" in found.causes[0].text


def test_dropout_is_seeded_by_the_check() -> None:
    lr = leaf(0.1)
    make = lambda: nn.Sequential(mlp(5, 6, 3), nn.Dropout(0.3))  # noqa: E731
    assert hypergradcheck(trainer({"lr": lr}, model=make), lambda model: outer(model.eval()), lr)


def test_a_loop_that_does_not_start_where_it_started() -> None:
    lr, generator = leaf(0.1), torch.Generator().manual_seed(0)

    def model() -> nn.Module:
        net = mlp(5, 6, 3)
        with torch.no_grad():
            net[0].weight.normal_(generator=generator)  # type: ignore[operator]
        return net

    found = report(trainer({"lr": lr}, model=model), outer, {"lr": lr})
    assert kinds(found) == ["beginning"]


def test_a_kink_exactly_at_zero() -> None:
    scale = leaf(1.0)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y) + torch.relu(scale - 1.0) * (model(x) ** 2).mean()

    found = report(trainer({"lr": torch.tensor(0.1)}, loss=loss), outer, {"scale": scale})
    assert kinds(found) == ["kink"]
    assert "ReLU" in found.causes[0].text
    assert found.rows[0].verdict == "not smooth there"


def test_a_kink_of_straight_lines() -> None:
    """The stencils agree to the last digit there."""
    scale = leaf(1.0)
    train = trainer({"lr": torch.tensor(0.1)}, loss=lambda model, x, y: scale * F.cross_entropy(model(x), y))
    found = report(train, lambda model: outer(model) + torch.relu(scale - 1.0), {"scale": scale})
    assert kinds(found) == ["kink"]


def test_a_step_nearby() -> None:
    scale = leaf(1.0)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y) * torch.where(scale > 1.00005, 1.1, 1.0) * scale

    found = report(trainer({"lr": torch.tensor(0.1)}, loss=loss), outer, {"scale": scale})
    assert kinds(found) == ["rough"]


def test_float32() -> None:
    lr = leaf(torch.tensor(0.1, dtype=torch.float32))

    def float32(model: nn.Module) -> Tensor:
        _, _, x, y = data()
        return F.cross_entropy(model(x.float()), y)

    found = report(trainer({"lr": lr}, model=lambda: mlp(5, 6, 3).float()), float32, {"lr": lr})
    assert kinds(found)[0] == "precision"
    assert "torch.float32" in found.causes[0].text


# -- what the check refuses --------------------------------------------------------------------------------------------


def test_values_are_no_leaves() -> None:
    hyper = metaopt.Hyperparameters(lr=metaopt.positive(0.1))
    with pytest.raises(metaopt.CheckError, match="no leaf"):
        hypergradcheck(trainer({"lr": hyper.lr}), outer, hyper.lr)
    with pytest.raises(metaopt.CheckError, match="no hyperparameter"):
        hypergradcheck(trainer({"lr": hyper.lr}), outer, [])


def test_a_training_that_is_not_watched() -> None:
    with pytest.raises(metaopt.CheckError, match="0 times"):
        hypergradcheck(lambda watch: mlp(5, 3), outer, leaf(0.1))


def test_a_training_that_uses_the_run() -> None:
    lr = leaf(0.1)

    def train(watch: Watch) -> nn.Module:
        model = mlp(5, 6, 3)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        x, y, _, _ = data()
        with watch(optimizer) as run:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            _ = run.steps
        return model

    with pytest.raises(metaopt.CheckError, match=r"run\.steps"):
        hypergradcheck(train, outer, lr)


def test_the_sides_of_a_domain() -> None:
    def right(h: float) -> float:
        if h < 0:
            raise metaopt.DomainError("no")
        return float(torch.tensor(1.0 + h).exp())

    found = difference(right, right(0.0), 1e-4)
    assert found.sided
    assert found.value == pytest.approx(2.718281828, rel=1e-8)
    left = difference(lambda h: right(-h), right(0.0), 1e-4)
    assert left.value == pytest.approx(-2.718281828, rel=1e-8)


@pytest.mark.parametrize(
    "wrong", [{"step": 0.0}, {"step": float("nan")}, {"rtol": -1.0}, {"atol": "a"}, {"entries": -1}]
)
def test_arguments_of_the_wrong_kind_are_not_the_trainings_fault(wrong: dict[str, Any]) -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(metaopt.CheckError, match=f"^{next(iter(wrong))} must be a"):
        hypergradcheck(lambda watch: None, lambda model: torch.ones(()), lr, **wrong)
    with pytest.raises(metaopt.CheckError, match="no function: hypergradcheck"):
        hypergradcheck(None, lambda model: None, lr)  # type: ignore[call-overload]
    with pytest.raises(metaopt.RuleError, match="an optimizer's class"):
        metaopt.check.rulecheck(torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1))  # type: ignore[call-overload]
