"""Data hyper-cleaning: find the wrong labels of a training set by the hypergradient of its examples' weights.

Half of the training labels are wrong, and nothing says which. Each training example i gets a weight, and a model is
trained on the weighted loss. A small set of clean examples then tells how good that training was, and the hypergradient

    dE_val(w_T) / d weight_i,    where w_T is what T steps of gradient descent make of the weights,

says for each training example whether the clean set would be served better by more of it or by less. Descending it
sends the weights of the wrong examples to zero. It is the first experiment of

    Franceschi, Donini, Frasconi, Pontil: Forward and Reverse Gradient-Based Hyperparameter Optimization. ICML 2017.

with thousands of hyperparameters, so REVERSE-HG it is: `metaopt.record`.

    python tutorials/01_data_hypercleaning.py             2 000 examples to clean: under a minute
    python tutorials/01_data_hypercleaning.py --full      the paper's 5 000 examples and four radii: some ten minutes
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from data import DataError, Dataset, load_dataset
from hypercleaning import (
    DISCARDED,
    Problem,
    Scores,
    accuracy,
    disagreement,
    f1,
    fit,
    join,
    make_problem,
    softmax_regression,
)
from hypercleaning_report import Monitor, describe, draw, remarks, table
from torch import Tensor

import metaopt

# 1. The settings


@dataclass(frozen=True)
class Settings:
    """How large the problem is, and how it is solved.

    Args:
        sizes: how many examples to train, to validate and to test on.
        radii: the bounds R on the sum of the weights; one cleaning each.
        steps: T, the steps of a training run.
        lr: its learning rate, as if the loss were a mean over R examples.
        hyper_steps: how often the example weights are moved. They start at R / N, so
            `hyper_steps * hyper_lr` must be well above that, or none can reach zero.
        hyper_lr: Adam's learning rate for them.
        fit_steps: the steps of the final, unweighted fits, the same for every method.
    """

    sizes: tuple[int, int, int]
    radii: tuple[int, ...]
    steps: int = 50
    lr: float = 0.2
    hyper_steps: int = 30
    hyper_lr: float = 0.02
    fit_steps: int = 100


SETTINGS = {
    "MNIST": Settings((2000, 1000, 10_000), (400,)),
    "digits": Settings((800, 200, 740), (160,), lr=0.5, fit_steps=200),
}
# Sizes and radii are the paper's; T and the hyper-iterations are fewer than in its authors' code (T from 128 up).
PAPER = Settings((5000, 5000, 10_000), (1000, 1500, 2000, 2500), steps=100, hyper_steps=60, fit_steps=400)


# 2. Cleaning

Watcher = Callable[[Tensor, float], object]


def clean(problem: Problem, radius: float, settings: Settings, watch: Watcher) -> Tensor:
    """Learn a weight in [0, 1] for each training example, all of them together at most `radius`.

    The loop in the middle is training as anybody writes it. Around it, `record` watches; below it, `run.backward` sends
    the validation loss back through all its steps into the weights' `.grad`, and one step of projected Adam follows.

    Args:
        problem: the examples. Which labels are wrong is not looked at.
        radius: R.
        settings: the rest.
        watch: called at each hyper-iteration with the weights (their `.grad` is the hypergradient) and the validation
            loss after training with them.

    Returns:
        The learnt weights.
    """
    x, y = problem.train
    x_val, y_val = problem.val
    n = len(y)

    hyper = metaopt.Hyperparameters(weights=metaopt.l1_box(torch.full((n,), radius / n), radius=radius))
    hyper_optimizer = torch.optim.Adam(hyper.parameters(), lr=settings.hyper_lr)
    model = softmax_regression(x.shape[1])
    optimizer = metaopt.optim.SGD(model.parameters(), lr=settings.lr * n / radius)

    for _ in range(settings.hyper_steps):
        with metaopt.record(optimizer) as run:
            for _ in range(settings.steps):
                optimizer.zero_grad()
                loss = (hyper.weights * F.cross_entropy(model(x), y, reduction="none")).mean()
                loss.backward()
                optimizer.step()
        val_loss = F.cross_entropy(model(x_val), y_val)

        hyper_optimizer.zero_grad()
        run.backward(val_loss)  # the hypergradient, into hyper.weights.grad
        watch(hyper.weights, val_loss.item())
        hyper_optimizer.step()
        hyper.project_()  # back to 0 <= weights <= 1, sum <= R
        run.rewind()  # the model back to zero, for the next hyper-iteration

    return hyper.weights.detach().clone()


# 3. Was it any good?


def references(problem: Problem, steps: int) -> dict[str, Scores]:
    """What cleaning is to be compared with.

    The oracle knows which labels are wrong and leaves them out; the baseline trains on everything. "V only" throws the
    whole training set away and trains on the clean validation examples alone: a control that the poster lacks.
    """
    everything = torch.ones(len(problem.truth), dtype=torch.bool)
    oracle = fit(join(problem.train, ~problem.corrupted, problem.val), steps=steps)
    baseline = fit(join(problem.train, everything, problem.val), steps=steps)
    val_only = fit(problem.val, steps=steps)
    suspects = disagreement(val_only, problem.train)
    return {
        "Oracle": Scores(accuracy(oracle, problem.test), 1.0),
        "Baseline": Scores(accuracy(baseline, problem.test), None),
        "V only": Scores(accuracy(val_only, problem.test), f1(suspects, problem.corrupted)),
    }


def judge(problem: Problem, weights: Tensor, steps: int) -> Scores:
    """Train, unweighted, on the examples that were kept and the validation examples; and were the right ones kept?"""
    discarded = weights < DISCARDED
    model = fit(join(problem.train, ~discarded, problem.val), steps=steps)
    return Scores(accuracy(model, problem.test), f1(discarded, problem.corrupted))


# 4. The experiment


def experiment(dataset: Dataset, settings: Settings, *, seed: int, out: Path | None) -> dict[str, Scores]:
    """Clean with every radius and print what came of it; draw it too, unless `out` is None."""
    problem = make_problem(dataset, settings.sizes, seed=seed)
    print(describe(dataset, problem))
    scores = references(problem, settings.fit_steps)
    for radius in settings.radii:
        name, begin = f"DH-{radius}", time.perf_counter()
        with Monitor(settings.hyper_steps, f"Cleaning, R = {radius}") as monitor:
            weights = clean(problem, radius, settings, monitor)
        print(f"{name}: {settings.hyper_steps} hyper-iterations in {time.perf_counter() - begin:.0f} s.")
        scores[name] = judge(problem, weights, settings.fit_steps)
        if out is not None:
            path = out / f"hypercleaning_{dataset.name.lower()}_R{radius}.png"
            title = f"{dataset.name}, R = {radius}: F1 {scores[name].f1:.3f}"
            draw(path, title, problem, weights, monitor.losses)
            print(f"{name}: figure saved as {path}")
    print("\n" + table(scores, settings.sizes[0]))
    print("\n" + remarks(scores))
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run the experiment."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        dataset = load_dataset("mnist" if options.full else options.data)
    except DataError as error:
        sys.exit(str(error))
    settings = PAPER if options.full else SETTINGS[dataset.name]
    if options.quick:
        settings = replace(settings, steps=10, hyper_steps=5, hyper_lr=0.1, fit_steps=20)
        print("A quick run, to see that everything works. Its numbers mean nothing.")
    out = options.out if options.figure else None
    if out is not None and importlib.util.find_spec("matplotlib") is None:
        print("No figure will be drawn: matplotlib is not installed.")
        out = None
    experiment(dataset, settings, seed=options.seed, out=out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", choices=["auto", "mnist", "digits"], default="auto", help="default: MNIST if it can be had"
    )
    parser.add_argument("--full", action="store_true", help="the paper's setting: 5000/5000/10000 examples, four radii")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that everything works")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the wrong labels")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for the figures (default: %(default)s)"
    )
    parser.add_argument("--no-figure", dest="figure", action="store_false", help="print only")
    parser.add_argument("--threads", type=int, default=1, help="for torch; 0: as it likes (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.full and options.data == "digits":
        parser.error("--full is the paper's setting, and that is MNIST's; leave out one of --full and --data digits.")
    return options


if __name__ == "__main__":
    main()
