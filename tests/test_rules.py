"""SGD, Adam and AdamW in depth: the rule is torch's step, it is differentiable, and the drop-in is torch's class.

The other rules are in test_every_rule.py; the loops of all of them, setting by setting, in test_optimizer_table.py.
A wrong rule is invisible to every gradient oracle that shares it, and a wrong derivative is invisible to parity, so
both are here.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import metaopt
from metaopt.rules import _RULES, Rule
from tests.strategies import FLAGS, NUMBERS, SCHEDULERS, Settings, randn, seeds, settings, tensors

REGISTERED = dict(_RULES)
EPS = torch.finfo(torch.float64).eps
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "for_loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
State = dict[str, Tensor | None]


@dataclass(frozen=True)
class Row:
    """What the tests need to know about a rule.

    Attributes:
        drop_in: its class in `metaopt.optim`.
        slope: ``∂w'/∂g`` on paper, at step ``t`` with zero weight, gradient and state, when not maximizing.
        exact: numbers for which torch's arithmetic and the rule's round alike.
        exact_weights: whether the weights do too, or the state only.
    """

    drop_in: type[torch.optim.Optimizer]
    slope: Callable[[Settings, int], float]
    exact: Mapping[str, tuple[float, ...]]
    exact_weights: bool


def adam_slope(s: Settings, t: int) -> float:
    n = s.numbers
    return -n["lr"] * (1 - n["beta1"]) / (1 - n["beta1"] ** t) / n["eps"]


def sgd_slope(s: Settings, t: int) -> float:
    n = s.numbers
    v = 1.0 if t == 1 else 1 - n["dampening"]
    return -n["lr"] * (1 + n["momentum"] * v if s.flags["nesterov"] else v if n["momentum"] else 1.0)


# Multiplying by a power of two does not round, nor does squaring a number of 24 bits, so that fused and separate
# multiply-adds agree. torch's `lerp` has one formula for weights below 1/2 and another one above.
SGD_EXACT = {"lr": (0.25, 1.0), "momentum": (0.0, 0.5), "dampening": (0.0, 0.5), "weight_decay": (0.0, 0.5)}
ADAM_EXACT = {"lr": (0.1,), "beta1": (0.75,), "beta2": (0.75, 0.5), "eps": (1e-8, 1.0), "weight_decay": (0.0,)}
ROWS: dict[type[torch.optim.Optimizer], Row] = {
    torch.optim.SGD: Row(metaopt.optim.SGD, sgd_slope, SGD_EXACT, True),
    torch.optim.Adam: Row(metaopt.optim.Adam, adam_slope, ADAM_EXACT, False),
    torch.optim.AdamW: Row(metaopt.optim.AdamW, adam_slope, ADAM_EXACT | {"weight_decay": (0.0, 0.1)}, False),
}
each = pytest.mark.parametrize("optimizer", list(ROWS), ids=lambda optimizer: optimizer.__name__)


def test_the_rows_are_complete() -> None:
    for optimizer, row in ROWS.items():
        assert issubclass(row.drop_in, optimizer)
        assert set(NUMBERS[optimizer.__name__]) == set(REGISTERED[optimizer].settings) == set(row.exact)
        assert {*FLAGS[optimizer.__name__]} <= {*REGISTERED[optimizer].flags}


# -- the rule and torch's step, side by side ---------------------------------------------------------------------------


@dataclass
class Point:
    """Where an update is taken: a weight, its gradient, its state, and the number of the step (from 1)."""

    w: Tensor
    g: Tensor
    state: State
    step: int

    def tensors(self) -> list[Tensor]:
        return [self.w, self.g, *(s for s in self.state.values() if s is not None)]


def numbers_of(rule: Rule, group: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, bool]]:
    """What a param group holds, by the rule's names."""
    numbers = {name: float(rule.number(group, name)) for name in rule.settings}
    return numbers, {flag: bool(group.get(flag, False)) for flag in rule.flags}


def apply(rule: Rule, point: Point, numbers: Mapping[str, Any], flags: Mapping[str, bool]) -> dict[str, Tensor | None]:
    """The rule's new weight (under ``"w"``) and state."""
    w, state = rule.update(point.w, point.g, point.state, point.step, **numbers, **flags)
    return {"w": w, **state}


