"""After how many steps is it worth to compile? ``python -m tests.benchmarks.compiling``

What compiling takes is the difference between a process's first run and its later ones, with empty caches; what it
saves, the difference between a step with and without it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from tests.benchmarks.catalogue import WORKLOADS
from tests.benchmarks.systems import record
from tests.benchmarks.workloads import make

STEPS = 20
BACKENDS = ("aot_eager", "inductor")


def runs(workload: str, backend: str | None, count: int) -> list[float]:
    """Seconds of some runs, one after the other."""
    run = record() if backend is None else record(compile=backend)
    found = []
    for _ in range(count):
        problem = make(workload)
        begin = time.perf_counter()
        run(problem, STEPS)
        found.append(time.perf_counter() - begin)
    return found


def measure(workload: str, backend: str) -> None:
    """A line of the table."""
    torch.set_num_threads(1)
    runs(workload, None, 2)
    plain = statistics.median(runs(workload, None, 7))
    first, *others = runs(workload, backend, 9)
    later = statistics.median(others[2:])
    saved = (plain - later) / STEPS
    worth = f"{(first - later) / saved:,.0f} steps" if saved > 0.02 * plain / STEPS else "never"
    step = f"{1e3 * plain / STEPS:.1f} ms | {1e3 * saved:+.1f} ms"
    print(f"| {workload} | {backend} | {first - later:.1f} s | {step} | {worth} |")


def main() -> None:
    """A process for each entry, with caches of its own."""
    if len(sys.argv) == 3:
        measure(sys.argv[1], sys.argv[2])
        return
    print("| | backend | to compile | a step and its derivative | saved | worth it after |")
    print("|---" * 6 + "|", flush=True)
    for workload in ("W1", "W2", "W3"):
        assert workload in WORKLOADS
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.compiling", workload, backend]
                subprocess.run(command, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}, check=True)


if __name__ == "__main__":
    main()
