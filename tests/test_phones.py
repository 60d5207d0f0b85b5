"""The parts of the second tutorial: frames and splits, plain training and random search, the table, the script."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))
recordings = importlib.import_module("recordings")
speech = importlib.import_module("speech")
phones = importlib.import_module("phones")
training = importlib.import_module("phone_training")
report = importlib.import_module("phones_report")
tutorial = importlib.import_module("02_phone_classification")

TINY = training.Settings(epochs=2, hidden=8, every=5, val_batch=50)


@pytest.fixture(autouse=True)
def _cpu() -> Iterator[None]:
    """The tutorial runs on the CPU, whatever --device says."""
    with torch.device("cpu"):
        yield


@pytest.fixture(scope="module")
def planted() -> Any:
    return speech.load_speech(data="planted")


# -- the problem


def test_a_window_has_three_neighbours_on_each_side_and_repeats_the_ends() -> None:
    frames = np.arange(10.0).reshape(5, 2)
    rows = phones.windows(frames).reshape(5, 7, 2)
    for t in range(5):
        for place in range(7):
            np.testing.assert_array_equal(rows[t, place], frames[min(max(t + place - 3, 0), 4)])


@pytest.mark.parametrize("middle", [0, 2, 5])
def test_the_secondary_target_is_the_mean_of_the_half(middle: int) -> None:
    frames = np.random.default_rng(0).normal(size=(5, 3))
    found = phones.half_means(recordings.Recording("a", "b", middle, frames))
    for t in range(5):
        half = frames[:middle] if t < middle else frames[middle:]
        np.testing.assert_allclose(found[t], half.mean(0))


def test_no_diphone_is_in_two_parts_though_it_were_recorded_twice() -> None:
    """Each frame holds the number of its diphone: after the split, it is found in one part alone."""
    frames = [np.full((4, recordings.CHANNELS), i // 2, float) for i in range(200)]
    twice = tuple(recordings.Recording("a", f"b{i // 2}", 2, frame) for i, frame in enumerate(frames))
    problem = phones.make_problem(recordings.Speech("twice", twice, ""), seed=1)
    seen = [{round(x, 6) for x in part.x[:, 0].tolist()} for part in (problem.train, problem.val, problem.test)]
    assert [len(part) for part in seen] == [70, 15, 15]
    assert len(set.union(*seen)) == 100
    assert [len(part.y) for part in (problem.train, problem.val, problem.test)] == [560, 120, 120]


def test_frames_are_scaled_labelled_and_in_their_windows(planted: Any) -> None:
    problem = phones.make_problem(planted)
    centre = problem.train.x.view(-1, 7, recordings.CHANNELS)[:, 3]
    torch.testing.assert_close(centre.mean(0), torch.zeros(recordings.CHANNELS), atol=1e-9, rtol=0)
    torch.testing.assert_close(centre.std(0, unbiased=False), torch.ones(recordings.CHANNELS))
    assert problem.secondary.shape == centre.shape
    labels = [len(r.frames) - r.middle for r in planted.recordings if r.right == "p03"]
    labels += [r.middle for r in planted.recordings if r.left == "p03"]
    parts = (problem.train, problem.val, problem.test)
    assert sum(int((part.y == problem.phones.index("p03")).sum()) for part in parts) == sum(labels)


def test_a_seed_gives_one_problem_and_another_seed_another(planted: Any) -> None:
    first, again, other = (phones.make_problem(planted, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.train.x, again.train.x)
    assert not torch.equal(first.test.y[:50], other.test.y[:50])


# -- training


def test_every_method_sees_the_same_batches_and_every_frame_at_most_once_an_epoch(planted: Any) -> None:
    problem = phones.make_problem(planted)
    first, again = (list(training.batches(problem, TINY, seed=1)) for _ in range(2))
    assert len(first) == TINY.epochs
    for epoch, twin in zip(first, again, strict=True):
        assert len(epoch) == len(problem.train.y) // TINY.batch
        for batch, same in zip(epoch, twin, strict=True):
            assert torch.equal(batch.x, same.x)
        rows = torch.cat([batch.x for batch in epoch])
        assert len(rows.unique(dim=0)) == len(rows)
    assert not torch.equal(first[0][0].x, first[1][0].x)


def test_the_random_generator_is_left_alone(planted: Any) -> None:
    problem, before = phones.make_problem(planted), torch.get_rng_state()
    training.fixed(problem, tutorial.VANILLA, replace(TINY, epochs=1), seed=0)
    tutorial.real_time(problem, tutorial.NULL, replace(TINY, epochs=1), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_training_that_diverges_is_ended(planted: Any) -> None:
    problem = phones.make_problem(planted)
    found = training.fixed(problem, training.Setting(0.0, 1e300, 0.9), replace(TINY, epochs=50), seed=0)
    assert len(found.epochs) < 5


def test_the_best_epoch_is_chosen_without_a_look_at_the_test() -> None:
    epochs = [training.Epoch(1.0, 50.0, 40.0), training.Epoch(2.0, 60.0, 30.0), training.Epoch(0.5, 55.0, 90.0)]
    assert training.Training(epochs=epochs).best == epochs[1]


def test_random_search_keeps_to_its_time_and_returns_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def fake(problem: Any, setting: Any, settings: Any, *, seed: int) -> Any:
        tried.append(setting)
        accuracy = [10.0, 30.0, 20.0][len(tried) - 1]
        return training.Training([training.Epoch(1.0, accuracy, accuracy + 1)], [setting], seconds=3.0)

    monkeypatch.setattr(training, "fixed", fake)
    found = training.random_search(None, TINY, seed=0, seconds=11.0)  # three runs of 3 s fit, a fourth does not
    assert (found.trials, found.seconds) == (3, 9.0)
    assert found.schedule == [tried[1]]
    assert found.best.test_accuracy == 31.0
    tried.clear()
    assert training.random_search(None, TINY, seed=0, seconds=0.0).trials == 1


def test_random_settings_have_the_papers_distributions() -> None:
    random = np.random.default_rng(0)
    drawn = np.array([training.draw_setting(random) for _ in range(20_000)])
    np.testing.assert_allclose(drawn.mean(0), [2.0, 0.1, 0.5], rtol=0.03)
    np.testing.assert_allclose(drawn.std(0), [4 / 12**0.5, 0.1, 1 / 12**0.5], rtol=0.03)
    assert drawn.min() >= 0
    assert drawn[:, [0, 2]].max(0) == pytest.approx([4, 1], rel=1e-3)


# -- the table and the script


def result(*accuracies: float, seconds: float = 2.0, trials: int = 1) -> list[Any]:
    return [
        training.Training([training.Epoch(1.0, 50.0, accuracy)], [tutorial.NULL], seconds, trials)
        for accuracy in accuracies
    ]


def test_the_table_puts_timits_figures_beside_ours_and_says_whose_they_are() -> None:
    results = {
        "Vanilla": result(50.0, 52.0, 54.0),
        "RS": result(51.0, 51.0, 51.0, trials=4),
        "RTHO": result(53.0, 53.0, 53.0, seconds=70.0),
        "RTHO-NT": result(49.0, 50.0, 51.0),
        "No steps": result(1.0, 2.0, 3.0),
    }
    rows = report.table(results, "KED").splitlines()
    assert "KED, this run, mean of 3 seeds" in rows[0]
    assert "TIMIT, as published" in rows[0]
    assert [row.split() for row in rows[2:]] == [
        "Vanilla 52.00 ± 1.15 2.0 ± 0.0 59.81 12".split(),
        "RS 51.00 ± 0.00 2.0 ± 0.0 60.36 300".split(),
        "RTHO 53.00 ± 0.00 70.0 ± 0.0 61.97 164".split(),
        "RTHO-NT 50.00 ± 0.58 2.0 ± 0.0 61.38 289".split(),
        "No steps 2.00 ± 0.58 2.0 ± 0.0".split(),
    ]
    assert report.gain(results, "RTHO", "Vanilla") == "RTHO - Vanilla: 1.00 ± 1.15 points, ahead in 2 of 3 seeds"
    problem = phones.make_problem(speech.load_speech(data="planted"))
    remarks = report.remarks(results, [problem])
    assert "reaches 96 % of Vanilla's accuracy" in remarks
    assert "enough for 4.0 runs" in remarks
    assert f"right {problem.chance:.2f} % of the time" in remarks


def test_one_seed_has_no_standard_error() -> None:
    rows = report.table({"Vanilla": result(50.0)}, "KED").splitlines()
    assert "one seed" in rows[0]
    assert rows[2].split() == ["Vanilla", "50.00", "2.0", "59.81", "12"]


def test_the_script_names_its_data_prints_the_table_and_saves_the_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    tutorial.main(["--data", "planted", "--quick", "--voice", "both", "--out", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    assert printed.count("Data: planted, synthetic, embedded.") == 1
    assert "numbers mean nothing" in printed
    for method in ("Vanilla", "RS", "RTHO", "RTHO-NT", "No steps"):
        assert f"\n{method} " in printed
    figure = tmp_path / "new" / "phones_planted.png"
    assert str(figure) in printed
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_script_runs_without_matplotlib_and_tqdm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    monkeypatch.setattr(tutorial, "QUICK", replace(tutorial.QUICK, epochs=1))
    tutorial.main(["--data", "planted", "--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert "matplotlib is not installed" in printed.out
    assert "planted: 5/5, No steps, " in printed.err
    assert not list(tmp_path.iterdir())


def test_full_needs_a_voice_and_says_what_to_get(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(voice: str, name: str) -> None:
        raise speech.MissingDataError(f"{voice}, {name}: get it there, put it here.")

    monkeypatch.setattr(tutorial, "load_speech", missing)
    with pytest.raises(SystemExit, match="ked, festvox: get it there, put it here"):
        tutorial.main(["--full"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--full --data planted", "leave out one of"), ("--full --quick", "not allowed"), ("--seeds 0", "at least 1")],
)
def test_what_makes_no_sense_is_refused(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tutorial.main(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "voices", "seeds"),
    [
        ("", ["ked"], 3),
        ("--full", ["ked", "kal"], 5),
        ("--quick --voice kal", ["kal"], 1),
        ("--full --seeds 2 --voice ked", ["ked"], 2),
    ],
)
def test_what_is_run_by_default(arguments: str, voices: list[str], seeds: int) -> None:
    options = tutorial.parse(arguments.split())
    assert (options.voices, options.seeds) == (voices, seeds)
