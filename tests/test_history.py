"""Hyperparameters are remembered: in copies, in checkpoints, by name, and over hyper-iterations."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from metaopt.hyperparameters import Hyperparameters, box, l1_box, name_of, owner_of, positive

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def make() -> Hyperparameters:
    return Hyperparameters(
        lr=positive(0.1),
        weights=l1_box(torch.full((10,), 0.2), radius=2.0),
        penalty=box(0.0, 0, None),
    )


def test_leaves_know_their_name_and_owner() -> None:
    hyper = make()
    for name, leaf in hyper.named_parameters():
        assert name_of(leaf) == name
        assert owner_of(leaf) is hyper
    assert name_of(hyper.lr) is None
    assert owner_of(torch.ones(1)) is None


def test_the_registry_follows_copies_conversions_and_loads() -> None:
    hyper = make()
    for twin in (copy.deepcopy(hyper), pickle.loads(pickle.dumps(hyper))):
        leaf = twin.weights
        assert leaf is not hyper.weights
        assert owner_of(leaf) is twin
        assert owner_of(hyper.weights) is hyper
    hyper.to(torch.float32)
    assert hyper.lr.dtype == torch.float32
    assert owner_of(hyper.weights) is hyper
    hyper.load_state_dict(make().state_dict(), assign=True)
    assert hyper.lr.dtype == torch.float64
    assert name_of(hyper.weights) == "weights"


def test_the_registry_follows_parameters_that_a_conversion_replaces() -> None:
    hyper = make()
    before = hyper.weights
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        hyper.to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert hyper.weights is not before
    assert name_of(hyper.weights) == "weights"
    assert name_of(before) is None


def test_the_registry_keeps_nobody_alive() -> None:
    hyper = make()
    leaf = hyper.weights
    del hyper
    gc.collect()
    assert owner_of(leaf) is None
    assert name_of(leaf) is None


def advanced() -> Hyperparameters:
    hyper = make()
    hyper.weights.grad = torch.ones(10)
    hyper.record()
    hyper.set(lr=0.2, weights=torch.arange(10) / 100)
    hyper.record(full=True)
    return hyper


def alike(one: Hyperparameters, other: Hyperparameters) -> bool:
    return (
        repr(one) == repr(other)
        and all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        and str(one.history) == str(other.history)
    )


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda hyper: pickle.loads(pickle.dumps(hyper))])
def test_copies_are_whole_and_apart(clone: Callable[[Hyperparameters], Hyperparameters]) -> None:
    hyper = advanced()
    twin = clone(hyper)
    assert alike(hyper, twin)
    twin.set(lr=0.5)
    twin.record()
    torch.testing.assert_close(hyper.lr, torch.tensor(0.2))
    assert len(hyper.history["lr"]) == 2


def test_state_dict_round_trips_through_a_file() -> None:
    hyper, twin = advanced(), make()
    file = io.BytesIO()
    torch.save(hyper.state_dict(), file)
    file.seek(0)
    leaves = list(twin.parameters())
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert alike(hyper, twin)
    assert all(before is after for before, after in zip(leaves, twin.parameters(), strict=True))
    twin.record()
    assert len(hyper.history["lr"]) == 2


def test_history_is_a_dict_of_lists() -> None:
    history = advanced().history
    assert history.names == ["lr", "weights", "penalty"]
    assert history["lr"] == pytest.approx([0.1, 0.2])
    assert history["weights.mean"] == pytest.approx([0.2, 0.045])
    assert history["weights.max"] == pytest.approx([0.2, 0.09])
    assert history["weights.q25"] == pytest.approx([0.2, 0.0225])
    assert history["weights.grad_norm"] == pytest.approx([math.sqrt(10)] * 2)
    assert all(math.isnan(norm) for norm in history["lr.grad_norm"])
    assert len(history["weights.full"]) == 1
    arrays = history.to_numpy()
    assert arrays["weights.full"].shape == (1, 10)
    assert arrays["lr"].dtype == np.float64


class Watcher(TorchFunctionMode):
    """Refuses every call of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was watched")


def test_looking_is_no_part_of_a_watched_loop() -> None:
    hyper = make()
    with Watcher():
        hyper.record(full=True)
        assert "lr" in repr(hyper)


def test_a_state_dict_does_not_grow_with_the_history() -> None:
    hyper = advanced()
    state = hyper.state_dict()
    hyper.record()
    assert len(state["_extra_state"]["lr"]) == 2


def test_recorded_values_do_not_move_with_their_leaves() -> None:
    hyper = advanced()
    hyper.set(weights=0.0)
    assert hyper.history["weights.full"][0].tolist() == pytest.approx([entry / 100 for entry in range(10)])


def test_recording_leaves_gradients_alone_and_takes_the_empty() -> None:
    hyper = Hyperparameters(empty=torch.empty(0), lr=positive(0.1))
    hyper.record(full=True)
    assert all(leaf.grad is None for leaf in hyper.parameters())
    assert math.isnan(hyper.history["empty.mean"][0])
