"""Torch's random generators: where they are, and back."""

from __future__ import annotations

__all__ = ["random_state", "same_randomness", "set_random_state"]

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The state of torch's generators, of the CPU and of a GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    """Put the generators back to a state."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Leave the random generators as they were."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(device, state)
