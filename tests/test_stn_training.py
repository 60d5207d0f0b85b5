"""The training algorithm: its steps, its guards, its checkpoints, and what it says about wrong input."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from metaopt.errors import (
    DomainError,
    FallbackWarning,
    ResponseError,
    SaturatedWarning,
    SkippedStepWarning,
    UnusedHyperparameterWarning,
)
from metaopt.stn import Tuned, Tuner, l2, train, transform
from metaopt.stn.descent import _finite
from metaopt.stn.perturbations import draw, inverse_softplus
from tests.stn_models import CASES, at, hyperparameters, responding

METHODS = ("stn", "centered", "delta")
methods = pytest.mark.parametrize("method", METHODS)


class Net(nn.Module):
    """Two layers with a dropout that is bound by name, BatchNorm, and one that is not bound."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.drop = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2)
        self.free, self.two = nn.Dropout(0.1), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.free(self.drop(torch.relu(self.norm(self.one(x))))))
        return y.squeeze(-1)


def problem(method: str = "delta", **options: Any) -> Tuned:
    hyper = metaopt.Hyperparameters(drop=metaopt.interval(0.3, 0, 0.9), decay=metaopt.positive(0.1))
    return transform(Net(), hyper, method, **options)


def data(n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 3, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    x = x.to(torch.get_default_device(), torch.get_default_dtype())
    return x, x.sum(1).sin()


def train_loss(model: Any, batch: Any, values: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1]) + l2(model, values.decay)


