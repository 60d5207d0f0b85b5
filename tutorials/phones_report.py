"""How phone classification is shown: a progress bar, a table beside the published one, and a figure."""

from __future__ import annotations

__all__ = ["TIMIT", "Monitor", "describe", "draw", "gain", "mean_error", "remarks", "table"]

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from phone_training import Settings, Training
from phones import Problem
from recordings import Speech

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = dict[str, list[Training]]  # for each method its runs, one a seed


class Published(NamedTuple):
    """Frame accuracy in percent and minutes, as published for TIMIT."""

    accuracy: float
    minutes: float


TIMIT = {
    "Vanilla": Published(59.81, 12),
    "RS": Published(60.36, 300),
    "RTHO": Published(61.97, 164),
    "RTHO-NT": Published(61.38, 289),
}


# -- in words


class Monitor:
    """Shows how far the comparison has come. A bar if tqdm is installed, else lines.

    Args:
        total: how many training runs (random search is one) there will be.
        title: what is going on.
    """

    def __init__(self, total: int, title: str) -> None:
        self._total = total
        self._title = title
        self._done = 0
        self._bar: Any = None

    def __enter__(self) -> Self:
        try:
            from tqdm import tqdm
        except ImportError:
            return self
        self._bar = tqdm(total=self._total, desc=self._title, unit="run", file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Around one training run."""
        begin = time.perf_counter()
        if self._bar is not None:
            self._bar.set_postfix_str(name)
        yield
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        else:
            seconds = time.perf_counter() - begin
            print(f"{self._title}: {self._done}/{self._total}, {name}, {seconds:.0f} s", file=sys.stderr, flush=True)


def describe(speech: Speech, problem: Problem, settings: Settings) -> str:
    """Which data, from where, and what is done with it."""
    sizes = [len(part.y) for part in (problem.train, problem.val, problem.test)]
    return (
        f"Data: {speech.name}, {speech.source.rstrip('.')}.\n"
        f"{len(speech.recordings)} recorded diphones, {len(problem.phones)} phones; "
        f"with the first seed {sizes[0]} frames to train, {sizes[1]} to validate and {sizes[2]} to test on,\n"
        f"no diphone in two of them. {settings.epochs} epochs; a hyper-step every {settings.every} steps."
    )


def mean_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, None of a single value."""
    array = np.asarray(values, dtype=float)
    return array.mean().item(), (array.std(ddof=1) / len(array) ** 0.5).item() if len(array) > 1 else None


def in_words(values: Sequence[float], digits: int = 2) -> str:
    """A mean and its standard error."""
    mean, error = mean_error(values)
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def accuracies(runs: list[Training]) -> list[float]:
    """On the test frames, at the epoch that is the best on the validation frames."""
    return [run.best.test_accuracy for run in runs]


def table(results: Results, name: str) -> str:
    """Every method's accuracy and time, beside TIMIT's."""
    seeds = len(results["Vanilla"])
    ours = f"{name}, this run, " + (f"mean of {seeds} seeds" if seeds > 1 else "one seed")
    lines = [f"{'':10}{ours:>32}   {'TIMIT, as published':>26}", f"{'':10}{'accuracy %':>16}{'CPU s':>16}"]
    lines[1] += f"   {'accuracy %':>13}{'time min':>13}"
    for method, runs in results.items():
        row = f"{method:10}{in_words(accuracies(runs)):>16}{in_words([run.seconds for run in runs], 1):>16}"
        if method in TIMIT:
            row += f"   {TIMIT[method].accuracy:13.2f}{TIMIT[method].minutes:13.0f}"
        lines.append(row)
    return "\n".join(lines)


def gain(results: Results, method: str, other: str) -> str:
    """By how much a method is ahead of another, seed by seed."""
    pairs = zip(accuracies(results[method]), accuracies(results[other]), strict=True)
    ahead = [ours - theirs for ours, theirs in pairs]
    return f"{method} - {other}: {in_words(ahead)} points, ahead in {sum(x > 0 for x in ahead)} of {len(ahead)} seeds"


def remarks(results: Results, problems: Sequence[Problem]) -> str:
    """What the table can and can't show."""
    vanilla, null = (mean_error(accuracies(results[name]))[0] for name in ("Vanilla", "RTHO-NT"))
    chance = mean_error([problem.chance for problem in problems])[0]
    trials = mean_error([run.trials for run in results["RS"]])[0]
    return (
        "Accuracy: single frames of the test diphones, at the epoch that is the best on the validation diphones.\n"
        "TIMIT's figures are not of this run: it is another corpus, with other features and a larger network.\n"
        f"RS had RTHO's processor time, enough for {trials:.1f} runs on average.\n"
        f"{gain(results, 'RTHO', 'Vanilla')}.\n"
        f"{gain(results, 'RTHO', 'RS')}.\n"
        f"RTHO-NT begins with ρ = η = μ = 0 and reaches {100 * null / vanilla:.0f} % of Vanilla's accuracy. No steps "
        "is the same without\n"
        f"hyper-steps: it learns nothing (always saying the commonest phone is right {chance:.2f} % of the time)."
    )


# -- in a picture

INK, COLOURS = "#22303c", {"Vanilla": "#8d99a6", "RTHO": "#2a9d8f", "RTHO-NT": "#e76f51"}
PANELS = {
    "rho": "ρ, weight of the secondary task",
    "lr": "η, learning rate",
    "momentum": "μ, momentum",
}


def draw(path: Path, title: str, results: Results, settings: Settings) -> None:
    """Save a figure of the three hyperparameters over training, and of the validation loss."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK}
    style |= dict.fromkeys(["axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"], INK)
    with rc_context(style):
        figure = Figure(figsize=(12.5, 3.6), layout="constrained", facecolor="white")
        figure.suptitle(f"Hyperparameters that move while the network trains: {title}", fontsize=13, fontweight="bold")
        *schedules, losses = figure.subplots(1, 4)
        for axes, (key, label) in zip(schedules, PANELS.items(), strict=True):
            draw_schedule(axes, key, results, settings)
            axes.set_title(label, loc="left", fontsize=11)
        draw_losses(losses, results)
        losses.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def draw_schedule(axes: Axes, key: str, results: Results, settings: Settings) -> None:
    """One hyperparameter over training."""
    axes.axhline(getattr(results["Vanilla"][0].schedule[0], key), color=COLOURS["Vanilla"], linewidth=1.5)
    for method in ("RTHO", "RTHO-NT"):
        curves = [[getattr(setting, key) for setting in run.schedule] for run in results[method]]
        draw_curves(axes, method, curves, settings.every)
    axes.set(xlabel="training step")
    axes.set_ylim(bottom=0)


def draw_losses(axes: Axes, results: Results) -> None:
    """The validation loss after each epoch."""
    for method in COLOURS:
        draw_curves(axes, method, [[epoch.val_loss for epoch in run.epochs] for run in results[method]], 1)
    axes.set(xlabel="epoch")
    axes.set_title("validation loss", loc="left", fontsize=11)


def draw_curves(axes: Axes, method: str, curves: list[list[float]], unit: int) -> None:
    """Each seed a thin line, and their mean, as far as all of them go, a thick one."""
    for curve in curves:
        axes.plot(unit * np.arange(1, len(curve) + 1), curve, color=COLOURS[method], linewidth=0.7, alpha=0.45)
    mean = np.mean([curve[: min(map(len, curves))] for curve in curves], axis=0)
    axes.plot(unit * np.arange(1, len(mean) + 1), mean, color=COLOURS[method], linewidth=2.2, label=method)
