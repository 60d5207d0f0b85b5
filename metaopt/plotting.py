"""Pictures of hyperparameter schedules and hypergradients, with matplotlib.

Nothing is shown or saved here, and no backend is chosen: each function draws on axes and returns them.
"""

from __future__ import annotations

__all__ = ["plot_history", "plot_hypergradient"]

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from metaopt.errors import require
from metaopt.hyperparameters import Hyperparameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The ratio of largest to smallest from which positive values are drawn on a log scale: two decades.
DECADES = 100.0

# The most entries of a hypergradient that are drawn as bars.
BARS = 50


def plot_history(
    history: Mapping[str, Sequence[Any]] | Hyperparameters,
    ax: Axes | None = None,
    *,
    names: str | Iterable[str] | None = None,
) -> Axes:
    """Draw the schedules of hyperparameters over hyper-iterations.

    A hyperparameter of one element is a line; a larger one is its median, with bands from the lower to the
    upper quartile and from the least to the greatest entry. The scale is logarithmic where all is positive
    and spans two decades or more.

    Args:
        history: the recorded series, ``hyper.history``, or the hyperparameters that have it.
        ax: the axes to draw on; a new figure's by default.
        names: the hyperparameters to draw, or the name of one; all by default.

    Returns:
        The axes.

    Raises:
        KeyError: if one of ``names`` was not recorded.
        MissingExtraError: if matplotlib is not installed.
    """
    if isinstance(history, Hyperparameters):
        history = history.history
    names = [names] if isinstance(names, str) else names
    axes = _axes(ax, "plotting a history")
    recorded = dict.fromkeys(key.partition(".")[0] for key in history)
    drawn = [_draw_schedule(axes, history, name) for name in (recorded if names is None else names)]
    _scale(axes, np.concatenate(drawn) if drawn else np.empty(0))
    axes.set_xlabel("hyper-iteration")
    axes.set_ylabel("hyperparameter")
    _legend(axes)
    return axes


def plot_hypergradient(
    gradient: Tensor | Mapping[str, Tensor | None] | Sequence[Tensor | None], ax: Axes | None = None
) -> Axes:
    """Draw a hypergradient entry by entry, or several by name.

    Args:
        gradient: a tensor of any shape, drawn flattened: a schedule's hypergradient over its steps, or one of
            example weights; or tensors by name (None for one that took no part), of which those of one
            element share a bar chart if all are such. Those of a tuple, as ``run.hypergradient`` returns it, have
            their numbers for names.
        ax: the axes to draw on; a new figure's by default.

    Returns:
        The axes.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    axes = _axes(ax, "plotting a hypergradient")
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    axes.set_ylabel("hypergradient")
    if isinstance(gradient, Tensor):
        _draw_entries(axes, _array(gradient))
        return axes
    named = gradient if isinstance(gradient, Mapping) else {str(place): tensor for place, tensor in enumerate(gradient)}
    arrays = {name: _array(tensor) for name, tensor in named.items() if tensor is not None}
    if all(array.size == 1 for array in arrays.values()):
        axes.bar(list(arrays), [array.item() for array in arrays.values()])
        return axes
    for name, array in arrays.items():
        axes.plot(array, label=name, marker="o" if array.size == 1 else None)
    axes.set_xlabel("entry")
    _legend(axes)
    return axes


def _axes(ax: Axes | None, purpose: str) -> Axes:
    if ax is not None:
        return ax
    require("matplotlib", "plot", purpose)
    from matplotlib import pyplot

    return pyplot.subplots()[1]


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().double().flatten().numpy()


def _draw_entries(axes: Axes, entries: np.ndarray[Any, Any]) -> None:
    if entries.size <= BARS:
        axes.bar(np.arange(entries.size), entries)
    else:
        axes.plot(entries, linewidth=0.8)
    axes.set_xlabel("entry")


def _draw_schedule(axes: Axes, history: Mapping[str, Sequence[Any]], name: str) -> np.ndarray[Any, Any]:
    """Draw one hyperparameter, and return what it put on the vertical axis."""
    if f"{name}.median" not in history:
        values = np.asarray(history[name], dtype=np.float64)
        axes.plot(values, label=name, marker="o" if values.size == 1 else None)
        return values
    keys = ("min", "q25", "median", "q75", "max")
    bands = np.asarray([history[f"{name}.{key}"] for key in keys], dtype=np.float64)
    (line,) = axes.plot(bands[2], label=f"{name} (median)", marker="o" if bands.shape[1] == 1 else None)
    for lower, upper in ((0, 4), (1, 3)):
        steps = np.arange(bands.shape[1])
        axes.fill_between(steps, bands[lower], bands[upper], color=line.get_color(), alpha=0.2, linewidth=0)
    return bands.ravel()


def _scale(axes: Axes, values: np.ndarray[Any, Any]) -> None:
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() >= DECADES * values.min():
        axes.set_yscale("log")


def _legend(axes: Axes) -> None:
    # matplotlib warns of a legend without entries.
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
