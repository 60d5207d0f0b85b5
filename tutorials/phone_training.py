"""How phones are learnt: the network and its two tasks, training with hyperparameters that stay, and random search.

The training that tunes itself, the part that needs metaopt, is in `02_phone_classification.py`.
"""

from __future__ import annotations

__all__ = [
    "Batch",
    "Epoch",
    "Network",
    "Setting",
    "Settings",
    "Training",
    "batches",
    "draw_setting",
    "evaluate",
    "fixed",
    "make_network",
    "random_search",
    "training_loss",
]

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from phones import CONTEXT, Problem
from recordings import CHANNELS
from torch import Tensor, nn


class Setting(NamedTuple):
    """The hyperparameters: the secondary task's weight ρ, the learning rate η, the momentum μ."""

    rho: float
    lr: float
    momentum: float


@dataclass(frozen=True)
class Settings:
    """How long and how the network is trained.

    Args:
        epochs: passes over the training frames.
        batch: frames in a minibatch.
        hidden: units in each of the two hidden layers.
        every: Δ, the steps from one hyper-step to the next.
        hyper_lr: Adam's learning rate for the hyperparameters.
        val_batch: validation frames in a hyper-step's loss.
    """

    epochs: int = 20
    batch: int = 100
    hidden: int = 200
    every: int = 50
    hyper_lr: float = 5e-3
    val_batch: int = 500


# -- the network and its losses


class Network(nn.Module):
    """Two hidden layers, and a linear head for each of the two tasks."""

    def __init__(self, hidden: int, phones: int) -> None:
        super().__init__()
        inputs = (2 * CONTEXT + 1) * CHANNELS
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.primary = nn.Linear(hidden, phones)
        self.secondary = nn.Linear(hidden, CHANNELS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.primary(features), self.secondary(features)


def make_network(problem: Problem, settings: Settings, seed: int) -> Network:
    """A network with its first weights; one seed gives every method the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(settings.hidden, len(problem.phones))
        for parameter in network.parameters():
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
    return network


class Batch(NamedTuple):
    """Training frames: windows, phones, secondary targets."""

    x: Tensor
    y: Tensor
    secondary: Tensor


def training_loss(network: nn.Module, batch: Batch, rho: Tensor | float) -> Tensor:
    """`E_tr`: cross entropy, and ρ times half the squared error of the secondary target."""
    logits, secondary = network(batch.x)
    return F.cross_entropy(logits, batch.y) + rho * 0.5 * F.mse_loss(secondary, batch.secondary)


def batches(problem: Problem, settings: Settings, seed: int) -> Iterator[list[Batch]]:
    """For each epoch the minibatches, shuffled; one seed gives every method the same. The last frames are left out."""
    generator = torch.Generator().manual_seed(seed)
    (x, y), secondary = problem.train, problem.secondary
    for _ in range(settings.epochs):
        shuffled = torch.randperm(len(y), generator=generator)
        whole = len(y) // settings.batch * settings.batch
        yield [Batch(x[i], y[i], secondary[i]) for i in shuffled[:whole].split(settings.batch)]


# -- how good it is


class Epoch(NamedTuple):
    """Where a network stands after an epoch: loss, and accuracies in percent."""

    val_loss: float
    val_accuracy: float
    test_accuracy: float


@dataclass
class Training:
    """What came of a training run.

    Args:
        epochs: where it stood after each.
        schedule: the hyperparameters at each hyper-step, in the order of time; one entry if they stayed.
        seconds: of the processor; other work on the machine is not counted.
        trials: how many runs it is the best of.
    """

    epochs: list[Epoch] = field(default_factory=list)
    schedule: list[Setting] = field(default_factory=list)
    seconds: float = 0.0
    trials: int = 1

    @property
    def best(self) -> Epoch:
        """The epoch with the best validation accuracy: where one would have stopped, without a look at the test."""
        return max(self.epochs, key=lambda epoch: epoch.val_accuracy)


@torch.no_grad()
def evaluate(network: nn.Module, problem: Problem) -> Epoch:
    """The validation loss and the two accuracies."""
    val, test = network(problem.val.x)[0], network(problem.test.x)[0]
    return Epoch(
        F.cross_entropy(val, problem.val.y).item(),
        100 * (val.argmax(1) == problem.val.y).double().mean().item(),
        100 * (test.argmax(1) == problem.test.y).double().mean().item(),
    )


# -- training with hyperparameters that stay


def fixed(problem: Problem, setting: Setting, settings: Settings, *, seed: int) -> Training:
    """Train with hyperparameters that stay as they are; a training that has diverged is ended."""
    begin = time.process_time()
    training = Training(schedule=[setting])
    network = make_network(problem, settings, seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=setting.lr, momentum=setting.momentum)
    for epoch in batches(problem, settings, seed):
        for batch in epoch:
            optimizer.zero_grad()
            training_loss(network, batch, setting.rho).backward()
            optimizer.step()
        training.epochs.append(evaluate(network, problem))
        if not math.isfinite(training.epochs[-1].val_loss):
            break
    training.seconds = time.process_time() - begin
    return training


def draw_setting(random: np.random.Generator) -> Setting:
    """ρ uniform in [0, 4], η exponential with mean 0.1, μ uniform in [0, 1]."""
    return Setting(random.uniform(0, 4), random.exponential(0.1), random.uniform(0, 1))


def random_search(
    problem: Problem,
    settings: Settings,
    *,
    seed: int,
    seconds: float,
    watch: Callable[[Training], object] = lambda trial: None,
) -> Training:
    """Train with random hyperparameters, again and again, until the next run would end after this time.

    Args:
        problem: the problem.
        settings: of each run.
        seed: of the network, the batches and the drawing.
        seconds: of the processor, for all of them; at least one run is made.
        watch: called with each run.

    Returns:
        The run with the best validation accuracy, with the time that all of them took.
    """
    random = np.random.default_rng(seed)
    trials: list[Training] = []
    spent = 0.0
    while not trials or spent * (1 + 1 / len(trials)) <= seconds:
        trials.append(fixed(problem, draw_setting(random), settings, seed=seed))
        spent += trials[-1].seconds
        watch(trials[-1])
    best = max(trials, key=lambda trial: trial.best.val_accuracy)
    return Training(best.epochs, best.schedule, spent, len(trials))