def present(optimizer: torch.optim.Optimizer, rule: Rule, weight: Tensor) -> Point:
    """Where torch's optimizer is about to step from."""
    assert weight.grad is not None
    held = optimizer.state.get(weight, {})
    state = {name: None if held.get(name) is None else held[name].clone() for name in rule.state}
    return Point(weight.detach().clone(), weight.grad.clone(), state, int(held.get("step", 0)) + 1)


def condition(rule: Rule, point: Point, numbers: Mapping[str, Any], flags: Mapping[str, bool]) -> dict[str, Tensor]:
    """What one rounding of every input, ``Σ |∂out/∂in| · |in|``, would make of each output."""
    leaves = [x.detach().clone().requires_grad_() for x in point.tensors()]
    given = iter(leaves)
    moved = Point(next(given), next(given), {k: None if s is None else next(given) for k, s in point.state.items()}, 0)
    moved.step = point.step
    result = {}
    for name, out in apply(rule, moved, numbers, flags).items():
        if out is not None and not out.requires_grad:  # a number that depends on the settings alone
            result[name] = out.abs()
        elif out is not None:
            grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True, retain_graph=True)
            parts = [(g * x).abs() for g, x in zip(grads, leaves, strict=True) if g is not None]
            result[name] = sum(parts, out.detach().abs()).detach()
    return result


@st.composite
def histories(draw: st.DrawFn, steps: int = 4) -> list[list[Tensor | None]]:
    """Gradients for three weights and some steps; None where a weight takes no part."""
    shapes = [draw(st.sampled_from(((), (1,), (0,), (5,), (3, 4)))) for _ in range(3)]
    return [[draw(st.none() | tensors(shape)) if t else draw(tensors(shape)) for shape in shapes] for t in range(steps)]


def walk(
    optimizer: type[torch.optim.Optimizer],
    chosen: Settings,
    history: Sequence[Sequence[Tensor | None]],
    look: Callable[[Rule, Point, torch.optim.Optimizer, Tensor, dict[str, float], dict[str, bool]], None],
    **options: Any,
) -> None:
    """Run torch's optimizer, and look at every weight before and after every step."""
    rule = REGISTERED[optimizer]
    weights = [torch.nn.Parameter(randn(7 + i, *g.shape)) for i, g in enumerate(history[0]) if g is not None]
    made = optimizer(weights, **chosen.arguments(), **options)
    for grads in history:
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = None if grad is None else grad.clone()
        points = [None if weight.grad is None else present(made, rule, weight) for weight in weights]
        numbers, flags = numbers_of(rule, made.param_groups[0])
        made.step()
        for weight, point in zip(weights, points, strict=True):
            if point is not None:
                look(rule, point, made, weight, numbers, flags)


@each
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(data=st.data())
def test_parity_with_torch(optimizer: type[torch.optim.Optimizer], implementation: str, data: st.DataObject) -> None:
    """From torch's own state at every step, the rule gives torch's next weights and next state.

    Tolerance: torch fuses multiply-adds and multiplies in another order, so each output may be off by what a dozen
    roundings of its inputs would make: 12 · 2⁻⁵² · Σ |∂out/∂in| · |in|.
    """
    chosen = data.draw(settings(optimizer.__name__))
    history = data.draw(histories())

    def look(
        rule: Rule,
        point: Point,
        made: torch.optim.Optimizer,
        weight: Tensor,
        numbers: dict[str, float],
        flags: dict[str, bool],
    ) -> None:
        found = apply(rule, point, numbers, flags)
        scale = condition(rule, point, numbers, flags)
        held = {"w": weight.detach(), **made.state.get(weight, {})}
        for name in ("w", *rule.state):
            actual, value = held.get(name), found[name]
            assert (actual is None) == (value is None), name
            if actual is not None and value is not None:
                assert torch.all((value - actual).abs() <= 12 * EPS * scale[name]), name
        assert "step" not in held or int(held["step"]) == point.step

    walk(optimizer, chosen, history, look, **IMPLEMENTATIONS[implementation])


