"""Every cell of the table of optimizers: the drop-in is the bare optimizer, and its derivative the bare loop's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import metaopt
from metaopt.links import assign
from tests.optimizer_table import KINDS, PAGE, REFUSED, ROWS, Row, group_arguments, page
from tests.strategies import randn

OURS = ("torch.", "metaopt.")
Leaves = dict[str, list[Tensor]]
each = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
CELLS = [
    pytest.param(row, name, kind, id=f"{row.name}-{name}-{kind}")
    for row in ROWS.values()
    for name in row.linked
    for kind in KINDS
]


# -- one loop, for all optimizers --------------------------------------------------------------------------------------


@contextmanager
def smooth() -> Iterator[None]:
    """Muon's iteration in float64, in torch's step and in the rule, where torch has it."""
    if "Muon" not in ROWS:
        yield
        return
    import torch.optim._muon as muon

    from metaopt.rules import muon as rule

    original = muon._zeropower_via_newtonschulz
    patch = pytest.MonkeyPatch()

    def wide(grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
        return rule.orthogonal(grad, coefficients, steps, eps)

    patch.setattr(muon, "_zeropower_via_newtonschulz", wide)
    patch.setattr(rule, "LOOP_PRECISION", torch.float64)
    assert original is not wide
    try:
        yield
    finally:
        patch.undo()


@dataclass
class Problem:
    """A network of two layers whose loss changes from step to step, so that every bound and sign comes into play."""

    row: Row
    silent: bool = False
    dtype: torch.dtype = torch.float64

    def weights(self) -> list[torch.nn.Parameter]:
        shapes = [(3, 4), (4, 2)] if self.row.matrices else [(3, 4), (4, 2), (4,), ()]
        scales = (0.7, 0.7, 0.1, 0.5)
        return [
            torch.nn.Parameter(s * self.draw(i, *shape))
            for i, (s, shape) in enumerate(zip(scales, shapes, strict=False))
        ]

    def draw(self, seed: int, *shape: int) -> Tensor:
        # Rounded to single precision, so that every precision has the same problem.
        generator = torch.Generator("cpu").manual_seed(seed)
        value = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return value.float().to(torch.get_default_device(), self.dtype)

    def loss(self, weights: list[Any], step: int) -> Tensor:
        x, y = self.draw(10, 6, 3), self.draw(11, 6, 2)
        first, second, *rest = weights
        hidden = torch.tanh(x @ first + (rest[0] if rest else 0.0))
        out = hidden @ second * (rest[1] if rest else 1.0)
        wave = (1.0, 1.5, -0.7, 2.5, 1.2, 0.8, 2.0)[step % 7]
        return wave * ((out - y) ** 2).mean() * (not self.silent)

    def outer(self, weights: list[Any]) -> Tensor:
        return ((torch.tanh(self.draw(12, 5, 3) @ weights[0]) @ weights[1] - 1) ** 2).mean() + sum(
            (w**2).sum() for w in weights[2:]
        )


def groups_of(kind: str, weights: list[Any]) -> list[list[Any]]:
    if kind == "group":
        return [weights[:1], weights[1:]]
    return [[w] for w in weights] if kind == "parameter" else [weights]


def leaves_for(row: Row, kind: str) -> Leaves:
    """Values for every setting, by group; no two alike."""
    count = len(groups_of(kind, Problem(row).weights()))
    result: Leaves = {}
    for name in row.linked:
        base = torch.tensor(row.numbers[name])
        if kind == "step":
            result[name] = [base * (1 - 0.02 * torch.arange(row.steps))]
        else:
            result[name] = [base * (1 - 0.03 * place) for place in range(count)]
        if name == "d":  # at least 1
            result[name] = [value.clamp(min=1.01) + 0.001 * place for place, value in enumerate(result[name])]
    return {name: [value.clone().requires_grad_() for value in values] for name, values in result.items()}


def at(value: Tensor, step: int) -> Tensor:
    return value[step] if value.dim() else value


def bare(
    row: Row, kind: str, flags: Mapping[str, Any], values: Mapping[str, list[Tensor]], **options: Any
) -> tuple[Any, Any]:
    """The loop with the plain class and plain numbers: nothing of metaopt is there."""
    problem = Problem(row, **options)
    weights = problem.weights()
    groups: list[dict[str, Any]] = []
    for place, members in enumerate(groups_of(kind, weights)):
        numbers = {name: float(at(value[place], 0).detach()) for name, value in values.items()}
        groups.append({"params": members, **group_arguments(row.rule, {**row.flat, **numbers})})
    arguments = {key: value for key, value in groups[0].items() if key != "params"}
    optimizer: Any = row.bare(groups, **arguments, **flags)
    if "initial_accumulator_value" in values:  # of which torch reads the constructor's alone
        for group in optimizer.param_groups:
            for weight in group["params"]:
                optimizer.state[weight]["sum"].fill_(group["initial_accumulator_value"])
    for step in range(row.steps):
        for place, group in enumerate(optimizer.param_groups):
            for name, value in values.items():
                assign(group, row.rule.settings[name], float(at(value[place], step).detach()))
        optimizer.zero_grad()
        problem.loss(weights, step).backward()
        optimizer.step()
    row.finish(optimizer)
    return problem.outer(weights), weights


def linked(
    row: Row,
    kind: str,
    flags: Mapping[str, Any],
    leaves: Mapping[str, list[Tensor]],
    mode: Callable[..., Any] | None,
    *,
    silent: bool = False,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """The loop as a user writes it, in a context."""
    problem = Problem(row, silent, dtype)
    weights = problem.weights()
    groups: list[dict[str, Any]] = []
    for place, members in enumerate(groups_of(kind, weights)):
        groups.append(
            {"params": members, **group_arguments(row.rule, {**row.flat, **{n: v[place] for n, v in leaves.items()}})}
        )
    arguments = {key: value for key, value in groups[0].items() if key != "params"}
    optimizer = row.drop_in(groups, **arguments, **flags)
    with nullcontext() if mode is None else mode(optimizer, **options) as run:
        for step in range(row.steps):
            optimizer.zero_grad()
            problem.loss(weights, step).backward()
            optimizer.step()
        row.finish(optimizer)
    return run, problem.outer(weights), weights


@functools.cache
def hypergradients(name: str, kind: str, variant: int) -> tuple[Leaves, dict[str, list[Tensor]]]:
    """All settings at once: reverse mode's numbers, once they agree with forward mode's, and the training is bare."""
    row = ROWS[name]
    flags = row.variants[variant]
    found: list[dict[str, list[Tensor]]] = []
    leaves = leaves_for(row, kind)
    wanted = [leaf for values in leaves.values() for leaf in values]
    modes: dict[str, Callable[..., Any]] = {"all": metaopt.record, "never": metaopt.stream}
    for verify, mode in modes.items():
        run, outer, weights = linked(row, kind, flags, leaves, mode, verify=verify)
        grads = iter(run.hypergradient(outer, wanted))
        found.append({key: [next(grads) for _ in values] for key, values in leaves.items()})
    expected, plain = bare(row, kind, flags, leaves)
    assert torch.equal(outer, expected)
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    for key, values in found[0].items():
        for value, other in zip(values, found[1][key], strict=True):
            torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-12)
    return leaves, found[0]


@pytest.mark.parametrize(("row", "name", "kind"), CELLS)
def test_a_cell(row: Row, name: str, kind: str) -> None:
    """Along one direction in all entries of a setting, in their own unit."""
    with smooth():
        for variant, flags in enumerate(row.variants):
            leaves, grads = hypergradients(row.name, kind, variant)
            directions = [randn(40 + i, *leaf.shape) * leaf.detach() for i, leaf in enumerate(leaves[name])]

            def value(h: float) -> float:
                moved = [leaf.detach() + h * d for leaf, d in zip(leaves[name], directions, strict=True)]  # noqa: B023
                return float(bare(row, kind, flags, {**leaves, name: moved})[0].detach())  # noqa: B023

            f = {k: value(k * 1e-4) for k in (-4, -2, -1, 1, 2, 4)}
            slopes = [(8 * (f[k] - f[-k]) - f[2 * k] + f[-2 * k]) / (12e-4 * k) for k in (1, 2)]
            found = sum(float((g * d).sum()) for g, d in zip(grads[name], directions, strict=True))
            assert slopes[0] != 0, "the setting makes no difference here, so nothing was tested"
            assert slopes[0] == pytest.approx(slopes[1], rel=1e-5, abs=1e-9), flags
            assert found == pytest.approx(slopes[0], rel=1e-5, abs=1e-9), flags


# -- what every optimizer holds ----------------------------------------------------------------------------------------


def test_every_rule_has_its_row() -> None:
    known = {rule.optimizer for rule in metaopt.rules._RULES.values() if rule.optimizer.__module__.startswith(OURS)}
    assert {row.bare for row in ROWS.values()} == known, "a rule was registered: give it a row in tests/optimizer_table"
    for row in ROWS.values():
        assert set(row.numbers) == set(row.rule.settings)
        assert issubclass(row.drop_in, row.bare)
        assert row.name in metaopt.optim.__all__
        assert not (set(row.remarks) - set(row.rule.settings))
        assert row.gradient == (not row.rule.blind)


def test_torch_has_no_other_optimizer() -> None:
    theirs = {kind for name in torch.optim.__all__ if isinstance(kind := getattr(torch.optim, name), type)}
    optimizers = {kind for kind in theirs if issubclass(kind, torch.optim.Optimizer)} - {torch.optim.Optimizer}
    assert optimizers == {row.bare for row in ROWS.values() if row.bare in optimizers} | set(REFUSED)


@pytest.mark.skipif("Muon" not in ROWS, reason="the page is that of a torch that has Muon")
def test_the_page_is_the_table() -> None:
    assert PAGE.read_text() == page(), "run `python -m tests.optimizer_table --write docs/optimizers.md`"


@each
@pytest.mark.parametrize("kind", KINDS)
def test_with_gradients_of_zero_everything_is_finite(row: Row, kind: str) -> None:
    """Exactly zero, from the first step to the last."""
    leaves = leaves_for(row, kind)
    for flags in row.variants:
        run, outer, weights = linked(row, kind, flags, leaves, metaopt.record, silent=True, verify="never")
        assert all(torch.isfinite(w).all() for w in weights)
        wanted = [leaf for values in leaves.values() for leaf in values]
        assert all(torch.isfinite(g).all() for g in run.hypergradient(outer, wanted))


IMPLEMENTATIONS = [
    pytest.param(row, name, id=f"{row.name}-{name}") for row in ROWS.values() for name in row.implementations
]


@pytest.mark.parametrize(("row", "implementation"), IMPLEMENTATIONS)
def test_the_implementation_does_not_matter(row: Row, implementation: str) -> None:
    """The replay agrees with foreach and fused steps too."""
    for variant, flags in enumerate(row.variants):
        leaves, expected = hypergradients(row.name, "group", variant)
        options = {**flags, implementation: True}
        run, outer, _ = linked(row, "group", options, leaves, metaopt.record, verify="all")
        for name, values in leaves.items():
            for value, found in zip(expected[name], run.hypergradient(outer, values), strict=True):
                torch.testing.assert_close(found, value, rtol=1e-7, atol=1e-10)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_the_default_precision_is_single(row: Row, dtype: torch.dtype) -> None:
    """torch keeps scalars of the state in single precision then, whatever the weights' is."""
    with smooth():
        leaves, expected = hypergradients(row.name, "scalar", 0)
        torch.set_default_dtype(torch.float32)
        singles = {name: [value.detach().to(dtype).requires_grad_() for value in leaves[name]] for name in leaves}
        mode: Callable[..., Any] = metaopt.record if dtype == torch.float32 else metaopt.stream
        run, outer, _ = linked(row, "scalar", row.variants[0], singles, mode, verify="all", dtype=dtype)
        for name, values in singles.items():
            for value, found in zip(expected[name], run.hypergradient(outer, values), strict=True):
                assert found.dtype == dtype
                torch.testing.assert_close(found.double(), value, rtol=2e-2, atol=1e-4)


