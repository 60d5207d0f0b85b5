"""What is kept, where, and what is computed again, changes the memory and not the hypergradient."""

from __future__ import annotations

import errno
import gc
import itertools
import mmap
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import metaopt
from metaopt.capture.cells import Cell
from metaopt.checkpoints import bytes_of, store_of, stores
from metaopt.checkpoints.stores import Place
from metaopt.modes import versions
from tests.cases import CASES, Case
from tests.test_cases import recorded

WAYS: dict[str, dict[str, Any]] = {
    "graphs": {"keep": "graphs"},
    "checkpoints": {"keep": "checkpoints"},
    "two checkpoints": {"keep": "checkpoints", "budget": 1},
    "disk": {"offload": "disk"},
}


@pytest.mark.parametrize(("place", "case"), list(enumerate(CASES)), ids=str)
def test_the_hypergradient_does_not_depend_on_what_is_kept(
    place: int, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "ENOUGH", 1)
    monkeypatch.setattr(versions, "AGAIN", 1)

    def gradients(**options: Any) -> dict[str, Tensor | None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=metaopt.MetaoptWarning)
            run, trained, hyper = recorded(case, **options)
            run.backward(trained.outer)
        return {name: leaf.grad for name, leaf in hyper.items()}

    expected = gradients()
    for way, options in WAYS.items():
        if str(case) == "truncated_backpropagation" and "checkpoints" in way:
            continue  # `last` keeps none
        if way == "graphs" and place % 3:
            continue  # test_compile traces the others; it takes longer than all else
        found = gradients(**options)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


