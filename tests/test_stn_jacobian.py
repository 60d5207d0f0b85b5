"""What a response learns, beside response Jacobians that are written out: A3 and A10 of the specification."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import metaopt
from metaopt.stn import diagnose, l2, train, transform
from metaopt.stn.responses import Responses
from tests.small_network import SmallNetwork, minimise, relative
from tests.stn_models import at
from tests.stored_data import stored_task

SCALE, POINT = 0.1, -2.5
LAYERS = [["0.weight", "0.bias"], ["2.weight", "2.bias"]]


@pytest.fixture(autouse=True)
def _cpu() -> Any:
    """Matrices of a hundred rows: the CPU is where they belong, whatever --device says."""
    with torch.device("cpu"):
        yield


def examples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(count, 13, generator=generator)
    y = torch.tanh(x @ torch.randn(13, 3, generator=generator) / 2).sum(1) + 0.3 * torch.randn(
        count, generator=generator
    )
    return x, y


@cache
def network() -> SmallNetwork:
    return SmallNetwork(*examples(80), LAYERS, POINT)


def learnt(net: SmallNetwork, method: str) -> Tensor:
    """The Θ that minimises the expected training loss, over a grid of Gauss and Hermite instead of draws."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    grid = torch.cartesian_prod(torch.tensor(nodes), torch.tensor(nodes))
    share = torch.cartesian_prod(torch.tensor(weights), torch.tensor(weights)).prod(1)
    n = len(net.x)
    batch = net.x.repeat(len(grid), 1), net.y.repeat(len(grid))
    z, mass = grid.repeat_interleave(n, 0), (share / share.sum() / n).repeat_interleave(n)
    values = {name: metaopt.positive(float(net.point[0].exp()), scale=SCALE) for name in ("first", "second")}
    # With as many banks as hyperparameters nothing is imposed on the response.
    tuned = transform(net.module, metaopt.Hyperparameters(**values), method, banks=2)

    def loss() -> Tensor:
        point = at(tuned, z, response=True, linearised=method == "delta")
        point.values = tuned.coordinates.values(net.point + SCALE * z)
        with tuned.perturbed(point):
            total = 0.5 * (mass * (tuned(batch[0]).squeeze(-1) - batch[1]).square()).sum()
            for name, group in zip(values, net.groups, strict=True):
                # `l2` is a mean over the rows, whose weights differ.
                total = total + 0.5 * l2(tuned, point.values[name] * mass * len(z), names=group)
        return total

    # Bank k follows hyperparameter k, so that its V is that column of Θ: the loss of Δ-STN is then a quadratic in what
    # is fitted, which is V and the vectors' rows of U.
    responses, free = tuned.responses, torch.zeros_like(tuned.responses.weight)
    with torch.no_grad():
        for entry in responses.entries:
            rows = responses.weight[:, entry.start : entry.stop]
            if entry.structure.axis is None:
                free[:, entry.start : entry.stop] = 1
            else:
                rows.copy_(torch.eye(2).repeat_interleave(entry.structure.rows, 1))
        for base in responses.bases:
            base.zero_()
    responses.weight.register_hook(lambda gradient: gradient * free)
    minimise(loss, list(responses.parameters()), 300)
    jacobian = tuned.responses.jacobian(tuned.reference)
    return torch.cat([jacobian[name].flatten(1) for name in net.shapes], 1).detach()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "gauss_newton", "bound"), [("delta", True, 0.01), ("centered", False, 0.05)])
def test_a3_a_response_tends_to_its_jacobian(method: str, gauss_newton: bool, bound: float) -> None:
    net = network()
    found = learnt(net, method)
    assert relative(found, net.response(gauss_newton=gauss_newton)) <= bound
    # The two Jacobians differ, and neither method learns the other's.
    assert relative(found, net.response(gauss_newton=not gauss_newton)) >= 0.3


