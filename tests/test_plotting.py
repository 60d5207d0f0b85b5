"""Plots draw on axes and return them, whatever was recorded."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import matplotlib
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaopt.errors import MissingExtraError
from metaopt.hyperparameters import History, Hyperparameters, box, positive
from metaopt.plotting import plot_history, plot_hypergradient

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def ax() -> Axes:
    axes = Figure().subplots()
    assert isinstance(axes, Axes)
    return axes


@pytest.fixture
def headless() -> Iterator[None]:
    backend = matplotlib.get_backend()
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")
    pyplot.switch_backend(backend)


def recorded(*lrs: float) -> History:
    hyper = Hyperparameters(lr=positive(lrs[0]), weights=box(torch.linspace(0, 1, 10), 0, 1))
    for lr in lrs:
        hyper.set(lr=lr)
        hyper.record(full=True)
    return hyper.history


def test_history_has_a_line_for_each_hyperparameter(ax: Axes) -> None:
    assert plot_history(recorded(0.1, 0.2, 0.3), ax) is ax
    assert [line.get_label() for line in ax.lines] == ["lr", "weights (median)"]
    assert ax.lines[0].get_ydata() == pytest.approx([0.1, 0.2, 0.3])
    assert len(ax.collections) == 2
    assert ax.get_yscale() == "linear"
    ax.figure.canvas.draw()


@pytest.mark.parametrize(("lrs", "scale"), [((1e-4, 1e-1), "log"), ((0.1, 0.5), "linear")])
def test_history_is_logarithmic_over_decades(lrs: tuple[float, ...], scale: str, ax: Axes) -> None:
    plot_history(recorded(*lrs), ax, names=["lr"])
    assert len(ax.lines) == 1
    assert ax.get_yscale() == scale


def test_history_draws_one_record_and_none(ax: Axes) -> None:
    plot_history(recorded(0.1), ax)
    assert ax.lines[0].get_marker() == "o"
    assert not plot_history(History(), Figure().subplots()).lines


def test_history_of_a_name_not_recorded(ax: Axes) -> None:
    with pytest.raises(KeyError, match="momentum"):
        plot_history(recorded(0.1), ax, names=["momentum"])


def test_history_plots_itself_on_a_new_figure(headless: None) -> None:
    history = recorded(0.1, 0.2)
    first, second = history.plot(), history.plot()
    assert first is not second
    assert pyplot.get_fignums() == [1, 2]


def test_hypergradient_of_a_tensor(ax: Axes) -> None:
    gradient = torch.tensor([[1.0, -2.0]], requires_grad=True)
    assert plot_hypergradient(gradient, ax) is ax
    assert [bar.get_height() for bar in ax.patches] == [1.0, -2.0]  # type: ignore[attr-defined]
    large = plot_hypergradient(torch.ones(1000, dtype=torch.float64), Figure().subplots())
    assert not large.patches
    assert len(large.lines) == 2


def test_hypergradient_by_name(ax: Axes) -> None:
    plot_hypergradient({"lr": torch.tensor(0.1), "momentum": torch.tensor([-0.2]), "unused": None}, ax)
    assert len(ax.patches) == 2
    mixed = plot_hypergradient({"lr": torch.tensor(0.1), "weights": torch.ones(3)}, Figure().subplots())
    assert [text.get_text() for text in mixed.get_legend().get_texts()] == ["lr", "weights"]  # type: ignore[union-attr]
    plot_hypergradient({}, Figure().subplots()).figure.canvas.draw()


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"\[plot\]"):
        plot_hypergradient(torch.ones(2))


def test_what_a_run_returns_is_drawn() -> None:
    axes = plot_hypergradient((torch.tensor(1.0), None, torch.tensor(-2.0)))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "2"]
    hyper = Hyperparameters(lr=positive(0.1), decay=0.5)
    hyper.record()
    assert [line.get_label() for line in plot_history(hyper, names="lr").lines] == ["lr"]