@each
def test_a_second_time_after_a_rewind(row: Row) -> None:
    leaves = leaves_for(row, "group")
    wanted = [leaf for values in leaves.values() for leaf in values]
    problem, options = Problem(row), group_arguments(row.rule, {**row.flat, **{n: v[0] for n, v in leaves.items()}})
    weights = problem.weights()
    optimizer = row.drop_in(weights, **options)
    found = []
    for _ in range(2):
        with metaopt.record(optimizer, verify="never") as run:
            for t in range(row.steps):
                optimizer.zero_grad()
                problem.loss(weights, t).backward()
                optimizer.step()
            row.finish(optimizer)
        found.append((problem.outer(weights), *run.hypergradient(problem.outer(weights), wanted[::2])))
        run.rewind()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@each
def test_a_group_that_is_added_later(row: Row) -> None:
    """A plain start, a second group, gradients that are kept as zeros, and one that is missing at a step."""

    def train(values: list[Any], mode: Callable[..., Any] | None) -> tuple[Any, Tensor]:
        problem = Problem(row)
        weights = problem.weights()
        first, second = ({**row.flat, **{n: row.numbers[n] for n in row.linked}, "weight_decay": v} for v in values)
        if "weight_decay" not in row.numbers:
            first, second = ({**row.numbers, "etaplus": v} for v in values)
        optimizer = row.drop_in([{"params": weights[:1]}], **group_arguments(row.rule, first))

        def step(t: int, missing: bool = False) -> None:
            optimizer.zero_grad(set_to_none=False)
            problem.loss(weights, t).backward()
            if missing:
                weights[0].grad = None
            optimizer.step()

        step(0)
        optimizer.add_param_group({"params": weights[1:], **group_arguments(row.rule, second)})
        with nullcontext() if mode is None else mode(optimizer, verify="all") as run:
            for t in range(1, 5):
                step(t, missing=t == 2)
            row.finish(optimizer)
        return run, problem.outer(weights)

    number = 1.2 if "weight_decay" not in row.numbers else 0.1
    leaves = [torch.tensor(number * f, requires_grad=True) for f in (1.0, 1.03)]
    with smooth():
        found = []
        for mode in (metaopt.record, metaopt.stream):
            run, outer = train(leaves, mode)
            found.append(run.hypergradient(outer, leaves))
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)

        def value(h: float) -> float:
            # What is before the context is a constant of the recording, so that only the second group moves here.
            return float(train([leaves[0].detach(), leaves[1].detach() + h], None)[1].detach())

        h = 1e-4
        slope = (8 * (value(h) - value(-h)) - value(2 * h) + value(-2 * h)) / (12 * h)
        assert float(found[0][1]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "name"),
    [pytest.param(row, name, id=f"{row.name}-{name}") for row in ROWS.values() for name in row.rule.flat],
)
def test_a_setting_without_a_derivative_is_an_error(row: Row, name: str) -> None:
    leaf = torch.tensor(row.numbers[name], requires_grad=True)
    weights = Problem(row).weights()
    arguments = group_arguments(row.rule, {**row.numbers, name: leaf})
    with pytest.raises(metaopt.DomainError, match=f"{name} of {row.name} can't be"):
        row.drop_in(weights, **arguments)
    optimizer: Any = row.bare(weights, **group_arguments(row.rule, row.numbers))
    optimizer.param_groups[0].update(arguments)
    with metaopt.record(optimizer), pytest.raises(metaopt.DomainError, match="can't be a hyperparameter"):
        Problem(row).loss(weights, 0).backward()
        optimizer.step()


