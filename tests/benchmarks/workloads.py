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

Batch = tuple[slice, Tensor, Tensor]
Forward = Callable[[Tensor], Tensor]
Activation = Callable[[], nn.Module]


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
    model: Callable[[Activation], nn.Module]
    activation: Activation
    shape: tuple[int, ...]
    batch: int
    validation: int
    optimizer: str
    settings: dict[str, float]


def _wide(width: int) -> Callable[[Activation], nn.Module]:
    def make(activation: Activation) -> nn.Module:
        layers = (nn.Linear(784, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, CLASSES))
        return nn.Sequential(*layers)

    return make


def _cnn(activation: Activation) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), activation()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), activation()),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 256), activation(), nn.Linear(256, CLASSES)),
    )  # 409 thousand weights


# Leaky, because a ReLU that is dead for a whole batch has gradients that are exactly zero, and the derivative of Adam's
# root of them is NaN in the loop unrolled by hand and in torchopt: there would be nothing to compare.
_RECIPES = {
    "W1": _Recipe(lambda _: nn.Linear(784, CLASSES), nn.Identity, (784,), EXAMPLES, 1000, "SGD", {"lr": 0.5}),
    "W2": _Recipe(_wide(256), nn.ReLU, (784,), 128, 1000, "SGD", {"lr": 0.05, "momentum": 0.9}),
    "W3": _Recipe(_cnn, nn.LeakyReLU, (1, 28, 28), 64, 64, "Adam", {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999}),
}
_RECIPES |= {
    name: _Recipe(_wide(width), nn.ReLU, (784,), 128, 1000, "SGD", {"lr": 0.05, "momentum": 0.9})
    for name, width in (("N4", 13), ("N5", 115), ("N6", 690), ("N7", 2800))
}


def make(
    name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, smooth: bool = False
) -> Problem:
    """A workload's problem: the same for every system, in float32 as in float64.

    Args:
        name: the workload.
        dtype: of the model, the data and the hyperparameters.
        device: where they are.
        seed: of the data and of the first weights.
        smooth: put tanh in place of the kinks. Where a kink is crossed the training jumps, so finite differences of it
            are no reference.
    """
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
        model=recipe.model(nn.Tanh if smooth else recipe.activation).to(device, dtype),
        optimizer=recipe.optimizer,
        hyper={key: value.to(dtype).requires_grad_() for key, value in hyper.items()},
        batches=[(i, x[i], y[i]) for i in full],
        validation=data(recipe.validation),
    )
