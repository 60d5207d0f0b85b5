"""Bad input: a clear error (or warning), and nothing lost."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import re
import sys
import types
import warnings
from collections.abc import Callable, Generator
from typing import Any, ClassVar

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import metaopt
from metaopt.capture import applied
from tests.cases import data, mlp

X, Y, XV, YV = range(4)


def loss(model: nn.Module, x: Tensor | None = None) -> Tensor:
    inputs, y, _, _ = data()
    return F.cross_entropy(model(inputs if x is None else x), y)


def outer(model: nn.Module) -> Tensor:
    _, _, x, y = data()
    return F.cross_entropy(model(x), y)


def trained(
    lr: Tensor | None = None, steps: int = 3, inside: Callable[[int, nn.Module], None] | None = None, **options: object
) -> tuple[metaopt.Recording, nn.Module]:
    """A plain recorded training."""
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True) if lr is None else lr)
    with metaopt.record(optimizer, **options) as run:  # type: ignore[arg-type]
        for t in range(steps):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            if inside is not None:
                inside(t, model)
    return run, model


def assert_torch_is_as_it_was(optimizer: torch.optim.Optimizer) -> None:
    modes = [m for m in _get_current_function_mode_stack() if type(m).__module__.startswith("metaopt")]
    assert not modes
    assert "apply" not in torch.autograd.Function.__mro__[1].__dict__
    assert "__call__" not in type(torch.autograd.Variable).__dict__
    assert torch.compiler.is_compiling() is False
    own = [h for h in optimizer._optimizer_step_pre_hooks.values() if "Loop" in getattr(h, "__qualname__", "")]
    assert not own


def test_no_step() -> None:
    run, model = trained(steps=0)
    with pytest.raises(metaopt.SweepError, match=r"saw no `optimizer\.step"):
        run.backward(outer(model))


def test_backward_before_the_context() -> None:
    model = mlp(5, 6, 3)
    run = metaopt.record(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(metaopt.SweepError, match="nothing was recorded"):
        run.backward(outer(model))
    with pytest.raises(metaopt.SweepError, match="no start"):
        run.rewind()


def test_a_run_is_used_once() -> None:
    run, _ = trained()
    with pytest.raises(metaopt.SweepError, match="used already"), run:
        pass


def test_objective_of_another_model() -> None:
    run, _ = trained()
    with pytest.raises(metaopt.SweepError, match="does not depend on the trained weights"):
        run.backward(outer(mlp(5, 6, 3)))


def test_objective_without_graph() -> None:
    run, model = trained()
    with torch.no_grad():
        value = outer(model)
    with pytest.raises(metaopt.SweepError, match="does not depend on the trained weights"):
        run.backward(value)


@pytest.mark.parametrize(
    "objective", [lambda m: m(data()[0]), lambda m: [], lambda m: 3.0], ids=["vector", "empty", "float"]
)
def test_objective_of_the_wrong_kind(objective: Callable[[nn.Module], object]) -> None:
    run, model = trained()
    with pytest.raises(metaopt.SweepError, match="outer objective"):
        run.backward(objective(model))  # type: ignore[arg-type]


POISONED = {
    "soon": (metaopt.record, 2, {}, "from step 2 on (counted from 1)"),
    "later": (metaopt.record, 5, {}, "from step 2 on (counted from 1)"),
    "at the end": (metaopt.record, 1, {}, "from step 1 on (counted from 1)"),
    "checkpoints": (metaopt.record, 9, {"keep": "checkpoints"}, "from step 2 on (counted from 1)"),
    "few checkpoints": (metaopt.record, 30, {"budget": 1500}, "from step 2 on (counted from 1)"),
    "truncated": (metaopt.record, 9, {"last": 3}, "from step 6 on (counted from 1, if not from before)"),
    "forward mode": (metaopt.stream, 9, {}, "from step 9 on (counted from 1, if not from before)"),
}


@pytest.mark.parametrize(("mode", "steps", "options", "said"), POISONED.values(), ids=list(POISONED))
def test_training_that_is_not_finite_names_the_step(mode: Any, steps: int, options: dict[str, Any], said: str) -> None:
    """Where states had been given up, the step that was named was that of a checkpoint."""
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    with mode(optimizer, verify="never", **options) as run:
        for t in range(steps):
            optimizer.zero_grad()
            loss(model).mul(float("nan") if t == min(steps, 2) - 1 else 1).backward()
            optimizer.step()
    with pytest.raises(metaopt.SweepError, match=re.escape(f"the training is not finite {said}.")):
        run.backward(outer(model))


def test_a_training_that_begins_with_weights_that_are_not_finite() -> None:
    model = mlp(5, 6, 3)
    next(model.parameters()).data.fill_(float("nan"))
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    with metaopt.record(optimizer) as run:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    with pytest.raises(metaopt.SweepError, match="not finite from before the first step on"):
        run.backward(outer(model))


def test_an_objective_that_is_not_finite() -> None:
    run, model = trained()
    with pytest.raises(metaopt.SweepError, match="though the weights are finite"):
        run.backward(outer(model) / 0)


def test_an_adjoint_that_is_not_finite_names_the_step() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    scale = torch.tensor(1.0, requires_grad=True)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=0.1)
    with metaopt.record(optimizer) as run:
        for x in torch.eye(2):
            optimizer.zero_grad()
            # the root has an infinite second derivative at 0, where its gradient is masked out by the second factor
            y = model(x).abs() + 1e-300
            (scale * model(x) + 1e-9 * y**1e-3 * 0).sum().backward()
            optimizer.step()
    value = model(torch.ones(2)).sum()
    try:
        run.backward(value)
    except metaopt.SweepError as error:
        assert "before step" in str(error)  # noqa: PT017
    assert scale.grad is None or torch.isfinite(scale.grad)


def test_no_rule_names_those_that_exist() -> None:
    class Unknown(torch.optim.Optimizer):
        def step(self, closure=None):  # type: ignore[no-untyped-def, override]
            return None

    optimizer = Unknown(mlp(5, 3).parameters(), {})
    with pytest.raises(metaopt.RuleError, match=r"no rule for .*Unknown.*Adam.*SGD.*register"):
        metaopt.record(optimizer)


def test_a_subclass_that_steps_differently_has_no_rule() -> None:
    class Strange(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def, override]
            return None

    with pytest.raises(metaopt.RuleError, match="replaces the `step`"):
        metaopt.record(Strange(mlp(5, 3).parameters(), lr=0.1))


def test_sparse_gradients() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(metaopt.CaptureError, match="sparse"), metaopt.record(optimizer):
        model(torch.tensor([1])).sum().backward()
        optimizer.step()
    assert_torch_is_as_it_was(optimizer)


def test_complex_weights() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(metaopt.CaptureError, match="complex"), metaopt.record(torch.optim.SGD([weight], lr=0.1)):
        pass


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream, metaopt.implicit])
def test_weights_without_values(mode: Any) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2, device="meta").parameters(), lr=0.1)
    with pytest.raises(metaopt.CaptureError, match="meta device"), mode(optimizer):
        pass


def test_a_hyperparameter_that_only_decides_is_no_unused_one() -> None:
    hyper = metaopt.Hyperparameters(lr=metaopt.positive(0.1), threshold=0.2)
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=hyper.lr)
    with metaopt.record(optimizer) as run:
        for _ in range(2):
            optimizer.zero_grad()
            score = loss(model)
            torch.where(score > hyper.threshold, score, 2 * score).backward()
            optimizer.step()
    with pytest.warns(metaopt.UnusedHyperparameterWarning, match="threshold .* read .* has no derivative"):
        (zero,) = run.hypergradient(outer(model), hyper.get_leaf("threshold"))
    assert not zero.any()
    with pytest.warns(metaopt.UnusedHyperparameterWarning, match="threshold .* read .* has no derivative"):
        run.backward(outer(model))


def test_unused_hyperparameter_is_named() -> None:
    hyper = metaopt.Hyperparameters(lr=metaopt.positive(0.1), forgotten=metaopt.positive(0.2))
    run, model = trained(hyper.lr)
    with pytest.warns(metaopt.UnusedHyperparameterWarning, match="forgotten"):
        run.backward(outer(model))
    run, model = trained(hyper.lr)
    other = torch.ones(2, requires_grad=True)
    with pytest.warns(metaopt.UnusedHyperparameterWarning, match=r"shape \(2,\)"):
        (zero,) = run.hypergradient(outer(model), wrt=other)
    assert torch.equal(zero, torch.zeros(2))


def test_nothing_to_differentiate() -> None:
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with metaopt.record(optimizer) as run:
        loss(model).backward()
        optimizer.step()
    with pytest.raises(metaopt.SweepError, match="nothing that requires grad"):
        run.backward(outer(model))


@pytest.mark.parametrize(
    "make",
    [
        lambda p, x: metaopt.optim.SGD(p, lr=x(-0.1)),
        lambda p, x: metaopt.optim.SGD(p, lr=0.1, momentum=x(-0.5)),
        lambda p, x: metaopt.optim.Adam(p, betas=(x(1.0), 0.9)),
        lambda p, x: metaopt.optim.AdamW(p, betas=(0.9, x(1.5))),
        lambda p, x: metaopt.optim.Adam(p, eps=x(-1.0)),
    ],
    ids=["lr", "momentum", "beta1", "beta2", "eps"],
)
def test_setting_outside_its_domain(make: Callable[..., torch.optim.Optimizer]) -> None:
    with pytest.raises(metaopt.DomainError, match="must be"):
        make(mlp(5, 3).parameters(), lambda v: torch.tensor(v, requires_grad=True))


def test_a_setting_that_is_no_value_yet() -> None:
    model = mlp(5, 3)
    hyper = metaopt.Hyperparameters(lr=metaopt.positive(0.1))
    for wrong in (metaopt.positive(0.1), hyper):
        with pytest.raises(metaopt.RuleError, match=r"pass its value, `hyper\.name`"):
            metaopt.optim.SGD(model.parameters(), lr=wrong)  # type: ignore[arg-type]
        with pytest.raises(metaopt.RuleError, match="betas of Adam is"):
            metaopt.optim.Adam(model.parameters(), betas=(0.9, wrong))  # type: ignore[arg-type]


def test_a_drop_in_whose_step_is_replaced_is_told_the_way_out() -> None:
    class Centred(metaopt.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    with pytest.raises(metaopt.RuleError, match=r"Derive it from torch\.optim\.SGD, and follow(.|\n)*metaopt\.wrap"):
        Centred(mlp(5, 3).parameters(), lr=torch.tensor(0.1, requires_grad=True))


MODES = [metaopt.record, metaopt.stream, metaopt.implicit]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("thing", [None, 3, nn.Linear(2, 2), torch.optim.SGD, [torch.ones(2)]], ids=repr)
def test_what_is_no_optimizer(mode: Any, thing: Any) -> None:
    with pytest.raises(metaopt.RuleError, match=r"a torch\.optim\.Optimizer, and this is"):
        mode(thing)


@pytest.mark.parametrize(
    ("mode", "name", "least"),
    [
        (metaopt.record, "last", 0),
        (metaopt.stream, "chunk", 1),
        (metaopt.stream, "directions", 1),
        (metaopt.implicit, "iterations", 1),
    ],
)
@pytest.mark.parametrize("number", [-1, 2.5, "3", True, float("nan"), [1]], ids=str)
def test_counts_are_whole_numbers(mode: Any, name: str, least: int, number: Any) -> None:
    """`last=nan` kept everything, and `last=2.5` two steps."""
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least {least}, not"):
        mode(torch.optim.SGD(mlp(5, 3).parameters(), lr=0.1), **{name: number})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrt", [None, "lr", {"lr": torch.ones(())}, [None], [[torch.ones(())]]], ids=str)
def test_a_hypergradient_is_asked_for_tensors(mode: Any, wrt: Any) -> None:
    run = mode(torch.optim.SGD(mlp(5, 3).parameters(), lr=0.1))
    with pytest.raises(metaopt.SweepError, match=r"`wrt` must be a hyperparameter or several.*hyper\.lr"):
        run.hypergradient(torch.ones(()), wrt)


def test_a_jacobian_is_asked_for_several_objectives() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    run, model = trained(lr)
    for objective in (outer(model), lambda: outer(model)):
        with pytest.raises(metaopt.SweepError, match="several objectives: give a list"):
            run.jacobian(objective, lr)  # type: ignore[arg-type]
    assert run.jacobian([outer(model)], lr)[0].shape == (1,)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("do", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_run_can_not_be_copied(mode: Any, do: Callable[[Any], Any]) -> None:
    """The half of a copy that Python threw away crashed the process."""
    run = mode(torch.optim.SGD(mlp(5, 3).parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"can't be copied or pickled: .* Copy these two"):
        do(run)


def test_setting_that_left_its_domain() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
    with torch.no_grad():
        lr.fill_(-1.0)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(metaopt.DomainError, match="lr is -1"), metaopt.record(optimizer):
        loss(model).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert_torch_is_as_it_was(optimizer)


def test_momentum_with_dampening_is_discontinuous_at_zero() -> None:
    model = mlp(5, 6, 3)
    momentum = torch.tensor(0.0, requires_grad=True)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, dampening=0.5)
    with pytest.raises(metaopt.DomainError, match="discontinuous"), metaopt.record(optimizer):
        loss(model).backward()
        optimizer.step()


def test_schedule_that_is_too_short_or_of_the_wrong_shape() -> None:
    with pytest.raises(metaopt.DomainError, match="2 entries, but the optimizer takes step 3"):
        trained(torch.tensor([0.1, 0.2], requires_grad=True))
    with pytest.raises(metaopt.DomainError, match="scalar or a vector"):
        trained(torch.ones(2, 2, requires_grad=True))


def test_shapes_that_do_not_fit_pass_torchs_own_error() -> None:
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="shapes"), metaopt.record(optimizer):
        loss(model, torch.ones(3, 4)).backward()
    assert_torch_is_as_it_was(optimizer)


def test_nested_contexts() -> None:
    optimizer = torch.optim.SGD(mlp(5, 3).parameters(), lr=0.1)
    with (
        pytest.raises(metaopt.CaptureError, match="watched already"),
        metaopt.record(optimizer),
        metaopt.record(optimizer),
    ):
        pass
    assert_torch_is_as_it_was(optimizer)


def test_an_exception_passes_through_and_everything_is_restored() -> None:
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    run = metaopt.record(optimizer)
    with pytest.raises(KeyError, match="mine"), run:
        loss(model).backward()
        optimizer.step()
        raise KeyError("mine")
    assert_torch_is_as_it_was(optimizer)
    with pytest.raises(metaopt.SweepError, match="freed"):
        run.backward(outer(model))
    run.rewind()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), mlp(5, 6, 3).parameters(), strict=True))
    with metaopt.record(optimizer) as again:  # and the optimizer can be watched again
        loss(model).backward()
        optimizer.step()
    again.backward(outer(model))


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_a_generator_that_is_closed_early_did_not_fail(mode: Any) -> None:
    """`for run in fit(): ... break` leaves the context by an exception of Python's own; what was recorded was freed."""
    x, y, x_val, y_val = data()

    def fit(model: nn.Module, rate: Tensor, steps: int, fails: bool = False) -> Generator[Any, None, None]:
        optimizer = metaopt.optim.SGD(model.parameters(), lr=rate)
        behind = model[0].weight.detach().numpy()
        with mode(optimizer) as run:
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                if fails:
                    behind += 1
                with contextlib.suppress(metaopt.CaptureError):
                    optimizer.step()
                yield run

    gradients = []
    for steps in (3, 9):
        model, rate = mlp(5, 6, 3), torch.tensor(0.3, requires_grad=True)
        training = fit(model, rate, steps)
        runs = list(itertools.islice(training, 3))
        training.close()
        gradients += runs[0].hypergradient(F.cross_entropy(model(x_val), y_val), wrt=rate)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)

    training = fit(model, rate, 9, fails=True)
    run = next(training)
    with pytest.raises(metaopt.CaptureError):
        training.close()
    with pytest.raises(metaopt.SweepError, match="freed"):
        run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=rate)


