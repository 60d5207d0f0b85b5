"""Every rule of the table is the step of its class, from wherever the class has got to.

The cells in test_optimizer_table.py hold the derivative; here are drawn numbers, flags, shapes and histories. SGD, Adam
and AdamW have all of this, and more, in test_rules.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

import metaopt
from metaopt.rules import Rule, Update
from tests.optimizer_table import ROWS, Row, group_arguments
from tests.strategies import numbers, randn, tensors
from tests.test_rules import EPS, Point, apply, condition, numbers_of, present

NEW = [row for name, row in ROWS.items() if name not in ("SGD", "Adam", "AdamW")]
each = pytest.mark.parametrize("row", NEW, ids=lambda row: row.name)
ELEMENTWISE = [pytest.param(row, id=row.name) for row in NEW if row.elementwise]
IMPLEMENTED = [pytest.param(row, name, id=f"{row.name}-{name}") for row in NEW for name in ("", *row.implementations)]
FRACTIONS = numbers(0.9, 0.0, 0.5, low=0.0, high=1.0)
DRAWN: Mapping[str, SearchStrategy[float]] = {
    "lr": numbers(0.1, 0.0, low=0.0, high=0.6),
    "beta1": FRACTIONS,
    "beta2": numbers(0.999, 0.0, 0.5, low=0.0, high=1.0),
    "momentum": FRACTIONS,
    "dampening": numbers(0.0, 0.5, low=0.0, high=1.0),
    "alpha": numbers(0.99, 0.75, low=0.3, high=1.0),  # with centered, a smaller one cancels in torch's own step
    "rho": numbers(0.9, 0.0, 1.0, low=0.0, high=1.0),
    "eps": numbers(1e-8, 1e-3, 1.0, low=0.0, high=0.5),
    "weight_decay": numbers(0.0, 1e-2, low=0.0, high=0.5),
    "momentum_decay": numbers(0.0, 4e-3, low=0.0, high=2.0),
    "lr_decay": numbers(0.0, 0.1, low=0.0, high=1.0),
    "initial_accumulator_value": numbers(0.0, 0.1, low=0.0, high=1.0),
    "lambd": numbers(1e-4, 0.0, low=0.0, high=0.5),
    "t0": numbers(1e6, 0.0, 2.0, low=-1.0, high=4.0),
    "etaminus": numbers(0.5, low=0.1, high=0.9),
    "etaplus": numbers(1.2, low=1.0, high=2.0),
    "step_size_min": numbers(1e-6, 0.0, low=0.0, high=0.1),
    "step_size_max": numbers(50.0, low=0.1, high=0.3),
    "beta2_decay": numbers(-0.8, 0.0, low=-2.0, high=0.0),
    "eps1": numbers(1e-3, low=0.0, high=0.5),
    "eps2": numbers(1e-3, low=0.0, high=1.0),
    "d": numbers(1.0, low=1.0, high=2.0),
    "ns_a": st.sampled_from((3.4445, 3.3)),  # with others the iteration may diverge
    "ns_b": st.sampled_from((-4.775, -4.7)),
    "ns_c": st.sampled_from((2.0315, 2.0)),
    "trust_coefficient": numbers(1e-3, 0.0, low=0.0, high=1.0),
}
Look = Callable[[Point, Any, Tensor, dict[str, float], dict[str, Any]], None]


@st.composite
def settings(draw: DrawFn, row: Row) -> tuple[dict[str, float], dict[str, Any]]:
    """Numbers by the rule's names, and flags."""
    return {name: draw(DRAWN[name]) for name in row.numbers}, dict(draw(st.sampled_from(row.variants)))


@st.composite
def histories(draw: DrawFn, row: Row, steps: int = 3) -> list[list[Tensor | None]]:
    """Gradients for three weights and some steps; None where a weight takes no part."""
    some = ((3, 4), (4, 2), (1, 1)) if row.matrices else ((), (1,), (5,), (3, 4))
    shapes = [draw(st.sampled_from(some if row.matrices or not row.elementwise else (*some, (0,)))) for _ in range(3)]
    return [[draw(st.none() | tensors(shape)) if t else draw(tensors(shape)) for shape in shapes] for t in range(steps)]


