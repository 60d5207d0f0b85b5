"""The closed forms that a best response must meet, and controls that must miss them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metaopt
from metaopt.stn import l2, train, transform
from tests.benchmarks import digits
from tests.stn_models import at
from tests.stored_data import stored_task

points = pytest.mark.parametrize(("point", "scale"), [(lam, s) for lam in (-1.0, 0.0, 3.0) for s in (0.1, 0.5, 1.0)])


class Ridge:
    """Linear regression with ``½ mean (x·w - y)² + ½ e^λ ‖w‖²``, and expectations over ε by Gauss and Hermite."""

    def __init__(self, point: float, scale: float, method: str, data: tuple[Tensor, Tensor] | None = None) -> None:
        self.x, self.y = data or (torch.randn(40, 8) @ torch.diag(torch.linspace(0.3, 2, 8)), torch.randn(40))
        self.gram, self.moment = self.x.T @ self.x / 40, self.x.T @ self.y / 40
        self.c, self.s, self.point = math.exp(point), scale, point
        self.layer = nn.Linear(8, 1, bias=False)
        hyper = metaopt.Hyperparameters(decay=metaopt.positive(self.c, scale=scale))
        self.tuned = transform(self.layer, hyper, method, standardize=False)
        nodes, weights = np.polynomial.hermite_e.hermegauss(21)
        self.nodes, self.weights = torch.tensor(nodes * scale), torch.tensor(weights / weights.sum())

    def set(self, w0: Tensor, slope: Tensor) -> None:
        """Weights and response: ``U = 1`` for the one row, so ``V`` is the slope."""
        with torch.no_grad():
            self.layer.weight.copy_(w0.reshape(1, -1))
            self.tuned.responses.weight.fill_(1.0)
            self.tuned.responses.bases[0].copy_(slope.reshape(1, -1))

    def gradients(self, *, weights: bool, origin: float = 0.0) -> list[Tensor]:
        """Of the expected training loss, by V and, in a joint step, by w0."""
        total = torch.zeros(())
        for node, share in zip(self.nodes, self.weights, strict=True):
            z = torch.full((40, 1), float(node) + origin)
            perturbation = at(self.tuned, z, response=True, weights=weights, linearised=self.tuned.method == "delta")
            perturbation.values = self.tuned.coordinates.values(torch.full((40, 1), float(node) + self.point))
            with self.tuned.perturbed(perturbation):
                fit = 0.5 * (self.tuned(self.x).squeeze(-1) - self.y).square().mean()
                total = total + share * (fit + 0.5 * l2(self.tuned, perturbation.values.decay))
        wanted = [self.tuned.responses.bases[0], *([self.layer.weight] if weights else [])]
        return list(torch.autograd.grad(total, wanted))


@points
def test_a1_the_linearised_response_of_ridge_is_the_closed_form(point: float, scale: float) -> None:
    ridge = Ridge(point, scale, "delta")
    eye, kappa = torch.eye(8), math.exp(scale**2 / 2)
    w0 = torch.linalg.solve(ridge.gram + ridge.c * eye, ridge.moment)
    slope = -torch.linalg.solve(ridge.gram + ridge.c * kappa * (1 + scale**2) * eye, ridge.c * kappa * w0)
    ridge.set(w0, slope)
    # The loss is a convex quadratic in Θ: where its gradient is zero, it is least.
    assert float(ridge.gradients(weights=False)[0].abs().max()) < 1e-10 * max(1.0, ridge.c)
    ridge.set(w0, 0.9 * slope)
    assert float(ridge.gradients(weights=False)[0].abs().max()) > 1e-5 * scale**2
    # The weights' own step has no bias: it never sees a perturbation.
    ridge.set(w0, slope)
    present = ridge.tuned.coordinates.present(40)
    perturbation = at(ridge.tuned, torch.zeros(40, 1), weights=True)
    perturbation.z, perturbation.values = None, present
    with ridge.tuned.perturbed(perturbation):
        fit = 0.5 * (ridge.tuned(ridge.x).squeeze(-1) - ridge.y).square().mean()
        loss = fit + 0.5 * l2(ridge.tuned, present.decay)
    assert float(torch.autograd.grad(loss, ridge.layer.weight)[0].abs().max()) < 1e-10 * max(1.0, ridge.c)


def joint_solution(ridge: Ridge) -> tuple[Tensor, ...]:
    """The ``w0`` and ``Θ`` at which the gradients of a joint step vanish."""
    eye, c, s, kappa = torch.eye(8), ridge.c, ridge.s, math.exp(ridge.s**2 / 2)
    g = ridge.gram
    top = torch.cat([g + c * kappa * eye, c * kappa * s**2 * eye], 1)
    bottom = torch.cat([c * kappa * s**2 * eye, s**2 * g + c * kappa * (s**2 + s**4) * eye], 1)
    return torch.linalg.solve(torch.cat([top, bottom]), torch.cat([ridge.moment, torch.zeros(8)])).split(8)


@points
def test_a1_a_joint_step_has_the_biased_solution_of_its_system(point: float, scale: float) -> None:
    ridge = Ridge(point, scale, "stn")
    w0, slope = joint_solution(ridge)
    # The uncentred response is Φ λ + φ0: at the present λ it must be w0.
    ridge.set(w0 - slope * point, slope)
    gradients = ridge.gradients(weights=True, origin=point)
    assert max(float(g.abs().max()) for g in gradients) < 1e-9 * max(1.0, ridge.c)
    unbiased = torch.linalg.solve(ridge.gram + ridge.c * torch.eye(8), ridge.moment)
    assert float((w0 - unbiased).norm() / unbiased.norm()) > 1e-4 * scale**2


@pytest.mark.parametrize(
    ("point", "scale", "bias"), [(3.0, 1.0, 18.65), (3.0, 0.5, 9.01), (-1.0, 1.0, 4.91), (-1.0, 0.5, 1.65)]
)
def test_a1_the_bias_of_a_joint_step_on_the_concrete_data(point: float, scale: float, bias: float) -> None:
    task = stored_task("concrete")
    given = (task.train[0].to(torch.get_default_device()), task.train[1].to(torch.get_default_device()))
    ridge = Ridge(point, scale, "stn", given)
    w0, slope = joint_solution(ridge)
    ridge.set(w0 - slope * point, slope)
    gradients = ridge.gradients(weights=True, origin=point)
    assert max(float(g.abs().max()) for g in gradients) < 1e-9 * max(1.0, ridge.c)
    unbiased = torch.linalg.solve(ridge.gram + ridge.c * torch.eye(8), ridge.moment)
    assert 100 * float((w0 - unbiased).norm() / unbiased.norm()) == pytest.approx(bias, abs=0.006)


def test_a2_centring_conditions_the_joint_problem() -> None:
    """Gradient descent at its best rate, on the quadratic of the joint loss by (w0, Θ)."""
    torch.manual_seed(1)
    x = torch.randn(40, 8)
    gram, c, s, lam = x.T @ x / 40, math.exp(3.0), 1.0, 3.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(21)

    def steps(origin: float) -> int:
        blocks = torch.zeros(2, 2, 8, 8)
        for node, share in zip(nodes * s, weights / weights.sum(), strict=True):
            inputs = torch.tensor([1.0, node + origin])
            blocks += share * torch.einsum("i,j,ab->ijab", inputs, inputs, gram + c * math.exp(node) * torch.eye(8))
        spectrum = torch.linalg.eigvalsh(blocks.permute(0, 2, 1, 3).reshape(16, 16))
        condition = float(spectrum[-1] / spectrum[0])
        return math.ceil(math.log(1e-4) / math.log((condition - 1) / (condition + 1)))

    assert steps(0.0) <= 100
    assert steps(lam) >= 1000


# -- trajectories on a problem with a known optimum


def regression(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(140, 6, generator=generator, device="cpu")
    truth = torch.randn(6, generator=generator, device="cpu")
    y = x @ truth + 2.5 * torch.randn(140, generator=generator, device="cpu")
    return x[:40], y[:40], x[40:], y[40:]


def optimum(x: Tensor, y: Tensor, xv: Tensor, yv: Tensor) -> float:
    gram, moment = x.T @ x / len(x), x.T @ y / len(x)
    grid = torch.linspace(-6, 4, 401)
    losses = [
        float((xv @ torch.linalg.solve(gram + lam.exp() * torch.eye(6), moment) - yv).square().mean()) for lam in grid
    ]
    return float(grid[int(np.argmin(losses))])


def follow(sabotage: Callable[[Any], None] | None = None, steps: int = 1500, start: float = 2.0) -> tuple[float, float]:
    """Run Δ-STN from ``start``, and return where λ ended, and the optimum."""
    x, y, xv, yv = regression()
    layer = nn.Linear(6, 1, bias=False)
    hyper = metaopt.Hyperparameters(decay=metaopt.positive(math.exp(start)))
    tuned = transform(layer, hyper)

    def train_loss(model: Any, batch: Any, values: Any) -> Tensor:
        fit = 0.5 * (model(batch[0]).squeeze(-1) - batch[1]).square().mean()
        return fit + 0.5 * l2(model, values.decay)

    def valid_loss(model: Any, batch: Any) -> Tensor:
        loss: Tensor = 0.5 * (model(batch[0]).squeeze(-1) - batch[1]).square().mean()
        return loss

    trail = []
    with train(
        tuned,
        train_loss,
        valid_loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
        hyper_optimizer=lambda p: torch.optim.RMSprop(p, lr=0.05),
        scale_optimizer=None,
        clip=1.0,
        seed=0,
    ) as tuner:
        if sabotage is not None:
            sabotage(tuner)
        for i in range(steps):
            tuner.train_step((x, y))
            if i >= 200 and i % 5 == 0:
                tuner.hyper_optimizer.param_groups[0]["lr"] = 0.05 * (1 - i / steps)
                tuner.valid_step((xv, yv))
            trail.append(hyper.get_leaf("decay").item())
    return sum(trail[-100:]) / 100, optimum(x, y, xv, yv)


def test_a7_the_trajectory_ends_at_the_optimum() -> None:
    found, best = follow()
    assert abs(found - best) <= 0.3


def test_a8_without_a_response_the_hyperparameter_never_moves() -> None:
    def freeze(tuner: Any) -> None:
        tuner.response_optimizer = torch.optim.SGD(tuner.response, lr=0.0)

    found, _ = follow(freeze, steps=300)
    assert found == pytest.approx(2.0, abs=1e-12)


@pytest.mark.slow
def test_a8_a_shuffled_perturbation_misses_the_optimum() -> None:
    def shuffle(tuner: Any) -> None:
        perturb = tuner._perturb

        def shuffled(examples: int, *point: Any) -> Any:
            z, *rest = perturb(examples, *point)
            return z[torch.randperm(examples)], *rest

        tuner._perturb = shuffled

    found, best = follow(shuffle)
    assert abs(found - best) > 0.3


@pytest.mark.slow
def test_a8_a_flipped_sign_runs_away() -> None:
    def flip(tuner: Any) -> None:
        active = tuner.tuned.responses.active
        tuner.tuned.responses.active = lambda z, frozen=False, weight=None: active(
            -z if frozen else z, frozen=frozen, weight=weight
        )

    found, best = follow(flip)
    assert found - best > 1.0


@pytest.mark.slow
def test_a12_tuned_dropout_beats_the_first_rates_and_keeps_up_with_random_search() -> None:
    def mean(method: str) -> float:
        return statistics.mean(digits.run_of(method, seed).best for seed in range(5))

    torch.set_default_dtype(torch.float32)
    fixed, random = mean("fixed"), mean("random")
    for method in ("stn", "centered", "delta"):
        found = mean(method)
        assert found <= 0.85 * fixed
        assert found <= 1.15 * random
