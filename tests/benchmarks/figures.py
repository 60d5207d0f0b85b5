"""Time and memory over the number of steps, as two figures for the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmarks.catalogue import CHECKPOINTS, LONG_STEPS, PLAIN, SCALING_STEPS, SCALING_WORKLOAD, WATCHED
from tests.benchmarks.report import ASSETS, Results

COLOURS = {
    "metaopt": "#0072b2",
    "compiled": "#0072b2",
    "graphs": "#0072b2",
    CHECKPOINTS: "#0072b2",
    WATCHED: "#56b4e9",
    "higher": "#d55e00",
    "torchopt": "#009e73",
    "hypertorch": "#cc79a7",
    "unrolled": "#7f7f7f",
}
MARKERS = {
    "metaopt": "o",
    "compiled": "v",
    "graphs": "P",
    CHECKPOINTS: "*",
    WATCHED: "o",
    "higher": "s",
    "torchopt": "^",
    "hypertorch": "X",
    "unrolled": "D",
}
NAMES = {
    "compiled": "metaopt, compiled",
    "graphs": "metaopt, graphs, compiled",
    CHECKPOINTS: "metaopt, checkpoints",
    WATCHED: "metaopt, no sweep",
    "unrolled": "autograd by hand",
}
STEPS = (*SCALING_STEPS, LONG_STEPS)


def draw(results: Results, systems: Sequence[str]) -> list[Path]:
    """Draw both figures; return where they are."""

    def time(system: str, steps: int) -> list[float]:
        return results.ratios(SCALING_WORKLOAD, system, steps)

    def memory(system: str, steps: int) -> list[float]:
        return [m.bytes / 1e6 for m in results.of(SCALING_WORKLOAD, system, steps)]

    drawn = [system for system in systems if system != PLAIN]
    return [
        _figure(time, drawn, "time over plain training", ASSETS / "benchmark_time.png"),
        _figure(memory, drawn, "peak memory above the start, MB", ASSETS / "benchmark_memory.png"),
    ]


def _figure(values: Callable[[str, int], list[float]], systems: Sequence[str], label: str, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    for system in systems:
        found = [(steps, values(system, steps)) for steps in STEPS if values(system, steps)]
        if not found:
            continue
        medians = [statistics.median(v) for _, v in found]
        spans = [[m - min(v) for m, (_, v) in zip(medians, found, strict=True)]]
        spans += [[max(v) - m for m, (_, v) in zip(medians, found, strict=True)]]
        axes.errorbar(
            [steps for steps, _ in found],
            medians,
            spans,
            fmt="--" if system == WATCHED else "-",
            color=COLOURS.get(system, "black"),
            marker=MARKERS.get(system, "x"),
            elinewidth=0.8,
            capsize=2.5,
            label=NAMES.get(system, system),
        )
    axes.set_xlabel(f"T, steps of {SCALING_WORKLOAD}")
    axes.set_ylabel(label)
    axes.set_xscale("log")
    if "memory" in label:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