@each
@pytest.mark.parametrize("small", [1e-3, 1e-8, 1e-17, 1e-30])
def test_parity_where_the_history_dwarfs_the_gradient(optimizer: type[torch.optim.Optimizer], small: float) -> None:
    """With a first beta or momentum of 0 the state is the gradient, however large the one before was."""
    numbers = dict.fromkeys(REGISTERED[optimizer].settings, 0.5) | {"weight_decay": 0.0}
    numbers |= {name: 0.0 for name in ("beta1", "momentum", "dampening") if name in numbers}
    history = [[randn(1, 5)], [small * randn(2, 5)], [torch.zeros(5)]]

    def look(
        rule: Rule,
        point: Point,
        made: torch.optim.Optimizer,
        weight: Tensor,
        numbers: dict[str, float],
        flags: dict[str, bool],
    ) -> None:
        found = apply(rule, point, numbers, flags)
        for name in rule.state:
            actual, value = made.state.get(weight, {}).get(name), found[name]
            if actual is not None and value is not None:
                assert torch.all((value - actual).abs() <= 4 * EPS * actual.abs()), name

    walk(optimizer, Settings("", numbers), history, look)


@each
@pytest.mark.parametrize("implementation", ["for_loop", "foreach"])
@given(data=st.data())
def test_parity_bit_for_bit(optimizer: type[torch.optim.Optimizer], implementation: str, data: st.DataObject) -> None:
    """With numbers that are exact in one formula and in the other."""
    row = ROWS[optimizer]
    pinned = {name: data.draw(st.sampled_from(values)) for name, values in row.exact.items()}
    chosen = data.draw(settings(optimizer.__name__, **pinned))
    history = [[None if g is None else g.float().double() for g in grads] for grads in data.draw(histories())]

    def look(
        rule: Rule,
        point: Point,
        made: torch.optim.Optimizer,
        weight: Tensor,
        numbers: dict[str, float],
        flags: dict[str, bool],
    ) -> None:
        found = apply(rule, point, numbers, flags)
        if row.exact_weights:
            assert torch.equal(found["w"], weight)  # type: ignore[arg-type]
        for name in rule.state:
            if found[name] is not None:
                assert torch.equal(found[name], made.state[weight][name]), name  # type: ignore[arg-type]

    walk(optimizer, chosen, history, look, **IMPLEMENTATIONS[implementation])


# -- purity and symmetry -----------------------------------------------------------------------------------------------


@st.composite
def points(draw: st.DrawFn, rule: Rule, shape: tuple[int, ...] | None = None, zeros: str | None = None) -> Point:
    """A weight, a gradient and a state, at the first step (no state yet) or at a later one."""
    w = draw(tensors(shape, zeros=zeros, magnitude=1.0))
    g = draw(tensors(tuple(w.shape), zeros=zeros))
    step = draw(st.integers(1, 4))
    if step == 1:
        return Point(w, g, dict.fromkeys(rule.state), step)
    parts = {name: draw(tensors(tuple(w.shape), zeros=zeros)) for name in rule.state}
    return Point(w, g, {name: x**2 if "sq" in name else x for name, x in parts.items()}, step)


@st.composite
def smooth_points(draw: st.DrawFn, rule: Rule) -> Point:
    """The same for finite differences: of a size around 1, away from the kinks at 0 and where two moments tie."""
    point = draw(points(rule, shape=(4,), zeros="none"))
    for i, (name, x) in enumerate(point.state.items()):
        if x is not None:
            size = 0.3 + randn(draw(seeds) + i, 4).abs()
            point.state[name] = size + 3 * ("max" in name) if "sq" in name else size * x.sign()
    point.g = point.g.sign() * (0.3 + randn(draw(seeds), 4).abs())
    return point


def flags_of(rule: Rule, chosen: Settings) -> dict[str, bool]:
    return {flag: bool(chosen.flags.get(flag, False)) for flag in rule.flags}


def leaves_of(chosen: Settings) -> dict[str, Tensor]:
    return {name: torch.tensor(number).requires_grad_() for name, number in chosen.numbers.items()}


@each
@given(data=st.data())
def test_a_rule_is_pure(optimizer: type[torch.optim.Optimizer], data: st.DataObject) -> None:
    rule = REGISTERED[optimizer]
    chosen, point = data.draw(settings(optimizer.__name__)), data.draw(points(rule))
    hyper = leaves_of(chosen)
    arguments = [*point.tensors(), *hyper.values()]
    before = [(x._version, x.detach().clone()) for x in arguments]
    state = dict(point.state)
    first = apply(rule, point, hyper, flags_of(rule, chosen))
    again = apply(rule, point, hyper, flags_of(rule, chosen))
    assert [(x._version) for x in arguments] == [version for version, _ in before]
    assert all(torch.equal(x, value) for x, (_, value) in zip(arguments, before, strict=True))
    assert point.state == state
    for name, value in first.items():
        assert (value is None) == (again[name] is None)
        assert value is None or torch.equal(value, again[name])  # type: ignore[arg-type]