def valid_loss(model: Any, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def steps(tuner: Tuner, count: int, first: int = 0) -> list[float]:
    found = []
    for i in range(first, first + count):
        found.append(tuner.train_step(data(seed=i)))
        if i % 2:
            found.append(tuner.valid_step(data(seed=100 + i)))
    return found


@methods
def test_a_run_moves_everything_and_stays_finite(method: str) -> None:
    tuned = problem(method)
    before = {k: v.clone() for k, v in tuned.state_dict().items() if isinstance(v, Tensor)}
    with train(tuned, train_loss, valid_loss) as tuner:
        assert all(map(math.isfinite, steps(tuner, 6)))
    for key, value in tuned.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and not (key == "reference" and method == "stn"):
            assert not torch.equal(value, before[key]), key
            assert torch.isfinite(value).all()


@methods
def test_a_checkpoint_restores_a_run_exactly(method: str) -> None:
    tuned = problem(method)
    with train(tuned, train_loss, valid_loss, antithetic=True) as tuner:
        steps(tuner, 4)
        kept = copy.deepcopy(tuner.state_dict())
        expected = steps(tuner, 4, 4)
    torch.rand(5)
    again = problem(method)
    with train(again, train_loss, valid_loss, antithetic=True) as tuner:
        tuner.load_state_dict(kept)
        assert steps(tuner, 4, 4) == expected
    for a, b in zip(tuned.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_hyper_steps_the_weights_are_those_of_plain_training() -> None:
    model = Net()
    plain = copy.deepcopy(model)
    hyper = metaopt.Hyperparameters(decay=metaopt.positive(0.1))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(5)
    for i in range(4):
        x, y = data(seed=i)
        optimizer.zero_grad()
        (F.mse_loss(plain(x), y) + 0.1 * sum(p.square().sum() for p in plain.parameters())).backward()
        optimizer.step()
    with train(transform(model, hyper), train_loss, valid_loss) as tuner:
        torch.manual_seed(5)
        for i in range(4):
            tuner.train_step(data(seed=i))
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_statistics_move_once_an_iteration_and_never_in_validation() -> None:
    tuned = problem()
    norm = tuned.model.norm
    assert isinstance(norm, nn.BatchNorm1d)
    with train(tuned, train_loss, valid_loss) as tuner:
        for i in range(3):
            tuner.train_step(data(seed=i))
            assert int(norm.num_batches_tracked) == i + 1  # type: ignore[arg-type]
            kept = norm.running_mean.clone()  # type: ignore[union-attr]
            tuner.valid_step(data(seed=i))
            assert torch.equal(norm.running_mean, kept)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*can't be linearised by hand:metaopt.FallbackWarning")
@pytest.mark.parametrize("retried", [False, True])
def test_both_steps_see_the_same_dropout_masks(retried: bool) -> None:
    """Also where an engine gives up after they were drawn, and the next one begins anew."""
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop, self.free = nn.Linear(3, 50), nn.Dropout(0.5), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            a = self.drop(torch.ones(len(x), 200))
            b = self.free(torch.ones(len(x), 200))
            seen.append(torch.cat([a, b], 1).detach() > 0)
            y: Tensor = self.layer(x)
            return (y.view(-1, 50).mul_(2) if retried else y).sum(1)

    tuned = transform(Watching(), metaopt.Hyperparameters(drop=metaopt.interval(0.5, 0, 0.9, scale=1e-9)), verify=False)
    loss: Callable[..., Tensor] = lambda model, batch, values: model(batch[0]).square().mean()  # noqa: E731
    with train(tuned, loss, valid_loss) as tuner:
        tuner.train_step(data())
        assert torch.equal(seen[0], seen[-1])
        tuner.train_step(data())
        assert torch.equal(seen[-2], seen[-1])
        assert not torch.equal(seen[0], seen[-1])


@methods
def test_modes_are_restored_whatever_happens(method: str) -> None:
    tuned = problem(method)
    tuned.eval()
    tuned.model.free.train()  # type: ignore[union-attr]
    modes = [m.training for m in tuned.modules()]
    with pytest.raises(KeyboardInterrupt), train(tuned, train_loss, valid_loss) as tuner:
        assert tuned.training
        tuner.valid_step(data())
        assert tuned.training
        raise KeyboardInterrupt
    assert [m.training for m in tuned.modules()] == modes


def test_the_algorithm_alternates_after_warming_up() -> None:
    calls: list[str] = []
    tuned = problem()

    def counted(name: str, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            if torch.is_grad_enabled() and tuned._at is not None and not tuned._at.response:
                calls.append(name)
            return loss(*arguments)

        return call

    validate = counted("v", valid_loss)
    schedule: dict[str, Any] = {"train_steps": 2, "valid_steps": 3, "warmup": 3}
    with train(tuned, counted("t", train_loss), lambda m, b: validate(m, b), **schedule) as tuner:
        tuner.run([data(seed=i) for i in range(4)], [data(seed=9)], steps=7)
    assert "".join(calls) == "ttttt" + "vvv" + "tt" + "vvv"


def test_batches_are_gone_through_anew_each_time() -> None:
    passes: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            passes.append(1)
            return iter([data(seed=0), data(seed=1)])

    with train(problem(), train_loss, valid_loss, train_steps=2) as tuner:
        tuner.run(Loader(), Loader(), steps=6)
        assert len(passes) == 3 + 2
        with pytest.raises(ResponseError, match=r"no \(more\) batches"):
            tuner.run(iter([data()]), [data()], steps=3)


# -- scales


@pytest.mark.parametrize("k", [1.0, 0.01])
def test_scales_settle_where_entropy_and_curvature_balance(k: float) -> None:
    """A9: σ = √(τ / k), k the validation loss's curvature along the response."""
    hyper = metaopt.Hyperparameters(a=metaopt.real(0.0, scale=0.2))
    layer = nn.Linear(1, 1, bias=False)
    tuned = transform(layer, hyper, "centered", standardize=False)
    with torch.no_grad():
        layer.weight.zero_()
        tuned.responses.weight.fill_(1.0)
        tuned.responses.bases[0].fill_(1.0)
    loss: Callable[..., Tensor] = lambda model, batch: 0.5 * k * model(batch).square().mean()  # noqa: E731
    x = torch.ones(512, 1)
    with train(
        tuned,
        train_loss,
        loss,
        hyper_optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        scale_optimizer=lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.9)),
        seed=1,
    ) as tuner:
        found = []
        for i in range(700):
            tuner.valid_step(x)
            if i >= 400:
                found.append(tuned.scale.item())
    assert sum(found) / len(found) == pytest.approx(math.sqrt(1e-3 / k), rel=0.05)


def test_scales_are_clamped_and_rescaling_keeps_the_response() -> None:
    tuned = problem()
    with torch.no_grad():
        tuned.responses.weight.normal_()
    before = tuned.responses.jacobian(tuned.reference)
    with train(
        tuned, train_loss, valid_loss, entropy_weight=1e4, scale_bounds=(0.1, 0.6), scale_optimizer=big
    ) as tuner:
        for i in range(5):
            tuner.valid_step(data(seed=i))
    torch.testing.assert_close(tuned.scale, torch.full((2,), 0.6))
    for name, value in tuned.responses.jacobian(tuned.reference).items():
        torch.testing.assert_close(value, before[name])


@pytest.mark.parametrize("beyond", [0, 1])
def test_scales_within_their_bounds_are_not_rounded(beyond: int) -> None:
    """Nor is one that stands beside another at a bound."""
    hyper = metaopt.Hyperparameters(a=metaopt.real(torch.zeros(1000)))
    tuned = transform(nn.Linear(2, 1), hyper)
    with torch.no_grad():
        tuned.rho.copy_(torch.linspace(-5, 1, 1000))
        tuned.rho[:beyond], tuned.rho[1000 - beyond :] = -20.0, 20.0
    before = tuned.rho.detach().clone()
    tuned.keep_scale(1e-3, 2.0)
    assert torch.equal(tuned.rho[beyond : 1000 - beyond], before[beyond : 1000 - beyond])
    if beyond:
        torch.testing.assert_close(tuned.scale[[0, -1]], torch.tensor([1e-3, 2.0]))


def big(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


@pytest.mark.parametrize("x", [1e-4, 0.5, 30.0, 1000.0])
def test_the_inverse_softplus_does_not_overflow(x: float) -> None:
    value = torch.tensor(x)
    torch.testing.assert_close(F.softplus(inverse_softplus(value)), value)


def test_noise_is_antithetic_shared_and_grouped_where_asked() -> None:
    def noise(**options: Any) -> Tensor:
        return draw(torch.Generator("cpu").manual_seed(0), 6, 2, like=torch.zeros(()), **options)

    n = noise(antithetic=True)
    assert torch.equal(n[:3], -n[3:])
    assert len(torch.unique(noise(shared=[1])[:, 1])) == 1
    n = noise(groups=2)
    assert torch.equal(n[0], n[2])
    assert not torch.equal(n[2], n[3])


# -- penalties


@pytest.mark.parametrize("name", ["mlp", "conv1d", "transposed1d", "tied", "bare", "layernorm"])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("banks", [1, 3])
def test_l2_is_exact_for_every_example(name: str, banks: int, rank: int | None) -> None:
    tuned, _ = responding(CASES[name], banks=banks, rank=rank)
    z, c = torch.randn(4, 3), torch.rand(4)
    with tuned.perturbed(at(tuned, z, response=True)):
        found = l2(tuned, c)
    unique = {e.name for e in tuned.responses.entries}
    expected = []
    for row, coefficient in zip(z, c, strict=True):
        changes = tuned.responses.changes(row)
        weights = [p + changes[n] for n, p in tuned.model.named_parameters() if n in unique]
        expected.append(coefficient * torch.stack([w.square().sum() for w in weights]).sum())
    torch.testing.assert_close(found, torch.stack(expected).mean())


# -- wrong input


def test_a_step_that_is_not_finite_is_left_out_and_said() -> None:
    tuned = problem()
    bad: Callable[..., Tensor] = lambda model, batch: valid_loss(model, batch) * math.nan  # noqa: E731
    with train(tuned, train_loss, bad) as tuner:
        tuner.train_step(data())
        before = {k: v.clone() for k, v in tuned.state_dict().items() if isinstance(v, Tensor)}
        with pytest.warns(SkippedStepWarning, match="hyperparameters was left out"):
            tuner.valid_step(data())
        assert tuner.skipped == 1
        assert all(leaf.grad is None for leaf in [*tuned.hyper.parameters(), tuned.rho])
    assert all(torch.equal(v, before[k]) for k, v in tuned.state_dict().items() if isinstance(v, Tensor))


@pytest.mark.parametrize(
    ("hyperparameter", "text"),
    [
        (metaopt.interval(0.3, 0, 0.9), r"'a' has the value 0\.\d+, as close to a bound of interval\(0, 0\.9\)"),
        (metaopt.integer([2, 2], 0, 5), r"'a' has the value \d \(and 1 more entries\), as close to a bound"),
        (metaopt.positive(0.3), r"'a' has the value (0|inf), the end of the positive numbers"),
    ],
    ids=["interval", "integer", "positive"],
)
def test_a_hyperparameter_at_a_bound_is_named_once(hyperparameter: Any, text: str) -> None:
    tuned = transform(Net(), metaopt.Hyperparameters(a=hyperparameter))
    with torch.no_grad():
        tuned.responses.weight.normal_()
    huge: Any = lambda p: torch.optim.RMSprop(p, lr=1e4)  # noqa: E731
    with train(tuned, train_loss, valid_loss, hyper_optimizer=huge) as tuner:
        with pytest.warns(SaturatedWarning, match=text + ".*lower the rate of `hyper_optimizer`"):
            tuner.valid_step(data())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tuner.valid_step(data())
    small: Any = lambda p: torch.optim.RMSprop(p, lr=1e-2)  # noqa: E731
    inside = transform(Net(), metaopt.Hyperparameters(a=hyperparameter))
    with train(inside, train_loss, valid_loss, hyper_optimizer=small) as tuner, warnings.catch_warnings():
        warnings.simplefilter("error")
        tuner.valid_step(data())


def test_a_batch_without_examples_is_refused() -> None:
    with train(problem(), train_loss, valid_loss) as tuner, pytest.raises(ResponseError, match="no examples"):
        tuner.train_step(data(0))


def test_a_hyperparameter_that_nothing_uses_is_named() -> None:
    hyper = metaopt.Hyperparameters(unused=metaopt.interval(0.3, 0, 1), decay=metaopt.positive(0.1))

    class Functional(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.3, self.training).squeeze(-1)

    unused = pytest.warns(UnusedHyperparameterWarning, match=r"uses: unused\..*functional dropout: make it a module")
    with train(transform(Functional(3, 1), hyper), train_loss, valid_loss) as tuner, unused:
        tuner.train_step(data())


class Rates(nn.Linear):
    """Dropouts of which one is called, and attention that drops at the rate of another, or at its own."""

    def __init__(self, called: bool, handed: bool) -> None:
        super().__init__(3, 1)
        self.called, self.handed, self.one, self.two = called, handed, nn.Dropout(0.3), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        rate = (self.two.p if self.handed else 0.3) if self.training else 0.0
        x = x + F.scaled_dot_product_attention(x.unsqueeze(2), x.unsqueeze(2), x.unsqueeze(2), dropout_p=rate)[..., 0]
        y = super().forward(x)
        return (self.one(y) if self.called else y).squeeze(-1)


@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
@pytest.mark.parametrize(
    ("called", "handed", "text"),
    [
        (True, True, None),
        (True, False, r"bound, and that the model did not call: two\."),
        (False, True, None),
        (False, False, r"uses: rate\..*functional dropout"),
    ],
)
def test_a_dropout_that_is_bound_and_not_called_is_named(called: bool, handed: bool, text: str, method: str) -> None:
    hyper = metaopt.Hyperparameters(rate=metaopt.interval(0.3, 0, 0.9), decay=metaopt.positive(0.1))
    tuned = transform(Rates(called, handed), hyper, method, bind={"rate": ["one", "two"]})
    with train(tuned, train_loss, valid_loss) as tuner, warnings.catch_warnings():
        warnings.simplefilter("error")
        with nullcontext() if text is None else pytest.warns(UnusedHyperparameterWarning, match=text):
            tuner.train_step(data())


class Computed(nn.Linear):
    """Computes with the rate of a dropout that it calls too."""

    def __init__(self, way: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(3, 1)
        self.drop, self.way = nn.Dropout(0.3), way

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x) * self.way(self, x)).squeeze(-1)


@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
@pytest.mark.parametrize(
    "way",
    [
        lambda m, x: F.dropout(x, 2 * m.drop.p, m.training),
        lambda m, x: F.dropout(x, m.drop.p / 2, m.training),
        lambda m, x: torch.bernoulli(torch.full_like(x, 1 - m.drop.p)),
        lambda m, x: m.drop.p * x,
    ],
    ids=["twice", "half", "kept", "tensor"],
)
def test_a_number_that_is_computed_from_a_bound_rate_says_what_to_do(way: Any, method: str) -> None:
    """It was the module's own number for every example and for ever."""
    hyper = metaopt.Hyperparameters(rate=metaopt.interval(0.3, 0, 0.9), decay=metaopt.positive(0.1))
    with (
        train(transform(Computed(way), hyper, method, bind={"rate": "drop"}), train_loss, valid_loss) as tuner,
        pytest.raises(ResponseError, match="computes with the rate of 'drop'"),
    ):
        tuner.train_step(data())
    # One that is not bound is a number.
    free = transform(Computed(way), metaopt.Hyperparameters(decay=metaopt.positive(0.1)), method)
    with train(free, train_loss, valid_loss) as tuner:
        tuner.train_step(data())


@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_a_bound_rate_times_the_mode_is_the_rate(method: str) -> None:
    found = []
    for way in (lambda m, x: m.drop.p * m.training, lambda m, x: m.training * m.drop.p, lambda m, x: m.drop.p):
        torch.manual_seed(0)

        def dropped(m: Any, x: Tensor, way: Any = way) -> Tensor:
            return F.dropout(x, way(m, x), m.training)

        hyper = metaopt.Hyperparameters(rate=metaopt.interval(0.3, 0, 0.9), decay=metaopt.positive(0.1))
        tuned = transform(Computed(dropped), hyper, method, bind={"rate": "drop"})
        with train(tuned, train_loss, valid_loss, seed=0) as tuner:
            for _ in range(2):
                tuner.train_step(data())
                tuner.valid_step(data())
        found.append([p.detach().clone() for p in (*tuned.parameters(), *hyper.parameters())])
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=0)
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda m, b, v: (m(b[0]) - b[1]).square(), r"scalar tensor, got a tensor of shape \(12,\); take the mean"),
        (lambda m, b, v: 1.0, "scalar tensor, got float"),
        (lambda m, b, v: b[1].mean(), "does not depend on the model"),
        (lambda m, b, v: m(b[0]).mean() + v.decay.mean() * m.model.one.weight.square().sum(), r"metaopt\.stn\.l2"),
        (lambda m, b, v: m(b[0][:5]).mean(), "5 examples in a step whose batch has 12"),
        (lambda m, b, v: m(b[0].repeat(2, 1)).mean(), "24 examples in a step whose batch has 12.*once for each view"),
    ],
    ids=["vector", "number", "constant", "direct", "part", "views"],
)
def test_a_wrong_loss_says_what_to_do(loss: Any, text: str) -> None:
    with train(problem(), loss, valid_loss) as tuner, pytest.raises(ResponseError, match=text):
        tuner.train_step(data())


