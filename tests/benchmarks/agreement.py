"""Are the hypergradients right? Asked in float64, on a short run, before any time is printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.benchmarks.catalogue import REFERENCE, SYSTEMS, WORKLOADS
from tests.benchmarks.runner import FailedError, ask, show

TOLERANCE = 1e-6  # relative, between two ways to the same number in float64
WRONG = 1e-3  # beyond this it is not rounding
TOLERANCE_OF_DIFFERENCES = 1e-4


@dataclass
class Agreement:
    """What the comparison found.

    Attributes:
        reference: for each workload the relative difference of the reference and finite differences, by name.
        errors: for each workload and system the relative difference from the reference, by name.
        failures: for each workload and system that failed, what it said.
    """

    reference: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def beyond(self, tolerance: float, workload: str, system: str) -> dict[str, float]:
        """The differences that are larger than a tolerance, or not numbers."""
        errors = self.errors.get((workload, system), {})
        return {name: error for name, error in errors.items() if not error <= tolerance}

    def reference_holds(self, workload: str) -> bool:
        """Whether the reference agrees with finite differences."""
        return all(error <= TOLERANCE_OF_DIFFERENCES for error in self.reference[workload].values())

    def notes(self) -> list[str]:
        """A sentence for each system that differs, with the cause, or that leaves hyperparameters out."""
        causes: dict[tuple[str, str], list[str]] = {}
        for workload, system in self.errors:
            for name in self.beyond(TOLERANCE, workload, system):
                cause = SYSTEMS[system].faults.get(name, "cause unknown")
                causes.setdefault((system, cause), []).append(f"{name} ({workload})")
        lines = [f"{system}, {', '.join(names)}: {cause}." for (system, cause), names in causes.items()]
        for workload, system in self.errors:
            if constant := [name for name in WORKLOADS[workload].hyper if name in SYSTEMS[system].constant]:
                names = " and ".join(constant)
                lines.append(f"{system}, {names} ({workload}): {SYSTEMS[system].why}.")
        return lines


def compare(workloads: Sequence[str], systems: Sequence[str], device: str) -> Agreement:
    """Compare the systems with the reference, and the reference with finite differences of the bare loop."""
    agreement = Agreement()
    for workload in workloads:
        steps = WORKLOADS[workload].check_steps
        show(f"comparing hypergradients: {workload}")
        slopes = ask(workload, REFERENCE, "differences", steps, device)
        agreement.reference[workload] = {name: _difference([a], [b]) for name, (a, b) in slopes.items()}
        reference = ask(workload, REFERENCE, "gradient", steps, device)
        for system in systems:
            if not SYSTEMS[system].hypergradient:
                continue
            try:
                found = ask(workload, system, "gradient", steps, device)
            except FailedError as error:
                agreement.failures[workload, system] = str(error)
                continue
            missing = set(reference) - set(found) - SYSTEMS[system].constant
            agreement.errors[workload, system] = {
                name: math.inf if name in missing else _difference(found[name], reference[name])
                for name in reference
                if name in found or name in missing
            }
    show("")
    return agreement


def _difference(found: Sequence[float], reference: Sequence[float]) -> float:
    a, b = np.asarray(found), np.asarray(reference)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))