def walk(row: Row, data: st.DataObject, look: Look, **options: Any) -> None:
    """Run the bare optimizer, and look at every weight before and after every step."""
    chosen, flags = data.draw(settings(row))
    history = data.draw(histories(row))
    weights = [torch.nn.Parameter(randn(7 + i, *g.shape)) for i, g in enumerate(history[0]) if g is not None]
    made: Any = row.bare(weights, **group_arguments(row.rule, chosen), **flags, **options)
    for grads in history:
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = None if grad is None else grad.clone()
        points = [None if weight.grad is None else present(made, row.rule, weight) for weight in weights]
        held, _ = numbers_of(row.rule, made.param_groups[0])
        made.step()
        for weight, point in zip(weights, points, strict=True):
            if point is not None:
                look(point, made, weight, held, flags_of(row.rule, made.param_groups[0]))


def flags_of(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    return {flag: group.get(flag, False) for flag in rule.flags}


def assert_close(row: Row, found: Tensor, expected: Tensor, scale: Tensor, name: str) -> None:
    """To a dozen roundings of every input; a norm or a mean rounds once per element, and then is divided by."""
    roundings = 12 if row.elementwise else 100
    assert torch.all((found - expected).abs() <= roundings * EPS * scale), name


@pytest.mark.parametrize(("row", "implementation"), IMPLEMENTED)
@given(data=st.data())
def test_parity_with_the_class(row: Row, implementation: str, data: st.DataObject) -> None:
    """From the class's own state at every step, the rule gives its next weights and state; and it writes nothing."""

    def look(point: Point, made: Any, weight: Tensor, chosen: dict[str, float], flags: dict[str, Any]) -> None:
        before = [(x._version, x.clone()) for x in point.tensors()]
        found = apply(row.rule, point, chosen, flags)
        for x, (version, value) in zip(point.tensors(), before, strict=True):
            assert x._version == version
            assert torch.equal(x, value)
        scale = condition(row.rule, point, chosen, flags)
        held = {"w": weight.detach(), **made.state.get(weight, {})}
        for name in ("w", *row.rule.state):
            actual, value_of = held.get(name), found[name]
            assert (actual is None) == (value_of is None), name
            if actual is not None and value_of is not None:
                assert value_of.dtype == actual.dtype
                assert value_of.shape == actual.shape
                assert_close(row, value_of, actual, scale[name], name)

    walk(row, data, look, **({implementation: True} if implementation else {}))


@each
@given(data=st.data())
def test_a_setting_given_as_a_tensor_is_the_same_setting(row: Row, data: st.DataObject) -> None:
    """To some roundings in the weights' precision, whatever the hyperparameter's own is."""
    dtype = data.draw(st.sampled_from((torch.float64, torch.float32)))

    def look(point: Point, made: Any, weight: Tensor, chosen: dict[str, float], flags: dict[str, Any]) -> None:
        hyper = {name: torch.tensor(number, dtype=dtype) for name, number in chosen.items()}
        plain = {name: float(leaf) for name, leaf in hyper.items()}
        linked, expected = apply(row.rule, point, hyper, flags), apply(row.rule, point, plain, flags)
        if row.name == "Adagrad" and point.step == 1:
            expected = apply(row.rule, Point(point.w, point.g, {"sum": None}, 1), plain, flags)
        scale = condition(row.rule, point, plain, flags)
        for name, value in expected.items():
            found = linked[name]
            if name == "momentum_buffer" and chosen.get("momentum") == 0:
                continue  # a hyperparameter's buffer is kept
            assert (value is None) == (found is None)
            if value is not None and found is not None:
                assert value.dtype == found.dtype
                assert_close(row, found, value, scale[name], name)

    walk(row, data, look)


@pytest.mark.parametrize("row", ELEMENTWISE)
@given(data=st.data())
def test_a_rule_commutes_with_permutation_and_concatenation(row: Row, data: st.DataObject) -> None:
    def look(point: Point, made: Any, weight: Tensor, chosen: dict[str, float], flags: dict[str, Any]) -> None:
        if point.w.dim() != 1:
            return
        size = len(point.w)
        cut, order = size // 2, torch.randperm(size)

        def at(place: Any) -> Point:
            state = {k: v[place] if v is not None and v.dim() else v for k, v in point.state.items()}
            return Point(point.w[place], point.g[place], state, point.step)

        whole = apply(row.rule, point, chosen, flags)
        left, right = (apply(row.rule, at(place), chosen, flags) for place in (slice(cut), slice(cut, None)))
        permuted = apply(row.rule, at(order), chosen, flags)
        for name, value in whole.items():
            if value is not None and value.dim():
                assert torch.equal(value, torch.cat([left[name], right[name]])), name  # type: ignore[list-item]
                assert torch.equal(value[order], permuted[name]), name  # type: ignore[arg-type]

    walk(row, data, look)


# -- domains, copies, checkpoints --------------------------------------------------------------------------------------

OUTSIDE = [
    pytest.param(row, name, number, id=f"{row.name}-{name}-{number}")
    for row in NEW
    for name in row.linked
    if name in row.rule.domain
    for number in (-0.1, 0.5, 1.0, 1.5, float("nan"))
    if not row.rule.domain[name][0](number)
]


@each
def test_what_the_class_refuses_is_outside_of_the_domain(row: Row) -> None:
    for name in row.numbers:
        for number in (-0.1, 0.5, 1.0, 1.5, float("nan")):
            try:
                row.bare(weights_of(row), **group_arguments(row.rule, {**row.numbers, name: number}))
            except ValueError:
                assert not row.rule.domain[name][0](number), (name, number)


@pytest.mark.parametrize(("row", "name", "number"), OUTSIDE)
def test_outside_of_its_domain_a_setting_is_an_error(row: Row, name: str, number: float) -> None:
    """At construction, and when the hyperparameter has moved; then nothing is changed."""
    outside = torch.tensor(number, requires_grad=True)
    with pytest.raises(metaopt.DomainError, match=name):
        row.drop_in(weights_of(row), **group_arguments(row.rule, {**row.numbers, name: outside}))
    leaf = torch.tensor(row.numbers[name], requires_grad=True)
    weights = weights_of(row)
    made = row.drop_in(weights, **group_arguments(row.rule, {**row.numbers, name: leaf}))
    step(made, 0)
    before = copy.deepcopy((weights, made.state_dict()))
    with torch.no_grad():
        leaf.fill_(number)
    with pytest.raises(metaopt.DomainError, match=name):
        step(made, 1)
    assert str((weights, made.state_dict())) == str(before)


def weights_of(row: Row) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(randn(i, 3, 2)) for i in range(2)]


