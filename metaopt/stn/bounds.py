"""Hyperparameters at the bounds of their domains: kept where they can move, and said."""

from __future__ import annotations

__all__ = ["keep_inside"]

import math

import torch
from torch import Tensor

from metaopt.errors import SaturatedWarning, warn
from metaopt.hyperparameters import Hyperparameters
from metaopt.hyperparameters.domains import Domain
from metaopt.hyperparameters.transformed import Integer, Interval, Positive

# An interval's leaf is kept where its sigmoid still has a slope: a thousandth of the width from the bounds.
LEAF = 6.9


def _safe(domain: Domain, dtype: torch.dtype) -> float:
    """The size up to which no leaf is near a bound."""
    if isinstance(domain, (Interval, Integer)):
        return LEAF
    # That of the least number whose reciprocal is finite too, with a margin for rounding.
    return -math.log(torch.finfo(dtype).tiny) - 1 if isinstance(domain, Positive) else math.inf


def _size(leaf: Tensor) -> float:
    # Of a number at once: two calls of torch for each hyperparameter are a notable part of a step.
    return float(leaf.abs().max()) if leaf.ndim else abs(leaf.item())


@torch.no_grad()
def keep_inside(hyper: Hyperparameters, warned: set[str]) -> None:
    """Move leaves back to where they have a slope; say of each hyperparameter once that it got there.

    Args:
        hyper: the hyperparameters, after a step.
        warned: names of those that were named; new ones are added.
    """
    for name, domain in hyper.domains.items():
        leaf = hyper.get_leaf(name)
        if not leaf.numel() or _size(leaf) <= _safe(domain, leaf.dtype):
            continue
        if isinstance(domain, (Interval, Integer)):
            beyond = leaf.abs() > LEAF
            leaf.clamp_(-LEAF, LEAF)
            where = f"as close to a bound of {domain} as it is let"
        elif isinstance(domain, Positive):
            value = domain.to_value(leaf)
            beyond = (value < torch.finfo(value.dtype).tiny) | value.isinf()
            where = "the end of the positive numbers of its type"
        else:
            continue
        if name not in warned and bool(beyond.any()):
            warned.add(name)
            values = domain.to_value(leaf)[beyond].reshape(-1)
            seen = f"{values[0].item():.3g}" + (f" (and {len(values) - 1} more entries)" if len(values) > 1 else "")
            warn(
                f"hyperparameter {name!r} has the value {seen}, {where}: it hardly moves there, and the response "
                "learns little about it. If the validation loss wants it there, take a constant or wider bounds; if "
                "not, lower the rate of `hyper_optimizer`, raise `warmup`, or use more validation data.",
                SaturatedWarning,
            )