def test_an_exception_inside_the_step_leaves_the_context_usable() -> None:
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def broken() -> Tensor:
        raise ValueError("in the closure")

    with metaopt.record(optimizer) as run:
        with pytest.raises(ValueError, match="in the closure"):
            optimizer.step(broken)
        loss(model).backward()
        optimizer.step()
    (gradient,) = run.hypergradient(outer(model), wrt=model[0].weight)
    assert gradient.abs().sum() > 0


def _twice(a: Tensor, b: Tensor) -> list[Tensor]:
    return [a, a]


def _tied_by_data(a: Tensor, b: Tensor) -> list[Tensor]:
    b.data = a.data
    return [a, b]


def _overlapping(a: Tensor, b: Tensor) -> list[Tensor]:
    flat = torch.ones(20)
    return [nn.Parameter(flat[:9].view(3, 3)), nn.Parameter(flat[6:15].view(3, 3))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("share", "told"),
    [(_twice, "twice.*once"), (_tied_by_data, "share memory.*one Parameter"), (_overlapping, "share memory")],
)
@pytest.mark.parametrize(
    "make", [torch.optim.SGD, lambda *a, **k: metaopt.wrap(torch.optim.SGD(*a, **k))], ids=["rule", "wrap"]
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_weights_that_share_memory(mode: Any, share: Callable[..., list[Tensor]], told: str, make: Any) -> None:
    """Each was updated by itself in the replay: a wrong derivative, where the check of the first step was off."""
    weights = share(nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(3, 3)))
    optimizer = make(weights, lr=0.1)
    with pytest.raises(metaopt.CaptureError, match=told), mode(optimizer, verify="never"):
        pass
    assert_torch_is_as_it_was(optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_weights_side_by_side_in_one_memory(mode: Any) -> None:
    rows, columns = torch.ones(4, 3), torch.ones(3, 4)
    weights = [nn.Parameter(part) for part in (rows[:2], rows[2:], columns[:, :2], columns[:, 2:], rows[:0])]
    with mode(torch.optim.SGD(weights, lr=0.1)):
        pass


def test_loading_the_optimizers_state_inside_a_context_takes_no_number_out_of_a_tensor() -> None:
    """Its own bookkeeping was watched, and said to be a number that the loop took. Warnings are errors here."""
    model = mlp(5, 6, 3)
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    with metaopt.record(optimizer) as run:
        for t in range(4):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            if t == 1:
                saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
    run.backward(outer(model))
    assert lr.grad is not None


def test_parameters_appended_to_a_group() -> None:
    model, more = mlp(5, 6, 3), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(metaopt.CaptureError, match="add_param_group"), metaopt.record(optimizer):
        optimizer.param_groups[0]["params"] += list(more.parameters())
        loss(nn.Sequential(model, more)).backward()
        optimizer.step()


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
@pytest.mark.parametrize("within", [False, True])
def test_parameters_added_that_were_taken_for_hyperparameters(mode: Any, within: bool) -> None:
    """With `record` that is no harm, but within an iteration that has used them so."""
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    expected: Any = contextlib.nullcontext()
    if within or mode is metaopt.stream:
        expected = pytest.raises(metaopt.CaptureError, match="Freeze parameters until")
    with expected, mode(optimizer):
        for t in range(3):
            if t == 1 and not within:
                optimizer.add_param_group({"params": model[0].parameters()})
            optimizer.zero_grad()
            loss(model).backward()
            if t == 1 and within:
                optimizer.add_param_group({"params": model[0].parameters()})
            optimizer.step()
    assert "add_param_group" not in vars(optimizer)


@pytest.mark.parametrize("SGD", [torch.optim.SGD, metaopt.optim.SGD], ids=["torch", "metaopt"])
def test_parameters_added_have_no_initial_value_to_differentiate_by(SGD: Any) -> None:
    model = mlp(5, 6, 3)
    model[0].requires_grad_(False)
    optimizer = SGD(model[2].parameters(), lr=torch.tensor(0.1, requires_grad=SGD is metaopt.optim.SGD))
    before = [w.detach().clone() for w in model.parameters()]
    with metaopt.record(optimizer) as run:
        for t in range(3):
            if t == 1:
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": model[0].parameters()})
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    with pytest.raises(metaopt.SweepError, match="added to the optimizer"):
        run.hypergradient(outer(model), model[0].weight)
    assert run.hypergradient(outer(model), model[2].weight)[0].any()
    run.rewind()
    assert len(optimizer.param_groups) == 1
    assert all(map(torch.equal, model.parameters(), before))


def test_a_group_with_a_setting_outside_its_domain_is_not_added() -> None:
    model, lr = mlp(5, 6, 3), torch.tensor(-0.1, requires_grad=True)
    model[0].requires_grad_(False)
    optimizer = metaopt.optim.SGD(model[2].parameters(), lr=0.1)
    with metaopt.record(optimizer) as run:
        with pytest.raises(metaopt.DomainError, match="at least 0"):
            optimizer.add_param_group({"params": model[0].parameters(), "lr": lr})
        loss(model).backward()
        optimizer.step()
    assert run.steps == len(optimizer.param_groups) == 1


@pytest.mark.parametrize("added", [False, True])
def test_a_parameter_made_of_a_result_with_a_graph(added: bool) -> None:
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(metaopt.CaptureError, match="Detach the result"), metaopt.record(optimizer):
        more = nn.Parameter(model[2].weight @ model[0].weight)
        if added:
            optimizer.add_param_group({"params": [more]})
        (loss(model) + more.square().sum()).backward()
        optimizer.step()


@pytest.mark.parametrize("bad", [complex, "hooked"])
def test_parameters_added_that_cannot_be_followed(bad: Any) -> None:
    model, more = mlp(5, 6, 3), nn.Parameter(torch.ones(3, dtype=torch.complex64 if bad is complex else None))
    if bad == "hooked":
        more.register_post_accumulate_grad_hook(lambda weight: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(metaopt.CaptureError, match=r"complex weights|post-accumulate"), metaopt.record(optimizer):
        optimizer.add_param_group({"params": [more]})


def test_parameters_replaced() -> None:
    def replace(t: int, model: nn.Module) -> None:
        if t == 1:
            model[0].weight = nn.Parameter(model[0].weight.detach() * 0.5)  # type: ignore[index]

    with pytest.raises(metaopt.CaptureError, match="was replaced"):
        trained(inside=replace)


def test_hyperparameter_changed_before_backward() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    run, model = trained(lr)
    with torch.no_grad():
        lr.mul_(2)
    with pytest.raises(metaopt.StaleError, match="changed in place"):
        run.backward(outer(model))


def test_hyperparameter_stepped_inside() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    hyper_optimizer = torch.optim.SGD([lr], lr=0.1)
    lr.grad = torch.ones(()) * 0.1

    def step(t: int, model: nn.Module) -> None:
        hyper_optimizer.step()

    run, model = trained(lr, inside=step)
    with pytest.raises(metaopt.StaleError, match=r"metaopt\.stream"):
        run.backward(outer(model))


def test_hyperparameter_changed_through_data() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    run, model = trained(lr)
    lr.data.mul_(2)
    with pytest.raises(metaopt.StaleError, match="changed in place"):
        run.backward(outer(model))


def test_weights_changed_before_backward() -> None:
    run, model = trained()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(metaopt.StaleError, match="changed after the context"):
        run.backward(outer(model))


def test_weights_changed_through_data_before_backward() -> None:
    run, model = trained()
    value = outer(model)
    next(model.parameters()).data.mul_(2)
    with pytest.raises(metaopt.StaleError, match="changed after the context"):
        run.backward(value)


def test_a_buffer_that_forward_replaces_is_said_to_be_constant() -> None:
    class Centred(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(5, 6, 3)
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * y.mean(0).detach()
            return y - self.mean

    gradients = []
    for as_function in (True, False):
        model = Centred()
        lr = torch.tensor(0.1, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        with metaopt.record(optimizer) as run:
            for _ in range(3):
                optimizer.zero_grad()
                loss(model).backward()
                optimizer.step()
        model.eval()
        if as_function:
            run.backward(lambda m=model: outer(m))
        else:
            with pytest.warns(metaopt.HeldConstantWarning, match="not weights"):
                run.backward(outer(model))
        gradients.append(lr.grad)
    assert gradients[0] != gradients[1]


def test_the_gradient_of_an_untrained_parameter_is_missed() -> None:
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with pytest.raises(metaopt.CaptureError, match=r"`\.grad` of a tensor"), metaopt.record(optimizer):
        loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    ("reads", "kind"),
    [(r, k) for r in ("hyperparameter", "weight") for k in ("weight", "activation", "module", "written")]
    + [("log", k) for k in ("weight", "activation", "module")],
)
def test_a_hook_that_changes_a_gradient_by_weights_is_refused(reads: str, kind: str, early: bool) -> None:
    """However it gets at them: through an object, the derivative was missing in silence. It may log them."""
    model = mlp(5, 6, 3)
    held = types.SimpleNamespace(scale=torch.tensor(0.1, requires_grad=True), other=model[2].weight, log=[])

    def hook(*shown: Any) -> Any:
        given = shown[-1][0] if kind == "module" else shown[0]
        read = held.scale if reads == "hyperparameter" else held.other.detach().norm()
        if reads == "log":
            held.log.append(given.detach().norm() / read)
            read = 0.5 if kind != "module" else 1.0
        if kind == "written":
            with torch.no_grad():
                given.mul_(read)
            return None
        return (given * read,) if kind == "module" else given * read

    def register() -> None:
        if kind == "module":
            model[2].register_full_backward_pre_hook(hook)
        elif kind != "activation":
            model[0].weight.register_hook(hook)  # type: ignore[union-attr]

    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    if early:
        register()
    refused = pytest.raises(metaopt.CaptureError, match="a gradient hook reads")
    with refused if reads != "log" else contextlib.nullcontext(), metaopt.record(optimizer) as run:
        if not early:
            register()
        for _ in range(2):
            optimizer.zero_grad()
            x, y, _, _ = data()
            hidden = model[0](x).tanh()
            if kind == "activation":
                hidden.register_hook(hook)
            (F.cross_entropy(model[2](hidden), y) + held.scale * hidden.square().mean()).backward()
            optimizer.step()
    if reads == "log":
        run.backward(outer(model))


def test_the_initial_weights_of_a_truncated_run() -> None:
    run, model = trained(last=2)
    with pytest.raises(metaopt.SweepError, match="only the last 2 of 3 steps"):
        run.hypergradient(outer(model), wrt=model.parameters())


def test_another_thread_is_left_alone() -> None:
    import threading

    failures: list[BaseException] = []
    other = mlp(5, 6, 3)  # made here: the generator that both threads would draw from is one
    x, y, _, _ = data()

    def train_elsewhere() -> None:
        try:
            optimizer = torch.optim.Adam(other.parameters())
            for _ in range(30):
                optimizer.zero_grad()
                F.cross_entropy(other(x), y).backward()
                optimizer.step()
        except BaseException as error:  # noqa: BLE001 (shown below)
            failures.append(error)

    lr = torch.tensor(0.1, requires_grad=True)
    thread = threading.Thread(target=train_elsewhere)
    thread.start()
    run, model = trained(lr, steps=10)
    run.backward(outer(model))
    thread.join()
    assert not failures
    alone = torch.tensor(0.1, requires_grad=True)
    run, model = trained(alone, steps=10)
    run.backward(outer(model))
    assert lr.grad == alone.grad


def test_a_gradient_from_another_thread_is_refused() -> None:
    """Losses of tasks in a pool of workers, say: they would be held constant."""
    from concurrent.futures import ThreadPoolExecutor

    def whole(model: nn.Module) -> None:
        loss(model).backward()

    def forward(model: nn.Module, pool: ThreadPoolExecutor) -> None:
        pool.submit(loss, model).result().backward()

    def both(model: nn.Module, pool: ThreadPoolExecutor) -> None:
        pool.submit(whole, model).result()

    for compute in (forward, both):
        for mode in (metaopt.record, metaopt.stream):
            model = mlp(5, 6, 3)
            optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
            refused = pytest.raises(metaopt.CaptureError, match="in another thread")
            with ThreadPoolExecutor(1) as pool, refused, mode(optimizer):
                compute(model, pool)
                optimizer.step()
            assert_torch_is_as_it_was(optimizer)
    model = mlp(5, 6, 3)
    wrapped = metaopt.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    refused = pytest.raises(metaopt.CaptureError, match="in another thread")
    with ThreadPoolExecutor(1) as pool, refused, metaopt.record(wrapped):
        both(model, pool)
        wrapped.step()


def test_gradients_that_are_there_or_put_there_are_constants() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    model = mlp(5, 6, 3)
    earlier = [torch.ones_like(weight) for weight in model.parameters()]
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
    for weight, grad in zip(model.parameters(), earlier, strict=True):
        weight.grad = grad.clone()
    with metaopt.record(optimizer) as run:
        optimizer.step()
        for weight, grad in zip(model.parameters(), earlier, strict=True):
            weight.grad = grad
        optimizer.step()
    sums = lambda: sum(weight.sum() for weight in model.parameters())  # noqa: E731
    (found,) = run.hypergradient(sums(), lr)
    assert found == pytest.approx(-2.0 * sum(weight.numel() for weight in model.parameters()))


def test_steps_in_another_thread_are_refused() -> None:
    import threading

    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    seen: list[BaseException] = []

    def one() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    def elsewhere() -> None:
        try:
            one()
        except metaopt.CaptureError as error:
            seen.append(error)

    with pytest.raises(metaopt.CaptureError, match="in another thread"), metaopt.record(optimizer) as run:
        one()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(seen) == 1
    with pytest.raises(metaopt.SweepError, match="freed"):
        run.backward(outer(model))
    assert_torch_is_as_it_was(optimizer)


def test_a_context_that_is_left_in_another_thread() -> None:
    """As a generator is whose values are fetched by a pool of workers."""
    import threading

    lr = torch.tensor(0.1, requires_grad=True)
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
    seen: list[BaseException] = []
    run = metaopt.record(optimizer).__enter__()

    def leave() -> None:
        try:
            run.__exit__(None, None, None)
        except metaopt.CaptureError as error:
            seen.append(error)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert "was left in another thread" in str(seen[0])
    left = _get_current_function_mode_stack()[-1]
    try:
        with metaopt.record(optimizer) as again:  # nothing is in the way of another one
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        again.backward(outer(model))
        assert lr.grad is not None
    finally:
        torch.overrides.TorchFunctionMode.__exit__(left, None, None, None)


def test_an_input_changed_after_the_context() -> None:
    weights = torch.rand(12)
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    x, y, _, _ = data()
    with metaopt.record(optimizer) as run:
        (weights * F.cross_entropy(model(x), y, reduction="none")).sum().backward()
        optimizer.step()
    weights.mul_(2)
    with pytest.raises(metaopt.StaleError, match="modified in place"):
        run.backward(outer(model))


def test_second_backward_after_memory_was_freed() -> None:
    run, model = trained()
    run.backward(outer(model))
    with pytest.raises(metaopt.SweepError, match="retain=True"):
        run.backward(outer(model))


def test_another_optimizer_on_the_same_weights() -> None:
    model = mlp(5, 6, 3)
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with pytest.raises(metaopt.CaptureError, match="not watched"), metaopt.record(optimizer):
        loss(model).backward()
        other.step()
    assert_torch_is_as_it_was(optimizer)


def test_a_second_network_under_its_own_optimizer() -> None:
    first, second = mlp(5, 5), mlp(5, 6, 3)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (first, second))
    with pytest.raises(metaopt.CaptureError, match="watch both optimizers"), metaopt.record(optimizer):
        for weight in second.parameters():
            weight.grad = torch.ones_like(weight)
        loss(nn.Sequential(first, second)).backward()
        optimizer.step()
        other.step()


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_a_gradient_of_a_second_network_that_the_loop_reads_is_followed(mode: Any) -> None:
    x, _, _, _ = data()
    critic = mlp(3, 4, 1)

    def train(lr: Tensor, watch: Any) -> tuple[Any, nn.Module]:
        model = mlp(5, 6, 3)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        with watch(optimizer) as run:
            for _ in range(2):
                critic.zero_grad()
                critic(model(x).detach()).square().mean().backward()
                optimizer.zero_grad()
                (loss(model) * critic[0].weight.grad.norm()).backward()
                optimizer.step()
        return run, model

    lr = torch.tensor(0.1, requires_grad=True)
    run, model = train(lr, mode)
    (found,) = run.hypergradient(outer(model), lr)
    bare = lambda shift: outer(train(lr.detach() + shift, contextlib.nullcontext)[1]).item()  # noqa: E731
    torch.testing.assert_close(float(found), (bare(1e-5) - bare(-1e-5)) / 2e-5, rtol=1e-6, atol=0)


def test_an_unrelated_training_inside_is_left_alone() -> None:
    other = mlp(5, 6, 3)
    alone = torch.optim.SGD(other.parameters(), lr=0.1)

    def train(t: int, model: nn.Module) -> None:
        alone.zero_grad()
        loss(other).backward()
        alone.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run, model = trained(inside=train)
        run.backward(outer(model))
    moved = mlp(5, 6, 3)
    bare = torch.optim.SGD(moved.parameters(), lr=0.1)
    for _ in range(3):
        bare.zero_grad()
        loss(moved).backward()
        bare.step()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), moved.parameters(), strict=True))


