"""Starts one process per measurement, and interleaves them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
THREADS = 1
TIMEOUT = 1800  # seconds


class FailedError(Exception):
    """A measurement's process failed; the text is the last line of what it said."""


@dataclass(frozen=True)
class Measurement:
    """The cost of one whole run; ``first`` where it is not a repetition, ``last`` the peak after all repetitions."""

    workload: str
    system: str
    steps: int
    round: int
    seconds: float
    cpu_seconds: float
    bytes: int
    torch: str
    threads: int
    device: str
    first_seconds: float = float("nan")
    first_cpu_seconds: float = float("nan")
    last_bytes: int = 0


def ask(workload: str, system: str, what: str, steps: int, device: str) -> dict[str, Any]:
    """The answer of a fresh process (see `measure`).

    Raises:
        FailedError: if there is none.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(THREADS))
    command = [sys.executable, "-m", "tests.benchmarks.measure", workload, system]
    command += ["--what", what, "--steps", str(steps), "--device", device]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise FailedError(f"no answer in {TIMEOUT} seconds") from None
    if done.returncode:
        raise FailedError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rounds(
    jobs: Sequence[tuple[str, int]], systems: Sequence[str], repeats: int, device: str
) -> Iterator[Measurement | tuple[str, str, FailedError]]:
    """The cost of every job (workload, steps) by every system, again in each round.

    Within a round the systems follow one another, so that they meet the same weather; their order turns from round to
    round. A system that fails at a job is reported once and not asked again.
    """
    failed: set[tuple[str, int, str]] = set()
    total = repeats * len(jobs) * len(systems)
    done = 0
    for round_ in range(repeats):
        for workload, steps in jobs:
            for system in _turned(systems, round_):
                done += 1
                show(f"{done} of {total}: {workload}, T = {steps}, {system}")
                if (workload, steps, system) in failed:
                    continue
                try:
                    answer = ask(workload, system, "cost", steps, device)
                except FailedError as error:
                    failed.add((workload, steps, system))
                    yield workload, system, error
                    continue
                yield Measurement(workload, system, steps, round_, **answer)
    show("")


def _turned(items: Sequence[str], by: int) -> Iterable[str]:
    by %= len(items)
    return [*items[by:], *items[:by]]


def show(text: str) -> None:
    """Say what goes on, on one line of the terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
