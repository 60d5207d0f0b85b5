"""Has metaopt become slower, or larger? ``python -m tests.benchmarks.regression``, or ``tox -e regressions``.

Ratios measured side by side in one run (time over plain training, memory over ``T · |s|``) against those in
``regression.json``. It fails when one is worse by more than half, which a busy machine does not do to a median of
processor times. The memory is the peak of several trainings in one process, so that what one leaves behind is in it.
``--write`` makes what is measured the new standard.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.catalogue import CHECKPOINTS, PLAIN, WATCHED
from tests.benchmarks.runner import Measurement, rounds

STANDARD = Path(__file__).with_name("regression.json")
WORKLOAD, STEPS = "W2", 50
STATE = 2 * 4 * (784 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10)  # weights and momentum, in bytes
SYSTEMS = (WATCHED, "metaopt", CHECKPOINTS)
WORSE = 1.5


def measure(repeats: int) -> dict[str, dict[str, float]]:
    """For each system the median of its ratios."""
    found = [m for m in rounds([(WORKLOAD, STEPS)], [PLAIN, *SYSTEMS], repeats, "cpu") if isinstance(m, Measurement)]
    plain = {m.round: m.cpu_seconds for m in found if m.system == PLAIN}
    return {
        system: {
            "time": statistics.median(m.cpu_seconds / plain[m.round] for m in found if m.system == system),
            "memory": statistics.median(m.last_bytes / (STEPS * STATE) for m in found if m.system == system),
        }
        for system in SYSTEMS
    }


def worse(now: dict[str, dict[str, float]], standard: dict[str, dict[str, float]]) -> list[str]:
    """A sentence for each ratio that is worse by more than half."""
    return [
        f"{system}: {name} is {value:.2f}, which was {standard[system][name]:.2f}"
        for system, ratios in now.items()
        for name, value in ratios.items()
        if value > WORSE * standard[system][name]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, compare, tell."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.regression", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    now = measure(options.repeats)
    for system, ratios in now.items():
        print(f"{system}: {ratios['time']:.2f} × plain training, {ratios['memory']:.2f} × T·|s|")
    if options.write:
        STANDARD.write_text(json.dumps(now, indent=2) + "\n")
    elif failures := worse(now, json.loads(STANDARD.read_text())):
        raise SystemExit("worse by more than half:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
