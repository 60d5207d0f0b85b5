"""torchopt and higher: as the Φ of a watched loop, and as independent oracles, with their known faults."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from metaopt.check import hypergradcheck
from tests.cases import data, mlp

Watch = Callable[[torch.optim.Optimizer], AbstractContextManager[Any]]


def needs(name: str) -> tuple[Any, Any]:
    """The package, and metaopt's integration of it."""
    pytest.importorskip(name, reason=f"{name} is not installed (extra: {name})")
    return importlib.import_module(name), importlib.import_module(f"metaopt.integrations.{name}")


def leaf(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def weights() -> Tensor:
    return (0.5 + 0.5 * torch.rand(12, generator=torch.Generator().manual_seed(1))).requires_grad_()


def loss(model: Callable[[Tensor], Tensor], hyper: dict[str, Tensor]) -> Tensor:
    x, y, _, _ = data()
    return (hyper["weights"] * F.cross_entropy(model(x), y, reduction="none")).mean()


def outer(model: Callable[[Tensor], Tensor]) -> Tensor:
    _, _, x, y = data()
    return F.cross_entropy(model(x), y)


def by_metaopt(make: Callable[..., torch.optim.Optimizer], hyper: dict[str, Tensor], mode: Any) -> dict[str, Tensor]:
    model = mlp(5, 6, 3)
    optimizer = make(model.parameters(), {name: value for name, value in hyper.items() if name != "weights"})
    with mode(optimizer) as run:
        for _ in range(3):
            optimizer.zero_grad()
            loss(model, hyper).backward()
            optimizer.step()
    found = run.hypergradient(outer(model), list(hyper.values()))
    return dict(zip(hyper, found, strict=True))


def test_nobody_imports_them() -> None:
    names = [name for name in sys.modules if name.startswith("metaopt.") and "integrations" not in name]
    for name in names:
        assert not hasattr(sys.modules[name], "TorchoptOptimizer")
        assert not hasattr(sys.modules[name], "HigherOptimizer")


@pytest.mark.parametrize("name", ["torchopt", "higher"])
def test_a_package_that_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"metaopt.integrations.{name}", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(metaopt.MissingExtraError, match=rf"metaopt-torch\[{name}\]"):
        importlib.import_module(f"metaopt.integrations.{name}")


# -- torchopt ----------------------------------------------------------------------------------------------------------

CHAINS: dict[str, tuple[Callable[..., Any], dict[str, float]]] = {
    "sgd": (lambda t, **h: t.sgd(**h, momentum=0.9), {"lr": 0.1}),
    "adam": (lambda t, **h: t.adam(**h, eps=1e-3), {"lr": 0.05}),
    "adamw": (lambda t, **h: t.adamw(**h), {"lr": 0.05}),
    "rmsprop": (lambda t, **h: t.rmsprop(**h, momentum=0.5), {"lr": 0.05}),
    "adamax": (lambda t, **h: t.adamax(**h), {"lr": 0.05}),
    "adagrad": (lambda t, **h: t.adagrad(**h), {"lr": 0.05}),
    "chain": (
        lambda t, **h: t.chain(t.transform.add_decayed_weights(0.1), t.transform.trace(0.9), t.sgd(**h)),
        {"lr": 0.1},
    ),
    "schedule": (
        lambda t: t.sgd(lr=t.schedule.linear_schedule(0.2, 0.01, 3, 0)),
        {},
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_torchopt_transformations(name: str) -> None:
    torchopt, integration = needs("torchopt")
    chain, values = CHAINS[name]
    hyper = {key: leaf(value) for key, value in values.items()} | {"weights": weights()}

    def train(watch: Watch) -> nn.Module:
        model = mlp(5, 6, 3)
        settings = {key: value for key, value in hyper.items() if key != "weights"}
        optimizer = integration.optimizer(model.parameters(), chain(torchopt, **settings))
        with watch(optimizer):
            for _ in range(3):
                optimizer.step(loss(model, hyper))
        return model

    assert hypergradcheck(train, outer, hyper, entries=1)


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream], ids=["record", "stream"])
@pytest.mark.parametrize("name", ["MetaSGD", "MetaAdam"])
def test_torchopts_own_gradient(name: str, mode: Any) -> None:
    torchopt, integration = needs("torchopt")
    settings = {"MetaSGD": {"momentum": 0.9}, "MetaAdam": {"eps": 1e-3}}[name]

    def meta(model: nn.Module, lr: Tensor) -> Any:
        return getattr(torchopt, name)(model, lr=lr, **settings)

    hyper = {"lr": leaf(0.1), "weights": weights()}
    model = mlp(5, 6, 3)
    theirs = meta(model, hyper["lr"])
    for _ in range(3):
        theirs.step(loss(model, hyper))
    expected = torch.autograd.grad(outer(model), list(hyper.values()))

    model = mlp(5, 6, 3)
    optimizer = integration.optimizer(meta(model, hyper["lr"]))
    with mode(optimizer) as run:
        for _ in range(3):
            optimizer.step(loss(model, hyper))
    found = run.hypergradient(outer(model), list(hyper.values()))
    ours = by_metaopt(lambda p, h: getattr(metaopt.optim, name[4:])(p, **h, **settings), hyper, mode)
    for a, b, c in zip(found, expected, ours.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)


def test_a_torchopt_optimizer_object_and_rewinding() -> None:
    torchopt, integration = needs("torchopt")
    model = mlp(5, 6, 3)
    hyper = {"weights": weights()}
    optimizer = integration.optimizer(torchopt.Adam(list(model.parameters()), lr=0.1))

    def train() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            loss(model, hyper).backward()
            optimizer.step()

    assert hypergradcheck(train, lambda: outer(model), hyper, optimizer=optimizer, entries=1)


def test_torchopt_clips_by_a_python_number_and_metaopt_refuses_it() -> None:
    torchopt, integration = needs("torchopt")
    model = mlp(5, 6, 3)
    chain = torchopt.chain(torchopt.clip.clip_grad_norm(max_norm=0.3), torchopt.sgd(lr=0.1))
    optimizer = integration.optimizer(model.parameters(), chain)
    # `float(total_norm)` loses the derivative of the norm. When this fails torchopt was mended.
    with pytest.raises(metaopt.CaptureError, match="took a Python number"), metaopt.record(optimizer):
        optimizer.step(loss(model, {"weights": weights()}))


def test_torchopt_unties_tied_weights_and_metaopt_does_not() -> None:
    torchopt, integration = needs("torchopt")

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
            self.last.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

    hyper = {"weights": weights()}
    model = Tied()
    torchopt.MetaSGD(model, lr=0.1).step(loss(model, hyper))
    # When this fails torchopt was mended.
    assert model.first.weight is not model.last.weight
    model = Tied()
    optimizer = integration.optimizer(torchopt.MetaSGD(model, lr=0.1))
    assert hypergradcheck(
        lambda: optimizer.step(loss(model, hyper)), lambda: outer(model), hyper, optimizer=optimizer, entries=1
    )
    assert model.first.weight is model.last.weight


def test_torchopt_refuses() -> None:
    torchopt, integration = needs("torchopt")
    model = mlp(5, 6, 3)
    with pytest.raises(metaopt.RuleError, match="no gradient transformation"):
        integration.optimizer(model.parameters(), torch.optim.SGD)
    with pytest.raises(metaopt.RuleError, match="no optimizer of torchopt"):
        integration.optimizer(model)
    meta = torchopt.MetaSGD(model, lr=0.1)
    meta.step(loss(model, {"weights": weights()}))
    with pytest.raises(metaopt.RuleError, match="has stepped"):
        integration.optimizer(meta)


# -- higher ------------------------------------------------------------------------------------------------------------

HIGHER: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, float]]] = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), {"lr": 0.1, "weight_decay": 0.01}),
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-3), {"lr": 0.1, "weight_decay": 0.01}),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.05), {"lr": 0.05}),
}