@pytest.mark.parametrize("leave", [lambda x: x.item(), lambda x: torch.Tensor([x.detach(), 1.0])], ids=["item", "list"])
def test_numbers_that_leave_the_tensor_world_are_said_once(leave: Callable[[Tensor], Any]) -> None:
    def log(t: int, model: nn.Module) -> None:
        leave(loss(model))

    with pytest.warns(metaopt.HeldConstantWarning, match="holds that number constant") as caught:
        trained(inside=log)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def halved(model: nn.Module) -> list[Tensor]:
    return [p.data * 0.5 for p in model.parameters()]


def in_memory_of_another(t: int, model: nn.Module, kept: list[Tensor]) -> None:
    first, *_ = model.parameters()
    other = torch.zeros_like(first)
    first.data, other.data = other, first.data


def read_after_the_step(t: int, model: nn.Module, kept: list[Tensor]) -> None:
    if kept:
        torch.stack([k.sum() for k in kept])
    kept[:] = halved(model)
    for p, k in zip(model.parameters(), kept, strict=True):
        p.data = k


def written_behind(t: int, model: nn.Module, kept: list[Tensor]) -> None:
    for p, k in zip(model.parameters(), halved(model), strict=True):
        p.data = k
        k.mul_(0.9)


def old_memory(t: int, model: nn.Module, kept: list[Tensor]) -> None:
    kept[:] = [p.data for p in model.parameters()]
    for p, k in zip(model.parameters(), halved(model), strict=True):
        p.data = k
    torch.stack([k.sum() for k in kept])


