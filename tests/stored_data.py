"""The tutorials' data in the tests: where they are stored; a test never fetches any."""

from __future__ import annotations

__all__ = ["stored_task"]

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))


def stored_task(name: str, **options: Any) -> Any:
    """A regression task of `tutorials/uci.py`, on the CPU; the test is skipped where its file is not stored."""
    data, uci = importlib.import_module("data"), importlib.import_module("uci")
    path = data.cache() / "uci" / f"{name}.txt"
    if not path.is_file():
        pytest.skip(f"needs {path}; running tutorials/03_stn_linear_regression.py --data all fetches it")
    with torch.device("cpu"):
        return uci.load_task(name, **options)