@each
@given(data=st.data())
def test_a_rule_commutes_with_permutation_and_concatenation(
    optimizer: type[torch.optim.Optimizer], data: st.DataObject
) -> None:
    rule = REGISTERED[optimizer]
    chosen, point = data.draw(settings(optimizer.__name__)), data.draw(points(rule, shape=(7,)))
    cut, order = data.draw(st.integers(0, 7)), torch.tensor(data.draw(st.permutations(range(7))))
    flags = flags_of(rule, chosen)

    def at(place: Any) -> Point:
        state = {name: None if value is None else value[place] for name, value in point.state.items()}
        return Point(point.w[place], point.g[place], state, point.step)

    whole = apply(rule, point, chosen.numbers, flags)
    left, right = (apply(rule, at(place), chosen.numbers, flags) for place in (slice(cut), slice(cut, None)))
    permuted = apply(rule, at(order), chosen.numbers, flags)
    for name, value in whole.items():
        if value is not None:
            assert torch.equal(value, torch.cat([left[name], right[name]])), name  # type: ignore[list-item]
            assert torch.equal(value[order], permuted[name]), name  # type: ignore[arg-type]


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(data=st.data())
def test_a_setting_given_as_a_tensor_is_the_same_setting(
    optimizer: type[torch.optim.Optimizer], dtype: torch.dtype, data: st.DataObject
) -> None:
    """To some roundings in the weights' precision, whatever the hyperparameter's own is."""
    rule = REGISTERED[optimizer]
    chosen, point = data.draw(settings(optimizer.__name__)), data.draw(points(rule))
    flags = flags_of(rule, chosen)
    hyper = {name: leaf.detach().to(dtype) for name, leaf in leaves_of(chosen).items()}
    linked = apply(rule, point, hyper, flags)
    numbers = {name: float(leaf) for name, leaf in hyper.items()}
    scale = condition(rule, point, numbers, flags)
    for name, value in apply(rule, point, numbers, flags).items():
        if name == "momentum_buffer" and chosen.numbers["momentum"] == 0:
            continue  # torch leaves it alone
        found = linked[name]
        assert (found is None) == (value is None)
        if value is not None and found is not None:
            assert found.dtype == value.dtype
            assert torch.all((found - value).abs() <= 12 * EPS * scale[name]), name


# -- derivatives -------------------------------------------------------------------------------------------------------


def pullback(rule: Rule, point: Point, hyper: Mapping[str, Any], flags: Mapping[str, bool]) -> Tensor:
    """A fixed linear combination of everything that an update returns."""
    outputs = [value for value in apply(rule, point, hyper, flags).values() if value is not None]
    return sum((value * randn(60 + i, *value.shape)).sum() for i, value in enumerate(outputs))  # type: ignore[return-value]


def slope(function: Callable[[float], float], h: float) -> float:
    """The derivative at 0, by a stencil of fourth order."""
    return (8 * (function(h) - function(-h)) - function(2 * h) + function(-2 * h)) / (12 * h)


@each
@pytest.mark.parametrize("zeros", ["all", "some"])
@given(data=st.data())
def test_values_and_derivatives_are_finite_at_zero(
    optimizer: type[torch.optim.Optimizer], zeros: str, data: st.DataObject
) -> None:
    rule = REGISTERED[optimizer]
    chosen, point = data.draw(settings(optimizer.__name__)), data.draw(points(rule, zeros=zeros))
    hyper = leaves_of(chosen)
    leaves = [x.requires_grad_() for x in point.tensors()]
    outputs = apply(rule, point, hyper, flags_of(rule, chosen))
    assert all(torch.isfinite(value).all() for value in outputs.values() if value is not None)
    total = pullback(rule, point, hyper, flags_of(rule, chosen))
    grads = torch.autograd.grad(total, [*leaves, *hyper.values()], create_graph=True, allow_unused=True)
    assert all(torch.isfinite(grad).all() for grad in grads if grad is not None)


