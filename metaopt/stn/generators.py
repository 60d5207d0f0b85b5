"""Random generators: where they are, and back. Torch's; and Python's and numpy's, where a model draws from them."""

from __future__ import annotations

__all__ = ["State", "other_state", "random_state", "same_randomness", "set_random_state"]

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor

# Of torch on the CPU and on a GPU, and of the others.
State = tuple[Tensor, Tensor | None, Any]


def random_state(device: torch.device, others: bool = False) -> State:
    """The state of the generators.

    Args:
        device: whose of torch's is kept beside the CPU's.
        others: whether Python's and numpy's are, which takes longer than many a small layer.
    """
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), gpu, other_state() if others else None


def other_state() -> tuple[Any, ...]:
    """The state of Python's and numpy's generators; states are equal if they compare so."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    return random.getstate(), (kind, tuple(numpy.asarray(keys).tolist()), *rest)


def set_random_state(device: torch.device, state: State) -> None:
    """Put the generators back to a state."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
    if len(state) > 2 and state[2] is not None:  # a checkpoint may have none
        random.setstate(state[2][0])
        numpy.random.set_state(state[2][1])


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Leave the random generators as they were."""
    state = random_state(device, others=True)
    try:
        yield
    finally:
        set_random_state(device, state)
