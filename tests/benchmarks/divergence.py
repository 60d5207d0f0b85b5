"""Do runs end in NaN? A literal Δ-STN beside ours, from a far start with wide perturbations.

python -m tests.benchmarks.divergence

Linear regression with an L2 penalty ``e^λ`` or with input dropout, from ``λ = 3`` with ``σ = 1``. The literal one has
what the algorithm's formulas say and no more: a dropout rate ``sigmoid(λ)`` that comes near 1, perturbations that
enter the response as they are, and gradients of any size. Ours has rates below 0.95, standardised perturbations, and
gradients clipped at 1.
"""

from __future__ import annotations

__all__ = ["KINDS", "literal", "ours"]

import importlib
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from metaopt.errors import SkippedStepWarning

sys.path.insert(0, str(Path(__file__).parents[2] / "tutorials"))

KINDS = ("l2", "dropout")
START, SCALE, LR, HYPER_LR, BATCH, WARMUP = 3.0, 1.0, 0.02, 0.05, 64, 300


def literal(task: Any, kind: str, seed: int, steps: int = 3000) -> float:
    """λ at the end of a run of the formulas, or NaN."""
    torch.manual_seed(seed)
    x, y = task.train
    width = x.shape[1]
    w0, u = Parameter(torch.zeros(width)), Parameter(torch.zeros(()))
    v = Parameter((2 * torch.rand(width) - 1) / math.sqrt(width))
    leaf = Parameter(torch.tensor(START))
    weights, response = (torch.optim.SGD(group, lr=LR, momentum=0.9) for group in ([w0], [u, v]))
    hyper = torch.optim.RMSprop([leaf], lr=HYPER_LR)

    def loss(rows: Tensor, targets: Tensor, points: Tensor, w: Tensor) -> Tensor:
        """Of weights ``(B, d)`` or ``(d,)`` at each example's point."""
        if kind == "dropout":
            rates = torch.sigmoid(points)[:, None]
            rows = rows * (torch.rand_like(rows) >= rates) / (1 - rates)
        fit = 0.5 * ((rows * w).sum(1) - targets).square()
        return (fit + 0.5 * points.exp() * w.square().sum(-1) if kind == "l2" else fit).mean()

    def descend(value: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    for step in range(steps + WARMUP):
        index = torch.randperm(len(x))[:BATCH]
        point = leaf.detach().expand(len(index))
        descend(loss(x[index], y[index], point, w0), weights)
        noise = SCALE * torch.randn(len(index))
        descend(loss(x[index], y[index], point + noise, w0.detach() + (u * noise)[:, None] * v), response)
        if step >= WARMUP and step % 5 == 0:
            w = w0.detach() + (u * v).detach() * (leaf - leaf.detach())
            hyper.param_groups[0]["lr"] = HYPER_LR * (1 - (step - WARMUP) / steps)
            descend(0.5 * (task.valid[0] @ w - task.valid[1]).square().mean(), hyper)
        if not torch.isfinite(torch.cat([w0.detach(), v.detach(), leaf.detach().reshape(1)])).all():
            return math.nan
    return leaf.item()


def ours(task: Any, kind: str, seed: int, steps: int = 3000) -> float:
    """λ at the end of the tutorial's run from the same start; NaN if that, or a weight, is not finite."""
    tutorial = importlib.import_module("03_stn_linear_regression")
    settings = tutorial.Settings(steps=steps, warmup=WARMUP, scale=SCALE, antithetic=False, last=1.0, start=START)
    with warnings.catch_warnings():
        # A step that is left out is the guard's work, not a failure.
        warnings.simplefilter("ignore", SkippedStepWarning)
        return tutorial.tune(task, kind, "delta", seed, settings)[-1]


def main() -> None:
    """A line for each kind: how many of four tasks and three seeds diverge."""
    torch.set_num_threads(1)
    closed_form, uci = importlib.import_module("stn_closed_form"), importlib.import_module("uci")
    print(f"{'tuned':10}{'literal: NaN':>14}{'ours: NaN':>12}{'ours: mean |λ - λ*|':>22}{'max':>8}")
    for kind in KINDS:
        first, second, errors = 0, 0, []
        for name in uci.TASKS:
            task = uci.load_task(name)
            best = closed_form.optimum(task, kind)
            for seed in range(3):
                first += math.isnan(literal(task, kind, seed))
                end = ours(task, kind, seed)
                second += not math.isfinite(end)
                errors.append(abs(end - best))
        print(f"{kind:10}{first:11} /12{second:9} /12{sum(errors) / 12:22.3f}{max(errors):8.3f}", flush=True)


if __name__ == "__main__":
    main()
