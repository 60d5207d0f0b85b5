"""Every scheduler of torch, under record and stream: the derivative is that of loop and scheduler made anew."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler as S
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import metaopt
from metaopt.check import hypergradcheck
from metaopt.followed import Followed
from tests.cases import data, mlp

Watch = Callable[[torch.optim.Optimizer], AbstractContextManager[Any]]
Optimizer = torch.optim.Optimizer


def rate(optimizer: Optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def momentum(optimizer: Optimizer) -> float:
    return optimizer.param_groups[0]["momentum"]


# By the class; what is after the dash is a variant. Numbers such as eta_min are absolute: they do not move with λ.
TABLE: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: S.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: S.LinearLR(o, 0.25, 1.0, 3),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 6),
    "CosineAnnealingLR-eta_min": lambda o: S.CosineAnnealingLR(o, 6, eta_min=0.05),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "CosineAnnealingWarmRestarts-eta_min": lambda o: S.CosineAnnealingWarmRestarts(o, 2, eta_min=0.05),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.25, 1.0, 2), S.ExponentialLR(o, 0.8)], [2]),
    "SequentialLR-eta_min": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, 0.25, 1.0, 2), S.CosineAnnealingLR(o, 4, eta_min=0.02)], [2]
    ),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.5, 2), S.ExponentialLR(o, 0.8)]),
    "ChainedScheduler-eta_min": lambda o: S.ChainedScheduler(
        [S.CosineAnnealingLR(o, 6, eta_min=0.05), S.ExponentialLR(o, 0.8)]
    ),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5),
    "ReduceLROnPlateau-patience": lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=1, threshold=0.5),
    "ReduceLROnPlateau-min_lr": lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5, min_lr=0.12),
    "CyclicLR": lambda o: S.CyclicLR(o, rate(o), 3 * rate(o), 2, cycle_momentum=False),
    "CyclicLR-max_lr": lambda o: S.CyclicLR(o, rate(o), 0.9, 2, base_momentum=0.5 * momentum(o), max_momentum=0.9),
    "OneCycleLR": lambda o: S.OneCycleLR(o, max_lr=2 * rate(o), total_steps=7, cycle_momentum=False),
    "OneCycleLR-momentum": lambda o: S.OneCycleLR(
        o, max_lr=2 * rate(o), total_steps=7, base_momentum=0.5 * momentum(o), max_momentum=momentum(o)
    ),
    "OneCycleLR-three_phase": lambda o: S.OneCycleLR(
        o, max_lr=2 * rate(o), total_steps=7, three_phase=True, anneal_strategy="linear", cycle_momentum=False
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
    "SWALR-linear": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3, anneal_strategy="linear"),
}


def leaf(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def outer(model: Callable[[Tensor], Tensor]) -> Tensor:
    _, _, x, y = data()
    return F.cross_entropy(model(x), y)


def trainer(make: Callable[[Optimizer], Any], hyper: dict[str, Tensor], steps: int = 5) -> Callable[[Watch], nn.Module]:
    def train(watch: Watch) -> nn.Module:
        model = mlp(5, 6, 3)
        x, y, _, _ = data()
        optimizer = metaopt.optim.SGD(model.parameters(), lr=hyper["lr"], momentum=hyper.get("momentum", 0.0))
        scheduler = make(optimizer)
        with watch(optimizer):
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                scheduler.step(*([1.0] if isinstance(scheduler, S.ReduceLROnPlateau) else []))
        return model

    return train


def test_the_table_has_every_class() -> None:
    named = {name.partition("-")[0] for name in TABLE}
    assert {name for name in S.__all__ if name != "LRScheduler"} | {"SWALR"} == named


@pytest.mark.parametrize("name", TABLE)
def test_the_derivative_is_that_of_the_loop_built_anew(name: str) -> None:
    hyper = {"lr": leaf(0.3), "momentum": leaf(0.6)}
    assert hypergradcheck(trainer(TABLE[name], hyper), outer, hyper)


@pytest.mark.parametrize("name", TABLE)
def test_the_training_is_that_of_torchs_optimizer(name: str) -> None:
    found = []
    for make in (torch.optim.SGD, metaopt.optim.SGD):
        weight = nn.Parameter(torch.ones(2))
        numbers: Any = (leaf(0.3), leaf(0.6)) if make is metaopt.optim.SGD else (0.3, 0.6)
        optimizer = make([weight], lr=numbers[0], momentum=numbers[1])
        scheduler = TABLE[name](optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            (weight**4).sum().backward()
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, S.ReduceLROnPlateau) else []))
        found.append(weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("name", TABLE)
def test_a_hyperparameter_that_moves_takes_the_schedule_along(name: str) -> None:
    """As if it had had its present value from the start; there, a schedule reads nothing else of it."""
    if name.startswith("ReduceLROnPlateau"):
        pytest.skip("it computes with `float(lr)`; its next number is a factor on the present one")

    def numbers(first: float, then: float) -> list[float]:
        lr, weight = leaf(first), nn.Parameter(torch.ones(()))
        optimizer = metaopt.optim.SGD([weight], lr=lr, momentum=0.6)
        scheduler = TABLE[name](optimizer)
        found = []
        for t in range(5):
            if t == 3:
                with torch.no_grad():
                    lr.fill_(then)
            weight.grad = torch.ones(())
            optimizer.step()
            found.append(float(optimizer.param_groups[0]["lr"]))
            scheduler.step()
        return found[3:]

    assert numbers(0.3, 0.2) == pytest.approx(numbers(0.2, 0.2), rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: S.OneCycleLR(o, max_lr=0.3, total_steps=7, cycle_momentum=False),
        lambda o: S.CyclicLR(o, 0.1, 0.4, 2, cycle_momentum=False),
    ],
    ids=["one_cycle", "cyclic"],
)
def test_a_rate_that_a_scheduler_overwrites_has_no_derivative_and_is_said_to(make: Any) -> None:
    hyper = {"lr": leaf(0.3), "momentum": leaf(0.6)}
    runs: list[metaopt.Recording] = []

    def watch(optimizer: Optimizer) -> metaopt.Recording:
        runs.append(metaopt.record(optimizer))
        return runs[0]

    with pytest.warns(metaopt.HeldConstantWarning, match=r"lr of group 0 (.|\n)*does not come from it"):
        model = trainer(make, hyper)(watch)
    with pytest.warns(metaopt.UnusedHyperparameterWarning):
        found = runs[0].hypergradient(outer(model), list(hyper.values()))
    assert found[0] == 0
    assert found[1] != 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", metaopt.HeldConstantWarning)
        report = hypergradcheck(trainer(make, hyper), outer, hyper, raise_exception=False)
    assert [cause.kind for cause in report.causes] == ["unused"]
    assert all(row.ok for row in report.rows)


def test_a_rate_set_by_hand() -> None:
    def by_factor(optimizer: Optimizer) -> Any:
        class Scheduler:
            def step(self) -> None:
                for group in optimizer.param_groups:
                    group["lr"] = max(0.8 * group["lr"], 0.2)

        return Scheduler()

    lr = leaf(0.3)
    assert hypergradcheck(trainer(by_factor, {"lr": lr}), outer, lr)


@pytest.mark.parametrize("kind", ["pre", "post", "pre_and_clips"])
def test_a_hook_that_the_loop_registers(kind: str) -> None:
    """It sees the numbers that carry their derivative, wherever it was registered, and its calls are followed."""
    lr = leaf(0.3)

    def train(watch: Watch) -> nn.Module:
        model = mlp(5, 6, 3)
        x, y, _, _ = data()
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.5)

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            optimizer.param_groups[0]["lr"] *= 0.8
            if kind == "pre_and_clips":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)

        with watch(optimizer):
            register = optimizer.register_step_post_hook if kind == "post" else optimizer.register_step_pre_hook
            handle = register(hook)
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            handle.remove()
        return model

    assert hypergradcheck(train, outer, lr)


def test_a_rate_that_is_a_share_of_another_groups() -> None:
    """Also where the group is linked itself, to the same hyperparameter or to another."""
    lr, own = leaf(0.3), leaf(0.1)

    def train(watch: Watch) -> nn.Module:
        model = mlp(5, 6, 3)
        x, y, _, _ = data()
        groups: list[dict[str, Any]] = [{"params": [p]} for p in model.parameters()]
        groups[1]["lr"] = own
        optimizer = metaopt.optim.SGD(groups, lr=lr, momentum=0.5)
        with watch(optimizer):
            for t in range(3):
                for place in (1, 2) if t > 0 else (2,):
                    optimizer.param_groups[place]["lr"] = optimizer.param_groups[0]["lr"] * 0.1 * (t + 1)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        return model

    assert hypergradcheck(train, outer, {"lr": lr, "own": own})


@pytest.mark.parametrize("second", [torch.optim.SGD, metaopt.optim.SGD], ids=["plain", "linked"])
def test_a_rate_of_another_optimizer_is_refused(second: Any) -> None:
    """A number of one optimizer says nothing of the other's hyperparameter, though both are "lr of group 0"."""
    one, two = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = metaopt.optim.SGD([one], lr=leaf(0.1))
    other = second([two], lr=leaf(0.2) if second is metaopt.optim.SGD else 0.2)
    other.param_groups[0]["lr"] = 0.5 * optimizer.param_groups[0]["lr"]
    with pytest.raises(metaopt.DomainError, match="groups of another"), metaopt.record([optimizer, other]):
        (one * two).sum().backward()
        optimizer.step()
        other.step()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))], ids=["copied", "pickled"]
)
def test_copies_of_all_follow_the_copied_hyperparameters(copied: Callable[[Any], Any]) -> None:
    hyper = metaopt.Hyperparameters(lr=metaopt.positive(0.3), momentum=metaopt.interval(0.5, 0, 1))
    weight = nn.Parameter(torch.ones(()))
    optimizer = metaopt.optim.SGD([weight], lr=hyper.lr, momentum=hyper.momentum)
    given = hyper, weight, optimizer
    found = []
    for hyper, weight, optimizer in (copied(given), given):
        with metaopt.stream(optimizer) as run:
            for _ in range(3):
                optimizer.zero_grad()
                (weight**4).backward()
                optimizer.step()
        run.backward(weight**2)
        found.append([leaf.grad for leaf in hyper.parameters()])
    assert None not in found[0]
    assert found[0] == found[1]


