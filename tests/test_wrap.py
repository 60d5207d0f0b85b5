"""Optimizers without a rule: the hypergradient through their steps is that of the bare loop, or there is an error."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from metaopt.check import hypergradcheck
from tests.cases import data, mlp

Watch = Callable[[torch.optim.Optimizer], AbstractContextManager[Any]]
Make = Callable[..., torch.optim.Optimizer]


def trainer(make: Make, hyper: dict[str, Tensor], wrap: Callable[[Any], Any] = metaopt.wrap, steps: int = 3) -> Any:
    """A training with example weights; the other hyperparameters go to the optimizer."""
    settings = {name: value for name, value in hyper.items() if name != "weights"}

    def train(watch: Watch) -> nn.Module:
        model = mlp(5, 6, 3)
        x, y, _, _ = data()
        optimizer = wrap(make(model.parameters(), **settings))
        with watch(optimizer):
            for _ in range(steps):

                def closure() -> Tensor:
                    optimizer.zero_grad()
                    losses = F.cross_entropy(model(x), y, reduction="none")
                    loss = (hyper["weights"] * losses).mean() if "weights" in hyper else losses.mean()
                    loss.backward()
                    return loss

                optimizer.step(closure)
            if hasattr(optimizer, "eval"):
                optimizer.eval()  # schedule-free optimizers move the weights here
        return model

    return train


def outer(model: nn.Module) -> Tensor:
    _, _, x, y = data()
    return F.cross_entropy(model(x), y)


def leaf(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value).clone().requires_grad_()


def weights() -> Tensor:
    return leaf(0.5 + 0.5 * torch.rand(12, generator=torch.Generator().manual_seed(1)))


def gradients(make: Make, hyper: dict[str, Tensor], wrap: Callable[[Any], Any]) -> tuple[Tensor, ...]:
    runs: list[metaopt.Recording] = []

    def watch(optimizer: torch.optim.Optimizer) -> metaopt.Recording:
        runs.append(metaopt.record(optimizer, verify="all"))
        return runs[0]

    model = trainer(make, hyper, wrap)(watch)
    return runs[0].hypergradient(outer(model), list(hyper.values()))


# -- torch's own -------------------------------------------------------------------------------------------------------

WITH_RULES = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "Adam": {"lr": 0.1, "weight_decay": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.1, "maximize": True},
}


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("name", WITH_RULES)
def test_a_watched_step_is_what_the_rule_says(name: str, foreach: bool) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return getattr(torch.optim, name)(parameters, **WITH_RULES[name], foreach=foreach)

    (found,) = gradients(make, {"weights": weights()}, metaopt.wrap)
    (expected,) = gradients(make, {"weights": weights()}, lambda optimizer: optimizer)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("name", ["Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "ASGD"])
def test_torchs_optimizers(name: str, foreach: bool) -> None:
    w = weights()
    train = trainer(lambda p: getattr(torch.optim, name)(p, lr=0.05, foreach=foreach), {"weights": w})
    if name == "RAdam" and foreach:  # it divides by zero while it warms up
        with pytest.raises(metaopt.SweepError, match="infinite derivative"):
            hypergradcheck(train, outer, {"weights": w}, entries=1)
        return
    assert hypergradcheck(train, outer, {"weights": w}, entries=1)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_rate_that_is_a_tensor_is_a_hyperparameter(name: str) -> None:
    lr = leaf(0.1)
    assert hypergradcheck(trainer(lambda p, lr: getattr(torch.optim, name)(p, lr=lr), {"lr": lr}), outer, {"lr": lr})


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "Adamax", "NAdam", "Adagrad", "Adadelta", "RMSprop", "ASGD"])
def test_a_single_hyperparameter(name: str, foreach: bool) -> None:
    """Forward mode pushes one column by forward formulas, which are others than those of many."""
    scale = leaf(0.7)

    def train(watch: Watch) -> nn.Module:
        model = mlp(5, 6, 3)
        x, y, _, _ = data()
        optimizer = metaopt.wrap(getattr(torch.optim, name)(model.parameters(), lr=0.05, foreach=foreach))
        with watch(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                F.mse_loss(model(x), scale * F.one_hot(y).to(x)).backward()
                optimizer.step()
        return model

    assert hypergradcheck(train, outer, scale)


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_the_loop_writes_around_the_step(when: str) -> None:
    lr = leaf(0.1)

    def train(watch: Watch) -> nn.Module:
        model = mlp(5, 6, 3)
        x, y, _, _ = data()
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)

        def shrink() -> None:
            with torch.no_grad():
                for w in model.parameters():
                    w.mul_(0.9)

        with watch(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                if when == "before":
                    shrink()
                optimizer.step()
                if when == "after":
                    shrink()
        return model

    assert hypergradcheck(train, outer, lr)


def test_many_iterations_of_lbfgs() -> None:
    def make(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.5, max_iter=4, **settings)

    w = weights()
    with pytest.raises(metaopt.CaptureError, match=r"took a Python number(.|\n)*hold_numbers=True"):
        hypergradcheck(trainer(make, {"weights": w}, steps=1), outer, {"weights": w})

    # Its numbers only decide when to stop.
    def wrap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return metaopt.wrap(optimizer, hold_numbers=True)

    assert hypergradcheck(trainer(make, {"weights": w}, wrap, steps=2), outer, {"weights": w}, entries=1)


def test_zero_gradients_have_finite_derivatives() -> None:
    for name in ("Adam", "RMSprop", "Adadelta", "Adamax", "NAdam"):
        for foreach in (False, True):
            w = nn.Parameter(torch.tensor([1.0, 0.0]))
            scale = leaf(torch.tensor([1.0, 0.0]))
            optimizer = metaopt.wrap(getattr(torch.optim, name)([w], lr=0.1, foreach=foreach))
            with metaopt.record(optimizer) as run:
                for _ in range(2):
                    optimizer.zero_grad()
                    (scale * w).square().sum().backward()
                    optimizer.step()
            (found,) = run.hypergradient(w.sum(), scale)
            assert torch.isfinite(found).all(), (name, foreach)


# -- third parties -----------------------------------------------------------------------------------------------------


def third_party(module: str, name: str, **settings: Any) -> Make:
    package = pytest.importorskip(module, reason=f"{module} is not installed (extra: test or thirdparty)")

    def make(parameters: Any, **more: Any) -> torch.optim.Optimizer:
        optimizer = getattr(package, name)(parameters, **settings, **more)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


@pytest.mark.parametrize(
    ("module", "name", "settings", "values"),
    [
        ("lion_pytorch", "Lion", {}, {"lr": 0.01, "weight_decay": 0.1}),
        ("schedulefree", "SGDScheduleFree", {"lr": 0.1}, {"weights": None}),
        ("schedulefree", "AdamWScheduleFree", {"lr": 0.1, "foreach": False}, {"weights": None}),
        ("schedulefree", "AdamWScheduleFree", {"lr": 0.1, "foreach": True}, {"weights": None}),
        ("pytorch_optimizer", "AdaBelief", {}, {"weights": None, "lr": 0.1, "weight_decay": 0.1}),
        ("pytorch_optimizer", "Lamb", {}, {"weights": None, "lr": 0.1, "weight_decay": 0.1}),
        ("pytorch_optimizer", "Adan", {}, {"weights": None, "lr": 0.1, "weight_decay": 0.1}),
        ("pytorch_optimizer", "LARS", {"lr": 0.1}, {"weights": None}),
    ],
    ids=str,
)
def test_third_parties(module: str, name: str, settings: dict[str, Any], values: dict[str, Any]) -> None:
    make = third_party(module, name, **settings)
    hyper = {key: weights() if value is None else leaf(value) for key, value in values.items()}
    assert hypergradcheck(trainer(make, hyper), outer, hyper, entries=1)


def test_a_third_party_that_computes_with_python_numbers_is_refused() -> None:
    make = third_party("prodigyopt", "Prodigy")
    with pytest.raises(metaopt.CaptureError, match="took a Python number"):
        hypergradcheck(trainer(make, {"weights": weights()}), outer, weights())


# -- optimizers of all manners -----------------------------------------------------------------------------------------


class Odd(torch.optim.Optimizer):
    """Writes through ``.data``, keeps its state in lists, makes it late, and has a second optimizer inside."""

    def __init__(self, params: Any, lr: float | Tensor = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr=0.01)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.inner.step()
        for group in self.param_groups:
            for w in group["params"]:
                state = self.state[w]
                if "past" not in state:
                    state["past"] = [torch.zeros(w.shape), torch.ones(w.shape)]
                    state["step"] = torch.tensor(0.0)
                state["step"] += 1
                past = state["past"]
                past[0].lerp_(w.grad, 0.3)
                past[1] = past[1] * 0.5 + w.grad.data.abs().mean()
                w.grad.data.mul_(0.9)
                w.data.add_(past[0] / past[1].sqrt(), alpha=-group["lr"] / state["step"].item())
        return loss


class Nested(torch.optim.Adam):
    """Calls the step of its base, as many optimizers on GitHub do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for w in group["params"]:
                w.mul_(1 - 0.1 * group["lr"])
        return loss


