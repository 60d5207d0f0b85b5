"""The third tutorial: its closed form, its loader, and a short run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))
data = importlib.import_module("data")
uci = importlib.import_module("uci")
closed_form = importlib.import_module("stn_closed_form")
tutorial = importlib.import_module("03_stn_linear_regression")


@pytest.fixture(autouse=True)
def _cpu() -> Iterator[None]:
    """The tutorial runs on the CPU, whatever --device says."""
    with torch.device("cpu"):
        yield


@pytest.mark.parametrize("kind", ["l2", "dropout"])
def test_the_closed_form_is_where_training_ends(kind: str) -> None:
    task = uci.load_task("diabetes")
    x, y = task.train
    point = torch.tensor(0.3)
    weights = closed_form.optimal_weights(task, kind, float(point)).requires_grad_()
    loss = 0.5 * (x @ weights - y).square().mean()
    if kind == "l2":
        loss = loss + 0.5 * point.exp() * weights.square().sum()
    else:
        # The variance that dropout adds to each prediction, in expectation over the masks.
        rate = 0.95 * torch.sigmoid(point)
        loss = loss + 0.5 * rate / (1 - rate) * (x.square() @ weights.square()).mean()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert float(gradient.abs().max()) < 1e-10


def test_missing_data_are_asked_for_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network in the tests")

    monkeypatch.setattr(uci.urllib.request, "urlopen", unreachable)
    with pytest.raises(data.MissingDataError, match=r"To use yacht, put https://.* as .*yacht\.txt"):
        uci.load_task("yacht", tmp_path)
    (tmp_path / "yacht.txt").write_text("another file")
    with pytest.raises(data.DataError, match="has MD5"):
        uci.load_task("yacht", tmp_path)


def test_a_quick_run_prints_a_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    tutorial.experiment([uci.load_task("diabetes")], tutorial.Settings(steps=20, warmup=5, seeds=1))
    assert "Δ-STN" in capsys.readouterr().out
    task = uci.load_task("diabetes")
    results = [tutorial.Result(task, kind, m, [2.0, 1.0], 0.0) for kind in tutorial.KINDS for m in tutorial.METHODS]
    tutorial.summary(results)
    tutorial.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.slow
def test_a7_each_run_ends_near_the_optimum() -> None:
    torch.set_default_dtype(torch.float32)
    task, settings = uci.load_task("diabetes"), tutorial.Settings(seeds=1)
    for kind in tutorial.KINDS:
        trail = tutorial.tune(task, kind, "delta", 0, settings)
        result = tutorial.Result(task, kind, "delta", trail, closed_form.optimum(task, kind))
        assert result.regret <= 0.005


def test_a_joint_step_rests_further_from_the_optimum_than_separate_ones() -> None:
    torch.set_default_dtype(torch.float64)
    task = uci.load_task("diabetes")
    for kind in tutorial.KINDS:
        best = closed_form.optimum(task, kind)
        # Where the perturbations are small, so is the bias.
        for method in ("stn", "delta"):
            assert abs(closed_form.resting_point(task, kind, method, 0.05) - best) <= 0.02
        joint, separate = (abs(closed_form.resting_point(task, kind, m, 1.5) - best) for m in ("stn", "delta"))
        assert joint > 0.02 + separate


@pytest.mark.slow
@pytest.mark.parametrize("method", ["stn", "delta"])
def test_a_run_ends_at_its_resting_point(method: str) -> None:
    torch.set_default_dtype(torch.float32)
    task, settings = uci.load_task("diabetes"), tutorial.Settings(scale=1.0, start=0.0)
    trail = tutorial.tune(task, "l2", method, 0, settings)
    result = tutorial.Result(task, "l2", method, trail, closed_form.resting_point(task, "l2", method, 1.0))
    assert result.error <= 0.2