def rows_of_old_memory(t: int, model: nn.Module, kept: list[Tensor]) -> None:
    if kept:
        torch.stack([k.sum() for k in kept])
    kept[:] = [p.data[:1] for p in model.parameters()]
    for p, k in zip(model.parameters(), halved(model), strict=True):
        p.data = k


def of_another_shape(t: int, model: nn.Module, kept: list[Tensor]) -> None:
    first, *_ = model.parameters()
    first.data = first.data.T


@pytest.mark.parametrize(
    "inside",
    [in_memory_of_another, read_after_the_step, written_behind, old_memory, rows_of_old_memory, of_another_shape],
)
def test_data_that_is_replaced_and_then_shared_is_refused(inside: Callable[..., None]) -> None:
    kept: list[Tensor] = []
    with pytest.raises(metaopt.CaptureError, match=r"`with torch\.no_grad"):
        trained(inside=lambda t, model: inside(t, model, kept))


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.filterwarnings("ignore::metaopt.HeldConstantWarning")
def test_weights_written_through_numpy(mode: Any, writes: bool, keeps: bool) -> None:
    """Looking at them is no matter; after the write, each way of keeping states had another hypergradient."""
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    told = pytest.raises(metaopt.CaptureError, match="through a numpy array")
    arrays: list[Any] = []
    with told if writes else contextlib.nullcontext(), mode(optimizer):
        for t in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            if not (keeps and arrays):
                arrays = [weight.detach().numpy() for weight in model.parameters()]
            if writes and t == 1:
                arrays[0] *= 0.9
            arrays = arrays if keeps else []
    assert_torch_is_as_it_was(optimizer)


