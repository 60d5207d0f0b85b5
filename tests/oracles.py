"""Independent ways to the same hypergradient."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from tests.cases import Case, Hyper


def value(case: Case, hyper: Hyper) -> float:
    """The outer objective of the bare loop: nothing of metaopt's capture is there."""
    outer = case.train(hyper, lambda optimizer: nullcontext()).outer
    return (outer() if callable(outer) else outer).item()


def finite_difference(case: Case, name: str, index: int) -> float:
    """The derivative of the bare loop in one entry, by two stencils of fourth order that have to agree."""

    def shifted(step: float) -> float:
        hyper = case.hyper()
        with torch.no_grad():
            hyper[name].view(-1)[index] += step
        return value(case, hyper)

    def stencil(h: float) -> float:
        if (
            name == "momentum" and float(case.hyper()[name].detach()) == 0
        ):  # the edge of the domain: from the right only
            f = [shifted(k * h) for k in range(5)]
            return (-25 * f[0] + 48 * f[1] - 36 * f[2] + 16 * f[3] - 3 * f[4]) / (12 * h)
        return (8 * (shifted(h) - shifted(-h)) - (shifted(2 * h) - shifted(-2 * h))) / (12 * h)

    first, second = stencil(1e-4), stencil(3e-4)
    assert abs(first - second) <= 1e-6 * max(1.0, abs(first)), f"the stencils disagree: {first} and {second}"
    return first


def entries(tensor: Tensor) -> list[int]:
    """Some entries of a hyperparameter to look at: the first, one in the middle, the last."""
    return sorted({0, tensor.numel() // 2, tensor.numel() - 1})
