"""The schedules of hyperparameters over hyper-iterations."""

from __future__ import annotations

__all__ = ["History"]

import importlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from metaopt.hyperparameters.projections import widen

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUMMARY = ("mean", "min", "q25", "median", "q75", "max")


class History(dict[str, list[Any]]):
    """Recorded values: a dict of lists, one entry for each hyper-iteration.

    A hyperparameter of one element, ``lr``, has the series ``lr``; a larger one, ``weights``, has
    ``weights.mean``, ``.min``, ``.q25``, ``.median``, ``.q75`` and ``.max``, and ``weights.full``, a list of
    CPU tensors, of those records that asked for it. ``NAME.grad_norm`` is the norm of the leaf's ``.grad``,
    NaN where there was none.
    """

    def append(self, name: str, value: Tensor, gradient: Tensor | None = None, *, full: bool = False) -> None:
        """Add one hyper-iteration of one hyperparameter.

        Args:
            name: its name, without a dot.
            value: its constrained value, any shape.
            gradient: its leaf's gradient, if any.
            full: keep all the entries of a large tensor, too.
        """
        if value.numel() == 1:
            self._extend(name, value.item())
        else:
            wide = widen(value).cpu()
            for key, number in _summary(wide.numpy()).items():
                self._extend(f"{name}.{key}", number)
            if full:
                # `widen` returns float64 CPU tensors as they are, and the leaf will move.
                self._extend(f"{name}.full", wide.clone())
        self._extend(f"{name}.grad_norm", math.nan if gradient is None else _norm(gradient))

    @property
    def names(self) -> list[str]:
        """The hyperparameters recorded, in the order of their first record."""
        return list(dict.fromkeys(key.partition(".")[0] for key in self))

    def state_dict(self) -> dict[str, list[Any]]:
        """The series as plain lists, of floats and tensors."""
        return {key: list(series) for key, series in self.items()}

    def load_state_dict(self, state: Mapping[str, list[Any]]) -> None:
        """Replace the series by those of ``state_dict``."""
        self.clear()
        self.update({key: list(series) for key, series in state.items()})

    def to_numpy(self) -> dict[str, np.ndarray[Any, Any]]:
        """The series as float64 arrays, hyper-iterations first."""
        return {key: np.stack([np.asarray(entry, dtype=np.float64) for entry in self[key]]) for key in self}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the schedules with `metaopt.plotting.plot_history`.

        Args:
            ax: the matplotlib axes to draw on; a new figure's by default.

        Raises:
            MissingExtraError: if matplotlib is not installed.
        """
        # By name and when called: plotting is a layer above, and needs matplotlib.
        axes: Axes = importlib.import_module("metaopt.plotting").plot_history(self, ax)
        return axes

    def _extend(self, key: str, entry: object) -> None:
        self.setdefault(key, []).append(entry)


def _norm(gradient: Tensor) -> float:
    if gradient.numel() == 1:
        return abs(float(gradient))
    return widen(gradient).norm().item()


def _summary(values: np.ndarray[Any, Any]) -> dict[str, float]:
    if values.size == 0:
        return dict.fromkeys(SUMMARY, math.nan)
    quantiles = np.quantile(values, (0.0, 0.25, 0.5, 0.75, 1.0))
    return dict(zip(SUMMARY, (float(values.mean()), *map(float, quantiles)), strict=True))