def test_wrong_options_say_what_to_do() -> None:
    hyper = metaopt.Hyperparameters(a=metaopt.interval(0.3, 0, 1))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"method": "newton"}, "choose one of stn, centered, delta"),
        ({"engine": "magic"}, "no engine 'magic'"),
        ({"banks": 0}, "at least 1"),
        ({"rank": 0}, "rank must be a whole number of at least 1"),
        ({"groups": 2.5}, "groups must be a whole number"),
        ({"batch_dim": -1}, "batch_dim must be a whole number"),
        ({"bind": "drop"}, "`bind` is a dictionary"),
        ({"bind": {"a": "one"}}, r"can't be bound to 'one'.*there are: drop, free.*make it a module"),
        ({"bind": {"a": "drop"}}, r"lives in interval\(0, 1\): at a rate of 1"),
        ({"bind": {"b": "drop"}}, "no such hyperparameter; there are: a"),
        ({"per_batch": ["b"]}, "no hyperparameter 'b'"),
    ]
    for options, text in wrong:
        with pytest.raises((ResponseError, DomainError), match=text):
            transform(Net(), hyper, **options)
    with pytest.raises(DomainError, match="a Gaussian perturbation would leave"):
        transform(Net(), metaopt.Hyperparameters(a=metaopt.box(0.1, 0, 1)))
    with pytest.raises(DomainError, match="add one"):
        transform(Net(), metaopt.Hyperparameters())
    with pytest.raises(
        ResponseError, match=r"a torch\.nn\.Module, for a metaopt\.Hyperparameters; these are Net and dict"
    ):
        transform(Net(), {"a": 0.3})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"train_steps": 0}, "train_steps must be a whole number of at least 1"),
        ({"valid_steps": 1.5}, "valid_steps must be a whole number of at least 0"),
        ({"clip": -1.0}, "clip is the largest norm of a gradient, above 0"),
        ({"clip": 0}, "clip is the largest norm of a gradient, above 0"),
        ({"entropy_weight": float("nan")}, "entropy_weight >= 0"),
        ({"scale_bounds": 0.1}, "scale_bounds, a pair"),
        ({"clip": "1"}, "clip is the largest norm of a gradient, above 0"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"optimizer": None}, "a function that makes it.*not as NoneType"),
        ({"hyper_optimizer": torch.optim.SGD([torch.ones(1)], lr=0.1)}, "a function that makes it.*not as SGD"),
    ],
    ids=str,
)
def test_wrong_options_of_a_training_say_what_to_do(options: dict[str, Any], text: str) -> None:
    """A negative `clip` turned every gradient round, and 0 stopped the training, without a word."""
    with pytest.raises(ResponseError, match=text), train(problem(), train_loss, valid_loss, **options):
        pass


