"""Dropout rates of a small network that overfits: fixed ones, random search, and the three responses.

python -m tests.benchmarks.digits                    all of them, five splits (about four minutes)
python -m tests.benchmarks.digits --train-steps 1    a validation step after each training step
python -m tests.benchmarks.digits --each-pixel       standardised pixel by pixel

Scikit-learn's digits, 300 to train, 300 to validate, the others to test. A 64-200-200-10 network with a dropout before
each layer, from a rate of 0.05; the settings of the Δ-STN authors' code: images standardised by one mean and one
deviation, SGD 0.01 with momentum 0.9 for weights and response, RMSprop 0.01 for λ and σ, σ = 1 at first, τ = 1e-3, a
warm-up of five epochs. A run counts by its best validation loss, evaluated without perturbation every 20 steps.
"""

from __future__ import annotations

__all__: list[str] = []

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import metaopt
from metaopt.stn import train, transform

Pair = tuple[Tensor, Tensor]
METHODS = ("fixed", "stn", "centered", "delta", "random")
STEPS, BATCH, EVERY, WARMUP, RATE, LARGEST = 2400, 100, 20, 15, 0.05, 0.95


def split(seed: int, each_pixel: bool = False) -> tuple[Pair, Pair, Pair]:
    """Training, validation and test examples."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images, dtype=torch.float32)[order], torch.tensor(labels)[order]
    if each_pixel:
        spread = x[:300].std(0)
        x = (x - x[:300].mean(0)) / torch.where(spread > 0, spread, 1.0)
    else:
        x = (x - x[:300].mean()) / x[:300].std()
    return (x[:300], y[:300]), (x[300:600], y[300:600]), (x[600:], y[600:])


def network(rates: Sequence[float]) -> nn.Sequential:
    """The network, with a dropout before each layer."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate([(64, 200), (200, 200), (200, 10)]):
        layers += [nn.Dropout(rates[i]), nn.Linear(a, b), *([nn.ReLU()] if i < 2 else [])]
    return nn.Sequential(*layers)


def batches(generator: torch.Generator) -> Iterator[Tensor]:
    """The indices of each batch of training examples, without end."""
    while True:
        yield from torch.randperm(300, generator=generator).split(BATCH)


class Run:
    """One run on one split.

    Args:
        seed: of the split, the weights and the batches.
        rates: the dropout rates at first.
        each_pixel: whether each pixel is standardised by itself.
    """

    def __init__(self, seed: int, rates: Sequence[float] = (RATE,) * 3, *, each_pixel: bool = False) -> None:
        self.train, self.valid, self.test = split(seed, each_pixel)
        torch.manual_seed(1000 + seed)
        self.seed, self.model = seed, network(rates)
        self.generator = torch.Generator().manual_seed(2000 + seed)
        self.best, self.then = float("inf"), float("inf")

    @torch.no_grad()
    def look(self, model: nn.Module) -> None:
        """Evaluate, and keep the best validation loss and the test loss at that moment."""
        self.model.eval()
        valid, test = (F.cross_entropy(model(x), y).item() for x, y in (self.valid, self.test))
        self.model.train()
        if valid < self.best:
            self.best, self.then = valid, test

    def fixed(self) -> Run:
        """Train with the rates as they are."""
        optimizer, indices = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9), batches(self.generator)
        x, y = self.train
        for step in range(STEPS):
            index = next(indices)
            optimizer.zero_grad()
            F.cross_entropy(self.model(x[index]), y[index]).backward()
            optimizer.step()
            if step % EVERY == EVERY - 1:
                self.look(self.model)
        return self

    def tuned(self, method: str, train_steps: int) -> Run:
        """Train with a response."""
        rates = {name: metaopt.interval(RATE, 0, LARGEST, scale=1.0) for name in "abc"}
        bind = {"a": "0", "b": "3", "c": "6"}
        tuned = transform(self.model, metaopt.Hyperparameters(**rates), method, bind=bind)
        indices, (x, y), (xv, yv) = batches(self.generator), self.train, self.valid
        with train(tuned, train_loss, valid_loss, train_steps=train_steps, warmup=WARMUP, seed=self.seed) as tuner:
            for step in range(STEPS):
                index = next(indices)
                tuner.train_step((x[index], y[index]))
                if step >= WARMUP and step % train_steps == 0:
                    index = torch.randperm(300, generator=self.generator)[:BATCH]
                    tuner.valid_step((xv[index], yv[index]))
                if step % EVERY == EVERY - 1:
                    self.look(tuned)
        return self


def train_loss(model: Any, batch: Pair, _: Any) -> Tensor:
    """Cross entropy; the rates are bound to the dropouts."""
    return F.cross_entropy(model(batch[0]), batch[1])


def valid_loss(model: Any, batch: Pair) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def random_search(seed: int, runs: int = 3, *, each_pixel: bool = False) -> Run:
    """The best of several runs with rates drawn uniformly."""
    draws = LARGEST * torch.rand(runs, 3, generator=torch.Generator().manual_seed(3000 + seed))
    return min((Run(seed, rates, each_pixel=each_pixel).fixed() for rates in draws.tolist()), key=lambda run: run.best)


def run_of(method: str, seed: int, *, train_steps: int = 5, each_pixel: bool = False) -> Run:
    """What a method gets on a split."""
    if method == "random":
        return random_search(seed, each_pixel=each_pixel)
    run = Run(seed, each_pixel=each_pixel)
    return run.fixed() if method == "fixed" else run.tuned(method, train_steps)


def main(arguments: Sequence[str] | None = None) -> None:
    """A line for each method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--train-steps", type=int, default=5, help="between validation steps (default: %(default)s)")
    parser.add_argument("--each-pixel", action="store_true", help="standardise each pixel by itself")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{'method':10}{'valid':>8}{'s.e.':>8}{'test':>8}   each split")
    for method in options.methods:
        runs = [
            run_of(method, seed, train_steps=options.train_steps, each_pixel=options.each_pixel)
            for seed in range(options.splits)
        ]
        found = [run.best for run in runs]
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
        test = statistics.mean(run.then for run in runs)
        each = " ".join(f"{value:.4f}" for value in found)
        print(f"{method:10}{statistics.mean(found):8.3f}{error:8.3f}{test:8.3f}   {each}", flush=True)


if __name__ == "__main__":
    main()
