"""What an iteration of Δ-STN costs beside a plain step of SGD, in processor time.

python -m tests.benchmarks.best_response
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
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


def loss(model: Any, batch: Any) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def seconds(step: Callable[[], Any], repeats: int = 40) -> float:
    """The lower quartile of a step's processor time: what other programs do then matters least."""
    times = []
    for _ in range(repeats + 5):
        begin = time.process_time()
        step()
        times.append(time.process_time() - begin)
    return sorted(times[5:])[repeats // 4]


def compare(name: str, build: Callable[[], Model]) -> None:
    """A line of the table."""
    torch.manual_seed(0)
    model, x, y, bind = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def plain() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    base, cells = seconds(plain), []
    for method, engine in [
        ("stn", "auto"),
        ("centered", "auto"),
        ("delta", "manual"),
        ("delta", "double"),
        ("delta", "forward"),
    ]:
        hyper = metaopt.Hyperparameters(**{key: metaopt.interval(0.05, 0, 0.95) for key in bind})
        tuned = transform(model, hyper, method, bind=bind, engine=engine)
        with train(
            tuned, lambda m, b, _: F.cross_entropy(m(b[0]), b[1]), lambda m, b: F.cross_entropy(m(b[0]), b[1])
        ) as t:
            total = seconds(lambda t=t: t.train_step((x, y))) + seconds(lambda t=t: t.valid_step((x, y))) / 5  # type: ignore[misc]
        cells.append(f"{total / base:8.1f}")
    print(f"{name:12}{base * 1e3:10.2f} ms" + "".join(cells), flush=True)


def main() -> None:
    """The table, each iteration with a fifth of a validation step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'model':12}{'SGD step':>13}{'STN':>8}{'centred':>8}{'Δ':>8}{'double':>8}{'forward':>8}")
    for name, build in [("MLP", mlp), ("CNN", cnn), ("transformer", transformer)]:
        compare(name, build)


if __name__ == "__main__":
    main()