@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_coefficients_of_l2(method: str) -> None:
    """A number failed in centred methods; a column was broadcast to a matrix, and the penalty another one."""

    def loss(make: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
        return lambda model, batch, values: train_loss(model, batch, values) + l2(model, make(values.decay))

    with train(problem(method), loss(lambda c: 0.1), valid_loss) as tuner:
        tuner.train_step(data())
    wrong = r"coefficients of shape \(12, 1\) for 12 examples; give a number"
    column = train(problem(method), loss(lambda c: c.unsqueeze(1)), valid_loss)
    with column as tuner, pytest.raises(ResponseError, match=wrong):
        tuner.train_step(data())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_can_not_be_seen_are_refused() -> None:
    hyper = metaopt.Hyperparameters(a=metaopt.interval(0.3, 0, 1))
    with pytest.raises(ResponseError, match=r"is compiled.*_orig_mod"):
        transform(nn.Sequential(torch.compile(nn.Linear(3, 1))), hyper)  # type: ignore[call-overload]
    with pytest.raises(ResponseError, match="call the model once"):
        transform(nn.Sequential(nn.LazyLinear(2)), hyper)


def test_parameters_without_a_rule_take_groups_and_say_so() -> None:
    case = CASES["kept"]
    hyper = metaopt.Hyperparameters(decay=metaopt.positive(0.1))
    loss: Callable[..., Tensor] = lambda m, b, v: m(b[0]).square().mean() + l2(m, v.decay)  # noqa: E731
    with train(transform(case.build(), hyper, groups=4), loss, valid_loss) as tuner:
        with pytest.warns(FallbackWarning, match="can't respond per example.*: vector"):
            tuner.train_step(data())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tuner.train_step(data())
        with pytest.raises(ResponseError, match="3 examples can't be split into 4 groups"):
            tuner.train_step(data(3))


def test_values_are_floored_where_they_are_whole_numbers() -> None:
    hyper = metaopt.Hyperparameters(holes=metaopt.integer(2, 0, 5, scale=2.0))
    seen: list[Tensor] = []

    def loss(model: Any, batch: Any, values: Any) -> Tensor:
        seen.append(values.holes)
        result: Tensor = (model(batch[0]).squeeze(-1) - values.holes).square().mean()
        return result

    with train(transform(nn.Linear(3, 1), hyper), loss, valid_loss) as tuner:
        tuner.train_step(data())
    assert torch.equal(seen[0], torch.full((12,), 2.0))
    assert len(seen[1].unique()) > 1
    assert torch.equal(seen[1], seen[1].round())


def test_hyperparameters_of_several_entries_respond_each() -> None:
    tuned = transform(nn.Linear(3, 1), hyperparameters())
    assert tuned.coordinates.size == 3
    values = tuned.coordinates.values(torch.randn(4, 3))
    assert values.b.shape == (4, 2)


def test_complex_parameters_say_what_to_do() -> None:
    """They ended in errors of torch's about softplus and gradients."""
    with pytest.raises(ResponseError, match=r"'weight' is complex.*view_as_complex"):
        transform(nn.Linear(3, 2, dtype=torch.complex64), hyperparameters())


class Transposed(nn.Module):
    """Has a gradient whose numbers lie in another order than the parameter's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.factor = nn.Linear(3, 4), nn.Dropout(0.2), nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.first(x))
        return (h.unsqueeze(1) * self.factor.t().contiguous()).sum((1, 2))


@methods
@pytest.mark.parametrize("kind", ["default", "adam"])
def test_a_fused_optimizer_moves_the_entries_that_the_gradient_is_of(method: str, kind: str) -> None:
    """Torch's fused kernels take a gradient as it lies in memory."""

    def trained(fused: bool) -> dict[str, Tensor]:
        hyper = metaopt.Hyperparameters(drop=metaopt.interval(0.3, 0, 0.9), noise=metaopt.positive(0.1))
        tuned = transform(Transposed(), hyper, method, bind={"drop": "drop"})

        def loss(model: Any, batch: Any, values: Any) -> Tensor:
            return F.mse_loss(model(batch[0] * (1 + values.noise.unsqueeze(1))), batch[1])

        options: dict[str, Any] = {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01, fused=fused)}
        if kind == "default":
            options = {} if fused else {"optimizer": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=False)}
        with train(tuned, loss, valid_loss, seed=2, **options) as tuner:
            for _ in range(3):
                tuner.train_step(data())
        return {name: p.detach().clone() for name, p in tuned.named_parameters()}

    found, right = trained(True), trained(False)
    for name, p in right.items():
        torch.testing.assert_close(found[name], p, rtol=1e-9, atol=1e-12)


