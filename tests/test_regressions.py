"""The benchmark that guards the costs says what is worse, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.benchmarks import measure, systems
from tests.benchmarks.catalogue import WATCHED
from tests.benchmarks.regression import STANDARD, SYSTEMS, worse


def test_what_is_worse_by_half_is_named() -> None:
    standard = {"metaopt": {"time": 4.0, "memory": 1.0}}
    assert worse({"metaopt": {"time": 5.9, "memory": 0.2}}, standard) == []
    assert worse({"metaopt": {"time": 6.1, "memory": 1.6}}, standard) == [
        "metaopt: time is 6.10, which was 4.00",
        "metaopt: memory is 1.60, which was 1.00",
    ]


def test_what_a_training_leaves_behind_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory was that of the first of several trainings in a process, which holds nothing of those before it."""
    left: list[int] = []

    def leak(problem: Any, steps: int) -> dict[str, Any]:
        left.append(steps)
        return {}

    monkeypatch.setitem(systems.RUNS, WATCHED, leak)
    monkeypatch.setattr(measure, "_peak", lambda device: sum(left))
    monkeypatch.setattr(measure, "_start_of_memory", lambda device: measure.WARM_UP)
    found = measure.cost("N4", WATCHED, 2, "cpu")
    assert found["bytes"] == 2
    assert found["last_bytes"] == 2 * (1 + measure.OFTEN)


def test_there_is_a_standard_for_every_system() -> None:
    assert set(json.loads(STANDARD.read_text())) == set(SYSTEMS)
