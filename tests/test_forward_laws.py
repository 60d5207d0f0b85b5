"""What holds for every training loop in forward mode, from no step on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import metaopt
from metaopt.capture.program import Program
from tests.oracles import unrolled
from tests.strategies import Loop, loops
from tests.test_laws import STATELESS, Recorded, assert_close, direct


@given(loop=loops(), chunk=st.sampled_from((None, 1, 3)))
@example(loop=STATELESS, chunk=1)
def test_forward_is_unrolled(loop: Loop, chunk: int | None) -> None:
    streamed = Recorded(loop, metaopt.stream, chunk=chunk)
    hyper = loop.leaves()
    oracle = unrolled(loop, hyper)
    found = streamed.gradient(streamed.outer() + direct(streamed.hyper))
    assert_close(found, oracle.gradients(list(hyper.values()), oracle.outer + direct(hyper)))


@given(loop=loops())
def test_the_transposed_step_gives_the_same_number(loop: Loop) -> None:
    found = Recorded(loop, metaopt.stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "split", lambda self, places: None)
        expected = Recorded(loop, metaopt.stream)
    assert_close(
        found.gradient(found.outer() + direct(found.hyper)),
        expected.gradient(expected.outer() + direct(expected.hyper)),
        relative=1e-10,
    )


@given(loop=loops(steps=3), a=st.floats(-2, 2), b=st.floats(-2, 2))
def test_forward_mode_is_linear_in_the_outer_objective(loop: Loop, a: float, b: float) -> None:
    streamed = Recorded(loop, metaopt.stream)
    both = streamed.gradient(a * streamed.outer() + b * streamed.outer(second=True))
    parts = [streamed.gradient(streamed.outer()), streamed.gradient(streamed.outer(second=True))]
    for found, one, other in zip(both, *parts, strict=True):
        size = float((abs(a) * one.abs() + abs(b) * other.abs()).max()) if found.numel() else 0.0
        assert torch.all((found - a * one - b * other).abs() <= 1e-9 * size + 1e-13)


@given(loop=loops())
def test_streaming_changes_no_bit_of_the_training(loop: Loop) -> None:
    streamed = Recorded(loop, metaopt.stream)
    hyper = loop.leaves()
    bare = loop.build(hyper)
    torch.manual_seed(loop.seed)
    loop.run(bare, hyper)
    pairs = zip(bare.model.state_dict().values(), streamed.training.model.state_dict().values(), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)
    assert all(leaf.grad is None for leaf in streamed.hyper.values())