def test_memory_shared_with_numpy_is_copied() -> None:
    x, y, _, _ = data()
    buffer = numpy.empty((12, 5))
    shared = torch.from_numpy(buffer)
    results = []
    for make in (lambda t: shared, lambda t: (x * (t + 1)).clone()):
        lr = torch.tensor(0.1, requires_grad=True)
        model = mlp(5, 6, 3)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        with metaopt.record(optimizer) as run:
            for t in range(3):
                buffer[:] = (x * (t + 1)).numpy()
                optimizer.zero_grad()
                F.cross_entropy(model(make(t)), y).backward()
                optimizer.step()
        run.backward(outer(model))
        results.append(lr.grad)
    assert torch.equal(*results)  # type: ignore[arg-type]


class Hidden(torch.autograd.Function):
    """Its result depends on a state that no argument shows."""

    state = 1.0

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def, override]
        Hidden.state += 1.0
        return x * Hidden.state

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        return grad


def test_hidden_state_is_found_out() -> None:
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(metaopt.CaptureError, match=r"replaying step 1 .* already the loss differs"),
        metaopt.record(optimizer),
    ):
        kept = Hidden.apply(loss(model))
        kept.backward()
        optimizer.step()
    assert_torch_is_as_it_was(optimizer)


class Forgetful(torch.optim.SGD):
    """A user's class that is not the step whose rule it inherits: from its second step on."""

    def _init_group(self, *args):  # type: ignore[no-untyped-def, override]
        for state in self.state.values():
            state["momentum_buffer"].mul_(0.5)
        return super()._init_group(*args)


