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
import metaopt.rules.muon
from metaopt.links import assign
from tests.optimizer_table import KINDS, PAGE, REFUSED, ROWS, Row, group_arguments, page
from tests.strategies import randn

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
    """Muon's iteration in float64, in torch's step and in the rule."""
    import torch.optim._muon as muon

    original = muon._zeropower_via_newtonschulz
    patch = pytest.MonkeyPatch()

    def wide(grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
        return metaopt.rules.muon.orthogonal(grad, coefficients, steps, eps)

    patch.setattr(muon, "_zeropower_via_newtonschulz", wide)
    patch.setattr(metaopt.rules.muon, "LOOP_PRECISION", torch.float64)
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

    def weights(self) -> list[torch.nn.Parameter]:
        shapes = [(3, 4), (4, 2)] if self.row.matrices else [(3, 4), (4, 2), (4,), ()]
        scales = (0.7, 0.7, 0.1, 0.5)
        return [torch.nn.Parameter(s * randn(i, *shape)) for i, (s, shape) in enumerate(zip(scales, shapes, strict=False))]

    def loss(self, weights: list[Any], step: int) -> Tensor:
        x, y = randn(10, 6, 3), randn(11, 6, 2)
        first, second, *rest = weights
        hidden = torch.tanh(x @ first + (rest[0] if rest else 0.0))
        out = hidden @ second * (rest[1] if rest else 1.0)
        wave = (1.0, 1.5, -0.7, 2.5, 1.2, 0.8, 2.0)[step % 7]
        return wave * ((out - y) ** 2).mean() * (not self.silent)

    def outer(self, weights: list[Any]) -> Tensor:
        return ((torch.tanh(randn(12, 5, 3) @ weights[0]) @ weights[1] - 1) ** 2).mean() + sum(
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
    for name, number in row.numbers.items():
        base = torch.tensor(number)
        if kind == "step":
            result[name] = [base * (1 - 0.02 * torch.arange(row.steps))]
        else:
            result[name] = [base * (1 - 0.03 * place) for place in range(count)]
        if name == "d":  # at least 1
            result[name] = [value.clamp(min=1.01) + 0.001 * place for place, value in enumerate(result[name])]
    return {name: [value.clone().requires_grad_() for value in values] for name, values in result.items()}


def at(value: Tensor, step: int) -> Tensor:
    return value[step] if value.dim() else value


def bare(row: Row, kind: str, flags: Mapping[str, Any], values: Mapping[str, list[Tensor]], **options: Any) -> tuple[Any, Any]:
    """The loop with the plain class and plain numbers: nothing of metaopt is there."""
    problem = Problem(row, **options)
    weights = problem.weights()
    groups: list[dict[str, Any]] = []
    for place, members in enumerate(groups_of(kind, weights)):
        numbers = {name: float(at(value[place], 0).detach()) for name, value in values.items()}
        groups.append({"params": members, **group_arguments(row.rule, numbers)})
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
    **options: Any,
) -> tuple[Any, Any, Any]:
    """The loop as a user writes it, in a context."""
    problem = Problem(row, silent=silent)
    weights = problem.weights()
    flat = {name: row.numbers[name] for name in row.rule.flat}
    groups: list[dict[str, Any]] = []
    for place, members in enumerate(groups_of(kind, weights)):
        groups.append({"params": members, **group_arguments(row.rule, {**{n: v[place] for n, v in leaves.items()}, **flat})})
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
    """All settings at once: reverse mode's numbers, after they were compared with forward mode's and with the training."""
    row = ROWS[name]
    flags = row.variants[variant]
    found: list[dict[str, list[Tensor]]] = []
    leaves = leaves_for(row, kind)
    hyper = {key: leaves[key] for key in row.linked}
    wanted = [leaf for values in hyper.values() for leaf in values]
    for mode, options in ((metaopt.record, {"verify": "all"}), (metaopt.stream, {"verify": "never"})):
        run, outer, weights = linked(row, kind, flags, hyper, mode, **options)
        grads = iter(run.hypergradient(outer, wanted))
        found.append({key: [next(grads) for _ in values] for key, values in hyper.items()})
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

            slopes = [
                (8 * (value(h) - value(-h)) - value(2 * h) + value(-2 * h)) / (12 * h) for h in (1e-4, 2e-4)
            ]
            found = sum(float((g * d).sum()) for g, d in zip(grads[name], directions, strict=True))
            assert slopes[0] != 0, "the setting makes no difference here, so nothing was tested"
            assert slopes[0] == pytest.approx(slopes[1], rel=1e-5, abs=1e-9), flags
            assert found == pytest.approx(slopes[0], rel=1e-5, abs=1e-9), flags
