"""Domains in which a hyperparameter is its own leaf: all reals, a box, an L1 ball in a box."""

from __future__ import annotations

__all__ = ["Box", "Domain", "L1Box", "Real", "Value", "as_value", "outside", "span"]

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from metaopt.errors import DomainError
from metaopt.hyperparameters.projections import check_l1_box, project_box, project_l1_box, sum_slack, widen

Value: TypeAlias = Tensor | np.ndarray[Any, Any] | Sequence[Any] | float


class Domain(ABC):
    """Where a hyperparameter lives, and how its value is read from a leaf.

    A subclass is a frozen record of bounds; it holds no tensor of the hyperparameter itself. ``str(domain)``
    is what a reader sees.
    """

    projected: ClassVar[bool] = False

    @abstractmethod
    def to_leaf(self, value: Tensor) -> Tensor:
        """The leaf whose value is ``value``, of its shape and dtype; ``DomainError`` if there is none."""

    @abstractmethod
    def to_value(self, leaf: Tensor) -> Tensor:
        """The constrained value of a leaf, differentiable; the leaf itself where nothing is transformed."""

    def leaf_for(self, value: Value, leaf: Tensor) -> Tensor:
        """What a leaf is to hold for another value, which may expand to its shape; ``DomainError`` if there is none."""
        tensor = as_value(value, leaf.dtype).to(leaf.device)
        try:
            tensor = tensor.expand_as(leaf)
        except RuntimeError as error:
            raise DomainError(
                f"its shape is {tuple(leaf.shape)}, which {tuple(tensor.shape)} does not expand to; "
                "reshape the value, or make new Hyperparameters."
            ) from error
        return self.to_leaf(tensor)

    def project(self, leaf: Tensor) -> Tensor:
        """The Euclidean projection of a leaf, detached; the leaf's own values where nothing is projected."""
        return leaf.detach()


class Direct(Domain):
    """A domain in which the leaf is the value."""

    def to_value(self, leaf: Tensor) -> Tensor:
        return leaf


@dataclass(frozen=True)
class Real(Direct):
    """All real numbers."""

    def to_leaf(self, value: Tensor) -> Tensor:
        return value

    def __str__(self) -> str:
        return "real"


@dataclass(frozen=True)
class Box(Direct):
    """The set low <= x <= high, kept by projection."""

    low: float = -math.inf
    high: float = math.inf
    projected: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise DomainError(f"{self} needs low < high; swap or widen the bounds, or use a plain number.")

    def to_leaf(self, value: Tensor) -> Tensor:
        if outside(value, self.low, self.high):
            raise DomainError(
                f"{self} is defined for {self.low:g} <= value <= {self.high:g}, got {span(value)}; "
                "clip the value or widen the bounds."
            )
        return value

    def project(self, leaf: Tensor) -> Tensor:
        return project_box(leaf, self.low, self.high)

    def __str__(self) -> str:
        return f"box({self.low:g}, {self.high:g})"


@dataclass(frozen=True)
class L1Box(Direct):
    """The set low <= x <= high with sum x <= radius, kept by projection."""

    radius: float
    low: float = 0.0
    high: float = 1.0
    projected: ClassVar[bool] = True

    def to_leaf(self, value: Tensor) -> Tensor:
        check_l1_box(value.numel(), self.radius, self.low, self.high)
        if outside(value, self.low, self.high):
            raise DomainError(
                f"{self} is defined for {self.low:g} <= value <= {self.high:g}, got {span(value)}; "
                "clip the value or widen the bounds."
            )
        total = float(widen(value).sum())
        if total > self.radius * (1 + sum_slack(value.dtype)):
            raise DomainError(
                f"{self} is defined for values whose sum is at most {self.radius:g}, got a sum of {total:g}; "
                f"start from radius / n = {self.radius / value.numel():g} each, project the value first with "
                "`metaopt.hyperparameters.project_l1_box`, or raise the radius."
            )
        return value

    def project(self, leaf: Tensor) -> Tensor:
        return project_l1_box(leaf, self.radius, self.low, self.high)

    def __str__(self) -> str:
        return f"l1_box(radius={self.radius:g}, {self.low:g}, {self.high:g})"


def as_value(value: Value, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a number or an array into a detached floating tensor.

    Args:
        value: the number or array.
        dtype: of the tensor; by default the array's own, and torch's default for numbers and integers.

    Raises:
        DomainError: if it is no array of real, finite numbers.
    """
    try:
        # A float64 scalar of numpy is a Python float too: it takes the default dtype, as any number does.
        number = float(value) if isinstance(value, numbers.Real) else value
        tensor = number if isinstance(number, Tensor) else torch.tensor(number, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DomainError(
            f"a hyperparameter's value is a number or an array of numbers, got {type(value).__name__}; "
            "convert it to a tensor first."
        ) from error
    if tensor.layout is not torch.strided:
        raise DomainError("a hyperparameter's value is dense, and this is a sparse tensor; use `value.to_dense()`.")
    if tensor.is_complex():
        raise DomainError("a hyperparameter is real, got a complex value; use its real and imaginary parts.")
    if dtype is not None or not tensor.is_floating_point():
        tensor = tensor.to(dtype or torch.get_default_dtype())
    if not torch.isfinite(tensor).all():
        raise DomainError(f"a hyperparameter's value is finite, got {span(tensor)}; replace the others.")
    return tensor.detach().clone()


def outside(value: Tensor, low: float, high: float) -> bool:
    """Whether an entry lies outside [low, high], the bounds rounded to the value's own dtype."""
    return bool(((value < low) | (value > high)).any())


def span(value: Tensor) -> str:
    """A value in words: the number, or the range of the entries."""
    value = value.detach()
    if value.numel() == 1:
        return f"{value.item():g}"
    if value.numel() == 0:
        return "no entries"
    return f"entries from {value.min().item():g} to {value.max().item():g}"