class Shifted(nn.Module):
    """Two parameters of which autograd has one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3)), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) * (self.a + self.b)


class Doubling(torch.optim.SGD):
    """Writes on the gradients."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(2)
        return super().step(closure)


def test_a_gradient_of_two_parameters_is_clipped_and_changed_once() -> None:
    def moved(optimizer: Any, **options: Any) -> Tensor:
        tuned = transform(Shifted(), metaopt.Hyperparameters(drop=metaopt.interval(0.3, 0, 0.9)), "centered")
        rate: dict[str, Any] = {
            "optimizer": lambda p: optimizer(p, lr=1.0),
            "response_optimizer": lambda p: torch.optim.SGD(p, lr=0.0),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnusedHyperparameterWarning)
            with train(tuned, lambda m, b, _: m(b[0]).sum(), valid_loss, **rate, **options) as tuner:
                torch.manual_seed(0)
                tuner.train_step(data())
        return torch.cat(list(tuned.model.parameters())).detach()

    torch.testing.assert_close(moved(torch.optim.SGD, clip=0.01).norm(), torch.tensor(0.01), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved(Doubling), 2 * moved(torch.optim.SGD))


def test_a_sum_that_overflows_is_finite() -> None:
    """Many small gradients in half precision; the step was left out."""
    large, small = torch.full((200000,), 1.0, dtype=torch.half), torch.ones(3)
    assert _finite(small.sum(), [large, None, small])
    assert not _finite(small.sum(), [large, small / 0])
    assert not _finite(small.sum() / 0, [large, small])