@pytest.mark.parametrize("name", HIGHER)
def test_highers_optimizers(name: str) -> None:
    higher, integration = needs("higher")
    make, values = HIGHER[name]
    hyper = {key: leaf(value) for key, value in values.items()} | {"weights": weights()}

    def inner() -> Any:
        model = mlp(5, 6, 3)
        override = {key: [hyper[key]] for key in values}
        return higher.innerloop_ctx(model, make(model.parameters()), override=override)

    def train(watch: Watch) -> Any:
        with inner() as (fmodel, diffopt):
            optimizer = integration.optimizer(diffopt)
            with watch(optimizer):
                for _ in range(3):
                    optimizer.step(loss(fmodel, hyper))
            return fmodel

    assert hypergradcheck(train, outer, hyper, entries=1)
    with inner() as (fmodel, diffopt):
        for _ in range(3):
            diffopt.step(loss(fmodel, hyper))
        expected = torch.autograd.grad(outer(fmodel), list(hyper.values()))
    for mode in (metaopt.record, metaopt.stream):
        runs: list[Any] = []

        def watch(optimizer: torch.optim.Optimizer, mode: Any = mode, runs: list[Any] = runs) -> Any:
            runs.append(mode(optimizer))
            return runs[0]

        fmodel = train(watch)
        found = runs[0].hypergradient(outer(fmodel), list(hyper.values()))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_the_initial_weights_of_a_patched_module() -> None:
    higher, integration = needs("higher")
    hyper = {"weights": weights()}
    model = mlp(5, 6, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        diffopt.step(loss(fmodel, hyper))
        expected = torch.autograd.grad(outer(fmodel), list(model.parameters()))
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
        optimizer = integration.optimizer(diffopt)
        with metaopt.record(optimizer) as run:
            optimizer.step(loss(fmodel, hyper))
        found = run.hypergradient(outer(fmodel), list(fmodel.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_highers_beta2_is_wrong_and_metaopt_refuses_it() -> None:
    higher, integration = needs("higher")
    hyper = {"beta2": leaf(0.9), "weights": weights()}
    model = mlp(5, 6, 3)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    override = {"betas": [(0.9, hyper["beta2"])]}
    with higher.innerloop_ctx(model, opt, override=override) as (fmodel, diffopt):
        for _ in range(2):
            inner = loss(fmodel, hyper)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that a tensor becomes a number, the first time
                diffopt.step(inner)
        (theirs,) = torch.autograd.grad(outer(fmodel), hyper["beta2"])
    make = lambda p, h: metaopt.optim.Adam(p, lr=0.1, betas=(0.9, h["beta2"]))  # noqa: E731
    ours = by_metaopt(make, hyper, metaopt.record)["beta2"]
    # `math.sqrt(1 - beta2**t)` cuts the graph. When this fails higher was mended.
    assert abs(theirs - ours) > 0.5 * abs(ours)
    with higher.innerloop_ctx(model, opt, override=override) as (fmodel, diffopt):
        optimizer = integration.optimizer(diffopt)
        with pytest.raises(metaopt.CaptureError, match="took a Python number"), metaopt.record(optimizer):
            optimizer.step(loss(fmodel, hyper))


def test_higher_drops_forward_hooks() -> None:
    higher, _ = needs("higher")
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda module, args, out: out * 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(1, 2)
    with higher.innerloop_ctx(model, opt) as (fmodel, _):
        # When this fails higher was mended.
        assert not torch.allclose(fmodel(x), model(x))


def test_higher_refuses() -> None:
    higher, integration = needs("higher")
    model = mlp(5, 6, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(metaopt.RuleError, match="no differentiable optimizer"):
        integration.optimizer(opt)
    with pytest.raises(metaopt.RuleError, match="no patched module"):
        integration.optimizer(higher.get_diff_optim(opt, model.parameters()))