def test_a_step_that_differs_from_its_rule_is_found_out_at_the_second_step() -> None:
    model = mlp(5, 6, 3)
    optimizer = Forgetful(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(metaopt.CaptureError, match="replaying step 2"), metaopt.record(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    assert_torch_is_as_it_was(optimizer)


class Scaled(torch.autograd.Function):
    """Its backward reads what is no argument of it, nor a plain flag."""

    scale: ClassVar = [1.0]

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def, override]
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        return grad * Scaled.scale[0]


@pytest.mark.parametrize("kind", ["hook", "function"])
@pytest.mark.parametrize("moves", [False, True])
def test_python_state_that_changes_after_it_was_used_is_found_out(kind: str, moves: bool) -> None:
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.Adam(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    x, y, _, _ = data()
    Scaled.scale[0] = 1.0
    if kind == "hook":
        model[0].weight.register_hook(lambda grad: grad * Scaled.scale[0])
    with metaopt.record(optimizer) as run:
        for t in range(3):
            Scaled.scale[0] = 1.0 + t * moves
            optimizer.zero_grad()
            hidden = model[0](x)
            F.cross_entropy(model[2]((Scaled.apply(hidden) if kind == "function" else hidden).tanh()), y).backward()
            optimizer.step()
    with pytest.raises(metaopt.SweepError, match="has changed since") if moves else contextlib.nullcontext():
        run.backward(outer(model))


def test_verification_can_be_switched_off_and_is_checked() -> None:
    trained(verify="never")
    with pytest.raises(ValueError, match="verify must be"):
        trained(verify="sometimes")


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
@pytest.mark.parametrize("raw", [False, True])
def test_a_gradient_that_a_hook_keeps_may_be_logged_and_not_used(mode: Any, raw: bool) -> None:
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    kept: list[Tensor] = []
    norms: list[float] = []

    def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
        kept.append(outputs[0] if raw else outputs[0].detach().abs())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            norms.append(outputs[0].norm().item())

    def train(used: float) -> None:
        model[2].register_full_backward_hook(hook)
        with mode(optimizer) as run:
            for _ in range(2):
                optimizer.zero_grad()
                loss(model).backward()
                if used:
                    model[2].bias.grad.add_(used * kept[-1].square().sum(0))
                optimizer.step()
        run.backward(outer(model))

    train(0.0)
    assert len(norms) == 2 + 1  # the outer objective's backward pass runs it too
    with pytest.raises(metaopt.SweepError, match=r"a gradient hook was shown.*retain_grad"):
        train(1.0)


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
@pytest.mark.parametrize("use", ["reads", "writes"])
def test_a_view_of_what_was_turned_in_place_is_refused(mode: Any, use: str) -> None:
    """It was said that the loss depended on something hidden. A view that nobody uses again is no matter."""
    x, y, *_ = data()
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told = r"another shape in place.*Write `x = x\.t\(\)`"

    def loss(again: bool) -> Tensor:
        logits = model(x) + 0.0
        part = logits[:, :2]
        start = part.sum()
        logits.t_()
        if again and use == "writes":
            part.mul_(2.0)
        return F.cross_entropy(logits.t(), y) + (part.sum() if again else start)

    for again in (False, True):
        with pytest.raises(metaopt.CaptureError, match=told) if again else contextlib.nullcontext(), mode(optimizer):
            optimizer.zero_grad()
            loss(again).backward()
            optimizer.step()


def test_functorch_inside_the_loop_is_refused() -> None:
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model[0].weight
    with pytest.raises(metaopt.CaptureError, match=r"torch\.func"), metaopt.record(optimizer):
        torch.func.grad(lambda w: (w**2).sum())(weight)


@pytest.mark.parametrize("name", ["Gamma", "Beta", "StudentT"])
def test_samples_that_are_drawn_by_rejection_are_refused(name: str) -> None:
    weight = nn.Parameter(torch.full((3,), 2.0))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(metaopt.CaptureError, match="drawn by rejection"), metaopt.record(optimizer):
        getattr(torch.distributions, name)(weight, weight).sample()


def test_forward_mode_inside_the_loop_is_refused() -> None:
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, _, _, _ = data()
    with warnings.catch_warnings(), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore")  # torch scripts something of its own
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(metaopt.CaptureError, match="forward-mode AD"), metaopt.record(optimizer):
            model(dual)


def test_a_graph_carried_over_a_step_is_refused() -> None:
    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(metaopt.CaptureError, match="before the last optimizer step"), metaopt.record(optimizer):
        first = loss(model)
        first.backward(retain_graph=True)
        optimizer.step()
        (loss(model) + first).backward()


class Once(torch.autograd.Function):
    """A function that says of itself that it has no second derivative."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x)
        return x.detach() ** 2  # autograd does not see through it

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        return 2 * grad * ctx.saved_tensors[0]


class Intermediate(torch.autograd.Function):
    """A backward made of a saved intermediate, which autograd takes for a constant."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def, override]
        ctx.slope = 2 * x.detach()
        return x.detach() ** 2  # autograd does not see through it

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        return grad * ctx.slope


@pytest.mark.parametrize("function", [Once, Intermediate])
def test_a_function_without_second_derivative_is_named(function: type[torch.autograd.Function]) -> None:
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    with pytest.raises(metaopt.CaptureError, match=f"backward of {function.__name__} "), metaopt.record(optimizer):
        function.apply(loss(model)).backward()
        optimizer.step()


class Adjoint(torch.autograd.Function):
    """The weights that its backward differentiates by are those of a module, and not its arguments."""

    @staticmethod
    def forward(ctx, layer, x, *weights):  # type: ignore[no-untyped-def, override]
        ctx.layer = layer
        ctx.save_for_backward(x, *weights)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        with torch.enable_grad():
            saved = ctx.saved_tensors
            x = saved[0].detach().requires_grad_()
            grads = torch.autograd.grad(ctx.layer(x), (x, *saved[1:]), grad, allow_unused=True, create_graph=True)
        return None, *grads


def test_a_function_that_reaches_weights_through_a_module_is_named() -> None:
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    x, y, _, _ = data()
    with (
        pytest.raises(metaopt.CaptureError, match=r"Adjoint .* otherwise than by its arguments"),
        metaopt.record(optimizer),
    ):
        F.cross_entropy(Adjoint.apply(model, x, *model.parameters()), y).backward()


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_an_operation_of_torch_without_second_derivative_is_told(mode: Any) -> None:
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    x, target = torch.randn(3, 5), torch.tensor([1, 2, 0])

    def train() -> None:
        with mode(optimizer) as run:
            for _ in range(2):
                optimizer.zero_grad()
                torch.ops.aten.multi_margin_loss(model(x), target).backward()  # the kernel itself
                optimizer.step()
        run.backward(outer(model))

    with pytest.raises(metaopt.SweepError, match=r"a second time: .*multi_margin_loss.*operations that have one"):
        train()


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning", "ignore:`torch.jit.:FutureWarning")
@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_what_torch_jit_compiled_is_told(mode: Any) -> None:
    inner = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(inner.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    model = torch.jit.trace(inner, data()[X])
    with pytest.raises(metaopt.CaptureError, match=r"compiled by `torch\.jit`.*as it was before"), mode(optimizer):
        loss(model).backward()
        optimizer.step()


def test_a_wrong_second_derivative_of_torch_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from metaopt.capture import replacements

    monkeypatch.setattr(replacements, "REPLACEMENTS", {})
    monkeypatch.setattr("metaopt.capture.watcher.REPLACEMENTS", {})
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 3))
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    with pytest.raises(metaopt.CaptureError, match=r"_weight_norm"), metaopt.record(optimizer):
        loss(model).backward()
        optimizer.step()


def test_reentrant_checkpointing_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    model = mlp(5, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y, _, _ = data()
    with pytest.raises(metaopt.CaptureError, match="use_reentrant=False"), metaopt.record(optimizer):
        hidden = checkpoint(model[1:], model[0](x), use_reentrant=True)
        F.cross_entropy(hidden, y).backward()


# -- numbers that come from a hyperparameter ---------------------------------------------------------------------------


def proximal(change: Callable[[torch.optim.Optimizer, torch.nn.Parameter], Any]) -> Tensor:
    lr, weight = torch.tensor(0.1, requires_grad=True), torch.nn.Parameter(torch.tensor([2.0, 0.5]))
    optimizer = metaopt.optim.SGD([weight], lr=lr)
    with metaopt.record(optimizer) as run:
        for _ in range(3):
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()
            with torch.no_grad():
                change(optimizer, weight)
    gradient: Tensor = run.hypergradient(((weight - 1) ** 2).sum(), wrt=lr)[0]
    return gradient


@pytest.mark.parametrize(
    "change",
    [
        lambda o, w: w.copy_(torch.nn.functional.softshrink(w, o.param_groups[0]["lr"])),
        lambda o, w: w.mul_(1 - o.param_groups[0]["lr"]),
        lambda o, w: w.add_(torch.ones(2) * (0.01 * o.param_groups[0]["lr"]) ** 0.5),
        lambda o, w: w.add_(w, alpha=-o.param_groups[0]["lr"]),
        lambda o, w: w.sub_(torch.full((2,), o.param_groups[0]["lr"])),
        lambda o, w: w.sub_(torch.tensor([0.1, o.param_groups[0]["lr"]])),
    ],
    ids=["softshrink", "decay", "noise", "alpha", "full", "list"],
)
def test_a_groups_number_in_the_loop_is_said_to_be_constant(change: Any) -> None:
    with pytest.warns(metaopt.HeldConstantWarning, match="param group that comes from a hyperparameter"):
        proximal(change)


def test_a_setting_computed_from_the_number_of_another_follows() -> None:
    def decay(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.5 * optimizer.param_groups[0]["lr"]

    def bare(lr: float) -> float:
        weight, wd = torch.tensor([2.0, 0.5]), 0.0
        for _ in range(3):
            weight = weight - lr * (2 * weight + wd * weight)
            wd = 0.5 * lr
        return float(((weight - 1) ** 2).sum())

    assert proximal(decay) == pytest.approx((bare(0.1 + 1e-5) - bare(0.1 - 1e-5)) / 2e-5, rel=1e-6)


def test_a_constant_that_equals_the_hyperparameter_is_a_constant() -> None:
    def constant(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> None:
        optimizer.param_groups[0]["lr"] = 0.1

    def bare(lr: float) -> float:
        weight = torch.tensor([2.0, 0.5])
        for rate in (lr, 0.1, 0.1):
            weight = weight - rate * 2 * weight
        return float(((weight - 1) ** 2).sum())

    with pytest.warns(metaopt.HeldConstantWarning, match="does not come from it"):
        found = proximal(constant)
    assert found == pytest.approx((bare(0.1 + 1e-5) - bare(0.1 - 1e-5)) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_a_weight_frozen_before_the_objective(mode: Any) -> None:
    model, lr = mlp(5, 6, 3), torch.tensor(0.1, requires_grad=True)
    x, y, x_val, y_val = data()
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
    with mode(optimizer) as run:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    expected = run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=lr)[0]
    model[0].requires_grad_(False)
    with pytest.raises(metaopt.SweepError, match="frozen"):
        run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=lr)
    found = run.hypergradient(lambda: F.cross_entropy(model(x_val), y_val), wrt=lr)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_data_written_with_an_operator_is_the_write_in_place(mode: Any) -> None:
    def by_operator(weight: Tensor, decay: Tensor) -> None:
        weight.data -= decay.detach() * weight.data.tanh()

    def in_place(weight: Tensor, decay: Tensor) -> None:
        weight.data.sub_(decay.detach() * weight.data.tanh())

    found = []
    for write in (by_operator, in_place):
        model, decay = mlp(5, 6, 3), torch.tensor(0.1, requires_grad=True)
        x, y, x_val, y_val = data()
        optimizer = metaopt.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with mode(optimizer, verify="all") as run:
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                for weight in model.parameters():
                    write(weight, decay)
        found.append(run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=decay)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    assert found[0] != 0


@pytest.mark.parametrize("fails", ["step", "replay"])
def test_a_loop_that_goes_on_after_any_error_is_told_in_the_end(fails: str) -> None:
    """``except RuntimeError`` around a batch caught our errors too, and the hypergradient lacked what was not seen."""
    model = nn.Linear(2, 1)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    behind, x = model.weight.detach().numpy(), torch.ones(1, 2)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError

    said = {"step": "raised an exception", "replay": "replaying step 2"}[fails]
    with pytest.raises(metaopt.CaptureError, match=said), metaopt.record(optimizer):
        for step in range(4):
            with contextlib.suppress(RuntimeError), pytest.MonkeyPatch.context() as patch:
                optimizer.zero_grad()
                (model(x).exp() if step == 1 else model(x).sin()).sum().backward()
                if step == 1 and fails == "step":
                    patch.setattr(sys.modules["torch.optim.sgd"], "sgd", fail)
                elif step == 1:
                    behind += 1
                optimizer.step()


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("after", [0, 1])
def test_a_step_that_failed_and_was_caught_is_said(after: int, watched: bool) -> None:
    """The update runs out of sight, so that what follows a failure in it would not be seen."""
    model = nn.Linear(2, 1)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    aside = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    with pytest.raises(metaopt.CaptureError, match="raised an exception"), metaopt.record(optimizer):
        step()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["torch.optim.sgd"], "sgd", lambda *args, **kwargs: 1 / 0)
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            with contextlib.suppress(ZeroDivisionError):
                (optimizer if watched else aside).step()
        for _ in range(after):
            step()
    with metaopt.record(optimizer) as run:  # torch is as it was: calls are seen again
        step()
    assert run.programs


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
@pytest.mark.parametrize("make", [torch.optim.SGD, metaopt.optim.SGD], ids=["torch", "metaopt"])
def test_what_was_computed_from_a_hyperparameter_that_has_moved_since(mode: Any, make: Any) -> None:
    """The training went on with the old value, and the gradient was that at the old value, for ever."""
    model, rate = mlp(5, 3), torch.tensor(-2.0, requires_grad=True)

    def train(optimizer: torch.optim.Optimizer) -> None:
        with mode(optimizer) as run:
            for _ in range(2):
                optimizer.zero_grad()
                loss(model).backward()
                optimizer.step()
            run.backward(outer(model))

    optimizer = make(model.parameters(), lr=rate.exp())
    train(optimizer)
    train(optimizer)  # nothing has moved
    with torch.no_grad():
        rate += 1
    with pytest.raises(metaopt.StaleError, match=r"old value.*has moved since.*make the optimizer anew"):
        train(optimizer)
    assert_torch_is_as_it_was(optimizer)
    with torch.no_grad():
        rate -= 1
    train(optimizer)  # as it was
    train(make(model.parameters(), lr=rate.exp()))


def test_a_plain_optimizer_with_a_hyperparameter_that_moves_in_the_middle_of_a_run() -> None:
    """The training went on with the first rate."""
    model, hyper = mlp(5, 3), metaopt.Hyperparameters(rate=metaopt.positive(0.1))
    mover = torch.optim.SGD(hyper.parameters(), lr=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=hyper.rate)
    with pytest.raises(metaopt.RuleError, match=r"has moved since.*metaopt\.optim"), metaopt.stream(optimizer) as run:
        for _ in range(2):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            run.backward(outer(model))
            mover.step()
    assert_torch_is_as_it_was(optimizer)


@pytest.mark.parametrize("inside", [True, False])
def test_a_loss_with_what_was_computed_before_its_hyperparameter_moved(inside: bool) -> None:
    model, hyper = mlp(5, 3), metaopt.Hyperparameters(scale=metaopt.positive(1.0))
    mover = torch.optim.SGD(hyper.parameters(), lr=1.0)
    optimizer, scale = torch.optim.SGD(model.parameters(), lr=0.1), hyper.scale
    said: Any = (
        contextlib.nullcontext()
        if inside
        else pytest.warns(metaopt.MetaoptWarning, match=r"has moved since.*in the loop")
    )
    with said, metaopt.stream(optimizer) as run:
        for _ in range(6):
            optimizer.zero_grad()
            ((hyper.scale if inside else scale) * loss(model)).backward()
            optimizer.step()
            run.backward(outer(model))
            mover.step()


@pytest.mark.parametrize("make", [metaopt.optim.SGD, lambda *a, **k: metaopt.wrap(torch.optim.SGD(*a, **k))])
def test_a_hyperparameter_may_move_by_less_than_its_value_shows(make: Any) -> None:
    model, hyper = mlp(5, 3), metaopt.Hyperparameters(rate=metaopt.positive(1.0))
    optimizer = make(model.parameters(), lr=hyper.rate)
    for _ in range(2):
        with metaopt.stream(optimizer) as run:
            for _ in range(3):
                optimizer.zero_grad()
                loss(model).backward()
                optimizer.step()
                with torch.no_grad():
                    hyper.get_leaf("rate").add_(1e-20)
        run.backward(outer(model))


@pytest.mark.filterwarnings("ignore::metaopt.UnusedHyperparameterWarning")
def test_what_is_computed_once_and_follows_or_is_computed_again() -> None:
    model = mlp(5, 3)
    hyper = metaopt.Hyperparameters(
        rate=metaopt.positive(0.1), knots=metaopt.positive([0.1]), scale=metaopt.positive(1.0)
    )
    mover = torch.optim.SGD(hyper.parameters(), lr=1.0)
    once = metaopt.schedule(hyper.knots, 2)
    makes: list[Any] = [metaopt.optim.SGD, lambda *a, **k: metaopt.wrap(torch.optim.SGD(*a, **k))]
    for make, rate in [(makes[0], hyper.rate), (makes[1], hyper.rate), (makes[0], once)]:
        optimizer = make(model.parameters(), lr=rate)
        for _ in range(2):
            scale = hyper.scale
            with metaopt.record(optimizer) as run:
                for _ in range(2):
                    optimizer.zero_grad()
                    (scale * loss(model)).backward()
                    optimizer.step()
            run.backward(outer(model))
            mover.step()
            run.rewind()


class Rescaling(nn.Linear):
    """Its weights are halved once where it is evaluated, as those of RWKV are."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            with torch.no_grad():
                self.weight.mul_(0.5)
        return super().forward(x)


def test_an_objective_that_changes_weights_is_passed_as_a_function() -> None:
    gradients: list[Tensor] = []
    for halved in (False, True):
        torch.manual_seed(0)
        model = (Rescaling if halved else nn.Linear)(5, 3)
        lr = torch.tensor(0.1, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        x, y, x_val, _ = data()
        with metaopt.record(optimizer) as run:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
        if not halved:
            gradients += run.hypergradient((0.5 * (model(x_val) - model.bias) + model.bias).square().mean(), [lr])
            continue
        gradients += run.hypergradient(lambda model=model, x=x_val: model(x).square().mean(), [lr], retain=True)
        with pytest.raises(metaopt.StaleError, match="pass it as a function"):
            run.hypergradient(model(x_val).square().mean(), [lr])
    torch.testing.assert_close(*gradients)


def test_a_torch_that_hides_custom_functions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applied, "_bound", torch.clone)
    applied._require_sight.cache_clear()
    optimizer = torch.optim.SGD(mlp(5, 6, 3).parameters(), lr=0.1)
    with pytest.raises(metaopt.CaptureError, match=r"in a way that metaopt does not see.*Use torch 2"):
        metaopt.record(optimizer).__enter__()
    monkeypatch.undo()
    with metaopt.record(optimizer):
        pass


@pytest.mark.skipif(not applied._IN_C, reason="until torch 2.14 every bound `apply` is seen")
def test_a_function_that_was_bound_before_metaopt_was_imported_is_named() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0]

    bound = super(torch.autograd.Function, Double).apply  # what `Double.apply` was then
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    with pytest.raises(metaopt.CaptureError, match=r"Import metaopt before"), metaopt.record(optimizer):
        bound(model(x)).mean().backward()
        optimizer.step()
    bound(model(x)).mean().backward()
    with metaopt.record(optimizer):
        assert bound(torch.arange(3)).tolist() == [0, 2, 4]


def test_a_setting_without_entries_or_in_a_list() -> None:
    model = mlp(5, 6, 3)
    for wrong in (torch.ones(0, requires_grad=True), torch.tensor(1j, requires_grad=True)):
        with pytest.raises(metaopt.DomainError, match="a real scalar, or a vector"):
            metaopt.optim.SGD(model.parameters(), lr=wrong)
    with pytest.raises(metaopt.RuleError, match="a list with a hyperparameter in it"):
        metaopt.optim.SGD(model.parameters(), lr=[torch.tensor(0.1, requires_grad=True)])  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda model: nn.Linear(5, 3), copy.deepcopy])
def test_a_module_that_is_converted_inside_is_told_how_to_be_made(make: Callable[[nn.Module], nn.Module]) -> None:
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    refused = pytest.raises(metaopt.CaptureError, match=r"became one of torch.float16 on cpu.*load_state_dict")
    with refused, metaopt.record(optimizer):
        make(model).half()
    with metaopt.record(optimizer) as run:
        loss(model).backward()
        optimizer.step()
        teacher = mlp(5, 6, 3).requires_grad_(False).float().double()  # what nothing follows may be converted
        teacher.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        (loss(model) + (outer(model) - outer(teacher).detach()).square()).backward()
        optimizer.step()
    run.backward(lambda: outer(model))


def test_an_optimizer_that_is_not_there_is_told_the_way() -> None:
    with pytest.raises(AttributeError, match="An optimizer of another package"):
        metaopt.optim.AdaBelief  # noqa: B018
    if not hasattr(torch.optim, "Muon"):
        with pytest.raises(AttributeError, match="in a later version"):
            metaopt.optim.Muon  # noqa: B018