def test_objects_of_another_kind_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.1))
    hyper = metaopt.Hyperparameters(rate=metaopt.interval(0.1, 0, 0.9))
    with pytest.raises(ResponseError, match="the model to train is"), train(model, None, None):  # type: ignore[arg-type]
        pass
    with pytest.raises(ResponseError, match="the loss function was given"):
        l2(model, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ResponseError, match="takes the tuner"):
        metaopt.stn.diagnose(model, None, None)  # type: ignore[arg-type]
    with pytest.raises(ResponseError, match="bind it to a name"):
        transform(model, hyper, bind={"rate": model[1]})  # type: ignore[dict-item]
    with pytest.raises(ResponseError, match="per_batch is a list"):
        transform(model, hyper, per_batch=3)  # type: ignore[arg-type]
    with pytest.raises(ResponseError, match="compute with floats"):
        metaopt.stn.augment.brightness(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 0.1)


def test_a_run_shows_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    model = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.1))
    hyper = metaopt.Hyperparameters(rate=metaopt.interval(0.1, 0, 0.9))
    tuned = transform(model, hyper, bind={"rate": "1"})

    def loss(model: Any, batch: Tensor, values: Any = None) -> Tensor:
        return model(batch).square().mean()

    with train(tuned, loss, loss) as tuner:
        tuner.run([torch.ones(4, 2)] * 3, [torch.ones(4, 2)], progress=True)
    assert "training:" in capsys.readouterr().err