def test_a_setting_that_was_computed_is_not_pickled_as_another() -> None:
    optimizer = metaopt.optim.SGD([nn.Parameter(torch.ones(()))], lr=leaf(-1.0).exp())
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(optimizer)


def test_a_setting_computed_from_two_hyperparameters_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = metaopt.optim.SGD([weight], lr=leaf(0.1), momentum=leaf(0.5))
    optimizer.param_groups[0]["momentum"] *= 1 - optimizer.param_groups[0]["lr"]
    with pytest.raises(metaopt.DomainError, match="computed from the numbers of two"), metaopt.record(optimizer):
        (weight**2).sum().backward()
        optimizer.step()


def test_a_linear_schedule_from_a_rate_of_zero() -> None:
    # λ = 0 under a factor: the factor is known, though it can't be seen in the number.
    lr = leaf(0.0)
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
    scheduler = S.ExponentialLR(optimizer, 0.5)
    x, y, _, _ = data()
    with metaopt.record(optimizer) as run:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    run.backward(outer(model))
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    directions = torch.autograd.grad(outer(model), list(model.parameters()))
    expected = -1.75 * sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    torch.testing.assert_close(lr.grad, expected)


@pytest.mark.parametrize("weights_only", [True, False])
def test_saved_and_loaded_numbers_still_follow(weights_only: bool) -> None:
    def made() -> tuple[Tensor, nn.Parameter, metaopt.optim.SGD, S.CosineAnnealingLR]:
        lr, weight = leaf(0.3), nn.Parameter(torch.ones(()))
        optimizer = metaopt.optim.SGD([weight], lr=lr)
        return lr, weight, optimizer, S.CosineAnnealingLR(optimizer, 6, eta_min=0.05)

    def step(weight: nn.Parameter, optimizer: Optimizer, scheduler: Any) -> None:
        weight.grad = torch.ones(())
        optimizer.step()
        scheduler.step()

    _, weight, optimizer, scheduler = made()
    for _ in range(3):
        step(weight, optimizer, scheduler)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), scheduler.state_dict()), file)
    assert type(optimizer.state_dict()["param_groups"][0]["lr"]) is float
    file.seek(0)
    saved = torch.load(file, weights_only=weights_only)
    lr, again, loaded, other = made()
    loaded.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert loaded.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    with torch.no_grad():
        lr.fill_(0.2)
    step(again, loaded, other)
    lr, weight, optimizer, scheduler = made()
    with torch.no_grad():
        lr.fill_(0.2)
    for _ in range(4):
        step(weight, optimizer, scheduler)
    assert loaded.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_followed_numbers_are_floats() -> None:
    x = Followed(0.5, 1.0, (0, "lr"))
    assert isinstance(x, float)
    assert repr(x) == "0.5"
    assert copy.deepcopy(x) is x

    def f(v: Any) -> Any:
        return (
            0.1 + (v - 0.1) * 0.7 + 2 / v - v**2 + (3 - v) * v - abs(-v) / 4 + 2**v + v % 0.3 * 2 + 1.3 % v + v // 0.3
        )

    h = 1e-5
    assert f(x).slope == pytest.approx((f(0.5 + h) - f(0.5 - h)) / (2 * h), rel=1e-8)
    assert max(x * 0.5, 0.3) == 0.3
    assert isinstance(torch.ones(2) * x, Tensor)
    assert isinstance(x * torch.ones(2), Tensor)


