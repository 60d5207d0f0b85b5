"""The projections are Euclidean: feasible, idempotent, and at an obtuse angle to every feasible point."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from metaopt.errors import DomainError
from metaopt.hyperparameters import project_box, project_l1_box

pytestmark = pytest.mark.filterwarnings("error")

# Exact zeros, ties and the bounds are where a piecewise linear root goes wrong: draw them on purpose.
entries = st.one_of(st.sampled_from([0.0, 0.5, 1.0, -1.0]), st.floats(-3.0, 3.0, width=32))
Case = tuple[Tensor, float, float, float]
dtypes = st.sampled_from([torch.float32, torch.float64])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A point and the set {low <= x <= high, sum x <= radius}, never empty."""
    x = torch.tensor(draw(st.lists(entries, min_size=1, max_size=12)), dtype=draw(dtypes))
    low = draw(st.sampled_from([0.0, 0.0, 0.25]))
    high = draw(st.sampled_from([1.0, 1.0, 0.3, 2.5, math.inf]))
    radius = low * len(x) + draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 6.0)))
    return x, radius, low, high


def root(x: Tensor, radius: float, low: float, high: float) -> float:
    """The oracle's τ by bisection, in float64; 0 where the clipped point is in the set."""
    wide = x.double()
    if wide.clamp(low, high).sum() <= radius:
        return 0.0
    left, right = 0.0, float(wide.max()) - low
    for _ in range(60):
        middle = (left + right) / 2
        if (wide - middle).clamp(low, high).sum() > radius:
            left = middle
        else:
            right = middle
    return right


def bisect(x: Tensor, radius: float, low: float, high: float) -> Tensor:
    """The oracle, which leaves dust where the exact projection has zeros."""
    return (x.double() - root(x, radius, low, high)).clamp(low, high)


def rounding(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 1e-12


@settings(deadline=None)
@given(cases())
@example((torch.ones(3, dtype=torch.float64), 0.0, 0.0, 1.0))
@example((torch.full((5,), 0.2, dtype=torch.float32), 1.0, 0.0, 1.0))
def test_l1_box_is_feasible_idempotent_and_keeps_its_input(case: Case) -> None:
    x, radius, low, high = case
    before = x.clone()
    projected = project_l1_box(x, radius, low, high)
    assert torch.equal(x, before)
    assert projected.dtype == x.dtype
    assert projected.shape == x.shape
    assert (projected >= low).all()
    assert (projected <= high).all()
    assert projected.double().sum() <= radius * (1 + rounding(x.dtype)) + 1e-300
    assert torch.equal(project_l1_box(projected, radius, low, high), projected)


@settings(deadline=None)
@given(cases())
def test_l1_box_is_what_bisection_finds(case: Case) -> None:
    projected = project_l1_box(*case).double()
    torch.testing.assert_close(projected, bisect(*case), rtol=0, atol=10 * rounding(case[0].dtype))


@settings(deadline=None)
@given(cases(), st.data())
def test_l1_box_meets_the_variational_inequality(case: Case, data: st.DataObject) -> None:
    x, radius, low, high = case
    x = x.double()
    projected = project_l1_box(x, radius, low, high)
    other = torch.tensor(data.draw(st.lists(entries, min_size=len(x), max_size=len(x)))).double()
    feasible = bisect(other, radius, low, high)
    assert ((x - projected) @ (feasible - projected)).item() <= 1e-10


@settings(deadline=None)
@given(cases())
def test_l1_box_has_true_zeros(case: Case) -> None:
    x, _, low, high = case
    projected = project_l1_box(*case)
    threshold = root(*case)
    assert (projected[x.double() - threshold < low - 1e-9] == low).all()
    assert (projected[x.double() - threshold > high + 1e-9] == high).all()


def test_l1_box_drops_the_small_to_exact_zero() -> None:
    x = torch.tensor([0.9, 0.8, 0.1, -0.2], dtype=torch.float64)
    expected = torch.tensor([0.55, 0.45, 0.0, 0.0], dtype=torch.float64)
    projected = project_l1_box(x, 1.0)
    torch.testing.assert_close(projected, expected, rtol=0, atol=1e-15)
    assert (projected[2:] == 0).all()


@pytest.mark.parametrize("offset", [1e6, 1e9])
def test_l1_box_meets_the_sum_far_from_the_set(offset: float) -> None:
    x = offset + torch.tensor([0.3, 0.1, 0.2, -5.0], dtype=torch.float64)
    projected = project_l1_box(x, 0.5, 0.0, math.inf)
    assert projected.sum().item() == pytest.approx(0.5, rel=1e-14)
    assert projected[3] == 0
    assert torch.equal(project_l1_box(projected, 0.5, 0.0, math.inf), projected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l1_box_of_the_size_of_hyper_cleaning(dtype: torch.dtype) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.1 + 0.2
    projected = project_l1_box(x, 600.0)
    assert projected.double().sum().item() == pytest.approx(600.0, rel=rounding(dtype))
    assert (projected == 0).any()
    assert (projected > 0).any()
    assert torch.equal(project_l1_box(projected, 600.0), projected)
    # The arithmetic is float64 whatever the dtype.
    assert torch.equal(project_l1_box(x.double(), 600.0).to(dtype), projected)


def test_l1_box_shares_one_radius_among_all_dimensions() -> None:
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    projected = project_l1_box(x, 2.0)
    assert projected.shape == (3, 4)
    assert not projected.requires_grad
    assert torch.equal(projected.flatten(), project_l1_box(x.flatten(), 2.0))


def test_l1_box_keeps_what_meets_the_sum_to_rounding() -> None:
    x = torch.full((3,), 0.1, dtype=torch.float64)
    assert x.sum() > 0.3
    assert torch.equal(project_l1_box(x, 0.3), x)


def test_l1_box_of_nothing_is_nothing() -> None:
    assert project_l1_box(torch.empty(0), 1.0).shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_l1_box_of_what_is_not_finite_is_nan(bad: float) -> None:
    assert project_l1_box(torch.tensor([bad, 0.1], requires_grad=True), 1.0).isnan().all()


@pytest.mark.parametrize(
    ("radius", "low", "high", "cure"),
    [
        (1.0, -0.1, 1.0, "Use low=0"),
        (-1.0, 0.0, 1.0, "raise the radius"),
        (0.3, 0.2, 1.0, "radius >= 0.4"),
        (math.inf, 0.0, 1.0, "use `box`"),
        (math.nan, 0.0, 1.0, "finite radius"),
        (1.0, 0.5, 0.2, "low <= high"),
        (1.0, 0.0, math.nan, "low <= high"),
    ],
)
def test_l1_box_refuses_sets_that_are_none(radius: float, low: float, high: float, cure: str) -> None:
    with pytest.raises(DomainError, match=cure):
        project_l1_box(torch.ones(2), radius, low, high)


@settings(deadline=None)
@given(st.lists(entries, max_size=8), dtypes)
def test_box_clips(values: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(values, dtype=dtype)
    projected = project_box(x, -0.5, 1.0)
    assert projected.tolist() == [min(max(value, -0.5), 1.0) for value in x.tolist()]
    assert torch.equal(project_box(projected, -0.5, 1.0), projected)
    assert torch.equal(project_box(x), x)


def test_box_refuses_the_empty_box() -> None:
    with pytest.raises(DomainError, match="swap or widen"):
        project_box(torch.ones(1), 1.0, 0.0)