@pytest.mark.parametrize("make", [Odd, Nested])
def test_odd_optimizers(make: Make) -> None:
    torch.optim.Adam([nn.Parameter(torch.zeros(()))])  # so that the base's step has torch's hooks
    hyper = {"weights": weights(), "lr": leaf(0.1)}
    runs: list[metaopt.Recording] = []

    def watch(optimizer: torch.optim.Optimizer) -> metaopt.Recording:
        runs.append(metaopt.record(optimizer, verify="all"))
        return runs[0]

    trainer(make, hyper)(watch)
    assert runs[0].steps == 3
    assert hypergradcheck(trainer(make, hyper), outer, hyper, entries=1)


def test_state_from_before_the_context_is_where_it_starts() -> None:
    w, x = nn.Parameter(torch.tensor([1.0, 2.0])), torch.tensor([0.3, 0.4])
    optimizer = metaopt.wrap(torch.optim.RMSprop([w], lr=0.1, momentum=0.9))
    scale = leaf(1.0)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            (scale * x * w**2).sum().backward()
            optimizer.step()

    steps(2)
    warm = {name: value.clone() for name, value in optimizer.state[w].items()}

    def train() -> None:
        steps(2)

    assert hypergradcheck(train, lambda: w.square().sum(), {"scale": scale}, optimizer=optimizer)
    assert all(torch.equal(value, warm[name]) for name, value in optimizer.state[w].items())


