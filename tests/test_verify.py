"""What the comparison of a replay with the loop lets pass, and what it does not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import metaopt
from metaopt.capture.segment import Segment
from metaopt.capture.verify import _difference


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_is_relative_whatever_the_size(size: float, dtype: torch.dtype) -> None:
    """It was not: of large tensors in single precision, a percent passed for rounding."""
    tensor = size * torch.randn(100, dtype=dtype)
    assert _difference(1.01 * tensor, tensor) == pytest.approx(0.01, rel=0.02)
    assert _difference(tensor * (1 + torch.finfo(dtype).eps), tensor) == 0.0


def test_what_is_not_finite_agrees_with_itself_alone() -> None:
    tensor = torch.tensor([1.0, torch.inf, torch.nan])
    assert _difference(tensor.clone(), tensor) == 0.0
    assert _difference(torch.tensor([2.0, torch.inf, torch.nan]), tensor) == pytest.approx(0.5)  # an infinity hid it
    assert _difference(torch.ones(2), tensor) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_an_infinity_that_the_replay_does_not_have_is_a_difference(dtype: torch.dtype) -> None:
    """The norms of both were infinite, and so anything beside it passed."""
    tensor = torch.tensor([torch.inf, 2.0], dtype=dtype)
    assert _difference(torch.tensor([1.0, 2.0], dtype=dtype), tensor) == float("inf")


@pytest.mark.parametrize(("size", "dtype"), [(1e30, torch.float32), (3000.0, torch.float16), (1e-9, torch.float32)])
def test_what_has_no_norm_in_its_own_precision_is_compared(size: float, dtype: torch.dtype) -> None:
    """Its squares are infinite, or the difference's are zero."""
    tensor = torch.full((1000,), size, dtype=dtype)
    assert _difference(-tensor, tensor) > 1.0
    assert _difference(tensor * (1 + 2 * torch.finfo(dtype).eps), tensor) < 1e-2


@pytest.mark.parametrize("steps", [1, 3])
def test_each_run_replays_one_step_of_a_structure_that_an_earlier_run_has_checked(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed: list[int] = []
    values = Segment.values

    def counted(self: Segment, keys: Sequence[int], **given: Any) -> list[torch.Tensor]:
        replayed.append(1)
        return values(self, keys, **given)

    monkeypatch.setattr(Segment, "values", counted)
    monkeypatch.setattr("metaopt.capture.program._known", OrderedDict())

    def train(steps: int) -> int:
        replayed.clear()
        model = torch.nn.Linear(3, 5)
        optimizer = torch.optim.Adam(model.parameters())
        with metaopt.record(optimizer):
            for _ in range(steps):
                optimizer.zero_grad()
                model(torch.ones(7, 3)).square().sum().backward()
                optimizer.step()
        return len(replayed)

    assert train(2) == 2
    assert train(steps) == 1  # a single step waits for no other, and is looked at as the context ends


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
@pytest.mark.parametrize("clamped", [False, True])
def test_a_single_step_of_a_known_structure_is_looked_at(mode: Any, clamped: bool) -> None:
    """What the loop writes after it is something else."""
    counted = [1.0, 0.0]

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.scale = counted[0]
            counted[0] += counted[1]
            return x * ctx.scale

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * ctx.scale

    def train(steps: int) -> None:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 5)
        optimizer = torch.optim.Adam(model.parameters())
        with mode(optimizer):
            for _ in range(steps):
                optimizer.zero_grad()
                Scaled.apply(model(torch.ones(7, 3))).square().sum().backward()
                optimizer.step()
            if clamped:
                model.weight.data.clamp_(-0.1, 0.1)

    train(2)
    train(1)
    counted[1] = 0.5
    with pytest.raises(metaopt.CaptureError, match="replaying step 1"):
        train(1)


def _with_another_last_digit(segment: Segment, values: Any, keys: Sequence[int], given: Any) -> list[torch.Tensor]:
    return values(segment.nudged(3), keys, **given)


def _not_quite_zero(segment: Segment, values: Any, keys: Sequence[int], given: Any) -> list[torch.Tensor]:
    return [value + 1e-18 for value in values(segment, keys, **given)]


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
@pytest.mark.parametrize("kernels", [_with_another_last_digit, _not_quite_zero])
def test_what_is_rounding_alone_is_no_other_value(mode: Any, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of what a batch norm gave, and the moments of gradients that are zero."""
    monkeypatch.setattr("metaopt.capture.program._known", OrderedDict())
    values = Segment.values
    monkeypatch.setattr(Segment, "values", lambda self, keys, **given: kernels(self, values, keys, given))
    torch.manual_seed(0)
    query, norm, twice = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), norm, twice)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])

    def loss() -> torch.Tensor:
        attention = (query(x)[:, :, None]).softmax(-1)[..., 0]
        return torch.nn.functional.cross_entropy(attention * model(x), y)

    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = metaopt.optim.Adam([*model.parameters(), *query.parameters()], lr=lr, eps=1e-3)
    with mode(optimizer) as run:
        for _ in range(2):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    (found,) = run.hypergradient(loss(), [lr])
    assert found.isfinite()


def test_what_can_not_be_asked_in_double_precision_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """torch's graphs print an error of theirs, which here is nobody's: nothing is concluded from it."""
    model = torch.nn.Linear(3, 2, dtype=torch.float32)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    with metaopt.record(optimizer):
        hidden = model(torch.ones(4, 3, dtype=torch.float32))
        rows = hidden.cumsum(0, dtype=torch.float32)
        rows[torch.tensor([0, 2])] = hidden[:2].clone()
        rows.square().sum().backward()
        optimizer.step()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_an_optimizer_keeps_of_a_gradient_that_is_all_rounding_may_differ(dtype: torch.dtype) -> None:
    """The key's bias has derivative 0, and the replay's attention rounds otherwise; the loop was refused."""
    torch.manual_seed(0)
    query, key, value = (torch.nn.Linear(8, 8, dtype=dtype) for _ in range(3))
    x, lr = torch.randn(2, 2, 6, 8, dtype=dtype), torch.tensor(0.01, requires_grad=True)
    optimizer = metaopt.optim.Adam([w for layer in (query, key, value) for w in layer.parameters()], lr=lr)
    with metaopt.record(optimizer) as run:
        for _ in range(2):
            optimizer.zero_grad()
            torch.nn.functional.scaled_dot_product_attention(query(x), key(x), value(x)).square().sum().backward()
            optimizer.step()
    (slope,) = run.hypergradient(lambda: value(x).square().sum(), [lr])
    assert bool(slope.isfinite())
