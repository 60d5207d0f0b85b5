"""Uses of weights and values that torch or a pass does not see as they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import metaopt
from metaopt.errors import ResponseError
from metaopt.stn import transform
from tests.stn_models import at, hyperparameters, output

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": lambda h: F.normalize(h, dim=-1),
    "method": lambda h: h / (h.norm(dim=-1, keepdim=True) + 0.1),
    "function": lambda h: torch.norm(h, p=2, dim=1),
    "vector": lambda h: torch.linalg.vector_norm(h, dim=-1),
    "either": lambda h: torch.linalg.norm(h, dim=-1, keepdim=True),
    "all": lambda h: torch.stack([row.norm() for row in h]),
    "cosine": lambda h: F.cosine_similarity(h, torch.ones(4), dim=-1),
    "another": lambda h: h.norm(p=1, dim=-1),
    "matrix": lambda h: torch.linalg.norm(h.reshape(-1, 2, 2), 2, dim=(1, 2)),
}


@pytest.mark.parametrize("name", list(NORMS))
@pytest.mark.parametrize("engine", ["manual", "forward", "double"])
def test_norms_are_torchs_and_have_a_derivative_at_zero(name: str, engine: str) -> None:
    """Where a batch had a vector of zeros, its step was left out."""
    torch.manual_seed(0)

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return NORMS[name](F.relu(self.layer(x) - 9 * (x[:, :1] > 5)))

    tuned = transform(Normed(), hyperparameters(), "delta", engine=engine, groups=4)
    with torch.no_grad():
        tuned.responses.weight.normal_()
    x, z = torch.rand(4, 3), torch.randn(4, 3)
    tuned.fallback = {entry.name: "" for entry in tuned.responses.entries} if name == "all" else {}
    point = {"linearised": True, "response": True, "groups": 4 if name == "all" else None}
    zero = output(tuned, x, at(tuned, torch.zeros_like(z), **point))
    torch.testing.assert_close(zero, tuned.model(x), rtol=1e-13, atol=1e-13)
    if name in ("another", "matrix"):
        return
    x[0, 0] = 9
    y = output(tuned, x, at(tuned, z, **point))
    gradients = torch.autograd.grad(y.square().sum(), list(tuned.responses.parameters()), allow_unused=True)
    assert all(bool(v.isfinite().all()) for v in (y, *gradients) if v is not None)


class Elsewhere(nn.Module):
    """A decoder that has its weight in a list, a closure, or of a parameter that a custom function is given."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4, bias=False)
        weight = self.encoder.weight
        self.held = [weight]
        self.decode: Any = {
            "list": lambda h: F.linear(h, self.held[0].t()),
            "closure": lambda h: h @ weight,
            "shape": lambda h: h[:, : weight.shape[1]],
            "attribute": lambda h: h @ self.encoder.weight,
        }[way]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decode(torch.tanh(self.encoder(x)))
        return y


@pytest.mark.parametrize("way", ["list", "closure", "shape", "attribute"])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_a_parameter_that_is_kept_elsewhere_is_an_error(way: str, method: str) -> None:
    """It was used without its response: with ``verify``, both sides of the comparison lacked it."""
    tuned, z = transform(Elsewhere(way), hyperparameters(), method), torch.randn(4, 3)
    point = at(tuned, z, linearised=method == "delta")
    if way in ("shape", "attribute"):
        output(tuned, torch.randn(4, 3), point)
        return
    with pytest.raises(ResponseError, match=r"uses its parameter 'encoder\.weight' by another way.*as an attribute"):
        output(tuned, torch.randn(4, 3), point)