@each
@given(data=st.data())
def test_the_derivative_at_zero_is_the_limit_on_paper(
    optimizer: type[torch.optim.Optimizer], data: st.DataObject
) -> None:
    """For Adam ``-lr · (1-β₁)/(1-β₁ᵗ) / eps``, also where the bare ``torch.optim`` step is differenced."""
    rule = REGISTERED[optimizer]
    chosen = data.draw(settings(optimizer.__name__))
    step = data.draw(st.integers(1, 4))
    zero = torch.zeros(3)
    g = torch.zeros(3, requires_grad=True)
    point = Point(zero, g, dict.fromkeys(rule.state, None if step == 1 else zero), step)
    if step > 1 and chosen.flags.get("amsgrad") is False:
        point.state["max_exp_avg_sq"] = None
    w = apply(rule, point, chosen.numbers, flags_of(rule, chosen))["w"]
    assert w is not None
    (slope,) = torch.autograd.grad(w.sum(), g)
    expected = ROWS[optimizer].slope(chosen, step) * (-1 if chosen.flags["maximize"] else 1)
    torch.testing.assert_close(slope, torch.full((3,), expected), rtol=1e-12, atol=0)

    def torch_step(h: float) -> float:
        weight = torch.nn.Parameter(torch.zeros(1))
        made = optimizer([weight], **chosen.arguments())
        for t in range(step):
            weight.grad = torch.full((1,), h if t == step - 1 else 0.0)
            made.step()
        return float(weight.detach())

    h = 1e-7 * chosen.numbers.get("eps", 1.0)
    assert (torch_step(h) - torch_step(-h)) / (2 * h) == pytest.approx(expected, rel=1e-5)


@each
@given(data=st.data())
def test_the_derivative_in_every_setting_is_that_of_finite_differences(
    optimizer: type[torch.optim.Optimizer], data: st.DataObject
) -> None:
    rule = REGISTERED[optimizer]
    chosen = data.draw(settings(optimizer.__name__))
    point = data.draw(smooth_points(rule))
    flags = flags_of(rule, chosen)
    hyper = leaves_of(chosen)
    total = pullback(rule, point, hyper, flags)
    grads = torch.autograd.grad(total, list(hyper.values()), allow_unused=True)

    def moved(name: str, h: float) -> float:
        shifted = {key: value.detach() + h * (key == name) for key, value in hyper.items()}
        return float(pullback(rule, point, shifted, flags))

    for name, grad in zip(hyper, grads, strict=True):
        h = 1e-4 * min(1.0, 1 - chosen.numbers[name]) if name.startswith("beta") else 1e-4
        slopes = [slope(partial(moved, name), k) for k in (h, 2 * h)]
        found = 0.0 if grad is None else float(grad)
        scale = max(abs(slopes[0]), abs(found), 1e-5 * abs(float(total.detach())), 1e-6)
        assert abs(slopes[0] - slopes[1]) <= 1e-5 * scale, (name, slopes)
        assert abs(found - slopes[0]) <= 1e-5 * scale, (name, found, slopes)


@each
@given(data=st.data())
def test_the_derivative_in_weights_gradient_and_state_is_that_of_finite_differences(
    optimizer: type[torch.optim.Optimizer], data: st.DataObject
) -> None:
    rule = REGISTERED[optimizer]
    chosen = data.draw(settings(optimizer.__name__, **({"eps": 0.1} if "eps" in rule.settings else {})))
    point = data.draw(smooth_points(rule))
    flags = flags_of(rule, chosen)
    leaves = [x.requires_grad_() for x in point.tensors()]
    total = pullback(rule, point, chosen.numbers, flags)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        direction = randn(80 + i, 4)

        def moved(h: float, leaf: Tensor = leaf, direction: Tensor = direction) -> float:
            with torch.no_grad():
                old = leaf.clone()
                leaf += h * direction
                value = float(pullback(rule, point, chosen.numbers, flags))
                leaf.copy_(old)
            return value

        expected = slope(moved, 1e-4)
        found = 0.0 if grad is None else float((grad * direction).sum())
        assert abs(found - expected) <= 1e-6 * max(abs(expected), 1e-3), i


# -- domains -----------------------------------------------------------------------------------------------------------


def outside(rule: Rule, name: str) -> list[float]:
    """Numbers that a setting refuses."""
    test, _ = rule.domain[name]
    return [number for number in (-0.1, 1.0, float("nan")) if not test(number)]


CASES = [
    pytest.param(optimizer, name, number, id=f"{optimizer.__name__}-{name}-{number}")
    for optimizer in ROWS
    for name in REGISTERED[optimizer].domain
    for number in outside(REGISTERED[optimizer], name)
]


