"""A training in real time that is stopped, saved and gone on with is the one that was never stopped."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from tests.cases import data

OPTIMIZERS: dict[str, Callable[[Any, Any], torch.optim.Optimizer]] = {
    "sgd": lambda p, h: metaopt.optim.SGD(p, lr=h.lr, momentum=h.momentum),
    "adam": lambda p, h: metaopt.optim.Adam(p, lr=h.lr, betas=(h.momentum, 0.9), eps=1e-2),
    "wrapped": lambda p, h: metaopt.wrap(torch.optim.RMSprop(p, lr=0.05, eps=1e-2)),
}


class Training:
    """A rate, a momentum and the examples' weights, moved every other step."""

    def __init__(self, kind: str, norm: bool, **options: Any) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)]
        self.model = nn.Sequential(*(layer for layer in layers if norm or not isinstance(layer, nn.BatchNorm1d)))
        self.hyper = metaopt.Hyperparameters(
            lr=metaopt.positive(0.1), momentum=metaopt.interval(0.5, 0, 0.99), weights=torch.ones(12)
        )
        self.hyper_optimizer = torch.optim.SGD(self.hyper.parameters(), lr=0.05)
        self.optimizer = OPTIMIZERS[kind](self.model.parameters(), self.hyper)
        self.parts: list[Any] = [self.model, self.hyper, self.hyper_optimizer, self.optimizer]
        self.options = options
        self.norm = norm

    def run(self, steps: range, saved: Any = None) -> Any:
        """Some steps; what is there to save after them."""
        x, y, x_val, y_val = data()
        modules = [self.model] if self.norm else []
        with metaopt.stream(self.optimizer, **self.options) as run:
            if saved is not None:
                run.load_state_dict(saved, self.hyper if self.norm else self.hyper.parameters(), *modules)
            for t in steps:
                self.optimizer.zero_grad()
                losses = F.cross_entropy(self.model(x), y, reduction="none")
                (self.hyper.weights * losses).mean().backward()
                self.optimizer.step()
                if t % 2:
                    self.hyper_optimizer.zero_grad()
                    run.backward(lambda: F.cross_entropy(self.model.eval()(x_val), y_val))
                    self.model.train()
                    self.hyper_optimizer.step()
            return run.state_dict(*modules)

    def state(self) -> list[Any]:
        return [part.state_dict() for part in self.parts]


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batchnorm"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"directions": 3}], ids=["all", "directions"])
@pytest.mark.filterwarnings("ignore::metaopt.UnusedHyperparameterWarning")
def test_a_run_that_is_gone_on_with_is_the_run(kind: str, norm: bool, options: dict[str, int]) -> None:
    def made() -> dict[str, Any]:
        return {**options, "generator": torch.Generator().manual_seed(3)} if options else {}

    whole = Training(kind, norm, **made())
    whole.run(range(8))
    first = Training(kind, norm, **made())
    kept = first.run(range(3)), first.state()
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    saved, states = torch.load(file, weights_only=True)
    again = Training(kind, norm, **made())
    for part, state in zip(again.parts, states, strict=True):
        part.load_state_dict(state)
    again.run(range(3, 8), saved)
    for a, b in zip(again.parts[:2], whole.parts[:2], strict=True):
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=1e-12, atol=1e-14)
    forgotten = Training(kind, norm, **made())
    for part, state in zip(forgotten.parts, states, strict=True):
        part.load_state_dict(state)
    forgotten.run(range(3, 8))
    assert not torch.allclose(forgotten.hyper.weights, whole.hyper.weights, rtol=1e-9)


def test_what_can_not_be_saved_or_loaded() -> None:
    training = Training("sgd", True)
    training.norm = False
    with pytest.raises(metaopt.SweepError, match=r"neither weights nor .*run\.state_dict\(model\)"):
        training.run(range(2))
    saved = Training("sgd", False).run(range(2))
    other = Training("sgd", False)
    with pytest.raises(metaopt.StaleError, match=r"state\.0\.0\.momentum_buffer.*Load the state of the optimizers"):
        other.run(range(2), saved)
    other = Training("adam", False)
    other.hyper = metaopt.Hyperparameters(lr=metaopt.positive(0.1))
    with pytest.raises(metaopt.StaleError, match="hyperparameters that were saved"):
        other.run(range(2), saved)
    late = Training("sgd", False)
    with (
        pytest.raises(metaopt.SweepError, match="before its first step"),
        metaopt.stream(late.optimizer) as run,
    ):
        late.model(torch.ones(1, 5)).sum().backward()
        late.optimizer.step()
        run.load_state_dict(saved, late.hyper.parameters())
    many = Training("sgd", False, directions=2)
    with pytest.raises(metaopt.StaleError, match="number of random directions"):
        many.run(range(2), Training("sgd", False, directions=3).run(range(1)))


def test_bare_hyperparameters_are_known_by_their_order() -> None:
    x, y, _, _ = data()

    def train(lr: Tensor, weights: Tensor, model: nn.Module, steps: int, state: Any = None) -> Any:
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        with metaopt.stream(optimizer) as run:
            if state is not None:
                run.load_state_dict(state, [weights, lr])
            for _ in range(steps):
                optimizer.zero_grad()
                (weights * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
                optimizer.step()
            assert [leaf.shape for leaf in run.hyperparameters] == [weights.shape, lr.shape]
            return run.state_dict(), run.hypergradient(F.cross_entropy(model(x), y), [lr, weights])

    def leaves() -> tuple[Tensor, Tensor]:
        return torch.tensor(0.1, requires_grad=True), torch.ones(12, requires_grad=True)

    torch.manual_seed(0)
    start = nn.Linear(5, 3).state_dict()
    models = [nn.Linear(5, 3), nn.Linear(5, 3)]
    for model in models:
        model.load_state_dict(start)
    _, whole = train(*leaves(), models[0], 6)
    state, _ = train(*leaves(), models[1], 3)
    _, found = train(*leaves(), models[1], 3, state)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-14)


def test_named_hyperparameters_go_on_as_they_were_named() -> None:
    def made(*names: str) -> Training:
        training = Training("sgd", False)
        training.options = {"hyper": [training.hyper.get_leaf(name) for name in names]} if names else {}
        return training

    whole, first, again = made("lr", "momentum"), made("lr", "momentum"), made("momentum", "lr")
    whole.run(range(4))
    saved = first.run(range(2))
    assert first.hyper.get_leaf("weights").grad is None
    for part, state in zip(again.parts, first.state(), strict=True):
        part.load_state_dict(state)
    again.run(range(2, 4), saved)
    torch.testing.assert_close(again.hyper.state_dict(), whole.hyper.state_dict(), rtol=1e-12, atol=1e-14)
    for names in (("lr",), ()):
        with pytest.raises(metaopt.StaleError, match=r"hyper=\.\.\.\)` as it was"):
            made(*names).run(range(2), saved)
