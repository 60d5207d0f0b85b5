"""Tables for the terminal and the documentation, and the CSV."""

from __future__ import annotations

import contextlib
import csv
import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path

from tests.benchmarks.agreement import TOLERANCE, WRONG, Agreement
from tests.benchmarks.catalogue import PLAIN, REFERENCE, SYSTEMS, WORKLOADS
from tests.benchmarks.runner import ROOT, Measurement

DOCS = ROOT / "docs" / "benchmarks.md"
ASSETS = ROOT / "docs" / "assets"
BEGIN, END = "<!-- benchmarks: begin (written by python -m tests.benchmarks --write) -->", "<!-- benchmarks: end -->"


@dataclass
class Results:
    """Everything that was measured.

    Attributes:
        clock: ``"wall"`` or ``"cpu"``: which of the two times the ratios are made of.
        failures: for each workload and system that failed, what it said.
    """

    clock: str
    agreement: Agreement
    measurements: list[Measurement] = field(default_factory=list)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def of(self, workload: str, system: str, steps: int) -> list[Measurement]:
        """The measurements of one entry of the table, by round."""
        return [m for m in self.measurements if (m.workload, m.system, m.steps) == (workload, system, steps)]

    def time(self, measurement: Measurement) -> float:
        """Seconds, by the clock."""
        return measurement.seconds if self.clock == "wall" else measurement.cpu_seconds

    def ratios(self, workload: str, system: str, steps: int) -> list[float]:
        """Time over that of plain training in the same round."""
        plain = {m.round: self.time(m) for m in self.of(workload, PLAIN, steps)}
        return [self.time(m) / plain[m.round] for m in self.of(workload, system, steps) if m.round in plain]

    def megabytes(self, workload: str, system: str, steps: int) -> float:
        """The median of the peak memory."""
        return statistics.median(m.bytes for m in self.of(workload, system, steps)) / 1e6

    def waiting(self) -> float:
        """How much longer than it computed a measurement took, in the median: 0 on an idle machine."""
        return statistics.median(m.seconds / m.cpu_seconds for m in self.measurements) - 1


# -- tables ---------------------------------------------------------------------------------------------


def agreement_table(agreement: Agreement, systems: Sequence[str]) -> str:
    """How far each system's hypergradient is from the reference's."""
    workloads = list(agreement.reference)
    rows = [["", *workloads]]
    rows.append(
        ["finite differences of the bare loop against the reference"]
        + [_words(agreement.reference[w], "agrees" if agreement.reference_holds(w) else "DIFFERS") for w in workloads]
    )
    for system in systems:
        if not SYSTEMS[system].hypergradient or system == REFERENCE:
            continue
        cells = []
        for workload in workloads:
            if (workload, system) in agreement.failures:
                cells.append(f"fails: {agreement.failures[workload, system]}")
            elif (workload, system) in agreement.errors:
                cells.append(_verdict(agreement, workload, system))
            else:
                cells.append("not installed")
        rows.append([SYSTEMS[system].title, *cells])
    return _table(rows)


def _verdict(agreement: Agreement, workload: str, system: str) -> str:
    for tolerance, word in ((WRONG, "DIFFERS"), (TOLERANCE, "close")):
        if beyond := agreement.beyond(tolerance, workload, system):
            return _words(beyond, word)
    return _words(agreement.errors[workload, system], "agrees")


def _words(errors: dict[str, float], word: str) -> str:
    if word == "agrees":
        return f"agrees ({max(errors.values()):.0e})"
    return f"{word}: " + ", ".join(f"{name} {error:.0e}" for name, error in errors.items())


def cost_table(results: Results, jobs: Sequence[tuple[str, int]], systems: Sequence[str]) -> str:
    """Time over plain training (median, range) and peak memory."""
    rows = [["", *(f"{workload}, T = {steps}" for workload, steps in jobs)]]
    for system in systems:
        rows.append([SYSTEMS[system].title, *(_cost(results, workload, system, steps) for workload, steps in jobs)])
    return _table(rows)


