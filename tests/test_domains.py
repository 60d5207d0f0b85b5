"""Domains: values round-trip through their leaves, and what no leaf can represent is said aloud."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import constraints

import metaopt
from metaopt.errors import DomainError, MetaoptWarning
from metaopt.hyperparameters import (
    Constrained,
    Hyperparameters,
    Value,
    box,
    constrained,
    integer,
    interval,
    l1_box,
    nonnegative,
    positive,
    real,
    simplex,
)

pytestmark = pytest.mark.filterwarnings("error")

dtypes = st.sampled_from([torch.float32, torch.float64])


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def close(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-12


@settings(deadline=None)
@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=5), dtypes)
def test_positive_round_trips(values: list[float], dtype: torch.dtype) -> None:
    value = torch.tensor(values, dtype=dtype)
    torch.testing.assert_close(positive(value).value, value, rtol=close(dtype), atol=0)


@settings(deadline=None)
@given(
    st.sampled_from([(0.0, 1.0), (-3.0, 5.0), (0.0, 1e-6), (100.0, 101.0), (-1e6, 1e6)]),
    st.lists(st.floats(1e-4, 1 - 1e-4), min_size=1, max_size=5),
    dtypes,
)
def test_interval_round_trips(bounds: tuple[float, float], shares: list[float], dtype: torch.dtype) -> None:
    low, high = bounds
    value = (low + (high - low) * torch.tensor(shares)).to(dtype)
    spec = interval(value, low, high)
    # Absolute, to the rounding of the bounds: far from 0 floats are sparse.
    error = close(dtype) * max(abs(low), abs(high))
    torch.testing.assert_close(spec.value, value, rtol=0, atol=error)
    assert torch.isfinite(spec.leaf).all()


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6), dtypes)
def test_simplex_round_trips(weights: list[float], dtype: torch.dtype) -> None:
    value = torch.tensor(weights, dtype=dtype)
    value = value / value.sum()
    torch.testing.assert_close(simplex(value).value, value, rtol=close(dtype), atol=close(dtype))


@pytest.mark.parametrize("share", [1e-30, 1e-10, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6])
def test_unit_interval_keeps_small_float32_values(share: float) -> None:
    value = torch.tensor(share, dtype=torch.float32)
    torch.testing.assert_close(interval(value, 0, 1).value, value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-2.0, 6.0)])
def test_interval_moves_bounds_inside(low: float, high: float, dtype: torch.dtype) -> None:
    value = torch.tensor([low, (low + high) / 2, high], dtype=dtype)
    with pytest.warns(MetaoptWarning, match=r"2 of 3 .* inside.*use `box\(value") as caught:
        spec = interval(value, low, high)
    assert caught[0].filename == __file__
    moved = spec.value.double()
    margin = max(1.01e-3, 16 * torch.finfo(dtype).eps) * (high - low)
    assert low < moved[0] <= low + margin
    assert high - margin <= moved[2] < high
    leaf = spec.leaf.clone().requires_grad_()
    spec.domain.to_value(leaf).sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad > 0).all()


def test_interval_of_the_front_page() -> None:
    with pytest.warns(MetaoptWarning, match="5 of 5") as caught:
        hyper = Hyperparameters(lr=positive(0.1), example_weights=interval(torch.ones(5), 0, 1))
    assert caught[0].filename == __file__
    torch.testing.assert_close(hyper.example_weights, torch.full((5,), 0.999), rtol=1e-12, atol=0)
    with pytest.warns(MetaoptWarning, match="1 of 5") as caught:
        hyper.set(example_weights=[0.0, 0.1, 0.2, 0.3, 0.4])
    assert caught[0].filename == __file__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interval_moves_inside_what_rounds_to_a_bound(dtype: torch.dtype) -> None:
    value = 1 - torch.tensor(torch.finfo(dtype).eps / 2, dtype=dtype)
    assert value < 1
    with pytest.warns(MetaoptWarning, match="1 of 1"):
        interval(value, 0, 1)


def test_simplex_moves_zeros_inside() -> None:
    with pytest.warns(MetaoptWarning, match="entries of 0"):
        spec = simplex([[0.0, 1.0], [0.25, 0.75]])
    torch.testing.assert_close(spec.value, torch.tensor([[0.0005, 0.9995], [0.25, 0.75]]))


@pytest.mark.parametrize(
    ("factory", "cure"),
    [
        (lambda: positive(0.0), r"value > 0, got 0; .*use `box\(0\.0, 0, None\)`"),
        (lambda: positive([0.1, -1.0]), "entries from -1 to 0.1"),
        (lambda: nonnegative(-0.1), r"box\(0, inf\) .*; clip the value"),
        (lambda: interval(1.5, 0, 1), r"interval\(0, 1\) is defined for 0 <= value <= 1, got 1.5; clip"),
        (lambda: interval(1.0, 2, 1), "low < high"),
        (lambda: interval(1.0, 0, math.inf), "use `positive` or `box`"),
        (lambda: interval(torch.tensor(1e8, dtype=torch.float32), 1e8, 1e8 + 64), "use float64"),
        (lambda: simplex([0.5, 0.6]), "divide by the sum"),
        (lambda: simplex(1.0), "vectors"),
        (lambda: simplex([1.5, -0.5]), "entries >= 0"),
        (lambda: box(2.0, 0, 1), "clip the value"),
        (lambda: box(2.0, 1, 0), "swap"),
        (lambda: l1_box([0.5, 0.6], 1.0), "sum of 1.1; start from radius / n = 0.5"),
        (lambda: l1_box([0.5, 1.5], 3.0), "l1_box.*clip the value"),
        (lambda: l1_box([0.5, -0.1], 1.0, low=-1.0), "Use low=0"),
        (lambda: constrained(torch.eye(2) - 2, constraints.lower_cholesky), "outside"),
        (lambda: constrained(1.0, constraints.lower_cholesky), r"shape \(\), is outside"),
        (lambda: constrained(0.0, constraints.greater_than_eq(0.0)), "boundary"),
        (lambda: constrained(1.0, constraints.boolean), "no smooth transform"),
        (lambda: real(math.nan), "finite"),
        (lambda: real(torch.tensor(1j)), "complex"),
        (lambda: real("0.1"), "got str"),
    ],
)
def test_outside_its_domain_an_error_names_the_cure(factory: Callable[[], Constrained], cure: str) -> None:
    with pytest.raises(DomainError, match=cure):
        factory()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bound_rounded_to_the_dtype_is_inside(dtype: torch.dtype) -> None:
    assert box(torch.tensor(0.1, dtype=dtype), 0, 0.1).leaf.dtype == dtype
    assert l1_box(torch.full((5000,), 0.2, dtype=dtype), 1000.0).leaf.shape == (5000,)


@pytest.mark.parametrize(
    "constraint",
    [constraints.lower_cholesky, constraints.positive_definite, constraints.independent(constraints.real, 1)],
)
def test_constrained_takes_any_constraint_of_torch(constraint: constraints.Constraint) -> None:
    value = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(constrained(value, constraint).value, value)


def test_constrained_by_an_interval_is_the_careful_interval() -> None:
    with pytest.warns(MetaoptWarning, match="bound"):
        spec = constrained(1.0, constraints.unit_interval)
    assert str(spec.domain) == "interval(0, 1)"


@pytest.mark.parametrize("value", [1, 2.0, np.float64(3), np.int32(4), [1], np.array([1]), torch.tensor(1)])
def test_numbers_take_the_default_dtype(value: Value) -> None:
    torch.set_default_dtype(torch.float32)
    assert real(value).leaf.dtype == torch.float32


def test_a_value_is_copied() -> None:
    value = torch.ones(3, requires_grad=True)
    array = np.ones(3)
    array.setflags(write=False)
    spec = real(value)
    hyper = Hyperparameters(a=value, b=spec, c=array)
    with torch.no_grad():
        value.zero_()
    assert (spec.value == 1).all()
    assert all((entry == 1).all() for entry in hyper.values())
    assert all(entry.is_leaf for entry in hyper.values())
    assert hyper.c.dtype == torch.float64


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_gradients_agree_with_finite_differences(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(3, generator=generator) * 0.9 + 0.05
    specs = [positive(draw), interval(draw, 0, 1), interval(draw, -1, 2), simplex(draw / draw.sum())]
    for spec in specs:
        leaf = spec.leaf.clone().requires_grad_()
        assert torch.autograd.gradcheck(spec.domain.to_value, leaf)
        assert torch.autograd.gradgradcheck(spec.domain.to_value, leaf)


@given(st.integers(-5, 5), st.integers(1, 6), st.data(), dtypes)
def test_integer_round_trips_and_reaches_both_bounds(
    low: int, width: int, data: st.DataObject, dtype: torch.dtype
) -> None:
    high = low + width
    value = torch.tensor(data.draw(st.lists(st.integers(low, high), min_size=1, max_size=5)), dtype=dtype)
    spec = integer(value, low, high)
    assert torch.equal(spec.value, value)
    assert not spec.value.requires_grad
    ends = spec.domain.to_value(torch.tensor([-1e3, 1e3], dtype=dtype))
    assert ends.tolist() == [low, high]
    # Every number has the same share of the interval.
    shares = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = torch.bincount(spec.domain.to_value(torch.logit(shares)).long() - low)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("arguments", [(0.5, 0, 5), (6, 0, 5), (0, 3, 3)], ids=str)
def test_integer_refuses_what_is_not_whole_or_outside(arguments: tuple[float, int, int]) -> None:
    with pytest.raises(DomainError, match=r"integer\("):
        integer(*arguments)


def test_each_hyperparameter_has_a_scale() -> None:
    hyper = Hyperparameters(a=positive(1.0, scale=0.1), b=interval(0.5, 0, 1, scale=2), c=integer(1, 0, 5), d=0.0)
    assert hyper.scales == {"a": 0.1, "b": 2.0, "c": 0.5, "d": 0.5}
    assert str(hyper.domains["c"]) == "integer(0, 5)"
    del hyper.a
    assert "a" not in hyper.scales


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_is_positive_and_finite(scale: float) -> None:
    with pytest.raises(DomainError, match="perturbation scale"):
        positive(1.0, scale=scale)


def test_bounds_and_scales_are_numbers_and_values_dense() -> None:
    for make in (
        lambda: metaopt.interval(torch.rand(3), torch.zeros(3), torch.ones(3)),  # type: ignore[arg-type]
        lambda: metaopt.interval(0.5, None, 1),  # type: ignore[arg-type]
        lambda: metaopt.box(0.5, "low", 1),  # type: ignore[arg-type]
        lambda: metaopt.positive(0.5, scale=None),  # type: ignore[arg-type]
    ):
        with pytest.raises(metaopt.DomainError, match="one number for all entries"):
            make()
    with pytest.raises(metaopt.DomainError, match="to_dense"):
        metaopt.real(torch.eye(2).to_sparse())