@each
def test_the_settings_that_torch_refuses_have_a_domain(optimizer: type[torch.optim.Optimizer]) -> None:
    rule = REGISTERED[optimizer]
    for name in rule.settings:
        for number in (-0.1, 1.0):
            chosen = dict.fromkeys(rule.settings, 0.5) | {name: number}
            try:
                optimizer([torch.nn.Parameter(torch.ones(1))], **Settings("", chosen).arguments())
            except ValueError:
                assert number in outside(rule, name)


@pytest.mark.parametrize(("optimizer", "name", "number"), CASES)
def test_outside_of_its_domain_a_setting_is_an_error(
    optimizer: type[torch.optim.Optimizer], name: str, number: float
) -> None:
    """At construction, when the hyperparameter has moved, and in a schedule's later entry."""
    drop_in: Any = ROWS[optimizer].drop_in
    numbers = dict.fromkeys(REGISTERED[optimizer].settings, 0.5)
    weight = torch.nn.Parameter(torch.ones(2))

    def make(value: Tensor) -> torch.optim.Optimizer:
        return drop_in([weight], **Settings("", numbers).arguments({name: value}))

    with pytest.raises(metaopt.DomainError, match=name):
        make(torch.tensor(number, requires_grad=True))
    with pytest.raises(metaopt.DomainError, match=name):
        drop_in(
            [{"params": [weight], **Settings("", {}).arguments()}],
            **Settings("", numbers).arguments({name: torch.tensor(number, requires_grad=True)}),
        )
    leaf = torch.tensor(0.5, requires_grad=True)
    made = make(leaf)
    weight.grad = torch.ones(2)
    made.step()
    before = weight.detach().clone(), copy.deepcopy(made.state_dict())
    with torch.no_grad():
        leaf.fill_(number)
    with pytest.raises(metaopt.DomainError, match=name):
        made.step()
    assert torch.equal(weight, before[0])
    assert str(made.state_dict()) == str(before[1])
    with torch.no_grad():
        leaf.fill_(0.25)
    made.step()
    assert REGISTERED[optimizer].number(made.param_groups[0], name) == 0.25
    scheduled = make(torch.tensor([0.5, number], requires_grad=True))
    scheduled.step()
    with pytest.raises(metaopt.DomainError, match=name):
        scheduled.step()


def test_no_derivative_where_sgd_is_discontinuous() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    leaf = torch.tensor(0.0, requires_grad=True)
    optimizer = metaopt.optim.SGD([weight], lr=0.1, momentum=leaf, dampening=0.5)
    (weight**2).sum().backward()
    with metaopt.record(optimizer), pytest.raises(metaopt.DomainError, match="discontinuous"):
        optimizer.step()


# -- the drop-in is torch's own class ----------------------------------------------------------------------------------


@dataclass
class Pair:
    """The same numbers in torch's optimizer and in the drop-in, there as hyperparameters."""

    plain: torch.optim.Optimizer
    linked: torch.optim.Optimizer
    leaves: dict[str, Tensor]

    def step(self, seed: int) -> None:
        for optimizer in (self.plain, self.linked):
            for place, weight in enumerate(weights_of(optimizer)):
                weight.grad = randn(seed + place, *weight.shape)
            optimizer.step()

    def assert_equal(self) -> None:
        for a, b in zip(weights_of(self.plain), weights_of(self.linked), strict=True):
            assert torch.equal(a, b)
        plain, linked = self.plain.state_dict(), self.linked.state_dict()
        assert plain["param_groups"] == linked["param_groups"]
        for place, state in plain["state"].items():
            for name, value in state.items():
                other = linked["state"][place][name]
                assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def pair(optimizer: type[torch.optim.Optimizer], chosen: Settings, **options: Any) -> Pair:
    def groups() -> list[dict[str, Any]]:
        shapes = ((3,), (), (2, 4))
        weights = [torch.nn.Parameter(randn(i, *shape)) for i, shape in enumerate(shapes)]
        return [{"params": weights[:2]}, {"params": weights[2:], "lr": 0.125}]

    leaves = leaves_of(chosen)
    drop_in: Any = ROWS[optimizer].drop_in
    plain: Any = optimizer
    return Pair(
        plain(groups(), **chosen.arguments(), **options),
        drop_in(groups(), **chosen.arguments(leaves), **options),
        leaves,
    )


def with_momentum(optimizer: type[torch.optim.Optimizer], data: st.DataObject) -> Settings:
    """Settings; a linked momentum of 0 keeps a buffer, which torch does not, so it is left out."""
    chosen = data.draw(settings(optimizer.__name__))
    return chosen.but(momentum=0.5) if chosen.numbers.get("momentum") == 0 else chosen


