"""What an iteration of Δ-STN costs beside a plain step of SGD, in processor time.

python -m tests.benchmarks.best_response
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from metaopt.stn import train, transform

Model = tuple[nn.Module, Tensor, Tensor, dict[str, str]]


def mlp() -> Model:
    """64-200-200-10 with a dropout before each layer, 100 examples."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate([(64, 200), (200, 200), (200, 10)]):
        layers += [nn.Dropout(0.05), nn.Linear(a, b), *([nn.ReLU()] if i < 2 else [])]
    return nn.Sequential(*layers), torch.randn(100, 64), torch.randint(10, (100,)), {"a": "0", "b": "3", "c": "6"}


def cnn() -> Model:
    """Two convolutions with BatchNorm, 32 images of 16 by 16."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.05)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Dropout(0.05), nn.Linear(1024, 10)),
    )
    return model, torch.randn(32, 3, 16, 16), torch.randint(10, (32,)), {"a": "4", "b": "10"}


def transformer() -> Model:
    """One encoder layer of width 64, 16 sequences of 32."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.05, batch_first=True)
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.layer(x).mean(1))
            return y

    return (
        Classifier(),
        torch.randn(16, 32, 64),
        torch.randint(10, (16,)),
        {"a": "layer.dropout1", "b": "layer.dropout2"},
    )


WAYS = [("stn", "auto"), ("centered", "auto"), ("delta", "manual"), ("delta", "double"), ("delta", "forward")]
BLOCK, ROUNDS = 8, 14


def medians(steps: list[Callable[[], Any]]) -> list[float]:
    """The median processor time of each step: blocks of each in turn, so that a slow minute is shared by all."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(ROUNDS):
        for step, found in zip(steps, times, strict=True):
            # The first ones of a block find the caches full of another's numbers.
            for i in range(BLOCK + 2):
                begin = time.process_time()
                step()
                found += [time.process_time() - begin] if i >= 2 else []
    return [statistics.median(found[BLOCK:]) for found in times]


def train_loss(model: Any, batch: Any, _: Any) -> Tensor:
    """Cross entropy, with nothing of the hyperparameters."""
    return F.cross_entropy(model(batch[0]), batch[1])


def valid_loss(model: Any, batch: Any) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def compare(name: str, build: Callable[[], Model]) -> None:
    """A line of the table."""
    torch.manual_seed(0)
    model, x, y, bind = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def plain() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    steps: list[Callable[[], Any]] = [plain]
    stack = ExitStack()
    for method, engine in WAYS:
        hyper = metaopt.Hyperparameters(**{key: metaopt.interval(0.05, 0, 0.95) for key in bind})
        tuned = transform(copy.deepcopy(model), hyper, method, bind=bind, engine=engine)
        tuner = stack.enter_context(train(tuned, train_loss, valid_loss))
        tuner.train_step((x, y))
        tuner.train_step((x, y))
        steps += [
            partial(tuner.train_step, (x, y)),
            partial(tuner.valid_step, (x, y)),
            partial(tuner._response, (x, y), tuned.coordinates.point()),
        ]
    base, *found = medians(steps)
    stack.close()
    cells = [f"{(found[i] + found[i + 1] / 5) / base:8.2f}" for i in range(0, len(found), 3)]
    print(f"{name:12}{base * 1e3:10.2f} ms{''.join(cells)}{found[8] / found[5]:18.2f}", flush=True)


def main() -> None:
    """The table, each iteration with a fifth of a validation step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(
        f"{'model':12}{'SGD step':>13}{'STN':>8}{'centred':>8}{'Δ':>8}{'double':>8}{'forward':>8}{'Θ: Δ / centred':>18}"
    )
    for name, build in [("MLP", mlp), ("CNN", cnn), ("transformer", transformer)]:
        compare(name, build)


if __name__ == "__main__":
    main()
