"""Self-tuning networks on linear regression: does the hyperparameter find its optimum while the weights are trained?

A linear model has one hyperparameter: the coefficient of an L2 penalty, or the rate of a dropout on its inputs. For
both, the weights that training would end in are known in closed form, and so is the validation loss at each value. The
best value is then known too, and a method that tunes the hyperparameter along the way can be compared with the truth.
It is the first experiment of

    Bae, Grosse: Delta-STN: Efficient Bilevel Optimization for Neural Networks using Structured Response Jacobians.
    NeurIPS 2020.

Three responses are trained: STN's, uncentred, with one joint step for everything; the centred one; and Δ-STN's, centred
and linearised. A linear model is its own linearisation, so the last two differ by rounding alone.

    python tutorials/03_stn_linear_regression.py                      scikit-learn's diabetes data
    python tutorials/03_stn_linear_regression.py --data all           four UCI sets, as files or fetched
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from data import DataError
from stn_closed_form import LARGEST, optimum, validation
from torch import Tensor, nn
from uci import TASKS, Task, load_task

import metaopt

METHODS = {"stn": "STN", "centered": "centered STN", "delta": "Δ-STN"}
KINDS = {"l2": "log of the L2 coefficient", "dropout": "logit of the input dropout / 0.95"}


@dataclass(frozen=True)
class Settings:
    """How a run is trained.

    Args:
        steps: training steps.
        warmup: the first of them, in which the hyperparameter stays.
        lr: of the weights and the response, SGD with momentum 0.9.
        last: the share of ``lr`` that is left at the end of the run.
        hyper_lr: of the hyperparameter, RMSprop; it falls to zero along the run.
        batch: examples in a batch.
        antithetic: whether perturbations come in pairs of opposite sign.
        scale: σ of the perturbations, which stays; 1 is where the authors' code begins.
        start: the unconstrained hyperparameter at first.
        seeds: runs of each kind.
    """

    steps: int = 3000
    warmup: int = 300
    lr: float = 0.02
    last: float = 0.2
    hyper_lr: float = 0.05
    batch: int = 64
    antithetic: bool = True
    scale: float = 1.0
    start: float = 2.0
    seeds: int = 3


# 1. Training


def tune(task: Task, kind: str, method: str, seed: int, settings: Settings) -> list[float]:
    """Train once, and return the unconstrained hyperparameter after each step."""
    torch.manual_seed(seed)
    x, y = task.train
    layer = nn.Linear(x.shape[1], 1, bias=False)
    nn.init.zeros_(layer.weight)
    model: nn.Module = layer
    if kind == "l2":
        hyper = metaopt.Hyperparameters(l2=metaopt.positive(math.exp(settings.start), scale=settings.scale))
    else:
        model = nn.Sequential(nn.Dropout(), layer)
        rate = LARGEST / (1 + math.exp(-settings.start))
        hyper = metaopt.Hyperparameters(dropout=metaopt.interval(rate, 0, LARGEST, scale=settings.scale))
    tuned = metaopt.stn.transform(model, hyper, method, bind={} if kind == "l2" else {"dropout": "0"})

    def train_loss(model: Any, batch: Any, values: Any) -> Tensor:
        loss: Tensor = 0.5 * (model(batch[0]).squeeze(-1) - batch[1]).square().mean()
        return loss + 0.5 * metaopt.stn.l2(model, values.l2) if kind == "l2" else loss

    def valid_loss(model: Any, batch: Any) -> Tensor:
        loss: Tensor = 0.5 * (model(batch[0]).squeeze(-1) - batch[1]).square().mean()
        return loss

    trail = []
    with metaopt.stn.train(
        tuned,
        train_loss,
        valid_loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=settings.lr, momentum=0.9),
        hyper_optimizer=lambda p: torch.optim.RMSprop(p, lr=settings.hyper_lr),
        scale_optimizer=None,
        clip=1.0,
        antithetic=settings.antithetic,
        seed=seed,
    ) as tuner:
        for step in range(settings.steps + settings.warmup):
            index = torch.randperm(len(x))[: settings.batch]
            tuner.train_step((x[index], y[index]))
            if step >= settings.warmup and step % 5 == 0:
                left = 1 - (step - settings.warmup) / settings.steps
                tuner.hyper_optimizer.param_groups[0]["lr"] = settings.hyper_lr * max(left, 0.02)
                for optimizer in (tuner.optimizer, tuner.response_optimizer):
                    optimizer.param_groups[0]["lr"] = settings.lr * max(left, settings.last)
                tuner.valid_step(task.valid)
            trail.append(tuned.coordinates.leaf().item())
    return trail


# 2. The experiment


@dataclass(frozen=True)
class Result:
    """One run: its trail, the optimum, and what was lost by missing it."""

    task: Task
    kind: str
    method: str
    trail: list[float]
    best: float

    @property
    def end(self) -> float:
        """The mean over the last tenth of the run."""
        last = self.trail[-max(1, len(self.trail) // 10) :]
        return sum(last) / len(last)

    @property
    def error(self) -> float:
        """How far from the optimum it ended."""
        return abs(self.end - self.best)

    @property
    def regret(self) -> float:
        """The relative excess of the validation loss, with the weights of the closed form."""
        return validation(self.task, self.kind, self.end) / validation(self.task, self.kind, self.best) - 1


def experiment(tasks: Sequence[Task], settings: Settings) -> list[Result]:
    """Every task, kind and method, with a line for each."""
    results = []
    print(f"{'data':18}{'tuned':10}{'method':14}{'|λ - λ*|, each seed':26}{'regret':>9}{'seconds':>9}")
    for task in tasks:
        for kind in KINDS:
            best = optimum(task, kind)
            for method, title in METHODS.items():
                begin = time.perf_counter()
                runs = [
                    Result(task, kind, method, tune(task, kind, method, seed, settings), best)
                    for seed in range(settings.seeds)
                ]
                errors = " ".join(f"{run.error:.3f}" for run in runs)
                worst = max(run.regret for run in runs)
                seconds = (time.perf_counter() - begin) / len(runs)
                print(f"{task.name:18}{kind:10}{title:14}{errors:26}{worst:9.2%}{seconds:9.1f}", flush=True)
                results += runs
    return results


def summary(results: Sequence[Result]) -> None:
    """Mean and largest error of each method."""
    print()
    for kind in KINDS:
        for method, title in METHODS.items():
            runs = [run for run in results if (run.kind, run.method) == (kind, method)]
            errors, regrets = [run.error for run in runs], [run.regret for run in runs]
            print(
                f"{kind:8} {title:13} mean |λ - λ*| {sum(errors) / len(errors):.3f}, max {max(errors):.3f}; "
                f"mean regret {sum(regrets) / len(regrets):.2%}, max {max(regrets):.2%}"
            )


def draw(results: Sequence[Result], path: Path) -> None:
    """The trajectories, with the optimum as a line: a row for each hyperparameter, a column for each data set."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run.task.name for run in results))
    figure = Figure(figsize=(3.2 * len(names) + 0.8, 5.2), layout="constrained")
    axes = figure.subplots(len(KINDS), len(names), squeeze=False)
    for row, kind in enumerate(KINDS):
        for column, name in enumerate(names):
            ax = axes[row][column]
            for run in results:
                if (run.kind, run.task.name) == (kind, name):
                    number = list(METHODS).index(run.method)
                    ax.plot(run.trail, color=f"C{number}", linewidth=0.9, label=METHODS[run.method])
                    ax.axhline(run.best, color="black", linestyle="--", linewidth=0.8, label="optimum")
            ax.set_title(name, fontsize="medium")
            ax.set_xlabel("step")
        axes[row][0].set_ylabel(KINDS[kind])
    handles, labels = axes[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes[0][0].legend(list(unique.values()), list(unique), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run the experiment."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", choices=["diabetes", *TASKS, "all"], default="diabetes", help="all: the four UCI sets"
    )
    parser.add_argument("--folder", type=Path, help="where the UCI files are (default: uci in the tutorials' cache)")
    parser.add_argument("--seeds", type=int, default=Settings.seeds, help="runs of each kind (default: %(default)s)")
    parser.add_argument(
        "--simple", action="store_true", help="without pairs of perturbations, and at a constant rate of the weights"
    )
    parser.add_argument("--scale", type=float, default=Settings.scale, help="σ (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short run of each kind, to see that everything works")
    parser.add_argument("--out", type=Path, default=Path("results"), help="the figure's folder (default: %(default)s)")
    parser.add_argument("--no-figure", dest="figure", action="store_false", help="print only")
    parser.add_argument("--threads", type=int, default=1, help="for torch; 0: as it likes (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        tasks = [load_task(name, options.folder) for name in (TASKS if options.data == "all" else [options.data])]
    except DataError as error:
        sys.exit(str(error))
    settings = Settings(seeds=options.seeds, scale=options.scale)
    if options.simple:
        settings = replace(settings, antithetic=False, last=1.0)
    if options.quick:
        settings = replace(settings, steps=300, warmup=100, seeds=1)
        print("A quick run, to see that everything works. Its numbers mean nothing.")
    for task in tasks:
        print(f"{task.name}: {len(task.train[1])} to train, {len(task.valid[1])} to validate; {task.source}.")
    results = experiment(tasks, settings)
    summary(results)
    if options.figure and importlib.util.find_spec("matplotlib") is not None:
        path = options.out / "stn_linear_regression.png"
        draw(results, path)
        print(f"Figure saved as {path}")


if __name__ == "__main__":
    main()