def test_a3_the_implicit_hypergradient_is_that_of_retraining() -> None:
    net, (x, y) = network(), examples(200)
    x, y = x[80:], y[80:]

    def valid(weights: Tensor) -> Tensor:
        return 0.5 * (net.outputs(weights, x) - y).square().mean()

    step, differences = 1e-4, []
    for unit in torch.eye(2):
        ends = [valid(net.retrained(net.point + sign * step * unit, net.weights)) for sign in (1, -1)]
        differences.append((ends[0] - ends[1]) / (2 * step))
    expected = torch.stack(differences)
    explicit = net.response(gauss_newton=False) @ torch.func.grad(valid)(net.weights)
    assert relative(explicit, expected) <= 1e-3
    # The diagnosis is the same, by conjugate gradients; the Gauss-Newton one is another.
    tuned = transform(net.module, metaopt.Hyperparameters(first=metaopt.positive(1.0), second=metaopt.positive(1.0)))
    with torch.no_grad():
        for name in ("first", "second"):
            tuned.hyper.get_leaf(name).fill_(POINT)

    def train_loss(model: Any, batch: Any, values: Any) -> Tensor:
        penalty = sum(
            0.5 * values[name].mean() * sum(net.module.get_parameter(n).square().sum() for n in group)
            for name, group in zip(("first", "second"), LAYERS, strict=True)
        )
        return 0.5 * (model(batch[0]).squeeze(-1) - batch[1]).square().mean() + penalty

    def valid_loss(model: Any, batch: Any) -> Tensor:
        loss: Tensor = 0.5 * (model(batch[0]).squeeze(-1) - batch[1]).square().mean()
        return loss

    with train(tuned, train_loss, valid_loss) as tuner:
        found = diagnose(tuner, (net.x, net.y), (x, y), damping=0.0, steps=2000, tolerance=1e-10)
    assert relative(found.implicit, expected) <= 1e-3
    other = net.response(gauss_newton=True) @ torch.func.grad(valid)(net.weights)
    assert relative(other, expected) >= 0.05


def best_fit(net: SmallNetwork, target: Tensor, banks: int) -> float:
    """The least relative error of a response with so many banks, in the metric of the Gauss-Newton matrix."""
    responses = Responses(net.module, len(net.groups), banks)
    pieces = dict(zip(net.shapes, target.split(net.sizes, 1), strict=True))
    bases = iter(responses.bases)
    with torch.no_grad():
        for entry in responses.entries:
            found = responses.weight[:, entry.start : entry.stop].t()
            if entry.structure.axis is None:
                found.copy_(pieces[entry.name].t())
                continue
            # Each row's best matrices of that rank, to start from.
            rows = pieces[entry.name].unflatten(1, entry.structure.view).transpose(0, 1)
            u, s, v = torch.linalg.svd(rows, full_matrices=False)
            found.copy_((u * s[:, None].sqrt())[..., :banks].permute(2, 0, 1).flatten(0, 1))
            for k in range(banks):
                next(bases).copy_((v * s[..., None].sqrt())[:, k])
    root = torch.linalg.cholesky(net.curvature)
    size = (target @ root).square().sum()

    def loss() -> Tensor:
        columns = responses.jacobian()
        gap = torch.cat([columns[name].flatten(1) for name in net.shapes], 1) - target
        return (gap @ root).square().sum() / size

    minimise(loss, list(responses.parameters()), 400)
    return float(loss().detach().sqrt())


@pytest.mark.slow
def test_a10_each_bank_brings_a_response_nearer() -> None:
    """Four hyperparameters, an L2 coefficient for each tensor: the published structure can't follow them all."""
    task = stored_task("bostonHousing", rows=80)
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    x, y = task.train
    net = SmallNetwork(x, y, [[name] for name in names], -3.2)
    errors = [best_fit(net, net.response(gauss_newton=True), banks) for banks in (1, 2, 3, 4)]
    assert errors[:3] == pytest.approx([0.316, 0.096, 0.029], rel=0.3)
    assert errors[3] <= 0.005
