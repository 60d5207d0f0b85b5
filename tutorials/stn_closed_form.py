"""Linear regression with an L2 penalty or input dropout: where weights and hyperparameter end, without training."""

from __future__ import annotations

__all__ = ["LARGEST", "optimal_weights", "optimum", "resting_point", "validation"]

import math

import torch
from torch import Tensor
from uci import Task

# The bound of a dropout rate.
LARGEST = 0.95


def optimal_weights(task: Task, kind: str, point: float) -> Tensor:
    """Where training ends: ridge regression, with dropout as an L2 penalty of each input by its second moment."""
    x, y = task.train
    gram, moment = x.T @ x / len(x), x.T @ y / len(x)
    if kind == "l2":
        return torch.linalg.solve(gram + math.exp(point) * torch.eye(len(gram)), moment)
    rate = LARGEST / (1 + math.exp(-point))
    return torch.linalg.solve(gram + rate / (1 - rate) * torch.diag(gram.diag()), moment)


def validation(task: Task, kind: str, point: float) -> float:
    """The validation loss after training at a fixed hyperparameter."""
    x, y = task.valid
    return float(0.5 * (x @ optimal_weights(task, kind, point) - y).square().mean())


def optimum(task: Task, kind: str) -> float:
    """The unconstrained hyperparameter with the least validation loss, on a fine grid."""
    grid = [i / 100 for i in range(-700, 401)]
    return min(grid, key=lambda point: validation(task, kind, point))


def resting_point(task: Task, kind: str, method: str, scale: float) -> float:
    """Where the hyperparameter comes to rest if weights and response are always trained to the end.

    The expected training loss is a quadratic in ``w0`` and ``Θ``, with the moments ``E[c(λ + ε) ε^k]`` of the penalty.
    A joint step minimises it by both; the separate steps have ``w0`` of ridge regression, and ``Θ`` given that. λ rests
    where ``Θᵀ ∇L_V(w0)`` changes sign: not where the optimum is, since neither ``w0`` nor ``Θ`` is what it is for
    ``σ → 0``.
    """
    x, y = (t.double() for t in task.train)
    inputs, targets = (t.double() for t in task.valid)
    gram, moment = x.T @ x / len(x), x.T @ y / len(x)
    penalty = torch.eye(len(gram), dtype=x.dtype) if kind == "l2" else torch.diag(gram.diag())
    noise = torch.linspace(-6, 6, 241, dtype=x.dtype)
    density = torch.softmax(-noise.square() / 2, 0)

    def coefficient(point: Tensor) -> Tensor:
        rate = LARGEST * torch.sigmoid(point)
        return point.exp() if kind == "l2" else rate / (1 - rate)

    def slope(point: Tensor) -> Tensor:
        c = density * coefficient(point + scale * noise)
        zeroth, first, second = ((c * (scale * noise) ** k).sum() * penalty for k in range(3))
        if method == "stn":
            rows = [torch.cat([gram + zeroth, first], 1), torch.cat([first, scale**2 * gram + second], 1)]
            weights, response = torch.linalg.solve(torch.cat(rows), torch.cat([moment, 0 * moment])).chunk(2)
        else:
            weights = torch.linalg.solve(gram + coefficient(point) * penalty, moment)
            response = -torch.linalg.solve(scale**2 * gram + second, first @ weights)
        return response @ (inputs.T @ (inputs @ weights - targets))

    grid = torch.linspace(-7, 4, 1101, dtype=x.dtype)
    slopes = torch.stack([slope(point) for point in grid])
    (ends,) = torch.where((slopes[:-1] < 0) & (slopes[1:] >= 0))
    return float(min((grid[int(i)] for i in ends), key=lambda point: abs(point - optimum(task, kind)), default=grid[0]))
