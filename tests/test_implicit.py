"""The hypergradient at a stationary point, from the last step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from tests.cases import data
from tests.strategies import randn


def ridge() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = randn(0, 20, 4), randn(1, 20)
    return x, y, randn(2, 10, 4), randn(3, 10)


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda w: metaopt.optim.SGD(w, lr=0.1),
    "momentum": lambda w: metaopt.optim.SGD(w, lr=0.1, momentum=0.7),
    "nesterov": lambda w: metaopt.optim.SGD(w, lr=0.1, momentum=0.5, nesterov=True),
    "RMSprop": lambda w: metaopt.optim.RMSprop(w, lr=0.05, eps=1.0),
    "wrapped": lambda w: metaopt.wrap(torch.optim.SGD(w, lr=0.1, momentum=0.5)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ridge_regression_in_closed_form(name: str) -> None:
    """``w* = (XᵀX/n + 2λI)⁻¹ Xᵀy/n``, whatever the optimizer that finds it."""
    x, y, x_val, y_val = ridge()
    decay = torch.tensor(0.2, requires_grad=True)

    def solution(decay: Tensor) -> Tensor:
        return torch.linalg.solve(x.T @ x / 20 + decay * torch.eye(4), x.T @ y / 20)

    weight = nn.Parameter(torch.zeros(4))
    optimizer = OPTIMIZERS[name]([weight])
    with metaopt.implicit(optimizer, tolerance=1e-12, iterations=20_000) as run:
        for _ in range(800):
            optimizer.zero_grad()
            (((x @ weight - y) ** 2).mean() / 2 + decay / 2 * weight.square().sum()).backward()
            optimizer.step()
    run.backward(((x_val @ weight - y_val) ** 2).mean() + decay**2)
    expected = torch.autograd.grad(((x_val @ solution(decay) - y_val) ** 2).mean() + decay**2, decay)[0]
    torch.testing.assert_close(weight.detach(), solution(decay).detach(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(decay.grad, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("how", ["in_place", "anew"])
def test_a_tensor_that_is_handed_on(how: str) -> None:
    """An average of the weights that the loss reads: in place it is state, made anew it was taken for a constant."""
    x, y, x_val, y_val = ridge()
    decay = torch.tensor(0.2, requires_grad=True)
    weight = nn.Parameter(torch.zeros(4))
    optimizer = metaopt.optim.SGD([weight], lr=0.1)
    mean = torch.zeros(4)
    with metaopt.implicit(optimizer, tolerance=1e-12, iterations=20_000) as run:
        for _ in range(800):
            optimizer.zero_grad()
            fit = ((x @ weight - y) ** 2).mean() / 2 + decay / 2 * weight.square().sum()
            (fit + 0.1 * (weight * mean).sum()).backward()
            optimizer.step()
            new = 0.5 * mean + 0.5 * weight.detach()
            mean = mean.copy_(new) if how == "in_place" else new

    def outer() -> Tensor:
        return ((x_val @ weight - y_val) ** 2).mean()

    if how == "anew":
        with pytest.raises(metaopt.SweepError, match="Write it in place"):
            run.backward(outer)
        return
    run.backward(outer)
    solution = torch.linalg.solve(x.T @ x / 20 + (decay + 0.1) * torch.eye(4), x.T @ y / 20)
    expected = torch.autograd.grad(((x_val @ solution - y_val) ** 2).mean(), decay)[0]
    torch.testing.assert_close(decay.grad, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("order", [1, -1], ids=["in_order", "reversed"])
def test_two_optimizers(order: int) -> None:
    x, y, x_val, y_val = ridge()
    decay = torch.tensor(0.2, requires_grad=True)
    parts: list[Tensor] = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizers: list[torch.optim.Optimizer]
    optimizers = [metaopt.optim.SGD([parts[0]], lr=0.1, momentum=0.5), torch.optim.SGD([parts[1]], lr=0.1)]
    with metaopt.implicit(optimizers[::order], tolerance=1e-12, iterations=20_000) as run:
        for _ in range(800):
            weight = torch.cat(parts)
            for optimizer in optimizers:
                optimizer.zero_grad()
            (((x @ weight - y) ** 2).mean() / 2 + decay / 2 * weight.square().sum()).backward()
            for optimizer in optimizers:
                optimizer.step()
    outer = ((x_val @ torch.cat(parts) - y_val) ** 2).mean()
    if order < 0:
        with pytest.raises(metaopt.SweepError, match="in the order in which they step"):
            run.backward(outer)
        return
    run.backward(outer)
    solution = torch.linalg.solve(x.T @ x / 20 + decay * torch.eye(4), x.T @ y / 20)
    expected = torch.autograd.grad(((x_val @ solution - y_val) ** 2).mean(), decay)[0]
    torch.testing.assert_close(decay.grad, expected, rtol=1e-7, atol=0)


def test_the_optimizers_of_torchopt_and_higher() -> None:
    """The same, with the step of another library as Φ."""
    torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed (extra: torchopt)")
    higher = pytest.importorskip("higher", reason="higher is not installed (extra: higher)")
    from metaopt.integrations import higher as of_higher
    from metaopt.integrations import torchopt as of_torchopt

    x, y, x_val, y_val = ridge()
    decay = torch.tensor(0.2, requires_grad=True)

    def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        with metaopt.implicit(optimizer, tolerance=1e-12, iterations=20_000) as run:
            for _ in range(800):
                optimizer.zero_grad()
                penalty = sum(w.square().sum() for w in model.parameters())
                (((model(x)[:, 0] - y) ** 2).mean() / 2 + decay / 2 * penalty).backward()
                optimizer.step()
        found: Tensor = run.hypergradient(((model(x_val)[:, 0] - y_val) ** 2).mean(), wrt=decay)[0]
        return found

    expected = torch.autograd.grad(
        ((x_val @ torch.linalg.solve(x.T @ x / 20 + decay * torch.eye(4), x.T @ y / 20) - y_val) ** 2).mean(), decay
    )[0]
    model = nn.Linear(4, 1, bias=False)
    found = trained(model, of_torchopt.optimizer(model.parameters(), torchopt.sgd(lr=0.1, momentum=0.5)))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    model = nn.Linear(4, 1, bias=False)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (patched, diffopt):
        found = trained(patched, of_higher.optimizer(diffopt))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


def test_reverse_mode_tends_to_it() -> None:
    """On a contraction, record -> implicit as T -> ∞."""
    x, y, x_val, y_val = data()
    gaps = []
    for steps in (3, 20, 320):
        found = []
        for mode in (metaopt.record, metaopt.implicit):
            torch.manual_seed(0)
            model = nn.Linear(5, 3)
            weights = torch.ones(12, requires_grad=True)
            optimizer = metaopt.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
            with mode(optimizer) as run:
                for _ in range(steps):
                    optimizer.zero_grad()
                    penalty = sum(p.square().sum() for p in model.parameters())
                    ((weights * F.cross_entropy(model(x), y, reduction="none")).mean() + 0.1 * penalty).backward()
                    optimizer.step()
            if mode is metaopt.implicit and steps == 3:
                with pytest.warns(metaopt.MetaoptWarning, match="has not converged"):
                    found.append(run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=weights)[0])
            else:
                found.append(run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=weights)[0])
        gaps.append(float((found[0] - found[1]).norm() / found[1].norm()))
    assert gaps[0] > 10 * gaps[1]
    assert gaps[2] < 1e-5


def quadratic(curvature: float, lr: float, steps: int = 3, **options: Any) -> tuple[metaopt.Implicit, Tensor, Tensor]:
    weight = nn.Parameter(torch.ones(1))
    target = torch.tensor(1.0, requires_grad=True)
    optimizer = metaopt.optim.SGD([weight], lr=lr)
    with metaopt.implicit(optimizer, **options) as run:
        for _ in range(steps):
            optimizer.zero_grad()
            (curvature / 2 * (weight - target) ** 2).sum().backward()
            optimizer.step()
    return run, target, weight


def test_what_is_no_contraction_is_an_error() -> None:
    run, target, weight = quadratic(-1.0, 0.5)
    with pytest.raises(metaopt.SweepError, match=r"grows.*1\.5 times.*no contraction"):
        run.hypergradient(weight.sum(), wrt=target)


def test_a_slow_series_says_how_to_go_on() -> None:
    run, target, weight = quadratic(1.0, 1e-4, iterations=50)
    with pytest.raises(metaopt.SweepError, match=r"not converged after 50 terms.*0\.9999"):
        run.hypergradient(weight.sum(), wrt=target)
    run, target, weight = quadratic(1.0, 0.5, iterations=3, tolerance=None)
    (found,) = run.hypergradient(weight.sum(), wrt=target)
    assert found == pytest.approx(0.5 * (1 + 0.5 + 0.25))


def test_bad_options_and_initial_weights() -> None:
    run, _, weight = quadratic(1.0, 0.5)
    with pytest.raises(metaopt.SweepError, match="does not depend on the initial weights"):
        run.hypergradient(weight.sum(), wrt=weight)
    optimizer = metaopt.optim.SGD([weight], lr=0.1)
    with pytest.raises(ValueError, match="iterations"):
        metaopt.implicit(optimizer, iterations=0)
    with pytest.raises(ValueError, match="tolerance"):
        metaopt.implicit(optimizer, tolerance=0.0)


@pytest.mark.parametrize("watched", [1, 2, 3])
def test_an_average_that_the_loop_keeps(watched: int) -> None:
    """It is state once two iterations have written it; before that the last step can't say how it goes on."""
    penalty, weight, average = torch.tensor(0.5, requires_grad=True), nn.Parameter(torch.tensor([2.0])), torch.zeros(1)
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            ((weight - 1) ** 2 + penalty * weight**2).sum().backward(inputs=[weight])
            optimizer.step()
            with torch.no_grad():
                average.lerp_(weight, 0.1)

    train(500)
    with metaopt.implicit(optimizer, tolerance=1e-12) as run:
        train(watched)
        outer = (average**2).sum()
    if watched < 3:
        with pytest.raises(metaopt.SweepError, match="at least 3 iterations"):
            run.backward(outer)
    else:
        run.backward(outer)
        assert penalty.grad == pytest.approx(-2 / 1.5**3)