@each
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(data=st.data())
def test_the_step_of_a_drop_in_is_torchs_step(
    optimizer: type[torch.optim.Optimizer], implementation: str, data: st.DataObject
) -> None:
    both = pair(optimizer, with_momentum(optimizer, data), **IMPLEMENTATIONS[implementation])
    assert isinstance(both.linked, optimizer)
    for t in range(3):
        both.step(10 * t)
        both.assert_equal()
    for group in both.linked.param_groups:
        for name in REGISTERED[optimizer].settings:
            assert isinstance(REGISTERED[optimizer].number(group, name), float)


@given(chosen=settings("SGD", momentum=0.0))
def test_a_linked_momentum_of_zero_takes_torchs_step(chosen: Settings) -> None:
    both = pair(torch.optim.SGD, chosen)
    for t in range(3):
        both.step(10 * t)
        assert all(torch.equal(a, b) for a, b in zip(weights_of(both.plain), weights_of(both.linked), strict=True))


@each
@given(data=st.data())
def test_a_state_dict_comes_back(optimizer: type[torch.optim.Optimizer], data: st.DataObject) -> None:
    """Through the drop-in's own state_dict, and torch's into the drop-in and back."""
    chosen = with_momentum(optimizer, data)
    first, second, third = (pair(optimizer, chosen) for _ in range(3))
    first.step(0)
    first.step(10)
    for other, source in ((second, first.linked.state_dict()), (third, first.plain.state_dict())):
        for mine, theirs in zip(weights_of(other.linked), weights_of(first.linked), strict=True):
            mine.data.copy_(theirs.detach())
        other.linked.load_state_dict(copy.deepcopy(source))
    back = pair(optimizer, chosen)
    back.plain.load_state_dict(copy.deepcopy(first.linked.state_dict()))
    first.step(20)
    for other in (second, third):
        for place, weight in enumerate(weights_of(other.linked)):
            weight.grad = randn(20 + place, *weight.shape)
        other.linked.step()
        Pair(first.plain, other.linked, {}).assert_equal()


