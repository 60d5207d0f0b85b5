"""One measurement, in a process of its own: ``python -m tests.benchmarks.measure WORKLOAD SYSTEM``.

The answer is one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import mmap
import os
import resource
import statistics
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from metaopt.checkpoints import stores
from tests.benchmarks.catalogue import SYSTEMS, WORKLOADS
from tests.benchmarks.systems import RUNS, plain
from tests.benchmarks.workloads import Problem, make

WARM_UP = 12  # steps: enough for what compiles
AWAKE = 2**30  # bytes
ONCE_FROM = 5000  # steps, beyond which a loop runs once
OFTEN, OFTEN_UP_TO = 5, 200  # runs after the first, of loops of so many steps


def cost(workload: str, system: str, steps: int, device: str) -> dict[str, Any]:
    """Seconds of the whole loop with its hypergradient, and peak memory above what the process held before.

    The loop runs again and again, as one hyper-iteration follows another. The first run tells the memory, and what
    memory costs that is new to the process; the median of the others is the time. After the last one the peak is
    higher if a run leaves anything behind.
    """
    run = RUNS[system]
    run(make(workload, device=device), WARM_UP)
    problem = make(workload, device=device)
    before = _start_of_memory(device)
    answer: dict[str, Any] = {}
    runs: list[tuple[float, float]] = []
    for _ in range(1 if steps > ONCE_FROM else 2 if steps > OFTEN_UP_TO else 1 + OFTEN):
        cpu, start = time.process_time(), time.perf_counter()
        result = run(problem, steps)
        _wait(device)
        runs.append((time.perf_counter() - start, time.process_time() - cpu))
        answer.setdefault("bytes", _peak(device) - before)
        assert bool(result) == SYSTEMS[system].hypergradient
        problem, result = make(workload, device=device), {}
    answer["last_bytes"] = _peak(device) - before
    if len(runs) > 1:
        answer["first_seconds"], answer["first_cpu_seconds"] = runs.pop(0)
    answer["seconds"], answer["cpu_seconds"] = (statistics.median(times) for times in zip(*runs, strict=True))
    return answer | {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": _name(device)}


def gradient(workload: str, system: str, steps: int, device: str) -> dict[str, Any]:
    """The hypergradients in float64."""
    found = RUNS[system](make(workload, dtype=torch.float64, device=device), steps)
    return {name: value.reshape(-1).tolist() for name, value in found.items()}


def differences(workload: str, system: str, steps: int, device: str) -> dict[str, Any]:
    """For each hyperparameter the derivative along some direction, by the system and by finite differences.

    The differences are those of the bare loop, in float64, with a stencil of fourth order.
    """
    answer = {}
    found = RUNS[system](_smooth(workload, device), steps)
    for name in WORKLOADS[workload].hyper:
        value = _smooth(workload, device).hyper[name].detach()
        direction = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(0)).to(device)
        direction = direction if value.dim() else torch.ones_like(value)
        h = 1e-5 * float(value.abs().max()) * (0.01 if value.dim() else 1.0)
        f = {k: _shifted(workload, name, k * h * direction, steps, device) for k in (-2, -1, 1, 2)}
        slope = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
        answer[name] = [float((found[name] * direction).sum()), slope]
    return answer


def _smooth(workload: str, device: str) -> Problem:
    return make(workload, dtype=torch.float64, device=device, smooth=True)


def _shifted(workload: str, name: str, shift: Tensor, steps: int, device: str) -> float:
    problem = _smooth(workload, device)
    problem.hyper[name] = problem.hyper[name].detach() + shift
    plain(problem, steps)
    return problem.outer(problem.model).item()


# -- the process and its device -------------------------------------------------------------------------


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def _start_of_memory(device: str) -> int:
    """Give back what the warm-up used, start the high-water mark anew, and read it."""
    gc.collect()
    stores._idle.clear()  # what metaopt keeps for the next training counts as its own
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _wait(device)
        return torch.cuda.memory_allocated()
    _wake_memory()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:  # else: what the warm-up peaked at
        file.write("5")
    return _peak(device)


def _wake_memory() -> None:
    # A virtual machine may have to ask its host for memory that was idle, which takes longer than the loop: up to
    # twice the time of those who use much. What was touched just now is there.
    with contextlib.suppress(OSError, AttributeError):
        mmap.mmap(-1, AWAKE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Measure, and print the answer."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.measure")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--what", choices=("cost", "gradient", "differences"), default="cost")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    what = {"cost": cost, "gradient": gradient, "differences": differences}[options.what]
    print(json.dumps(what(options.workload, options.system, options.steps, options.device)))


if __name__ == "__main__":
    main()