# -- weights that are averaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["swa", "ema", "ema_by_hand", "swa_and_buffers"])
def test_averages_of_weights(kind: str) -> None:
    lr = leaf(0.3)

    def train(watch: Watch) -> nn.Module:
        model: nn.Module = mlp(5, 6, 3)
        if kind == "swa_and_buffers":
            model = nn.Sequential(model, nn.BatchNorm1d(3))
        averages = {
            "swa": lambda: AveragedModel(model),
            "ema": lambda: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7)),
            "ema_by_hand": lambda: AveragedModel(model, avg_fn=lambda mean, new, n: 0.7 * mean + 0.3 * new),
            "swa_and_buffers": lambda: AveragedModel(model, use_buffers=True),
        }
        averaged = averages[kind]()
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
        schedule = SWALR(optimizer, swa_lr=0.1, anneal_epochs=2)
        x, y, _, _ = data()
        with watch(optimizer):
            for t in range(4):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if t > 0:
                    averaged.update_parameters(model)
                    schedule.step()
        return averaged.eval()

    assert hypergradcheck(train, outer, {"lr": lr})


# -- scaled, clipped, accumulated gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["norm", "norm_of_inf", "value", "none"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
def test_scaled_clipped_and_accumulated_gradients(scaled: bool, clip: str) -> None:
    lr = leaf(0.3)

    def train(watch: Watch) -> nn.Module:
        model = mlp(5, 6, 3)
        x, y, _, _ = data()
        optimizer = metaopt.optim.Adam(model.parameters(), lr=lr, eps=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, enabled=scaled)
        with watch(optimizer), warnings.catch_warnings():
            warnings.simplefilter("ignore", metaopt.HeldConstantWarning)
            for _ in range(4):
                optimizer.zero_grad()
                for i in (slice(0, 5), slice(5, 12)):
                    scaler.scale(F.cross_entropy(model(x[i]), y[i]) / 2).backward()
                scaler.unscale_(optimizer)
                if clip == "value":
                    nn.utils.clip_grad_value_(model.parameters(), 0.05)
                elif clip != "none":
                    nn.utils.clip_grad_norm_(model.parameters(), 0.2, norm_type=2.0 if clip == "norm" else torch.inf)
                scaler.step(optimizer)
                scaler.update()
        return model

    assert hypergradcheck(train, outer, {"lr": lr})


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("linked", [True, False])
def test_a_schedule_by_hand_may_put_tensors_into_the_groups(name: str, linked: bool) -> None:
    """In place of a linked setting it was taken for a number that comes from nowhere."""
    lr, x = torch.tensor(0.05, requires_grad=True), torch.randn(5, 4)

    def train(watch: Watch) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = getattr(metaopt.optim, name)(model.parameters(), lr=lr if linked else 0.05)
        with watch(optimizer):
            for t in range(3):
                for group in optimizer.param_groups:
                    group["lr"] = lr * (t + 1) / 3
                optimizer.zero_grad()
                model(x).tanh().square().sum().backward()
                optimizer.step()
        return model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor", UserWarning)  # torch's own, of such a rate
        assert hypergradcheck(train, lambda model: model.weight.sin().sum(), [lr])


@pytest.mark.parametrize("moved", [0.0, 1e-14])
def test_a_schedule_by_hand_of_tensors_goes_on_where_the_hyperparameter_moves(moved: float) -> None:
    """It was taken for a number that comes from nowhere, which is a wrong tangent."""
    x = torch.randn(5, 4)
    found: list[Tensor] = []
    for mode in (metaopt.record, metaopt.stream):
        torch.manual_seed(0)
        lr, model = torch.tensor(0.05, requires_grad=True), nn.Linear(4, 3)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        with warnings.catch_warnings(), mode(optimizer) as run:
            warnings.filterwarnings("ignore", "Converting a tensor", UserWarning)
            for t in range(4):
                optimizer.param_groups[0]["lr"] = lr * (t + 1) / 3
                optimizer.zero_grad()
                model(x).tanh().square().sum().backward()
                optimizer.step()
                if mode is metaopt.stream:
                    with torch.no_grad():
                        lr.add_(moved)
        found += run.hypergradient(model.weight.sin().sum(), [lr])
    torch.testing.assert_close(found[0], found[1])