class Training:
    """Steps of SGD with momentum on a small network, with dropout."""

    def __init__(self, steps: int, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.size = 2 * sum(w.nbytes for w in self.model.parameters())
        self.lr = torch.tensor(0.05, requires_grad=True)
        optimizer = metaopt.optim.SGD(self.model.parameters(), lr=self.lr, momentum=0.9)
        self.advanced = 0
        with metaopt.record(optimizer, **options) as self.run:
            for _ in range(steps):
                optimizer.zero_grad()
                self.model(torch.randn(6, 4)).square().mean().backward()
                optimizer.step()
        self.outer = F.mse_loss(self.model.eval()(torch.ones(3, 4)), torch.ones(3, 1))

    def gradient(self) -> Tensor:
        (found,) = self.run.hypergradient(self.outer, self.lr)
        return found


@given(
    steps=st.integers(1, 40),
    slots=st.one_of(st.none(), st.integers(3, 50)),
    level=st.sampled_from((None, "checkpoints")),
)
def test_any_number_of_steps_and_of_checkpoints(steps: int, slots: int | None, level: str | None) -> None:
    budget = None if slots is None else slots * Training(1).size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", metaopt.FallbackWarning)
        training = Training(steps, keep=level, budget=budget)
        expected = Training(steps).gradient()
        for _ in range(2):
            torch.testing.assert_close(training.gradient(), expected, rtol=1e-9, atol=1e-14)
    if budget is not None:
        memory = training.run.memory()
        assert memory.states + memory.values <= budget


@pytest.mark.parametrize("steps", [1, 7, 50, 400])
def test_checkpoints_grow_with_the_root_of_the_steps(steps: int) -> None:
    memory = Training(steps, keep="checkpoints").run.memory()
    assert memory.checkpoints <= 2 * steps**0.5 + 1
    assert memory.states <= memory.checkpoints * memory.state


def test_a_budget_takes_graphs_then_states_then_checkpoints() -> None:
    size = Training(1).size
    found = [Training(20, budget=budget).run.memory().keep for budget in ("1 GiB", 22 * size, 8 * size)]
    assert found == ["graphs", "states", "checkpoints"]
    assert Training(20).run.memory().keep == "states"
    assert Training(20, keep="states", budget="1GiB").run.memory().keep == "states"


def test_a_budget_below_two_states_is_said_once() -> None:
    with pytest.warns(metaopt.MetaoptWarning, match="less than two states") as caught:
        training = Training(6, budget=100)
    assert [warning.filename for warning in caught] == [__file__]
    torch.testing.assert_close(training.gradient(), Training(6).gradient(), rtol=1e-9, atol=0)


def test_memory_is_told_and_forecast() -> None:
    training = Training(10)
    memory = training.run.memory()
    assert memory.states == 10 * training.size
    assert memory.inputs == 10 * 6 * 4 * 8
    assert memory.forecast(100) == 10 * memory.total
    assert "10 steps, keep='states'" in str(memory)
    assert "10 steps" in str(memory)
    kept = Training(10, keep="graphs").run.memory()
    assert kept.values > 0
    assert kept.total == kept.states + kept.values + kept.inputs
    training.run.backward(training.outer)
    assert training.run.memory().states == 0


@pytest.mark.parametrize("batch", ["whole", "slices", "epochs", "copies"])
def test_a_data_set_is_counted_once(batch: str) -> None:
    """Forecasts multiplied it by the steps; slices of it were counted in every epoch."""
    x = torch.randn(12, 4)

    def memory(steps: int) -> metaopt.Memory:
        model = nn.Linear(4, 1)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
        shuffled = x
        with metaopt.record(optimizer) as run:
            for t in range(steps):
                if t % 4 == 0 and batch == "epochs":
                    shuffled = x[torch.randperm(12)]
                part = slice(t % 4 * 3, t % 4 * 3 + 3)
                given = {"whole": x, "copies": x[part].clone()}.get(batch, shuffled[part])
                optimizer.zero_grad()
                model(given).square().mean().backward()
                optimizer.step()
        return run.memory()

    found = memory(8)
    expected = {"whole": 1, "slices": 1, "epochs": 2, "copies": 2}[batch] * x.nbytes
    assert found.inputs == expected
    assert found.forecast(16) == memory(16).total


def test_leaves_that_the_loop_makes_are_counted() -> None:
    """Those that are made out of sight look like hyperparameters, and were left out."""
    x, model = torch.randn(12, 4), nn.Linear(4, 1)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    with metaopt.record(optimizer) as run:
        for _ in range(4):
            noisy = nn.Parameter(x.clone())
            (slope,) = torch.autograd.grad(model(noisy).square().mean(), noisy, create_graph=True)
            optimizer.zero_grad()
            slope.square().mean().backward()
            optimizer.step()
    assert run.memory().inputs == 4 * x.nbytes


@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("keep", ["states", "graphs"])
def test_sparse_matrices_are_counted(layout: str, keep: str) -> None:
    """torch has no size of a sparse tensor in bytes: `run.memory()` and ``keep="graphs"`` ended in its error."""
    dense = torch.eye(12)
    matrix = dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()
    x, model = torch.randn(12, 4), nn.Linear(4, 1)
    edges, index = torch.rand(12, requires_grad=True), torch.arange(12).expand(2, 12)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    with metaopt.record(optimizer, keep=keep) as run:
        for _ in range(4):
            optimizer.zero_grad()
            smoothed = torch.sparse.mm(matrix, model(x))
            torch.sparse.mm(torch.sparse_coo_tensor(index, edges, (12, 12)), smoothed).square().mean().backward()
            optimizer.step()
    indices = 2 * 12 if layout == "coo" else 13 + 12
    assert run.memory().inputs == x.nbytes + index.untyped_storage().nbytes() + 8 * indices + 8 * 12
    assert (run.memory().values > 0) == (keep == "graphs")
    run.backward(model(x).square().mean())
    assert edges.grad is not None


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_a_forecast_of_a_truncated_recording_counts_the_last_steps(steps: int) -> None:
    """It grew with the steps, as if all of them were kept."""
    forecast = Training(steps, last=5).run.memory().forecast(100)
    assert forecast == Training(20, last=5).run.memory().total == Training(5).run.memory().total
    assert Training(3, last=0).run.memory().forecast(100) == 0


def test_a_forecast_of_checkpoints_is_near_what_they_take() -> None:
    forecast = Training(100, keep="checkpoints").run.memory().forecast(400)
    actual = Training(400, keep="checkpoints").run.memory().total
    assert actual <= forecast < 2 * actual


def test_states_on_disk_leave_no_file(tmp_path: Path) -> None:
    training = Training(20, offload=tmp_path / "states")
    assert (tmp_path / "states").is_dir()
    torch.testing.assert_close(training.gradient(), Training(20).gradient(), rtol=0, atol=0)
    assert not list((tmp_path / "states").iterdir())


@pytest.mark.parametrize("states", [4, 12])
def test_states_stay_on_disk_where_a_budget_gives_some_up(states: int) -> None:
    """Those kept when the budget was reached moved into memory."""
    training = Training(20, offload="disk", budget=states * Training(1).size)
    assert training.run.memory().keep == "checkpoints"
    copies = [cell for segment in training.run._keeping.segments for cell in segment.copies() if cell.nbytes]
    assert copies
    assert all(isinstance(cell.kept, Place) for cell in copies)
    torch.testing.assert_close(training.gradient(), Training(20).gradient(), rtol=1e-9, atol=0)


def test_checkpoints_on_disk_take_the_room_that_they_are_said_to_take() -> None:
    """A file stayed as long as one checkpoint lay in it, which was the room of nearly all states."""
    store = store_of("disk")
    store.scatter()
    kept = [store.copy(torch.zeros(2**18, dtype=torch.float64)) for _ in range(8)]
    assert sum(len(place.chunk) for place in kept if isinstance(place, Place)) <= 2**25


def test_a_folder_may_be_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the name "~" was made."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Training(1, offload="~/states")
    assert [folder.name for folder in tmp_path.iterdir()] == ["home"]


def test_states_lie_on_disk_where_room_can_not_be_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS it was an `AttributeError`, in the middle of the training."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    torch.testing.assert_close(Training(4, offload="disk").gradient(), Training(4).gradient(), rtol=0, atol=0)


def test_what_a_budget_gives_up_is_freed() -> None:
    """A batch that the loop overwrites, and an average that few steps read, kept the states beside them in memory."""
    model, x, average = nn.Linear(40, 1), torch.zeros(2, 40), torch.zeros(1, 40)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    with metaopt.record(optimizer, budget=2000) as run:
        for t in range(9):
            x.copy_(torch.randn(2, 40))
            optimizer.zero_grad()
            (model(x).square().mean() + model.weight.mul(average).sum()).backward()
            optimizer.step()
            if t % 4 == 0:
                average.mul_(0.5).add_(model.weight.detach(), alpha=0.5)
    assert run.memory().keep == "checkpoints"
    cells = [cell for segment in run._keeping.segments for cell in (*segment.copies(), *segment.constants)]
    assert cells
    assert not any(isinstance(cell.kept, Place) for cell in cells)


def test_states_lie_side_by_side_and_are_tensors_only_where_they_are_read() -> None:
    # A tensor for each copy would keep the memory between them from being used again: W1 took five times its states.
    model = nn.Linear(64, 64)
    lr = torch.tensor(0.01, requires_grad=True)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
    with metaopt.record(optimizer) as run:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 64)).square().mean().backward()
            optimizer.step()
    cells = [cell for segment in run._keeping.segments for _, cell in segment.inputs]
    assert len(cells) == 6
    assert all(cell.kept is not None for cell in cells)
    distances = [b.tensor.data_ptr() - a.tensor.data_ptr() for a, b in itertools.pairwise(cells)]
    assert distances == [cell.nbytes for cell in cells[:-1]]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x.to(torch.bfloat16),
        lambda x: x[:0],
        lambda x: x.sum(),
        lambda x: x.long(),
        lambda x: x.to(torch.complex64).conj(),
        lambda x: x.to(torch.complex64).conj().imag,
        lambda x: x.to_sparse(),
        lambda x: x.repeat(300, 300),
    ],
    ids="transposed strided bfloat16 empty scalar whole conjugate negated sparse large".split(),
)
@pytest.mark.parametrize("where", [None, "disk"])
def test_a_copy_is_the_value_and_stays_it(make: Any, where: str | None) -> None:
    store = store_of(where)
    tensor = make(torch.arange(6.0).view(2, 3) + 1)
    for _ in range(2):  # the second one does not begin a chunk
        cell = Cell(tensor)
        cell.commit(store.copy)
        kept = cell.value()
        assert (kept.dtype, kept.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(kept.to_dense().resolve_neg(), tensor.to_dense().resolve_neg())
        if tensor.layout is torch.strided and tensor.numel():
            assert kept.data_ptr() != tensor.data_ptr()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_writes_its_states_into_memory_of_its_own() -> None:
    """Two of a pool's workers wrote into the same idle chunk, and both hypergradients were wrong."""
    store = store_of(None)
    place = store.copy(torch.ones(3))
    assert isinstance(place, Place)
    child = os.fork()
    if not child:
        place.tensor().fill_(7)
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(place.tensor(), torch.ones(3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_that_goes_on_writes_its_states_into_files_of_its_own() -> None:
    """Both wrote into the same file, and the hypergradients were wrong."""
    store = store_of("disk")
    store.copy(torch.zeros(3))
    ready, written = os.pipe()
    child = os.fork()
    if not child:
        os.read(ready, 1)
        store.copy(torch.full((3,), 7.0))
        os._exit(0)
    place = store.copy(torch.ones(3))
    os.write(written, b"x")
    os.waitpid(child, 0)
    assert isinstance(place, Place)
    assert torch.equal(place.tensor(), torch.ones(3))


def test_idle_memory_is_taken_where_it_fits_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one took the largest, and the next training had to have another large one."""
    large, small = mmap.mmap(-1, 2**24), mmap.mmap(-1, 2**22)
    monkeypatch.setattr(stores, "_idle", [large, small])
    place = store_of(None).copy(torch.ones(3))
    assert isinstance(place, Place)
    assert len(place.chunk) == 2**22


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="a system without this advice")
def test_the_system_may_take_the_memory_of_idle_chunks() -> None:
    store = store_of(None)
    place = store.copy(torch.ones(3))
    assert isinstance(place, Place)
    place.chunk.obj.madvise(mmap.MADV_FREE)  # type: ignore[attr-defined]  # of shared memory it is an error


def test_amounts_are_read() -> None:
    amounts: list[Any] = [5, "5", "2GiB", "500 MB", "1.5k", "3 MiB", 1e9, 2.0**70, ".5 KB", "1. kB"]
    expected = [5, 5, 2**31, 5 * 10**8, 1500, 3 * 2**20, 10**9, 2**70, 500, 1000]
    assert [bytes_of(amount) for amount in amounts] == expected


@pytest.mark.parametrize(
    "amount",
    ["much", "-3", "0", True, "3 PB", "iB", "1.2.3 GB", ".", "", float("nan"), float("inf"), -1, 0, [5]],
    ids=repr,
)
def test_what_is_no_amount_is_refused(amount: Any) -> None:
    with pytest.raises(ValueError, match="budget"):
        bytes_of(amount)


@pytest.mark.parametrize("where", [3, True, "", "cuda", "gpu", "CPU", "mps:0", torch.device("cpu"), b"/tmp"])
def test_what_is_no_folder_is_refused(where: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of such names were made, without a word."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='offload must be None, "cpu", "disk" or a folder'):
        Training(1, offload=where)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_not_be_used_is_said_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the folder .*file is none that can be written to .*Give `offload=`"):
        metaopt.record(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1), offload=tmp_path / "file")


def test_a_disk_without_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"can't take 4 MiB of states .*No space left.*Give `offload=`") as caught:
        Training(2, offload=tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_options_that_contradict_each_other_are_refused() -> None:
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="graphs, states, checkpoints"):
        metaopt.record(optimizer, keep="everything")
    for options in ({"budget": 100}, {"keep": "checkpoints"}):
        with pytest.raises(ValueError, match="already bounds"):
            metaopt.record(optimizer, last=3, **options)


@pytest.mark.parametrize("options", [{}, *WAYS.values()], ids=["states", *WAYS])
def test_a_loop_without_a_step_is_told_whatever_is_kept(options: dict[str, Any]) -> None:
    """Where checkpoints were to be kept, the error was one of Python's."""
    training = Training(0, **options)
    with pytest.raises(metaopt.SweepError, match=r"no `optimizer.step\(\)`"):
        training.gradient()


def test_checkpoints_without_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was missed when the sweep began, after the whole training, and where it is of no use too."""
    monkeypatch.setitem(__import__("sys").modules, "checkpoint_schedules", None)
    torch.testing.assert_close(Training(10, keep="checkpoints").gradient(), Training(10).gradient())
    size = Training(1).size
    for options in ({"keep": "checkpoints", "budget": 100 * size}, {"budget": 4 * size}):
        with pytest.raises(metaopt.MissingExtraError, match=r"metaopt-torch\[checkpoints\]"):
            Training(20, **options)
    torch.testing.assert_close(Training(3, keep="states", budget=20 * size).gradient(), Training(3).gradient())


def test_what_was_recorded_is_freed_with_the_run() -> None:
    """And not when Python looks for cycles the next time."""
    Training(1)  # torch's first optimizer of a process leaves a cycle of its own
    gc.collect()
    gc.disable()
    try:
        training = Training(3)
        cell = weakref.ref(training.run._keeping.segments[1].inputs[0][1])
        assert cell() is not None
        del training
        assert cell() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("collected", [False, True], ids=["dropped", "collected"])
def test_leaves_that_the_loop_makes_are_of_their_own_step(collected: bool) -> None:
    """Each step read the gradients of all leaves before it, so that no two were alike, and the gradients stayed."""
    torch.manual_seed(0)
    model, lr = nn.Linear(3, 1), torch.tensor(0.1, requires_grad=True)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    leaves: list[Any] = []
    with metaopt.record(optimizer) as run:
        for _ in range(6):
            x = torch.randn(4, 3).requires_grad_()
            leaves.append(x if collected else weakref.ref(x))
            optimizer.zero_grad()
            loss = model(x).square().mean()
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + slope.square().sum()).backward()
            optimizer.step()
        del x, loss, slope
    assert len(run.programs) <= 2  # the first step has no momentum
    assert collected or all(leaf() is None for leaf in leaves)
    assert all(bool(leaf.grad.any()) for leaf in leaves if collected)


def test_what_few_steps_write_is_carried_between_checkpoints() -> None:
    def train(**options: Any) -> Tensor:
        torch.manual_seed(0)
        model, teacher = nn.Linear(3, 1), torch.zeros(1, 3)
        lr = torch.tensor(0.1, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
        with metaopt.record(optimizer, **options) as run:
            for t in range(20):
                x = torch.randn(4, 3)
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                if t % 2 == 0:
                    with torch.no_grad():
                        teacher.mul_(0.5).add_(model.weight, alpha=0.5)
        (found,) = run.hypergradient(lambda: (model.weight * teacher).sum(), lr)
        return found

    torch.testing.assert_close(train(keep="checkpoints"), train(), rtol=1e-9, atol=0)
