"""Phone classification: a training run that tunes its own hyperparameters while it goes on.

A network learns which phone each frame of recorded speech belongs to. While it trains, a second head predicts what
the phone sounds like in its context, a target that only the training frames have. Three hyperparameters decide how well
that goes: the weight ρ of the secondary task, the learning rate η and the momentum μ. Forward mode carries, beside the
weights, their derivatives with respect to the three, so that every few steps the hypergradient of a validation loss

    dE_val(w_t) / d(ρ, η, μ),    where w_t is where training stands,

is at hand, the three take a step, and training goes on from where it is. It is the third experiment of

    Franceschi, Donini, Frasconi, Pontil: Forward and Reverse Gradient-Based Hyperparameter Optimization. ICML 2017.

with real-time hyperparameter optimisation, so FORWARD-HG it is: `metaopt.stream`.

    python tutorials/02_phone_classification.py             one speaker, three seeds: a few minutes
    python tutorials/02_phone_classification.py --full      two speakers, five seeds, 20 epochs: the table of the docs
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from data import DataError
from phone_training import (
    Setting,
    Settings,
    Training,
    batches,
    evaluate,
    fixed,
    make_network,
    random_search,
    training_loss,
)
from phones import Problem, make_problem
from phones_report import Monitor, describe, draw, remarks, table
from recordings import Speech
from speech import VOICES, load_speech

import metaopt

# 1. The settings

VANILLA = Setting(rho=0.0, lr=0.075, momentum=0.5)
INFORMED = Setting(rho=1.6, lr=0.075, momentum=0.5)  # where RTHO begins: ρ was found by a grid search, by others
NULL = Setting(rho=0.0, lr=0.0, momentum=0.0)  # where RTHO-NT begins: the null teacher, who teaches nothing

FULL = Settings()
DEFAULT = Settings(epochs=10, every=25)
PLANTED = Settings(epochs=20, every=10)
QUICK = Settings(epochs=2, hidden=20, every=5, val_batch=100)


# 2. Training that tunes itself

Watcher = Callable[[metaopt.Streaming, metaopt.Hyperparameters], object]


def real_time(
    problem: Problem, start: Setting, settings: Settings, *, seed: int, watch: Watcher = lambda run, hyper: None
) -> Training:
    """Train, and move ρ, η and μ by the hypergradient every Δ steps.

    The loop is training as anybody writes it. `stream` watches it and carries the tangents along; at a hyper-step,
    `run.backward` turns a validation loss into the hyperparameters' `.grad`, and one step of projected Adam follows.
    Neither the weights nor the tangents start over.

    Args:
        problem: the frames. What is validated on is a fresh sample of the validation frames each time.
        start: where the hyperparameters begin.
        settings: the rest.
        seed: of the network, the batches and the samples.
        watch: called before each hyper-step, when the hypergradient is in `.grad`.

    Returns:
        The validation loss and the accuracies after each epoch, and the hyperparameters at each hyper-step.
    """
    begin = time.process_time()
    training = Training()
    sampler = torch.Generator().manual_seed(seed)

    hyper = metaopt.Hyperparameters(
        rho=metaopt.nonnegative(start.rho),
        lr=metaopt.nonnegative(start.lr),
        momentum=metaopt.box(start.momentum, 0, 0.9999),
    )
    hyper_optimizer = torch.optim.Adam(hyper.parameters(), lr=settings.hyper_lr)
    network = make_network(problem, settings, seed)
    optimizer = metaopt.optim.SGD(network.parameters(), lr=hyper.lr, momentum=hyper.momentum)

    with metaopt.stream(optimizer) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore", metaopt.HeldConstantWarning)  # `evaluate` takes numbers out, to print them
        for epoch in batches(problem, settings, seed):
            for batch in epoch:
                optimizer.zero_grad()
                training_loss(network, batch, hyper.rho).backward()
                optimizer.step()

                if run.steps % settings.every == 0:
                    sample = torch.randint(len(problem.val.y), (settings.val_batch,), generator=sampler)
                    hyper_optimizer.zero_grad()
                    run.backward(F.cross_entropy(network(problem.val.x[sample])[0], problem.val.y[sample]))
                    watch(run, hyper)
                    training.schedule.append(setting_of(hyper))
                    hyper_optimizer.step()
                    hyper.project_()  # back to ρ >= 0, η >= 0, 0 <= μ <= 0.9999
            training.epochs.append(evaluate(network, problem))

    training.schedule.append(setting_of(hyper))
    training.seconds = time.process_time() - begin
    return training


def setting_of(hyper: metaopt.Hyperparameters) -> Setting:
    """The hyperparameters as they are now."""
    return Setting(*(value.item() for value in hyper.values()))


# 3. The methods side by side


def compare(problem: Problem, settings: Settings, *, seed: int, monitor: Monitor) -> dict[str, Training]:
    """Every method once, from the same weights and over the same batches.

    Random search is given the processor time that RTHO took. "No steps" begins where RTHO-NT begins, at zero, and stays
    there: a control, which learns nothing.
    """
    with monitor.running("Vanilla"):
        vanilla = fixed(problem, VANILLA, settings, seed=seed)
    with monitor.running("RTHO"):
        rtho = real_time(problem, INFORMED, settings, seed=seed)
    with monitor.running("RS"):
        search = random_search(problem, settings, seed=seed, seconds=rtho.seconds)
    with monitor.running("RTHO-NT"):
        null = real_time(problem, NULL, settings, seed=seed)
    with monitor.running("No steps"):
        control = fixed(problem, NULL, settings, seed=seed)
    return {"Vanilla": vanilla, "RS": search, "RTHO": rtho, "RTHO-NT": null, "No steps": control}


def experiment(speech: Speech, settings: Settings, *, seeds: int, out: Path | None) -> dict[str, list[Training]]:
    """Compare the methods on one speaker and print what came of it; draw it too, unless `out` is None."""
    problems = [make_problem(speech, seed=seed) for seed in range(seeds)]
    print(describe(speech, problems[0], settings))
    with Monitor(5 * seeds, speech.name) as monitor:
        runs = [compare(problem, settings, seed=seed, monitor=monitor) for seed, problem in enumerate(problems)]
    results = {name: [run[name] for run in runs] for name in runs[0]}
    print("\n" + table(results, speech.name))
    print("\n" + remarks(results, problems))
    if out is not None:
        path = out / f"phones_{speech.name.lower()}.png"
        draw(path, f"{speech.name}, {seeds} seeds", results, settings)
        print(f"\nFigure saved as {path}\n")
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run the experiment."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    out = options.out if options.figure else None
    if out is not None and importlib.util.find_spec("matplotlib") is None:
        print("No figure will be drawn: matplotlib is not installed.")
        out = None
    try:
        speeches = [load_speech(voice, "festvox" if options.full else options.data) for voice in options.voices]
    except DataError as error:
        sys.exit(str(error))
    if options.quick:
        print("A quick run, to see that everything works. Its numbers mean nothing.")
    for speech in {speech.name: speech for speech in speeches}.values():
        settings = PLANTED if speech.name == "planted" else DEFAULT
        if options.full or options.quick:
            settings = FULL if options.full else QUICK
        experiment(speech, settings, seeds=options.seeds, out=out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        choices=["auto", "festvox", "planted"],
        default="auto",
        help="recorded speech, or synthetic frames; default: recorded if it can be had",
    )
    parser.add_argument("--voice", choices=[*VOICES, "both"], help="the speaker (default: ked; with --full, both)")
    parser.add_argument("--seeds", type=int, help="how many (default: 3; with --full 5, with --quick 1)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--full", action="store_true", help="20 epochs, two speakers, five seeds: the docs' table")
    length.add_argument("--quick", action="store_true", help="a few seconds, to see that everything works")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for the figures (default: %(default)s)"
    )
    parser.add_argument("--no-figure", dest="figure", action="store_false", help="print only")
    parser.add_argument("--threads", type=int, default=1, help="for torch; 0: as it likes (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.full and options.data == "planted":
        parser.error("--full is for recorded speech; leave out one of --full and --data planted.")
    if options.seeds is None:
        options.seeds = 5 if options.full else 1 if options.quick else 3
    if options.seeds < 1:
        parser.error("--seeds must be at least 1.")
    voice = options.voice or ("both" if options.full else "ked")
    options.voices = list(VOICES) if voice == "both" else [voice]
    return options


if __name__ == "__main__":
    main()
