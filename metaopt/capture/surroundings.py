"""What a replayed call needs around it: random numbers, precision, kernels."""

from __future__ import annotations

__all__ = ["draws", "generators", "surroundings"]

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from metaopt.capture.notices import name_of
from metaopt.capture.trace import Trace

Seed = list[tuple[torch.Generator, Tensor]]

_RANDOM = re.compile(
    "drop|rand|bernoulli|normal|multinomial|rrelu|gumbel|poisson|binomial|exponential|cauchy|uniform|geometric|"
    "attention|lstm|gru|rnn|noise|sample|apply|fractional|dirichlet|gamma|kaiming|xavier|orthogonal|sparse_|lowrank|lobpcg"
)
_NATIVE = re.compile("attention|lstm|gru|rnn")


@lru_cache(4096)
def draws(func: Callable[..., Any]) -> bool:
    """Whether a function may draw random numbers."""
    return _RANDOM.search(name_of(func)) is not None


@lru_cache(4096)
def _is_native(func: Callable[..., Any]) -> bool:
    """Whether a function's fastest kernels lack a second derivative."""
    return _NATIVE.search(name_of(func)) is not None


def generators(func: Callable[..., Any], kwargs: dict[str, Any]) -> Seed:
    """The generators that a call may move, where they stand before it."""
    if not draws(func):
        return []
    known = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        known += list(torch.cuda.default_generators)
    given = kwargs.get("generator")
    return [(g, g.get_state()) for g in ([*known, given] if given is not None else known)]


def surroundings(trace: Trace, func: Callable[..., Any], seed: Seed | None) -> dict[str, Any]:
    """What is noted of a call that has run, as the options of its `Instruction`; ``seed``: its `generators`."""
    options: dict[str, Any] = {"native": True} if _is_native(func) else {}
    if torch._C._is_any_autocast_enabled():
        options["autocast"] = tuple(
            (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        )
    if seed:
        # One entry per call: the generators that it moved, where they stood before it.
        moved = tuple((g, state) for g, state in seed if not torch.equal(g.get_state(), state))
        if moved:
            trace.seeds.append(moved)
            options["seed"] = len(trace.seeds) - 1
    return options
