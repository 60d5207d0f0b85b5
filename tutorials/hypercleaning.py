"""What surrounds data hyper-cleaning: the problem with its wrong labels, plain training, and the scores.

The cleaning itself, the part that needs metaopt, is in `01_data_hypercleaning.py`.
"""

from __future__ import annotations

__all__ = [
    "DISCARDED",
    "Part",
    "Problem",
    "Scores",
    "accuracy",
    "auc",
    "corrupt_labels",
    "disagreement",
    "f1",
    "fit",
    "join",
    "make_problem",
    "softmax_regression",
    "split",
]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from data import Dataset
from torch import Tensor, nn

CLASSES = 10
DISCARDED = 1e-3  # an example whose weight is below is thrown out


class Part(NamedTuple):
    """Examples: pixels in [0, 1], one image a row, and labels."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Problem:
    """A training set with wrong labels, and clean examples to validate and to test on."""

    train: Part
    val: Part
    test: Part
    truth: Tensor

    @property
    def corrupted(self) -> Tensor:
        """Which training labels are wrong. The cleaner never sees this."""
        return self.train.y != self.truth


class Scores(NamedTuple):
    """A method's accuracy on the test examples, and the F1 of its finding the corrupted ones, if it looks for them."""

    accuracy: float
    f1: float | None


def make_problem(dataset: Dataset, sizes: Sequence[int], *, seed: int = 0, fraction: float = 0.5) -> Problem:
    """Balanced training, validation and test examples; a fraction of the training labels is made wrong.

    Args:
        dataset: where the examples come from.
        sizes: how many to train, to validate and to test on.
        seed: of the split and of the wrong labels.
        fraction: of the training labels that become wrong.

    Returns:
        The problem.
    """
    generator = torch.Generator().manual_seed(seed)
    train, val, test = split(dataset.labels, sizes, generator)
    truth = dataset.labels[train]
    given = corrupt_labels(truth, fraction, generator)
    return Problem(
        train=Part(dataset.pixels(train), given),
        val=Part(dataset.pixels(val), dataset.labels[val]),
        test=Part(dataset.pixels(test), dataset.labels[test]),
        truth=truth,
    )


def split(labels: Tensor, sizes: Sequence[int], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Disjoint random index sets of these sizes, each with the classes in equal numbers (or one apart)."""
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = [shuffled[labels[shuffled] == c] for c in range(CLASSES)]
    depth = min(len(index) for index in by_class)
    rounds = torch.stack([index[:depth] for index in by_class], dim=1).flatten()
    if sum(sizes) > len(rounds):
        raise ValueError(f"{sum(sizes)} balanced examples were asked for and there are {len(rounds)}: ask for fewer.")
    return rounds[: sum(sizes)].split(list(sizes))


def corrupt_labels(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Replace a random fraction of the labels, each by one of the nine wrong classes, all nine equally likely."""
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, CLASSES, chosen.shape, generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % CLASSES
    return noisy


def softmax_regression(pixels: int) -> nn.Linear:
    """`x @ W.T + b`, all zeros."""
    model = nn.Linear(pixels, CLASSES)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def fit(part: Part, *, steps: int = 400, lr: float = 0.1, momentum: float = 0.9) -> nn.Linear:
    """Train on these examples, unweighted, by full-batch gradient descent.

    With momentum 0.9, 400 steps go about as far as 4 000 plain ones of the same learning rate.
    """
    model = softmax_regression(part.x.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(part.x), part.y).backward()
        optimizer.step()
    return model


def join(part: Part, keep: Tensor, other: Part) -> Part:
    """The examples of the one part that are kept, and all of the other."""
    return Part(torch.cat([part.x[keep], other.x]), torch.cat([part.y[keep], other.y]))


def disagreement(model: nn.Module, part: Part) -> Tensor:
    """Where the model's own label is not the given one."""
    with torch.no_grad():
        return model(part.x).argmax(1) != part.y


def accuracy(model: nn.Module, part: Part) -> float:
    """How many of these examples the model gets right, in percent."""
    return 100 * (1 - disagreement(model, part).double().mean().item())


def f1(found: Tensor, wanted: Tensor) -> float:
    """Harmonic mean of precision and recall, of two masks; corrupted examples are the positives."""
    hits = (found & wanted).sum().item()
    return 2 * hits / max(1, (found.sum() + wanted.sum()).item())


def auc(score: Tensor, wanted: Tensor) -> float:
    """The probability that a wanted example scores higher than another one (ties count half)."""
    values, rank = score.unique(return_inverse=True)
    counts = torch.bincount(rank, minlength=len(values)).double()
    midrank = (counts.cumsum(0) - (counts - 1) / 2)[rank]
    positives, negatives = wanted.sum().item(), (~wanted).sum().item()
    return (midrank[wanted].sum().item() - positives * (positives + 1) / 2) / (positives * negatives)