@pytest.mark.parametrize("row", [row for row in ROWS.values() if not row.gradient], ids=lambda row: row.name)
def test_what_acts_through_a_sign_is_said(row: Row) -> None:
    """A penalty has derivative 0; the initial weights' scale, and the optimizer's own settings, have one."""
    assert row.rule.blind
    penalty, scale, lr = (torch.tensor(x, requires_grad=True) for x in (0.1, 1.1, 0.05))
    problem = Problem(row)
    weights = problem.weights()
    optimizer = row.drop_in(weights, lr=lr)
    warns = pytest.warns(metaopt.UnusedHyperparameterWarning, match="acts through the gradient")
    with warns as warned, metaopt.record(optimizer) as run:
        with torch.no_grad():
            weights[0].mul_(scale)
        for t in range(2):
            optimizer.zero_grad()
            (problem.loss(weights, t) + penalty * (weights[0] ** 2).sum()).backward()
            optimizer.step()
    assert len(warned) == 1
    grads = run.hypergradient(problem.outer(weights), [penalty, scale, lr])
    assert [bool(g != 0) for g in grads] == [False, True, True]


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_an_optimizer_that_can_have_no_rule_says_what_to_use(kind: Any) -> None:
    with pytest.raises(metaopt.RuleError, match=r"metaopt\.optim\."):
        metaopt.record(kind([torch.nn.Parameter(torch.ones(2))]))


