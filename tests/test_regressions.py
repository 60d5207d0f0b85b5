"""The benchmark that guards the costs says what is worse, and nothing else."""

from __future__ import annotations

import json

from tests.benchmarks.regression import STANDARD, SYSTEMS, worse


def test_what_is_worse_by_half_is_named() -> None:
    standard = {"metaopt": {"time": 4.0, "memory": 1.0}}
    assert worse({"metaopt": {"time": 5.9, "memory": 0.2}}, standard) == []
    assert worse({"metaopt": {"time": 6.1, "memory": 1.6}}, standard) == [
        "metaopt: time is 6.10, which was 4.00",
        "metaopt: memory is 1.60, which was 1.00",
    ]


def test_there_is_a_standard_for_every_system() -> None:
    assert set(json.loads(STANDARD.read_text())) == set(SYSTEMS)
