"""``python -m tests.benchmarks``: time over plain training and peak memory, side by side, in one run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tests.benchmarks import report
from tests.benchmarks.agreement import compare
from tests.benchmarks.catalogue import (
    LONG_STEPS,
    LONG_SYSTEMS,
    PLAIN,
    SCALING_STEPS,
    SCALING_WORKLOAD,
    SIZES,
    SYSTEMS,
    WORKLOADS,
)
from tests.benchmarks.figures import draw
from tests.benchmarks.runner import ROOT, FailedError, Measurement, rounds

CSV = ROOT / "build" / "benchmarks.csv"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=[w for w in WORKLOADS if w not in SIZES])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--repeats", type=int, default=7, help="processes per entry of the table (default 7)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="what ratios are made of: wall-clock time, or the processor's, for a machine with other work",
    )
    parser.add_argument("--quick", action="store_true", help="one repeat of a few steps: does it run?")
    parser.add_argument("--write", action="store_true", help="update docs/benchmarks.md, its figures and its CSV")
    options = parser.parse_args(arguments)
    if options.quick and options.write:
        parser.error("--quick measures nothing that is worth to --write")
    if options.clock == "cpu" and options.device != "cpu":
        parser.error("--clock cpu does not see what the device does")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.quick:
        options.repeats = 1
    options.systems = [system for system in SYSTEMS if system in {PLAIN, *options.systems}]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the hypergradients, then measure, then tell."""
    options = parse(arguments)
    here = [system for system in options.systems if SYSTEMS[system].installed]
    try:
        agreement = compare(options.workloads, here, options.device)
    except FailedError as error:
        raise SystemExit(f"the reference could not be computed: {error}") from error
    print(report.agreement_text(agreement, options.systems), end="\n\n", flush=True)

    jobs = [(w, WORKLOADS[w].check_steps if options.quick else WORKLOADS[w].steps) for w in options.workloads]
    sizes = [(w, WORKLOADS[w].steps) for w in SIZES]
    plans: list[tuple[list[tuple[str, int]], list[str], int]] = [(jobs, here, options.repeats)]
    if options.write:
        few = max(1, options.repeats // 2)
        scaling = [(SCALING_WORKLOAD, steps) for steps in SCALING_STEPS]
        plans.append(([job for job in scaling if job not in jobs], here, few))
        plans.append((sizes, here, few))
        plans.append(([(SCALING_WORKLOAD, LONG_STEPS)], [system for system in LONG_SYSTEMS if system in here], 1))
    results = report.Results(options.clock, agreement)
    for some, systems, repeats in plans:
        for outcome in rounds(some, systems, repeats, options.device):
            if isinstance(outcome, Measurement):
                results.measurements.append(outcome)
            else:
                workload, system, failure = outcome
                results.failures[workload, system] = str(failure)
    if not results.measurements:
        raise SystemExit("nothing could be measured: " + "; ".join(results.failures.values()))
    print(report.cost_text(results, jobs, options.systems), end="\n\n")
    if results.waiting() > 0.05 and options.clock == "wall":
        print("The machine was busy with other work. `--clock cpu` leaves waiting out of the times.\n")

    report.write_csv(results.measurements, CSV)
    written = [CSV]
    if options.write:
        parts = [report.agreement_text(agreement, options.systems), report.cost_text(results, jobs, options.systems)]
        long = [(SCALING_WORKLOAD, steps) for steps in (*SCALING_STEPS, LONG_STEPS)]
        parts += (report.cost_table(results, long, options.systems), report.cost_table(results, sizes, options.systems))
        titles = ("## Are they right?", "## What do they cost?", "## Over the number of steps", "## Over the size")
        report.write_docs("\n\n".join(text for pair in zip(titles, parts, strict=True) for text in pair))
        report.write_csv(results.measurements, report.ASSETS / "benchmarks.csv")
        written += [report.DOCS, report.ASSETS / "benchmarks.csv", *draw(results, here)]
    print("written: " + ", ".join(str(path.relative_to(ROOT)) for path in written))


if __name__ == "__main__":
    main()