def step(made: Any, seed: int) -> None:
    for group in made.param_groups:
        for place, weight in enumerate(group["params"]):
            weight.grad = randn(seed + place, *weight.shape)
    made.step()


def linked(row: Row) -> tuple[dict[str, Tensor], Any]:
    leaves = {name: torch.tensor(row.numbers[name], requires_grad=True) for name in row.linked}
    return leaves, row.drop_in(weights_of(row), **group_arguments(row.rule, {**row.flat, **leaves}))


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(one.param_groups, other.param_groups, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a["params"], b["params"], strict=True))
    assert str(one.state_dict()["state"]) == str(other.state_dict()["state"])


@each
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "bare state_dict"])
def test_copies_and_checkpoints_go_on(row: Row, way: str) -> None:
    leaves, made = linked(row)
    step(made, 0)
    step(made, 10)
    if "state_dict" in way:
        _, copied = linked(row)
        source = made.state_dict()
        if way.startswith("bare"):  # torch's own class saved it, and reads what the drop-in saves
            bare: Any = row.bare(weights_of(row), **group_arguments(row.rule, row.numbers))
            bare.load_state_dict(copy.deepcopy(source))
            step(bare, 20)
            bare.load_state_dict(copy.deepcopy(source))
            source = bare.state_dict()
        for mine, theirs in zip(copied.param_groups[0]["params"], made.param_groups[0]["params"], strict=True):
            mine.data.copy_(theirs.detach())
        copied.load_state_dict(copy.deepcopy(source))
    else:
        copied = copy.deepcopy(made) if way == "deepcopy" else pickle.loads(pickle.dumps(made))
    assert type(copied) is row.drop_in
    assert isinstance(copied, row.bare)
    for optimizer in (made, copied):
        step(optimizer, 20)
    assert_same(made, copied)
    for group in made.param_groups:
        assert all(isinstance(row.rule.number(group, name), float) for name in leaves)