def test_forward_mode_opens_without_warnings_of_torchs_own() -> None:
    code = (
        "import warnings, torch\nfrom metaopt.stn.forward_mode import dual_level\nwarnings.simplefilter('error')\n"
        "with dual_level():\n    torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def _written(how: str) -> Callable[..., Tensor]:
    def loss(model: Any, batch: Any, values: Any) -> Tensor:
        if how == "number":
            rate = values.drop[0]
            rate *= 0.5
        elif how == "name":
            values["drop"] = 0.5 * values.drop
        decay = values.decay[0]
        if how == "decay":
            decay *= 2
        return F.mse_loss(model(batch[0]), batch[1]) + decay

    return loss


@pytest.mark.parametrize("how", ["decay", "number", "name"])
def test_what_a_loss_writes_into_its_values_is_for_that_step_alone(how: str) -> None:
    """And the dropout goes by it."""

    def losses(method: str, function: Any, drop: float) -> list[float]:
        torch.manual_seed(0)
        hyper = metaopt.Hyperparameters(drop=metaopt.interval(drop, 0, 0.9), decay=metaopt.positive(0.1))
        tuned = transform(Net(), hyper, method, bind={"drop": "drop"})
        with train(tuned, function, valid_loss, seed=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)) as tuner:
            torch.manual_seed(4)
            found = []
            for _ in range(4):
                torch.manual_seed(5)
                found.append(tuner.train_step(data()))
        return found

    added = 0.1 if how == "decay" else 0.0
    expected = losses("centered", _written(""), 0.3 if how == "decay" else 0.15)
    found = losses("centered", _written(how), 0.3)
    assert found == pytest.approx([loss + added for loss in expected], rel=1e-9)