def test_constrained_hyperparameters_are_followed() -> None:
    hyper = metaopt.Hyperparameters(lr=metaopt.positive(0.1))
    w = nn.Parameter(torch.tensor(1.0))
    optimizer = metaopt.wrap(torch.optim.SGD([w], lr=hyper.lr))

    def train() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            (w**4).backward()
            optimizer.step()

    run = metaopt.record(optimizer)
    with run:
        train()
    run.backward(w**2)
    assert next(hyper.parameters()).grad is not None
    run.rewind()
    hyper.lr = 0.2
    with metaopt.record(optimizer) as again:
        train()
    again.backward(w**2)
    expected = torch.tensor(1.0)
    for _ in range(3):
        expected = expected - 0.2 * 4 * expected**3
    assert w.item() == pytest.approx(expected.item())


def test_a_scheduler_of_a_wrapped_optimizer() -> None:
    w = weights()

    def train(watch: Watch) -> nn.Module:
        model = mlp(5, 6, 3)
        x, y, _, _ = data()
        optimizer = metaopt.wrap(torch.optim.RMSprop(model.parameters(), lr=0.05))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4, eta_min=0.01)
        with watch(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                (w * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
                optimizer.step()
                scheduler.step()
        return model

    assert hypergradcheck(train, outer, {"weights": w}, entries=1)


def test_a_scheduler_on_a_hyperparameter_of_a_wrapped_optimizer_is_refused() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = metaopt.wrap(torch.optim.SGD([w], lr=leaf(0.1)))
    with pytest.raises(RuntimeError, match="in-place"):  # torch's own error
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    hyper = metaopt.Hyperparameters(lr=metaopt.positive(0.1))
    for optimizer in (
        metaopt.wrap(torch.optim.SGD([w], lr=hyper.lr)),
        metaopt.wrap(torch.optim.SGD([w], lr=2 * leaf(0.1))),
        torch.optim.SGD([w], lr=2 * leaf(0.1)),
    ):
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        with pytest.raises(metaopt.RuleError, match="a scheduler wrote its number"), metaopt.record(optimizer):
            (w**2).sum().backward()
            optimizer.step()


def test_rewinding_keeps_the_hyperparameter_in_the_groups() -> None:
    lr = leaf(0.1)
    w = nn.Parameter(torch.tensor(1.0))
    optimizer = metaopt.wrap(torch.optim.SGD([w], lr=lr))
    for _ in range(2):
        with metaopt.record(optimizer) as run:
            optimizer.zero_grad()
            (w**2).backward()
            optimizer.step()
        run.backward(w**2)
        run.rewind()
        assert optimizer.param_groups[0]["lr"] is lr
    assert lr.grad is not None
    assert lr.grad.item() == pytest.approx(2 * 2 * (1 - 0.2) * -2)


# -- what is refused ---------------------------------------------------------------------------------------------------


def step(optimizer: torch.optim.Optimizer) -> None:
    w = optimizer.param_groups[0]["params"][0]
    with metaopt.record(optimizer):
        (w**2).sum().backward()
        optimizer.step()


def test_fused_kernels() -> None:
    optimizer = metaopt.wrap(torch.optim.Adam([nn.Parameter(torch.ones(3))], fused=True))
    with pytest.raises(metaopt.CaptureError, match="fused=False"):
        step(optimizer)


class Sharpness(torch.optim.Optimizer):
    """SAM (Foret et al. 2021) as it is found on GitHub: it goes back to where it was by replacing ``.data``."""

    def __init__(self, params: Any, lr: float | Tensor = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.5)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        weights = [w for group in self.param_groups for w in group["params"]]
        closure = torch.enable_grad()(closure)
        loss = closure()
        scale = 0.1 / torch.stack([w.grad.norm() for w in weights]).norm()
        for w in weights:
            self.state[w]["old"] = w.data.clone()
            w.add_(w.grad * scale)
        closure()
        for w in weights:
            w.data = self.state[w]["old"]
        self.base.step()
        return loss


class OneVector(torch.optim.Optimizer):
    """All weights as one vector, written back by torch's own function, which replaces ``.data``."""

    def __init__(self, params: Any, lr: float | Tensor = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = torch.enable_grad()(closure)()
        weights = self.param_groups[0]["params"]
        vector = nn.utils.parameters_to_vector(weights)
        gradient = nn.utils.parameters_to_vector([w.grad for w in weights])
        nn.utils.vector_to_parameters(vector - self.param_groups[0]["lr"] * gradient / (1 + gradient.norm()), weights)
        return loss


@pytest.mark.filterwarnings("ignore:the loop also wrote")  # the inner optimizer's momentum
@pytest.mark.parametrize("make", [Sharpness, OneVector])
def test_data_that_is_replaced(make: Make) -> None:
    hyper = {"weights": weights(), "lr": leaf(0.1)}
    assert hypergradcheck(trainer(make, hyper), outer, hyper, entries=1)


def test_data_of_a_teacher_that_is_replaced() -> None:
    """Also where the teacher was a constant so far."""
    lr = leaf(0.1)
    x, y, _, _ = data()

    def train(watch: Watch) -> nn.Module:
        model = mlp(5, 6, 3)
        teacher = copy.deepcopy(model).requires_grad_(False)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        with watch(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                (F.cross_entropy(model(x), y) + F.mse_loss(model(x), teacher(x))).backward()
                optimizer.step()
                for slow, fast in zip(teacher.parameters(), model.parameters(), strict=True):
                    slow.data = 0.8 * slow.data + 0.2 * fast.data
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", metaopt.HeldConstantWarning)  # the teacher, which the objective does not read
        assert hypergradcheck(train, outer, lr)


def test_sparse_gradients() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = metaopt.wrap(torch.optim.SparseAdam(model.parameters()))
    with pytest.raises(metaopt.CaptureError, match="sparse"), metaopt.record(optimizer):
        model(torch.tensor([1])).sum().backward()
        optimizer.step()


def test_a_drop_in_optimizer_with_hyperparameters_needs_no_wrapping() -> None:
    with pytest.raises(metaopt.RuleError, match=r"without `metaopt\.wrap`"):
        metaopt.wrap(metaopt.optim.SGD([nn.Parameter(torch.ones(3))], lr=leaf(0.1)))


def test_what_is_no_optimizer() -> None:
    with pytest.raises(metaopt.RuleError, match=r"takes a torch\.optim\.Optimizer, not Linear"):
        metaopt.wrap(nn.Linear(2, 2))  # type: ignore[type-var]


def test_without_a_rule_the_error_names_wrap() -> None:
    with pytest.raises(metaopt.RuleError, match=r"metaopt\.wrap"):
        metaopt.record(Odd([nn.Parameter(torch.ones(3))]))
    with pytest.raises(metaopt.RuleError, match=r"metaopt\.wrap"):
        metaopt.record(Nested([nn.Parameter(torch.ones(3))]))


def test_a_copy_is_not_wrapped() -> None:
    optimizer = metaopt.wrap(Nested([nn.Parameter(torch.ones(3))]))
    with pytest.raises(metaopt.RuleError):
        metaopt.record(copy.deepcopy(optimizer))


def test_a_step_that_raises_leaves_the_context_usable() -> None:
    w = nn.Parameter(torch.tensor(1.0))
    lr = leaf(0.1)
    optimizer = metaopt.wrap(torch.optim.SGD([w], lr=lr))

    def broken() -> Tensor:
        raise ValueError("in the closure")

    with metaopt.record(optimizer) as run:
        with pytest.raises(ValueError, match="in the closure"):
            optimizer.step(broken)
        with pytest.warns(metaopt.HeldConstantWarning):  # outside of the step, a number is no error
            (w * 1.0).item()
        (w**2).backward()
        optimizer.step()
    run.backward(w**2)
    assert lr.grad is not None


class Counting(torch.optim.Optimizer):
    """Beside what it knows of its weights, it keeps a count of its own in its state."""

    def __init__(self, params: Any, lr: Any = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.count = cast(Any, self.state)
        self.count["count"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            value = None if closure is None else closure()
        self.count["count"] += 1
        for weight in self.param_groups[0]["params"]:
            average = self.state[weight].setdefault("average", torch.zeros_like(weight.data.flatten()).detach())
            average.mul_(0.5).add_(weight.grad.flatten())
            weight.sub_(self.param_groups[0]["lr"] / self.count["count"] * average.view_as(weight))
        return value


def test_an_optimizer_that_keeps_numbers_in_its_state() -> None:
    hyper = {"weights": weights(), "lr": leaf(0.1)}
    assert hypergradcheck(trainer(Counting, hyper), outer, hyper)
    model = mlp(5, 6, 3)
    optimizer = metaopt.wrap(Counting(model.parameters()))
    with metaopt.record(optimizer) as run:
        outer(model).backward()
        optimizer.step()
    run.rewind()
    assert optimizer.count["count"] == 0