@each
def test_the_groups_numbers_follow_schedulers_and_hyperparameters(row: Row) -> None:
    leaves, made = linked(row)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(made, 0.5)
    for t in range(2):
        step(made, t)
        scheduler.step()
    with torch.no_grad():
        leaves["lr"].mul_(0.5)
    step(made, 2)
    assert made.param_groups[0]["lr"] == pytest.approx(row.numbers["lr"] * 0.125)


# -- many tensors at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS.values() if row.rule.elementwise])
def test_small_tensors_updated_as_one_are_updated_as_each(row: Row) -> None:
    """Values and derivatives, with tensors of no, one and two dimensions, empty ones, and others at another step."""
    assert row.elementwise
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 3), (0,), (3,), ()]
    steps = [2, 2, 2, 2, 5, 5]
    update = Update(row.rule, tuple((flag, False) for flag in row.rule.flags))
    settings = {name: torch.tensor(number, requires_grad=True) for name, number in row.numbers.items()}
    settings = {k: v.detach() if k in row.rule.flat else v for k, v in settings.items() if k in row.rule.settings}
    weights, grads = ([torch.randn(shape, requires_grad=True) for shape in shapes] for _ in range(2))
    states = [[torch.rand(shape, requires_grad=True) for _ in row.rule.state] for shape in shapes]
    whole = update(weights, grads, states, steps, **settings)
    single = [
        value
        for given in zip(weights, grads, states, steps, strict=True)
        for value in update(*([entry] for entry in given), **settings)  # type: ignore[arg-type]
    ]
    variables = [*weights, *grads, *(s for state in states for s in state)]
    variables += [s for s in settings.values() if s.requires_grad]
    kept = [place for place, value in enumerate(single) if value.requires_grad]
    cotangents = [torch.randn_like(single[place]) for place in kept]
    found, expected = (
        torch.autograd.grad([values[place] for place in kept], variables, cotangents, allow_unused=True)
        for values in (whole, single)
    )
    for a, b in zip([*whole, *found], [*single, *expected], strict=True):
        assert (a is None) == (b is None) or not (a if b is None else b).any()
        if a is not None and b is not None:
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
@given(data=st.data())
def test_a_first_step_is_a_step_from_zeros(row: Row, data: st.DataObject) -> None:
    """Where the rule says so: value, derivative, and that the optimizer makes a tensor of the weight's shape."""

    def look(point: Point, made: Any, weight: Tensor, chosen: dict[str, float], flags: dict[str, Any]) -> None:
        names = row.rule.zeros({**flags, **chosen}, frozenset())
        if not names or point.state[names[0]] is not None:
            return
        assert all(made.state[weight][name].shape == weight.shape for name in names)
        assert all(made.state[weight][name].dtype == weight.dtype for name in names)
        zeros = Point(point.w, point.g, point.state | {n: torch.zeros_like(point.w) for n in names}, 1)
        found, expected = (_derivative(row.rule, at, chosen, flags) for at in (zeros, point))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, equal_nan=True)

    walk(row, data, look)


def _derivative(rule: Rule, point: Point, chosen: dict[str, float], flags: dict[str, Any]) -> list[Tensor]:
    """What the rule gives, and its derivatives by weight, gradient and settings."""
    w, g = (x.detach().clone().requires_grad_() for x in (point.w, point.g))
    hyper = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in chosen.items()}
    if rule.refuse is not None:
        hyper = {name: value.detach() for name, value in hyper.items()}
    after = apply(rule, Point(w, g, point.state, point.step), hyper, flags)
    values = [value for value in after.values() if value is not None]
    moving = [value for value in values if value.requires_grad]
    leaves = [x for x in (w, g, *hyper.values()) if x.requires_grad]
    grads = torch.autograd.grad([v.sum() for v in moving], leaves, allow_unused=True, materialize_grads=True)
    return [*(value.detach() for value in values), *grads]