def test_what_is_no_continuous_setting_is_an_error() -> None:
    weight, leaf = torch.nn.Parameter(torch.ones(2, 2)), torch.tensor(1e-8, requires_grad=True)

    class Renamed(metaopt.optim.DifferentiableOptimizer, torch.optim.SGD):
        def __init__(self, params: Any, lr: Any) -> None:
            super().__init__(params, **self._link(lr=lr, nesterov=leaf))

    with pytest.raises(metaopt.RuleError, match="nesterov of SGD can't be a hyperparameter"):
        Renamed([weight], 0.1)


def test_a_whole_t0_is_an_error() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = metaopt.optim.ASGD([weight], t0=torch.tensor(3.0, requires_grad=True))
    weight.grad = torch.ones(2)
    with metaopt.record(optimizer), pytest.raises(metaopt.DomainError, match=r"from 3\.5 say"):
        optimizer.step()


@pytest.mark.parametrize("name", ["ScheduleFreeSGD", "ScheduleFreeAdamW"])
def test_a_schedule_free_rate_of_zero_is_an_error(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = getattr(metaopt.optim, name)([weight], lr=torch.tensor(0.0, requires_grad=True))
    weight.grad = torch.ones(2)
    with metaopt.record(optimizer), pytest.raises(metaopt.DomainError, match="exactly 0"):
        optimizer.step()


# -- details of one optimizer ------------------------------------------------------------------------------------------


def test_a_linked_momentum_of_zero_in_rmsprop() -> None:
    """torch keeps no buffer then; the derivative from the right needs one, and the momentum may leave 0."""

    def train(momentum: Any, optim: Any, mode: Callable[..., Any] | None = None) -> tuple[Any, Tensor, Any]:
        problem = Problem(ROWS["RMSprop"])
        weights = problem.weights()
        optimizer = optim.RMSprop(weights, lr=0.05, eps=0.01, momentum=momentum)
        with nullcontext() if mode is None else mode(optimizer) as run:
            for t in range(4):
                optimizer.zero_grad()
                problem.loss(weights, t).backward()
                optimizer.step()
        return run, problem.outer(weights), optimizer

    leaf = torch.tensor(0.0, requires_grad=True)
    run, outer, optimizer = train(leaf, metaopt.optim, metaopt.record)
    assert torch.equal(outer, train(0.0, torch.optim)[1])
    (found,) = run.hypergradient(outer, leaf)
    f = [float(train(k * 1e-4, torch.optim)[1].detach()) for k in range(5)]
    slope = (-25 * f[0] + 48 * f[1] - 36 * f[2] + 16 * f[3] - 3 * f[4]) / 12e-4
    assert float(found) == pytest.approx(slope, rel=1e-5)
    with torch.no_grad():
        leaf.fill_(0.5)
    optimizer.step()


def test_an_accumulator_follows_its_hyperparameter_after_a_rewind() -> None:
    leaf = torch.tensor(0.1, requires_grad=True)
    problem = Problem(ROWS["Adagrad"])
    weights = problem.weights()
    optimizer = metaopt.optim.Adagrad(weights, initial_accumulator_value=leaf)
    sums = []
    for _ in range(2):
        with metaopt.record(optimizer) as run:
            optimizer.zero_grad()
            problem.loss(weights, 0).backward()
            optimizer.step()
        grad = weights[0].grad
        assert grad is not None
        sums.append(float((optimizer.state[weights[0]]["sum"] - grad**2).mean()))
        run.rewind()
        with torch.no_grad():
            leaf.fill_(0.4)
    assert sums == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize("name", ["ScheduleFreeSGD", "ScheduleFreeAdamW"])
def test_schedule_free_evaluation_comes_and_goes(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = getattr(metaopt.optim, name)([weight], lr=0.1)
    for t in range(3):
        weight.grad = torch.full((2,), 1.0 + t)
        optimizer.step()
    trained = weight.detach().clone()
    optimizer.eval()
    optimizer.eval()
    assert not torch.equal(weight, trained)
    with pytest.raises(RuntimeError, match="train"):
        optimizer.step()
    optimizer.train()
    optimizer.train()
    assert torch.equal(weight, trained)


@pytest.mark.skipif("Muon" not in ROWS, reason="this torch has no Muon")
def test_muon_replays_torchs_bfloat16() -> None:
    """The recorded values are torch's own, to the bit; the derivative exists all the same."""
    row = ROWS["Muon"]
    leaves = leaves_for(row, "scalar")
    run, outer, _ = linked(row, "scalar", {}, leaves, metaopt.record, verify="all")
    assert all(
        bool(g.isfinite()) and float(g) != 0 for g in run.hypergradient(outer, leaves["lr"] + leaves["momentum"])
    )
