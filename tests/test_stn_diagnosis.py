"""The diagnostic: the response's hypergradient beside the implicit one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metaopt
from metaopt.errors import ResponseError
from metaopt.stn import Tuned, diagnose, l2, train, transform


def data(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(30, 4)
    return x, x.sum(1) + torch.randn(30)


def loss(model: Any, batch: Any, values: Any = None) -> Tensor:
    fit: Tensor = 0.5 * (model(batch[0]).squeeze(-1) - batch[1]).square().mean()
    return fit if values is None else fit + 0.5 * l2(model, values.decay)


def valid(model: Any, batch: Any) -> Tensor:
    return loss(model, batch)


def exact(method: str = "delta") -> Tuned:
    """Ridge regression at its optimum, with the exact response."""
    x, y = data(0)
    gram, c = x.T @ x / 30 + 0.5 * torch.eye(4), 0.5
    w0 = torch.linalg.solve(gram, x.T @ y / 30)
    layer = nn.Linear(4, 1, bias=False)
    hyper = metaopt.Hyperparameters(decay=metaopt.positive(c), unused=metaopt.integer(1, 0, 3))
    tuned = transform(layer, hyper, method)
    with torch.no_grad():
        layer.weight.copy_(w0.reshape(1, -1))
        tuned.responses.weight.copy_(torch.tensor([[0.5], [0.0]]))
        tuned.responses.bases[0].copy_(-c * torch.linalg.solve(gram, w0).reshape(1, -1))
    return tuned


def test_an_exact_response_has_the_implicit_hypergradient() -> None:
    tuned = exact()
    with train(tuned, loss, valid) as tuner:
        found = diagnose(tuner, data(0), data(1), damping=0.0)
        assert found.names == ("decay",)
        assert found.residual < 1e-8
        torch.testing.assert_close(found.response, found.implicit, rtol=1e-8, atol=1e-10)
        assert found.cosine == pytest.approx(1.0)
        # By finite differences of the closed form.
        x, y = data(0)
        xv, yv = data(1)

        def outer(log: float) -> float:
            w = torch.linalg.solve(x.T @ x / 30 + math.exp(log) * torch.eye(4), x.T @ y / 30)
            return float(0.5 * (xv @ w - yv).square().mean())

        h, log = 1e-5, math.log(0.5)
        assert float(found.implicit) == pytest.approx((outer(log + h) - outer(log - h)) / (2 * h), rel=1e-6)
        with torch.no_grad():
            tuned.responses.weight.neg_()
        assert diagnose(tuner, data(0), data(1)).cosine == pytest.approx(-1.0)


def test_what_can_not_be_compared_is_said() -> None:
    with train(exact("stn"), loss, valid) as tuner, pytest.raises(ResponseError, match="uncentred"):
        diagnose(tuner, data(0), data(1))
    with train(exact(), lambda m, b, v: loss(m, b), valid) as tuner, pytest.raises(ResponseError, match="smoothly"):
        diagnose(tuner, data(0), data(1))
    bent = train(exact(), lambda m, b, v: loss(m, b, v) - 9 * l2(m, v.decay), valid)
    with bent as tuner, pytest.raises(ResponseError, match="not convex"):
        diagnose(tuner, data(0), data(1))