class Dropped(nn.Module):
    """A dropout, and what it did to ones."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.drop, self.scale = kind(0.5), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(x)
        return y * self.scale


@pytest.mark.filterwarnings("ignore:dropout:UserWarning")
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.Dropout, (4, 3)),
        (nn.Dropout1d, (4, 3)),
        (nn.Dropout2d, (4, 3)),
        (nn.Dropout2d, (4,)),
        (nn.Dropout2d, (4, 3, 2, 2)),
        (nn.Dropout3d, (4, 3, 2)),
        (nn.Dropout3d, (4, 3, 2, 2)),
        (nn.Dropout3d, (4, 3, 2, 2, 2)),
    ],
)
def test_a_bound_dropout_drops_what_torchs_own_does(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    """Entries or channels: `Dropout2d` of (N, C, L) dropped whole examples."""
    torch.manual_seed(0)
    x = torch.ones(99, *shape)

    def together(y: Tensor) -> list[bool]:
        return [bool((y == y.narrow(d, 0, 1)).all()) for d in range(y.ndim)]

    hyper = metaopt.Hyperparameters(rate=metaopt.interval(0.5, 0, 0.9))
    tuned = transform(Dropped(kind), hyper, "centered", bind={"rate": "drop"})
    y = output(tuned, x, at(tuned, torch.zeros(99, 1)))
    assert together(y) == together(kind(0.5)(x))
    assert not together(y)[0]


class ByName(nn.Module):
    """Functions that are given their tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.matrix = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(input=F.linear(input=x, weight=self.layer.weight, bias=self.layer.bias))
        y = torch.cat(tensors=[y, torch.sum(input=y, dim=1, keepdim=True)], dim=1)
        y = torch.mul(input=y, other=F.softmax(input=y, dim=-1))
        y = torch.add(y, other=torch.tanh(input=F.pad(input=y, pad=(1, 0))[:, 1:]))
        return torch.mm(input=torch.flatten(input=y, start_dim=1)[:, 1:], mat2=self.matrix).sub(other=1.0)


@pytest.mark.parametrize("engine", ["manual", "forward", "double"])
def test_functions_may_be_given_their_tensors_by_name(engine: str) -> None:
    torch.manual_seed(0)
    tuned = transform(ByName(), hyperparameters(), engine=engine)
    with torch.no_grad():
        tuned.responses.weight.normal_()
    x, z, h = torch.randn(4, 3), torch.randn(4, 3), 1e-5
    moved = [output(tuned, x, at(tuned, sign * h * z)) for sign in (1, -1)]
    expected = tuned.model(x) + (moved[0] - moved[1]) / (2 * h)
    torch.testing.assert_close(output(tuned, x, at(tuned, z, linearised=True)), expected, rtol=1e-7, atol=1e-8)
    assert not tuned.fallback


class Bounded(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_a_cache_of_parametrizations_is_of_one_pass(method: str, verify: bool) -> None:
    """With the model called in `parametrize.cached()`, weights were those that a pass before had computed."""
    x = torch.randn(5, 3)

    def gradients(cached: bool) -> list[Tensor | None]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        parametrize.register_parametrization(model[0], "weight", Bounded())
        tuned = metaopt.stn.transform(
            model, metaopt.Hyperparameters(size=metaopt.positive(0.5)), method, verify=verify, groups=5
        )
        with torch.no_grad():
            tuned.responses.weight.normal_()

        def loss_of(model: Any, batch: Tensor, values: Any = None) -> Tensor:
            with parametrize.cached() if cached else nullcontext():
                y = model(batch)
            return (y.square() * (1 if values is None else values.size[:, None])).mean()

        with metaopt.stn.train(tuned, loss_of, loss_of, seed=0) as tuner:
            tuner.train_step(x)
            tuner.valid_step(x)
        return [p.grad for p in (*tuned.parameters(), *tuned.hyper.parameters())]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning")
@pytest.mark.parametrize("bag", [None, "sum"])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_tables_with_sparse_gradients_are_trained_as_others(method: str, bag: str | None) -> None:
    """Torch was asked for a sparse gradient of a view."""

    def trained(sparse: bool) -> list[Tensor]:
        torch.manual_seed(0)
        table = nn.EmbeddingBag(7, 4, mode=bag, sparse=sparse) if bag else nn.Embedding(7, 4, sparse=sparse)
        model, x = nn.Sequential(table, nn.Tanh(), nn.Linear(4, 2)), torch.randint(7, (5, 3))
        tuned = metaopt.stn.transform(model, metaopt.Hyperparameters(size=metaopt.positive(0.5)), method, groups=2)

        def loss_of(model: Any, batch: Tensor, values: Any = None) -> Tensor:
            each = model(batch).square().flatten(1).mean(1)
            return (each if values is None else each * values.size).mean()

        options: Any = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "seed": 0}
        with metaopt.stn.train(tuned, loss_of, loss_of, **options) as tuner:
            for _ in range(3):
                tuner.train_step(x)
                tuner.valid_step(x)
        return [p.detach().clone() for p in (*tuned.parameters(), *tuned.hyper.parameters())]

    torch.testing.assert_close(trained(True), trained(False))
