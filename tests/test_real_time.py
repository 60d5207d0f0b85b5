"""Hypergradients while the training goes on, and what the contexts show of themselves."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metaopt
from metaopt.capture.program import Program
from metaopt.check import hypergradcheck
from metaopt.hyperparameters import owner_of
from metaopt.modes.columns import Directions
from metaopt.rules import _RULES
from tests.cases import Damped, data, mlp


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    teacher = torch.randn(10, 4)
    x = torch.randn(300, 10)
    y = (x @ teacher).argmax(1)
    return x[:200], y[:200], x[200:], y[200:]


def real_time(sign: float) -> tuple[metaopt.Hyperparameters, float, metaopt.Streaming]:
    """Real-time optimisation of the rate and the momentum from zero; `sign` turns the hypergradient."""
    x, y, x_val, y_val = problem()
    model = mlp(10, 16, 4)
    hyper = metaopt.Hyperparameters(lr=metaopt.box(0.0, 0, None), momentum=metaopt.box(0.0, 0, 0.9999))
    hyper_optimizer = torch.optim.Adam(hyper.parameters(), lr=5e-3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=hyper.lr, momentum=hyper.momentum)
    torch.manual_seed(1)
    with metaopt.stream(optimizer) as run:
        for t in range(200):
            i = torch.randint(0, 200, (32,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
            if t % 5 == 4:
                hyper_optimizer.zero_grad()
                run.backward(F.cross_entropy(model(x_val), y_val))
                for leaf in hyper.parameters():
                    assert leaf.grad is not None
                    leaf.grad *= sign
                hyper_optimizer.step()
                hyper.project_()
                assert hyper.lr >= 0
                assert 0 <= hyper.momentum <= 0.9999
    return hyper, (model(x_val).argmax(1) == y_val).double().mean().item(), run


def test_a_null_teacher_learns_and_its_negation_does_not() -> None:
    hyper, accuracy, run = real_time(1.0)
    assert hyper.lr > 0.05
    assert accuracy > 0.7
    assert run.steps == 200
    hyper, accuracy, _ = real_time(-1.0)
    assert hyper.lr == 0
    assert accuracy < 0.5


def test_bookkeeping_inside_a_context_raises_no_alarm() -> None:
    """A projection, a loaded state: their numbers are none of the loop's."""
    hyper = metaopt.Hyperparameters(
        lr=metaopt.box(0.1, 0, None), weights=metaopt.l1_box(torch.full((12,), 0.5), radius=6)
    )
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    hyper_optimizer = torch.optim.Adam(hyper.parameters(), lr=0.01)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=hyper.lr, momentum=0.5)
    with metaopt.stream(optimizer) as run:
        for _ in range(3):
            optimizer.zero_grad()
            (hyper.weights * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            hyper_optimizer.zero_grad()
            run.backward(F.cross_entropy(model(x_val), y_val))
            hyper_optimizer.step()
            hyper.project_()
    with pytest.raises(TypeError, match="can't be copied"):
        copy.deepcopy(run)


def test_weights_that_rest_before_they_depend_on_anything() -> None:
    """A part of the model that is trained now and then, first when no hyperparameter has acted yet."""
    decay = torch.tensor(0.1, requires_grad=True)
    x, y, x_val, y_val = data()

    def train(watch: Callable[[torch.optim.Optimizer], Any]) -> nn.Module:
        model = mlp(5, 6, 3)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        with watch(optimizer):
            for t in range(6):
                optimizer.zero_grad()
                model[0].requires_grad_(t % 4 == 0)
                scores = model(x)
                loss = F.cross_entropy(scores, y)
                (loss + decay * scores.square().mean() if t > 0 else loss).backward()
                optimizer.step()
        return model.requires_grad_(True)

    assert hypergradcheck(train, lambda model: F.cross_entropy(model(x_val), y_val), decay)


@pytest.mark.parametrize("snapshot", [False, True], ids=["rollout", "snapshot"])
def test_what_was_computed_before_anything_depended_on_a_hyperparameter(snapshot: bool) -> None:
    """Targets of the untrained model that several epochs read, and a copy of it that only the objective does."""
    lr = torch.tensor(0.1, requires_grad=True)
    x, y, x_val, y_val = data()

    def train(watch: Callable[[torch.optim.Optimizer], Any]) -> list[nn.Module]:
        model = mlp(5, 6, 3)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        with watch(optimizer):
            start = copy.deepcopy(model)
            for t in range(10):
                if t % 5 == 0:
                    with torch.no_grad():
                        targets = (model(x) + F.one_hot(y, 3)).softmax(1)
                optimizer.zero_grad()
                part = torch.arange(t % 2, len(x), 2)
                F.cross_entropy(model(x[part]), targets[part]).backward()
                optimizer.step()
        return [model, start] if snapshot else [model]

    assert hypergradcheck(
        train, lambda models: torch.stack([F.cross_entropy(m(x_val), y_val) for m in models]).sum(), lr
    )


@pytest.mark.parametrize("kept", ["best", "module", "average", "targets"])
def test_what_the_loop_comes_back_to_much_later(kept: str) -> None:
    """The best weights so far, and targets of all batches that an epoch begins with."""
    lr = torch.tensor(0.1, requires_grad=True)
    x, y, x_val, y_val = data()

    def train(watch: Callable[[torch.optim.Optimizer], Any]) -> nn.Module:
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
        best: Any = None
        losses = []
        with watch(optimizer):
            for t in range(9):
                if kept == "targets" and t == 2:
                    with torch.no_grad():
                        targets = [model(part).softmax(1) for part in x.split(2)]
                optimizer.zero_grad()
                if kept == "targets" and t > 2:
                    F.cross_entropy(model(x.split(2)[t - 3]), targets[t - 3]).backward()
                else:
                    F.cross_entropy(model(x), y).backward()
                optimizer.step()
                losses.append(F.cross_entropy(model(x), y).detach())
                if t == 3 and kept == "best":
                    best = copy.deepcopy(model.state_dict())
                elif t == 3 and kept == "module":
                    best = copy.deepcopy(model).state_dict()
                elif t in (1, 4) and kept == "average":
                    new = model.state_dict()
                    best = {name: (v.clone() if best is None else (best[name] + v) / 2) for name, v in new.items()}
            if best is not None:
                model.load_state_dict(best)
        return model.eval()

    assert hypergradcheck(train, lambda model: F.cross_entropy(model(x_val), y_val), lr)


@pytest.mark.parametrize("scalar", [False, True])
def test_logs_that_nobody_reads_do_not_grow_the_tangents(scalar: bool) -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    x, y, _, _ = data()
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
    log, sizes = [], []
    with metaopt.stream(optimizer) as run:
        for _ in range(20):
            optimizer.zero_grad()
            scores = model(x)
            loss = F.cross_entropy(scores, y)
            log.append(loss.detach() if scalar else scores.detach())
            loss.backward()
            optimizer.step()
            sizes.append(sum(z.numel() for z in run._carried.tangents.values()))
        assert max(sizes) <= (1 if scalar else 2) * sum(p.numel() for p in model.parameters())
        with pytest.raises(metaopt.CaptureError, match="used again; its tangent was not kept"):
            run.backward(lambda: log[10].mean())


def test_a_loop_that_looks_for_anomalies_is_shown_none_of_ours() -> None:
    """A way to push that torch has not was tried under the loop's own look-out, which warned of it."""
    lr = torch.tensor(0.1, requires_grad=True)
    weights = torch.ones(12, requires_grad=True)
    x, y, _, _ = data()
    model = mlp(5, 6, 6, 3)
    optimizer = metaopt.optim.Adam(model.parameters(), lr=lr)
    with warnings.catch_warnings(record=True) as caught, metaopt.stream(optimizer):
        warnings.simplefilter("always")
        for t in range(3):
            with torch.autograd.set_detect_anomaly(t == 1):
                optimizer.zero_grad()
                hidden = checkpoint(lambda: F.dropout(model[:3](x), 0.3), use_reentrant=False)
                (weights * F.cross_entropy(model[3:](hidden), y, reduction="none")).mean().backward()
                optimizer.step()
    assert not [w for w in caught if "Error detected" in str(w.message)]


def test_tangents_that_were_reset_are_not_asked_for() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
    with metaopt.stream(optimizer) as run:
        for t in range(8):
            if t == 1:
                target = model(x).detach().softmax(1)
            if t == 5:
                run.reset_tangents()
            optimizer.zero_grad()
            (F.cross_entropy(model(x), target) if t > 5 else F.cross_entropy(model(x), y)).backward()
            optimizer.step()
    run.backward(F.cross_entropy(model(x_val), y_val))


def test_weights_that_the_loop_sets_to_numbers() -> None:
    """They have no tangent before the step, and gradients are taken at them."""
    lr = torch.tensor(0.1, requires_grad=True)
    x, y, x_val, y_val = data()

    def train(watch: Callable[[torch.optim.Optimizer], Any]) -> nn.Module:
        model = mlp(5, 6, 3)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        with watch(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                with torch.no_grad():
                    for p in model[0].parameters():
                        p.fill_(0.1)
        return model

    assert hypergradcheck(train, lambda model: F.cross_entropy(model(x_val), y_val), lr)


@pytest.mark.parametrize("name", ["chunk", "directions"])
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_counts_are_whole_numbers(name: str, value: float) -> None:
    optimizer = torch.optim.SGD(mlp(5, 3).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        metaopt.stream(optimizer, **{name: value})  # type: ignore[arg-type]


def test_the_tangents_are_not_reset_by_a_hyper_step() -> None:
    def trained(reset: bool) -> Tensor:
        x, y, x_val, y_val = data()
        model = mlp(5, 6, 3)
        lr = torch.tensor(0.1, requires_grad=True)
        hyper_optimizer = torch.optim.SGD([lr], lr=0.01)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
        with metaopt.stream(optimizer) as run:
            for _ in range(6):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                hyper_optimizer.zero_grad()
                run.backward(F.cross_entropy(model(x_val), y_val))
                hyper_optimizer.step()
                if reset:
                    run.reset_tangents()
        return lr.detach()

    assert trained(True) != trained(False)


def test_the_memory_of_forward_mode_does_not_grow() -> None:
    x, y, _, _ = data()
    model = mlp(5, 6, 3)
    hyper = metaopt.Hyperparameters(lr=metaopt.positive(0.01))
    optimizer = metaopt.optim.SGD(model.parameters(), lr=hyper.lr, momentum=0.5)
    sizes = []
    with metaopt.stream(optimizer) as run:
        for t in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            hyper.lr = 0.01 + 1e-4 * t
            sizes.append((len(run._carried.tangents), len(run._carried._recent), len(run._loop.tape.externals)))
    assert sizes[20] == sizes[-1]


def test_many_hyperparameters_are_told_of_the_other_mode() -> None:
    """They are named: a teacher that is frozen by omission alone is among them."""
    model, teacher = nn.Linear(5, 3), nn.Linear(3, 40)
    weights = torch.ones(1200, requires_grad=True)
    hyper = metaopt.Hyperparameters(rate=metaopt.positive(0.1))
    optimizer = metaopt.optim.SGD(model.parameters(), lr=hyper.rate)
    x = torch.randn(1200, 5)
    said = (
        r"1361 entries.*metaopt\.record.*They are Tensor \(1200,\), Parameter \(40, 3\), Parameter \(40,\), rate \(\):"
        r".*requires_grad_\(False\)"
    )
    seen = pytest.warns(metaopt.MetaoptWarning, match=said)
    with seen, metaopt.stream(optimizer, chunk=100):
        (weights * teacher(model(x)).square().sum(1)).mean().backward()
        optimizer.step()


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "Variable": lambda x: torch.autograd.Variable(x + 0.1, requires_grad=True),
    "Parameter": lambda x: nn.Parameter(torch.randn(x.shape)),
    "requires_grad_": lambda x: torch.empty(x.shape).copy_(x).requires_grad_(),
    "requires_grad": lambda x: torch.zeros(x.shape, requires_grad=True),
    "detach": lambda x: x.detach().requires_grad_(),
}


def penalised(
    watch: Callable[..., Any], make: Callable[[Tensor], Tensor], weight: Tensor
) -> tuple[Any, Tensor, list[Tensor]]:
    """Train with a penalty on the gradients at leaves that the loop makes."""
    x, y, x_val, y_val = data()
    model, made = mlp(5, 6, 3), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    torch.manual_seed(0)
    with watch(optimizer) as run:
        for _ in range(3):
            made.append(make(x))
            (slope,) = torch.autograd.grad(model(made[-1]).sum(), made[-1], create_graph=True)
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + weight * slope.square().sum()).backward()
            optimizer.step()
    return run, F.cross_entropy(model(x_val), y_val), made


@pytest.mark.parametrize("directions", [None, 8])
@pytest.mark.parametrize("how", MADE)
def test_leaves_that_the_loop_makes_to_take_gradients_at_are_no_hyperparameters(how: str, directions: int) -> None:
    """``Variable(x, requires_grad=True)`` got a column for each of its entries, in each iteration anew."""
    weight = torch.tensor(0.01, requires_grad=True)
    run, outer, made = penalised(partial(metaopt.stream, directions=directions), MADE[how], weight)
    assert [leaf is weight for leaf in run._columns.leaves()] == [True]
    assert not any(leaf is external.tensor for leaf in made for external in run._loop.tape.externals.values())
    gradient = run.hypergradient(outer, wrt=weight)[0]
    with pytest.raises(metaopt.SweepError, match="made inside the context"):
        run.hypergradient(outer, wrt=made[0])
    run, outer, _ = penalised(metaopt.record, MADE[how], weight)
    torch.testing.assert_close(gradient, run.hypergradient(outer, wrt=weight)[0], rtol=1e-9, atol=0)


def test_constants_that_are_gone_are_forgotten() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    with metaopt.stream(optimizer) as run:
        for _ in range(1000):
            torch.rand(3)
        assert len(run._loop.tape.externals._made) < 300


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_leaves_made_inside_are_no_hyperparameters_to_ask_for(mode: Callable[..., Any]) -> None:
    """Reverse mode gave 0 for what the loop took for its own."""
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mode(optimizer) as run:
        weight, known = torch.tensor(0.3, requires_grad=True), nn.Parameter(torch.zeros(3))
        for _ in range(2):
            optimizer.zero_grad()
            (weight * F.cross_entropy(model(x) + known, y)).backward()
            optimizer.step()
    outer = F.cross_entropy(model(x_val), y_val)
    with pytest.warns(metaopt.UnusedHyperparameterWarning, match="made inside the context"):
        run.backward(outer, **({"retain": True} if mode is metaopt.record else {}))
    outer = F.cross_entropy(model(x_val), y_val)
    with pytest.raises(metaopt.SweepError, match="before the `with` block"):
        run.hypergradient(outer, wrt=weight, **({"retain": True} if mode is metaopt.record else {}))
    assert known.grad is not None
    assert known.grad.count_nonzero()


def named_problem(mode: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A rate, the examples' weights and a penalty, of which some are named."""
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    hyper = metaopt.Hyperparameters(lr=metaopt.positive(0.1), penalty=metaopt.positive(0.01))
    weights = torch.ones(12, requires_grad=True)
    known = {"lr": hyper.get_leaf("lr"), "penalty": hyper.get_leaf("penalty"), "weights": weights}
    optimizer = metaopt.optim.SGD(model.parameters(), lr=hyper.lr, momentum=0.9)
    with mode(optimizer, hyper, weights) as run:
        for _ in range(10):
            optimizer.zero_grad()
            loss = (weights * F.cross_entropy(model(x), y, reduction="none")).mean()
            (loss + hyper.penalty * sum(p.square().sum() for p in model.parameters())).backward()
            optimizer.step()
    return run, F.cross_entropy(model(x_val), y_val) + 0.1 * weights.sum(), known


NAMED: dict[str, tuple[Callable[[Any, Tensor], Any], set[str]]] = {
    "leaf": (lambda hyper, _: hyper.get_leaf("lr"), {"lr"}),
    "value": (lambda hyper, _: [hyper.lr], {"lr"}),
    "module": (lambda hyper, _: hyper, {"lr", "penalty"}),
    "modules": (lambda hyper, weights: (t for t in [hyper, weights]), {"lr", "penalty", "weights"}),
}


@pytest.mark.parametrize("compiled", [False, "aot_eager"])
@pytest.mark.parametrize("which", NAMED)
def test_only_the_named_hyperparameters_have_tangents(which: str, compiled: bool | str) -> None:
    select, expected = NAMED[which]
    run, outer, known = named_problem(lambda optimizer, *_: metaopt.record(optimizer))
    reverse = dict(zip(known, run.hypergradient(outer, wrt=known.values()), strict=True))
    run, outer, known = named_problem(
        lambda optimizer, *hyper: metaopt.stream(optimizer, hyper=select(*hyper), compile=compiled)
    )
    assert {name for name in known if any(known[name] is leaf for leaf in run._columns.leaves())} == expected
    assert len(run.hyperparameters) == len(expected)
    run.backward(outer)
    for name, leaf in known.items():
        if name in expected:
            torch.testing.assert_close(leaf.grad, reverse[name], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(run.hypergradient(outer, wrt=leaf)[0], reverse[name], rtol=1e-9, atol=1e-12)
        else:
            assert leaf.grad is None
            with pytest.raises(metaopt.SweepError, match=r"was not named in `metaopt\.stream"):
                run.hypergradient(outer, wrt=[leaf])


def test_what_can_not_be_named() -> None:
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrong, why in (
        ("lr", "has a str"),
        ([1.0], "has a float"),
        (torch.ones(3), "does not require grad"),
        ([], "names no hyperparameter"),
        (model, "has a trained weight"),
    ):
        with pytest.raises(metaopt.SweepError, match=why):
            metaopt.stream(optimizer, hyper=wrong)  # type: ignore[arg-type]
    unused = torch.ones(2, requires_grad=True)
    run, outer, _ = named_problem(lambda optimizer, *_: metaopt.stream(optimizer, hyper=unused))
    with pytest.raises(metaopt.SweepError, match=r"none of the hyperparameters that `hyper=` names"):
        run.backward(outer)
    with pytest.warns(metaopt.UnusedHyperparameterWarning, match="took no part"):
        assert not run.hypergradient(outer, wrt=unused)[0].any()


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_a_module_of_hyperparameters_may_be_asked_for(mode: Any) -> None:
    run, outer, known = named_problem(lambda optimizer, *_: mode(optimizer))
    hyper = owner_of(known["lr"])
    assert hyper is not None
    torch.testing.assert_close(run.hypergradient(outer, wrt=hyper), run.hypergradient(outer, wrt=hyper.parameters()))


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_hooks_in_an_objective(mode: Any) -> None:
    """Those that the model's `forward` sets act on an objective's own graph, and not where it is a function."""
    x, y, x_val, y_val = data()

    def trained(lr: float, context: Any) -> tuple[Any, Callable[[], Tensor], Tensor]:
        torch.manual_seed(0)
        model, rate = Damped(), torch.tensor(lr, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=rate)
        with context(optimizer) as run:
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        return run, lambda: F.cross_entropy(model(x_val), y_val), rate

    right, left = (trained(lr, lambda _: nullcontext())[1]().item() for lr in (0.3 + 1e-5, 0.3 - 1e-5))
    run, outer, rate = trained(0.3, mode)
    assert run.hypergradient(outer, wrt=rate)[0].item() == pytest.approx((right - left) / 2e-5, rel=1e-6)
    with pytest.warns(metaopt.MetaoptWarning, match="hooks that change gradients"):
        run.hypergradient(outer(), wrt=rate)


def test_chunks_give_the_same_number() -> None:
    gradients = []
    for chunk in (None, 1, 5):
        x, y, x_val, y_val = data()
        model = mlp(5, 6, 3)
        weights = torch.ones(12, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with metaopt.stream(optimizer, chunk=chunk) as run:
            for _ in range(3):
                optimizer.zero_grad()
                (weights * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
                optimizer.step()
        gradients.append(run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=weights)[0])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-12, atol=0)


def weighted_training(context: Callable[[torch.optim.Optimizer], Any], steps: int = 3) -> tuple[Any, Tensor, Tensor]:
    """A run under weights of the examples and a learned rate, and the validation loss after it."""
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    weights = torch.ones(12, requires_grad=True)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with context(optimizer) as run:
        for _ in range(steps):
            optimizer.zero_grad()
            (weights * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
            optimizer.step()
    return run, weights, F.cross_entropy(model(x_val), y_val)


def test_random_directions_are_unbiased_and_have_the_variance_of_the_docs() -> None:
    """E‖ĝ - g‖² = (m - 1)/k ‖g‖² for directions with entries ±1."""
    run, weights, outer = weighted_training(metaopt.stream)
    (exact,) = run.hypergradient(outer, wrt=weights)
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(150):
        run, weights, outer = weighted_training(
            partial(metaopt.stream, directions=2, generator=generator, verify="never")
        )
        estimates.append(run.hypergradient(outer, wrt=weights)[0])
    errors = torch.stack(estimates) - exact
    variance = (errors**2).sum(1).mean() / (exact**2).sum()
    assert variance == pytest.approx(11 / 2, rel=0.3)
    # Unbiased: the mean's squared error is the variance over the number of estimates.
    assert (errors.mean(0) ** 2).sum() / (exact**2).sum() < 3 * variance / 150


def test_all_sign_vectors_together_give_the_hypergradient() -> None:
    """With a full set of orthogonal directions the estimate is no estimate."""
    hadamard = torch.tensor([[1.0, 1], [1, -1]])
    lr, momentum = (torch.tensor(v, requires_grad=True) for v in (0.1, 0.5))
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    with metaopt.stream(optimizer, directions=2) as run, drawn(run, [lr, momentum], hadamard):
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        found = run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=[lr, momentum])
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    with metaopt.record(optimizer) as exact:
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    expected = exact.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=[lr, momentum])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@contextmanager
def drawn(run: metaopt.Streaming, leaves: list[Tensor], rows: Tensor) -> Iterator[None]:
    columns = run._columns
    assert isinstance(columns, Directions)
    columns._shapes = {id(leaf): leaf.shape for leaf in leaves}
    columns._drawn = {id(leaf): (leaf, rows[:, place].to(leaf)) for place, leaf in enumerate(leaves)}
    yield


def test_drawing_directions_leaves_the_random_numbers_of_the_loop_alone() -> None:
    states = []
    for directions in (None, 3):
        run, weights, _ = weighted_training(partial(metaopt.stream, directions=directions))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    first = run._columns._drawn[id(weights)][1].clone()
    run.reset_tangents()
    assert not torch.equal(run._columns._drawn[id(weights)][1], first)


@pytest.mark.parametrize("kind", ["constant", "linear"])
@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_a_schedule_of_few_knots(kind: str, mode: Callable[..., Any]) -> None:
    """The knots' hypergradient is that of the steps, summed over each knot's share."""

    def trained(values: Tensor, leaf: Tensor) -> Tensor:
        x, y, x_val, y_val = data()
        model = mlp(5, 6, 3)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=values, momentum=0.5)
        with mode(optimizer) as run:
            for _ in range(7):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        gradient: Tensor = run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=leaf)[0]
        return gradient

    knots = torch.tensor([0.3, 0.1, 0.2], requires_grad=True)
    steps = metaopt.schedule(knots, 7, kind=kind).detach().requires_grad_()
    expected = torch.autograd.grad(metaopt.schedule(knots, 7, kind=kind), knots, trained(steps, steps))[0]
    found = trained(metaopt.schedule(knots, 7, kind=kind), knots)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_a_schedule_follows_its_knots() -> None:
    hyper = metaopt.Hyperparameters(lr=metaopt.positive(torch.tensor([0.1, 0.2])))
    optimizer = metaopt.optim.SGD([nn.Parameter(torch.ones(1))], lr=metaopt.schedule(hyper.lr, 4))
    hyper.lr = torch.tensor([0.3, 0.4])
    rates = []
    for _ in range(4):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.3, 0.3, 0.4, 0.4])
    with pytest.raises(metaopt.DomainError, match="knots"):
        metaopt.schedule(torch.ones(5), 4)
    with pytest.raises(metaopt.DomainError, match="the knots are a hyperparameter, a tensor"):
        metaopt.schedule([0.1, 0.2], 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be a whole number"):
        metaopt.schedule(torch.ones(2), 3.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind"):
        metaopt.schedule(torch.ones(2), 4, kind="cubic")


def test_the_engines_agree() -> None:
    """Through the gradient's own graph, and through the transpose of the whole step."""
    gradients = []
    for chunk in (None, 1):
        for splits in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not splits:
                    patch.setattr(Program, "split", lambda self, places: None)
                run, weights, outer = weighted_training(partial(metaopt.stream, chunk=chunk), steps=5)
            gradients.append(run.hypergradient(outer, wrt=weights)[0])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-10, atol=0)


def test_a_hyperparameter_that_appears_later_begins_with_no_tangent() -> None:
    x, y, x_val, y_val = data()
    gradients = []
    for mode in (metaopt.stream, metaopt.record):
        model = mlp(5, 6, 3)
        first, second = (torch.tensor([0.1, 0.2], requires_grad=True) for _ in range(2))
        optimizer = metaopt.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with mode(optimizer) as run:
            for t in range(5):
                optimizer.zero_grad()
                scores = model(x)
                loss = F.cross_entropy(scores, y) + first[0] * scores.square().mean() + first[1] * scores.exp().mean()
                if t >= 3:
                    loss = loss + second[0] * scores.abs().mean() + second[1] * scores.sin().mean()
                loss.backward()
                optimizer.step()
        gradients.append(run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=[first, second]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=0)


def test_a_hyperparameter_keeps_its_shape_and_its_domain() -> None:
    x, y, _, _ = data()

    def stream(change: Callable[[Tensor, Tensor], Any]) -> None:
        model = mlp(5, 6, 3)
        lr, weights = torch.tensor(0.1, requires_grad=True), torch.ones(12, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        with metaopt.stream(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                (weights.mean() * F.cross_entropy(model(x), y)).backward()
                optimizer.step()
                with torch.no_grad():
                    change(lr, weights)

    def shrink(lr: Tensor, weights: Tensor) -> None:
        weights.data = torch.ones(6)

    with pytest.raises(metaopt.StaleError, match=r"shape \(12,\).*\(6,\)"):
        stream(shrink)
    with pytest.raises(metaopt.DomainError, match=r"lr is -0\.2.*project"):
        stream(lambda lr, weights: lr.sub_(0.3))


def test_what_forward_mode_drops_in_silence_is_pushed_by_the_transpose() -> None:
    """A rule with a `detach` inside an operation that autograd's own backward differentiates."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return torch.zeros_like(tangent)  # wrong, as a formula of torch's might be

    class Doubled(torch.optim.SGD):
        """Twice the step."""

    def update(w: Tensor, g: Tensor, state: Any, step: int, *, lr: Any) -> Any:
        return w - lr * Through.apply(g), {}

    metaopt.rules.register(metaopt.rules.Rule(Doubled, update, settings={"lr": "lr"}))
    x, y, x_val, y_val = data()
    gradients = []
    try:
        for mode in (metaopt.stream, metaopt.record):
            model = mlp(5, 6, 3)
            tilt = torch.tensor(0.1, requires_grad=True)
            optimizer = Doubled(model.parameters(), lr=0.1)
            with mode(optimizer, verify="never") as run:
                for _ in range(4):
                    optimizer.zero_grad()
                    scores = model(x)
                    (F.cross_entropy(scores, y) + tilt * scores.square().mean()).backward()
                    optimizer.step()
            gradients.append(run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=tilt)[0])
    finally:
        _RULES.pop(Doubled)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "mode", [metaopt.record, partial(metaopt.record, keep="graphs"), metaopt.stream, metaopt.implicit]
)
@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("aside", [torch.no_grad, torch.inference_mode])
def test_a_hypergradient_is_had_where_nothing_requires_grad(mode: Any, function: bool, aside: Any) -> None:
    """It was 0 under ``inference_mode``, or lacked all but the last step."""
    x, y, x_val, y_val = data()

    def hypergradient(context: Any) -> Tensor:
        model, rate = mlp(5, 6, 3), torch.tensor(0.3, requires_grad=True)
        decay = torch.tensor(1.0, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", metaopt.MetaoptWarning)  # no stationary point
            with mode(optimizer) as run:
                for _ in range(4):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
            outer = (lambda: F.cross_entropy(model(x_val), y_val)) if function else F.cross_entropy(model(x_val), y_val)
            with context():
                gradient: Tensor = run.hypergradient(outer, wrt=decay)[0]
        return gradient

    torch.testing.assert_close(hypergradient(aside), hypergradient(nullcontext), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_gradient_that_has_no_derivative_in_torch_is_an_error() -> None:
    """Forward mode pushes through the gradient by the hyperparameter; that by a sparse matrix has no graph."""
    x, y, x_val, y_val = data()
    index = torch.stack([torch.arange(24) // 2, torch.arange(24) % 12])

    def train(mode: Any, edges: Tensor) -> tuple[Any, nn.Module]:
        model = mlp(5, 4, 3)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=0.3)
        with mode(optimizer) as run:
            for _ in range(3):
                optimizer.zero_grad()
                adjacency = torch.sparse_coo_tensor(index, edges, (12, 12))
                F.cross_entropy(torch.sparse.mm(adjacency, model(x)), y).backward()
                optimizer.step()
        return run, model

    with pytest.raises(metaopt.SweepError, match=r"(?s)forward mode can't differentiate.*sparse.*metaopt\.record"):
        train(metaopt.stream, torch.rand(24).requires_grad_())

    def value(edges: Tensor) -> Tensor:
        return F.cross_entropy(train(nullcontext, edges)[1](x_val), y_val).detach()

    edges = torch.rand(24).requires_grad_()
    run, model = train(metaopt.record, edges)
    along = run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=edges)[0].sum()
    moved = [value(edges.detach() + step) for step in (1e-5, -1e-5)]
    torch.testing.assert_close(along, (moved[0] - moved[1]) / 2e-5, rtol=1e-6, atol=0)


def test_a_tangent_that_overflows_is_named_with_its_step() -> None:
    """An unstable equilibrium: the weight stays at 0 while its derivative grows a hundredfold a step."""
    weight, tilt = nn.Parameter(torch.zeros(1)), torch.tensor(0.0, requires_grad=True)
    optimizer = metaopt.optim.SGD([weight], lr=0.1)
    message = r"not finite by step \d+ \(norms.*discount"
    with pytest.raises(metaopt.SweepError, match=message), metaopt.stream(optimizer):
        for _ in range(200):
            optimizer.zero_grad()
            (-500 * weight**2 + tilt * weight).sum().backward()
            optimizer.step()
    with metaopt.stream(optimizer, discount=0.005) as run:
        for _ in range(200):
            optimizer.zero_grad()
            (-500 * weight**2 + tilt * weight).sum().backward()
            optimizer.step()
    assert run.hypergradient(weight.sum(), wrt=tilt)[0].isfinite()


def test_forward_mode_refuses_the_initial_weights_and_bad_options() -> None:
    x, y, _, _ = data()
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    with metaopt.stream(optimizer) as run:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with pytest.raises(metaopt.SweepError, match="every weight"):
        run.hypergradient(F.cross_entropy(model(x), y), wrt=model.parameters())
    with pytest.raises(ValueError, match="chunk"):
        metaopt.stream(optimizer, chunk=0)
    for discount in (2.0, -1, float("nan"), None, "0.9"):
        with pytest.raises(ValueError, match="discount must be a number between 0 and 1"):
            metaopt.stream(optimizer, discount=discount)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"generator must be a torch\.Generator"):
        metaopt.stream(optimizer, directions=2, generator=3)  # type: ignore[arg-type]
    for tolerance in (0, "1e-6", float("nan")):
        with pytest.raises(ValueError, match="tolerance must be a number above 0"):
            metaopt.implicit(optimizer, tolerance=tolerance)  # type: ignore[arg-type]


def through_data_in_place(weight: Tensor) -> None:
    weight.data.clamp_(0.2, 0.8).mul_(0.9)


def through_data(weight: Tensor) -> None:
    weight.data = weight.data.clamp(0.2, 0.8) * 0.9


def by_a_copy_into_data(weight: Tensor) -> None:
    weight.data.copy_(weight.data.clamp(0.2, 0.8) * 0.9)


def by_a_part_of_data(weight: Tensor) -> None:
    weight.data[:] = weight.detach().clamp(0.2, 0.8) * 0.9


@torch.no_grad()
def by_a_copy(weight: Tensor) -> None:
    weight.copy_(weight.clamp(0.2, 0.8) * 0.9)


@torch.no_grad()
def in_place(weight: Tensor) -> None:
    weight.clamp_(0.2, 0.8).mul_(0.9)


def weighted(mode: Any, move: Any, weight: Tensor) -> tuple[Any, Tensor]:
    """Steps of a regression with weights for its examples, which are moved once; the objective after it."""
    x, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 6)
    theta = nn.Parameter(torch.zeros(3))
    optimizer = metaopt.optim.SGD([theta], lr=0.1, momentum=0.5)
    with mode(optimizer) as run:
        for t in range(5):
            if t == 2:
                move(weight)
            optimizer.zero_grad()
            (weight * (x @ theta - y).square()).mean().backward()
            optimizer.step()
    return run, (theta - 1).square().sum()


WAYS_TO_MOVE = [through_data_in_place, through_data, by_a_copy_into_data, by_a_part_of_data, by_a_copy]


@pytest.mark.parametrize("move", WAYS_TO_MOVE)
def test_a_hyperparameter_that_is_projected_by_hand_stays_one(move: Any) -> None:
    """It was taken for state, so that `run.backward` gave it nothing from there on, or errors spoke of weights."""
    found = []
    for way in (in_place, move):
        weight = torch.linspace(0.1, 1, 6).requires_grad_()
        run, outer = weighted(metaopt.stream, way, weight)
        run.backward(outer)
        found.append(weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("move", WAYS_TO_MOVE)
def test_a_leaf_that_the_loop_comes_to_write_has_the_derivative_by_its_first_value(move: Any) -> None:
    """Reverse mode said 0, or left the steps before the write out."""
    start, h = torch.linspace(0.1, 1, 6), 1e-6
    weight = start.clone().requires_grad_()
    run, outer = weighted(metaopt.record, move, weight)
    (found,) = run.hypergradient(outer, weight)
    for place in range(6):
        ends = [
            weighted(lambda _: nullcontext(), move, (start + s * torch.eye(6)[place]).requires_grad_())[1]
            for s in (h, -h)
        ]
        torch.testing.assert_close(found[place], (ends[0] - ends[1]).detach() / (2 * h), rtol=1e-6, atol=1e-8)
    weight = start.clone().requires_grad_()
    shift = torch.zeros((), requires_grad=True)
    run, outer = weighted(metaopt.record, move, weight)
    with pytest.warns(metaopt.UnusedHyperparameterWarning, match=r"a leaf of shape \(6,\) was written inside"):
        run.backward(outer + shift)


def test_objectives_that_the_loop_computed_some_steps_ago() -> None:
    """In forward mode they had the hypergradient 0, in silence."""
    x, y, x_val, y_val = data()
    found: dict[Any, list[Tensor]] = {}
    for mode in (metaopt.record, metaopt.stream):
        model, rate = mlp(5, 6, 3), torch.tensor(0.3, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        losses = []
        with mode(optimizer) as run:
            for _ in range(5):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                losses.append(F.cross_entropy(model(x_val), y_val))
            last = losses[-1] + losses[-2]
        objectives: list[Any] = [*losses[2:], last, [losses[-1], losses[-2]]]
        found[mode] = [run.hypergradient(objective, wrt=rate)[0] for objective in objectives]
    torch.testing.assert_close(found[metaopt.stream], found[metaopt.record], rtol=1e-9, atol=0)
    assert all(found[metaopt.record])
    with pytest.raises(metaopt.CaptureError, match=r"several steps ago.*metaopt\.record"):
        run.hypergradient(losses[0], wrt=rate)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_an_objective_made_of_what_the_loop_computed(mode: Any, retain: bool, deep: bool) -> None:
    """A mean of losses over the training: torch's errors spoke of `retain_graph`; of a linear model it was wrong."""
    x, y, x_val, y_val = data()
    model, rate = mlp(5, 6, 3) if deep else mlp(5, 3), torch.tensor(0.3, requires_grad=True)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses, outer = [], []
    with mode(optimizer) as run:
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward(retain_graph=retain)
            optimizer.step()
            losses.append(loss)
            outer.append(F.cross_entropy(model(x_val), y_val))
        scores = model(x_val)
        inside = losses[-1] + outer[-2] * outer[-1]
    found = [run.hypergradient(o, wrt=rate)[0] for o in (losses[-1] + outer[-2] * outer[-1], inside)]
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)
    weight = next(model.parameters())
    now = F.cross_entropy(scores, y_val) + weight.square().mean()  # the weights are as they were
    last = F.cross_entropy(model(x_val), y_val) + weight.square().mean()
    torch.testing.assert_close(*[run.hypergradient(o, wrt=rate)[0] for o in (now, last)], rtol=1e-9, atol=0)
    with pytest.raises(metaopt.SweepError, match=r"before its last step.*as a list"):
        run.hypergradient(last + losses[-1], wrt=rate)
    both = [run.hypergradient(o, wrt=rate)[0] for o in ([last, losses[-1]], last, losses[-1])]
    torch.testing.assert_close(both[0], both[1] + both[2], rtol=1e-9, atol=0)


def test_an_objective_of_an_earlier_step_and_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    x, y, x_val, y_val = data()
    gradients = []
    for steps in (6, 4):
        model = mlp(5, 6, 3)
        lr = torch.tensor(0.1, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        with metaopt.record(optimizer, progress=True) as run:
            for t in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if t == 3:
                    outer = F.cross_entropy(model(x_val), y_val)
        run.backward(outer)
        gradients.append(lr.grad)
    assert gradients[0] == gradients[1]
    assert "reverse sweep" in capsys.readouterr().err


def test_parts_of_a_hyperparameter_that_moves_are_read_again() -> None:
    """Neither a part with a graph nor one without makes the whole a result of the loop's."""
    torch.manual_seed(0)
    weights = torch.full((6,), 0.5, requires_grad=True)
    model = nn.Linear(3, 1)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=0.1)
    with metaopt.stream(optimizer) as run:
        for _ in range(3):
            optimizer.zero_grad()
            out = model(torch.randn(6, 3))
            (weights[:3].sum() * out.square().mean() + (weights[3:4].detach() * out).sum()).backward()
            optimizer.step()
            (grad,) = run.hypergradient(lambda: model(torch.ones(2, 3)).square().sum(), weights)
            assert grad[3].abs() > 0
            with torch.no_grad():
                weights -= 0.01 * grad


# -- projection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    "entry", [metaopt.nonnegative(0.01), metaopt.l1_box(torch.full((4,), 0.5), 2.0)], ids=["nonnegative", "l1_box"]
)
def test_a_hyperparameter_that_nothing_projects_is_named_once(
    entry: Any, attached: bool, mode: Callable[..., Any]
) -> None:
    hyper = metaopt.Hyperparameters(decay=entry)
    hyper_optimizer = torch.optim.SGD(hyper.parameters(), lr=1.0)
    if attached:
        hyper.attach(hyper_optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            weight = nn.Parameter(torch.ones(4))
            optimizer = torch.optim.SGD([weight], lr=0.1)
            with mode(optimizer) as run:
                for _ in range(2):
                    optimizer.zero_grad()
                    (hyper.decay * weight**2).sum().backward()
                    optimizer.step()
            run.backward(((weight - 1.5) ** 2).sum())
            assert hyper.decay.grad is not None
            hyper.decay.grad = -torch.ones_like(hyper.decay) if entry.leaf.dim() else torch.ones_like(hyper.decay)
            hyper_optimizer.step()
    said = [str(w.message) for w in caught if issubclass(w.category, metaopt.InfeasibleWarning)]
    assert len(said) == (not attached)
    assert all("hyperparameter decay, " in text and "hyper.attach(hyper_optimizer)" in text for text in said)
