"""Where the bare formulas diverge, a run of ours goes on."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.divergence import literal, ours

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))


@pytest.mark.slow
def test_a_far_start_with_wide_perturbations_does_not_end_in_nan() -> None:
    torch.set_default_dtype(torch.float32)
    with torch.device("cpu"):
        task = importlib.import_module("uci").load_task("diabetes")
        assert math.isnan(literal(task, "dropout", 0, steps=1000))
        end = ours(task, "dropout", 0, steps=1000)
        best = importlib.import_module("stn_closed_form").optimum(task, "dropout")
    assert math.isfinite(end)
    assert abs(end - best) < 3.0 - best
