"""The training problems: synthetic data of the right shape, made from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.catalogue import WORKLOADS

CLASSES = 10
EXAMPLES = 5000
VALIDATION = 1000

Batch = tuple[slice, Tensor, Tensor]
Forward = Callable[[Tensor], Tensor]


@dataclass
class Problem:
    """A model, its data and its hyperparameters; the loop goes round the batches."""

    model: nn.Module
    optimizer: str
    hyper: dict[str, Tensor]
    batches: list[Batch]
    validation: tuple[Tensor, Tensor]

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        return self.batches[step % len(self.batches)]

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """The training loss, with a weight for each example."""
        i, x, y = batch
        return (self.hyper["weights"][i] * F.cross_entropy(forward(x), y, reduction="none")).mean()

    def outer(self, forward: Forward) -> Tensor:
        """The outer objective."""
        x, y = self.validation
        return F.cross_entropy(forward(x), y)

    def numbers(self, *, without: tuple[str, ...] = ("weights",)) -> dict[str, float]:
        """The optimizer's settings as plain numbers."""
        return {name: value.item() for name, value in self.hyper.items() if name not in without}


@dataclass(frozen=True)
class _Recipe:
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    optimizer: str
    settings: dict[str, float]


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES)
    )  # 269 thousand weights


def _cnn() -> nn.Module:
    # Leaky, because a ReLU that is dead for a batch gives gradients that are exactly zero, and Adam's root of them gives
    # NaN in every system but metaopt: there would be nothing to compare.
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.LeakyReLU(0.1), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.LeakyReLU(0.1), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 256), nn.LeakyReLU(0.1), nn.Linear(256, CLASSES)),
    )  # 409 thousand weights


_RECIPES = {
    "W1": _Recipe(lambda: nn.Linear(784, CLASSES), (784,), EXAMPLES, "SGD", {"lr": 0.5}),
    "W2": _Recipe(_mlp, (784,), 128, "SGD", {"lr": 0.05, "momentum": 0.9}),
    "W3": _Recipe(_cnn, (1, 28, 28), 64, "Adam", {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999}),
}


def make(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Problem:
    """A workload's problem: the same for every system, in float32 as in float64."""
    recipe = _RECIPES[name]
    assert {"weights", *recipe.settings} == set(WORKLOADS[name].hyper)
    random = torch.Generator().manual_seed(seed)
    teacher = torch.randn(784, CLASSES, generator=random)

    def data(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 784, generator=random)
        noise = 10 * torch.randn(n, CLASSES, generator=random)
        return x.view(n, *recipe.shape).to(device, dtype), (x @ teacher + noise).argmax(1).to(device)

    x, y = data(EXAMPLES)
    full = [slice(start, start + recipe.batch) for start in range(0, EXAMPLES - recipe.batch + 1, recipe.batch)]
    torch.manual_seed(seed)
    hyper = {key: torch.tensor(value, device=device, dtype=torch.float64) for key, value in recipe.settings.items()}
    hyper["weights"] = (0.5 + 0.5 * torch.rand(EXAMPLES, generator=random)).to(device)
    return Problem(
        model=recipe.model().to(device, dtype),
        optimizer=recipe.optimizer,
        hyper={key: value.to(dtype).requires_grad_() for key, value in hyper.items()},
        batches=[(i, x[i], y[i]) for i in full],
        validation=data(VALIDATION),
    )