@each
@pytest.mark.parametrize("kind", ["leaf", "positive"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_and_pickles_go_on(optimizer: type[torch.optim.Optimizer], way: str, kind: str) -> None:
    """Of an optimizer alone, whose hyperparameter is a leaf or a constrained value."""
    leaf = torch.tensor(0.25, requires_grad=True)
    lr = leaf if kind == "leaf" else metaopt.Hyperparameters(lr=metaopt.positive(leaf.detach())).lr
    weight = torch.nn.Parameter(torch.ones(3))
    drop_in: Any = ROWS[optimizer].drop_in
    made = drop_in([weight], lr=lr)
    weight.grad = randn(1, 3)
    made.step()
    copied = copy.deepcopy(made) if way == "deepcopy" else pickle.loads(pickle.dumps(made))
    assert type(copied) is type(made)
    (other,) = weights_of(copied)
    assert other is not weight
    for w, o in ((weight, made), (other, copied)):
        w.grad = randn(2, 3)
        o.step()
    Pair(made, copied, {}).assert_equal()


@each
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_made_with_its_hyperparameter_follows_the_copy(optimizer: type[torch.optim.Optimizer], way: str) -> None:
    leaf = torch.tensor(0.25, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(3))
    drop_in: Any = ROWS[optimizer].drop_in
    made = drop_in([weight], lr=leaf)
    both = (leaf, made)
    other, copied = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    with torch.no_grad():
        other.fill_(0.5)
    for o in (made, copied):
        for w in weights_of(o):
            w.grad = torch.ones(3)
        o.step()
    assert (made.param_groups[0]["lr"], copied.param_groups[0]["lr"]) == (0.25, 0.5)


@each
def test_a_checkpoint_taken_after_a_hyper_step_follows_the_hyperparameter(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    """The group's number is stale then; in the next process it must not be taken for a scheduler's factor."""
    leaf = torch.tensor(0.25, requires_grad=True)
    drop_in: Any = ROWS[optimizer].drop_in

    def make(value: Tensor) -> torch.optim.Optimizer:
        return drop_in([torch.nn.Parameter(torch.ones(3))], lr=value)

    def step(made: torch.optim.Optimizer) -> float:
        for w in weights_of(made):
            w.grad = torch.ones(3)
        made.step()
        return made.param_groups[0]["lr"]

    made = make(leaf)
    step(made)
    with torch.no_grad():
        leaf.fill_(0.5)
    saved = copy.deepcopy((leaf.detach(), made.state_dict()))
    assert step(made) == 0.5
    made.load_state_dict(saved[1])
    assert step(made) == 0.5
    fresh = make(saved[0].clone().requires_grad_())
    fresh.load_state_dict(saved[1])
    assert step(fresh) == 0.5


@each
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_do_what_they_do_to_torchs_optimizer(optimizer: type[torch.optim.Optimizer], scheduler: str) -> None:
    chosen = Settings("", dict.fromkeys(REGISTERED[optimizer].settings, 0.5))
    both = pair(optimizer, chosen)
    schedules = [SCHEDULERS[scheduler](o) for o in (both.plain, both.linked)]
    for t in range(6):
        both.step(10 * t)
        for schedule in schedules:
            schedule.step()
        both.assert_equal()
        assert schedules[0].get_last_lr() == schedules[1].get_last_lr()


@each
@pytest.mark.parametrize("moved_at", [0, 3])
@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "one_cycle"])
def test_a_schedulers_factor_multiplies_the_hyperparameter(
    optimizer: type[torch.optim.Optimizer], scheduler: str, moved_at: int
) -> None:
    """``lr_t = λ · c_t``, whenever λ moves: as a loop with plain numbers that had this λ from the start."""
    chosen = Settings("", dict.fromkeys(REGISTERED[optimizer].settings, 0.25))
    moved = pair(optimizer, chosen)
    doubled = pair(optimizer, Settings("", {**chosen.numbers, "lr": 0.5}))
    schedules = [SCHEDULERS[scheduler](o) for o in (moved.linked, doubled.plain)]
    for t in range(6):
        if t == moved_at:
            with torch.no_grad():
                moved.leaves["lr"].mul_(2)
        moved.step(10 * t)
        doubled.step(10 * t)
        if t >= moved_at:
            assert moved.linked.param_groups[0]["lr"] == pytest.approx(doubled.plain.param_groups[0]["lr"], rel=1e-12)
        for schedule in schedules:
            schedule.step()


@each
def test_a_cycled_momentum_follows_its_hyperparameter(optimizer: type[torch.optim.Optimizer]) -> None:
    """``OneCycleLR`` sets the momentum (or the first beta) too, to numbers of its own; they are factors on λ."""
    rule = REGISTERED[optimizer]
    name = "momentum" if "momentum" in rule.settings else "beta1"
    moved = pair(optimizer, Settings("", dict.fromkeys(rule.settings, 0.5)))
    schedules = [SCHEDULERS["one_cycle"](o) for o in (moved.linked, moved.plain)]
    for t in range(6):
        if t == 3:
            with torch.no_grad():
                moved.leaves[name].mul_(0.5)
        moved.step(10 * t)
        expected = rule.number(moved.plain.param_groups[0], name) * (0.5 if t >= 3 else 1.0)
        assert rule.number(moved.linked.param_groups[0], name) == pytest.approx(expected, rel=1e-12)
        for schedule in schedules:
            schedule.step()


@each
@given(seed=seeds)
def test_a_learned_schedule_is_read_step_by_step(optimizer: type[torch.optim.Optimizer], seed: int) -> None:
    values = randn(seed, 4).abs() / 4
    drop_in: Any = ROWS[optimizer].drop_in
    plain, linked = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    reference: Any = optimizer
    theirs = reference([plain], lr=float(values[0]))
    mine = drop_in([linked], lr=values.clone().requires_grad_())
    for t in range(4):
        theirs.param_groups[0]["lr"] = float(values[t])
        for weight, made in ((plain, theirs), (linked, mine)):
            weight.grad = randn(seed + t, 3)
            made.step()
        assert torch.equal(plain, linked)
    with pytest.raises(metaopt.DomainError, match="4 entries"):
        mine.step()


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Optimizer", "Nonsense"])
def test_what_has_no_drop_in_says_what_to_use(name: str) -> None:
    cure = {"LBFGS": r"metaopt\.wrap", "SparseAdam": r"dense gradients", "Optimizer": r"metaopt\.wrap"}
    with pytest.raises(AttributeError, match=f"no attribute '{name}'.*{cure.get(name, '')}"):
        getattr(metaopt.optim, name)
    assert not hasattr(metaopt.optim, name)
