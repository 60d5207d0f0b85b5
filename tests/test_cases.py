"""Every loop of the table: its hypergradients are those of the bare loop, and its training is the bare training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import metaopt
from tests.cases import CASES, Case, Trained
from tests.oracles import entries, finite_difference


def watched(mode: Callable[..., Any], case: Case, **options: Any) -> tuple[Any, Trained, dict[str, torch.Tensor]]:
    runs: list[Any] = []

    def context(optimizer: torch.optim.Optimizer) -> Any:
        runs.append(mode(optimizer, **options))
        return runs[0]

    hyper = case.hyper()
    trained = case.train(hyper, context)
    return runs[0], trained, hyper


def recorded(case: Case, **options: Any) -> tuple[metaopt.Recording, Trained, dict[str, torch.Tensor]]:
    return watched(metaopt.record, case, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_reverse(case: Case) -> None:
    gradients = []
    for mode in (metaopt.record, metaopt.stream):
        run, trained, hyper = watched(mode, case)
        run.backward(trained.outer)
        gradients.append({name: leaf.grad for name, leaf in hyper.items()})
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert found is not None, name
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reverse_is_finite_differences(case: Case) -> None:
    run, trained, hyper = recorded(case, verify="all")
    run.backward(trained.outer)
    for name, leaf in hyper.items():
        assert leaf.grad is not None, name
        for index in entries(leaf):
            expected = finite_difference(case, name, index)
            found = leaf.grad.reshape(-1)[index].item()
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-7), (name, index)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_watching_changes_nothing(case: Case) -> None:
    bare = case.train(case.hyper(), lambda optimizer: nullcontext())
    bare_rng = torch.get_rng_state()
    _, watched, hyper = recorded(case)
    assert torch.equal(bare_rng, torch.get_rng_state())
    assert all(leaf.grad is None for leaf in hyper.values())
    pairs = zip(bare.model.state_dict().items(), watched.model.state_dict().values(), strict=True)
    for (name, before), after in pairs:
        assert torch.equal(before, after), name
    one, other = bare.optimizer.state_dict(), watched.optimizer.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for key, state in one["state"].items():
        for name, tensor in state.items():
            if tensor is not None:
                assert torch.equal(tensor, other["state"][key][name]), name


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_a_complex_hyperparameter_has_two_derivatives(mode: Callable[..., Any]) -> None:
    (case,) = (case for case in CASES if case.name == "complex_state_in_the_objective")

    def values() -> dict[str, torch.Tensor]:
        return {name: torch.view_as_complex(v) if name == "filter" else v for name, v in case.values().items()}

    gradients = []
    for variant in (case, Case(case.name, case.train, values)):
        run, trained, hyper = watched(mode, variant)
        run.backward(trained.outer)
        assert hyper["filter"].grad is not None
        gradients.append(hyper["filter"].grad)
    torch.testing.assert_close(torch.view_as_real(gradients[1]), gradients[0], rtol=1e-9, atol=1e-12)