def _cost(results: Results, workload: str, system: str, steps: int) -> str:
    if not SYSTEMS[system].installed:
        return "not installed"
    if (workload, system) in results.failures:
        return f"fails: {results.failures[workload, system]}"
    ratios = results.ratios(workload, system, steps)
    if not ratios:
        return "-"
    memory = f"{results.megabytes(workload, system, steps):.0f} MB"
    if system == PLAIN:
        seconds = statistics.median(results.time(m) for m in results.of(workload, system, steps))
        return f"1 ({seconds:.2f} s) · {memory}"
    wrong = " †" if results.agreement.beyond(WRONG, workload, system) else ""
    span = f" ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}×{span} · {memory}{wrong}"


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


# -- words ----------------------------------------------------------------------------------------------


def machine(results: Results) -> str:
    """What it was measured on, and how quiet it was there."""
    first = results.measurements[0]
    where = _cpu() if first.device == "cpu" else f"{first.device} ({_cpu()})"
    count = max(m.round for m in results.measurements) + 1
    clock = {"wall": "wall-clock time", "cpu": "processor time of the process"}[results.clock]
    return (
        f"{datetime.date.today()}, {where}, {os.cpu_count()} cores, {first.threads} thread{'s' * (first.threads > 1)} "
        f"per process, {platform.system()}, Python {platform.python_version()}, {_versions(first.torch)}. Times are "
        f"{clock}, medians of {count} processes (least-greatest). For a second of computing, a process waited "
        f"{results.waiting():.2f} s for a processor that other programs used."
    )


def _versions(torch: str) -> str:
    names = [f"torch {torch}", f"metaopt {_commit()}"]
    for system in SYSTEMS.values():
        if system.package and system.installed:
            with contextlib.suppress(metadata.PackageNotFoundError):
                names.append(f"{system.package} {metadata.version(system.package)}")
    return ", ".join(names)


def _commit() -> str:
    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "--", "metaopt") else ""
        return git("log", "-1", "--format=%h", "--", "metaopt") + changed
    except (OSError, subprocess.CalledProcessError):
        return "(not in a checkout)"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def agreement_text(agreement: Agreement, systems: Sequence[str]) -> str:
    """The comparison of hypergradients, with what is known about the differences."""
    text = (
        "Relative differences of the hypergradients from those of autograd unrolled by hand, in float64, at T = "
        f"{', '.join(str(WORKLOADS[w].check_steps) for w in agreement.reference)}; the largest of all hyperparameters. "
        f"Up to {TOLERANCE:.0e} is agreement, up to {WRONG:.0e} is close."
    )
    notes = "\n".join(f"- {note}" for note in agreement.notes())
    return f"{text}\n\n{agreement_table(agreement, systems)}" + (f"\n\n{notes}" if notes else "")


def cost_text(results: Results, jobs: Sequence[tuple[str, int]], systems: Sequence[str]) -> str:
    """The table of costs, with the workloads and the machine."""
    titles = "\n".join(f"- {workload}: {WORKLOADS[workload].title}" for workload in dict.fromkeys(w for w, _ in jobs))
    mark = any(results.agreement.beyond(WRONG, workload, system) for workload, _ in jobs for system in systems)
    wrong = "\n\n† its hypergradient differs from the reference, see above." if mark else ""
    return (
        "Time over plain training, the median of five runs in a process after a first one (of one, where T > 200), as "
        "hyper-iterations follow one another; and "
        f"peak memory above what the process held before the first.\n\n{titles}\n\n"
        f"{cost_table(results, jobs, systems)}{wrong}\n\n{machine(results)}"
    )


# -- files ----------------------------------------------------------------------------------------------


def write_csv(measurements: Iterable[Measurement], path: Path) -> None:
    """Every measurement, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Measurement)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(m) for m in measurements)


def write_docs(text: str) -> None:
    """Put the text between the markers of the documentation's page."""
    page = DOCS.read_text()
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{DOCS} has lost its markers: {BEGIN} … {END}")
    DOCS.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
