"""Domains in which a hyperparameter is a smooth function of an unconstrained leaf."""

from __future__ import annotations

__all__ = ["General", "Integer", "Interval", "Positive", "Simplex", "Transformed", "refuse_other", "signature"]

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.transforms import Transform

from metaopt.errors import DomainError, MetaoptWarning, warn
from metaopt.hyperparameters.domains import Domain, outside, span
from metaopt.hyperparameters.projections import widen

# The share of its width by which a value on a bound moves inside: the sigmoid's slope there is 1e-3 of the
# width, small enough to respect the wish and large enough for a hypergradient to pass.
MARGIN = 1e-3


class Transformed(Domain):
    """A domain read through ``torch.distributions.transform_to``."""

    @property
    @abstractmethod
    def constraint(self) -> constraints.Constraint:
        """The constraint of torch that the transform meets."""

    @abstractmethod
    def admit(self, value: Tensor) -> Tensor:
        """The value as float64, moved off the bounds that no leaf reaches; ``DomainError`` outside."""

    def to_leaf(self, value: Tensor) -> Tensor:
        # The inverse is taken in float64: close to a bound a logit or a log would lose digits of float32.
        leaf: Tensor = _transform(self).inv(self.admit(value))
        return leaf.to(value)

    def to_value(self, leaf: Tensor) -> Tensor:
        value: Tensor = _transform(self)(leaf)
        return value


@dataclass(frozen=True)
class Positive(Transformed):
    """The positive numbers, x = exp(leaf)."""

    @property
    def constraint(self) -> constraints.Constraint:
        return constraints.positive

    def admit(self, value: Tensor) -> Tensor:
        if (value <= 0).any():
            raise DomainError(
                f"positive(value) is exp(leaf) and defined for value > 0, got {span(value)}; start from a "
                "small positive number, or use `box(0.0, 0, None)`, which reaches 0 by projection."
            )
        return widen(value)

    def __str__(self) -> str:
        return "positive"


@dataclass(frozen=True)
class Interval(Transformed):
    """The numbers between two bounds, x = low + (high - low) sigmoid(leaf)."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise DomainError(
                f"{self} needs finite bounds with low < high; widen them, or use `positive` or `box`, "
                "whose bounds may be infinite."
            )

    @property
    def constraint(self) -> constraints.Constraint:
        return constraints.interval(self.low, self.high)

    def admit(self, value: Tensor) -> Tensor:
        if outside(value, self.low, self.high):
            raise DomainError(
                f"{self} is defined for {self.low:g} <= value <= {self.high:g}, got {span(value)}; "
                "clip the value or widen the bounds."
            )
        least, most, margin = self._resolved(value.dtype)
        wide = widen(value)
        at_low, at_high = wide <= least, wide >= most
        if not (at_low | at_high).any():
            return wide
        warn(
            f"{int((at_low | at_high).sum())} of {value.numel()} initial values of {self} lie on a bound, "
            f"which a sigmoid can't represent and where its derivative vanishes: they start {margin:g} "
            f"inside. Start inside, or use `box(value, {self.low:g}, {self.high:g})`, which reaches its "
            "bounds by projection.",
            MetaoptWarning,
        )
        return wide.masked_fill(at_low, self.low + margin).masked_fill(at_high, self.high - margin)

    def _resolved(self, dtype: torch.dtype) -> tuple[float, float, float]:
        """The range that a sigmoid of this dtype can tell from the bounds, and the step off a bound."""
        limits, width = torch.finfo(dtype), self.high - self.low
        rounding = limits.eps * max(abs(self.low), abs(self.high), width)
        if width < 64 * rounding:
            raise DomainError(
                f"{self} is too narrow for {dtype} to resolve so far from 0; use float64, or a "
                "hyperparameter of width 1 that your code shifts and scales."
            )
        # Close to 0 floats are dense, so a low of 0 is told apart to the least normal number.
        least = self.low + 4 * max(limits.eps * abs(self.low), limits.tiny * width)
        return least, self.high - 4 * rounding, max(MARGIN * width, 8 * rounding)

    def __str__(self) -> str:
        return f"interval({self.low:g}, {self.high:g})"


@dataclass(frozen=True)
class Integer(Domain):
    """The whole numbers between two bounds, x = floor(low + (high + 1 - low) sigmoid(leaf))."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low != int(self.low) or self.high != int(self.high) or not self.low < self.high:
            raise DomainError(
                f"{self} needs whole bounds with low < high; round or widen them, or use a plain number for a constant."
            )

    def to_leaf(self, value: Tensor) -> Tensor:
        if (value != value.round()).any() or outside(value, self.low, self.high):
            raise DomainError(
                f"{self} is defined for whole numbers from {self.low} to {self.high}, got {span(value)}; round and "
                "clip the value, or use `interval` for real numbers."
            )
        leaf: Tensor = torch.logit((widen(value) + 0.5 - self.low) / (self.high + 1 - self.low))
        return leaf.to(value)

    def to_value(self, leaf: Tensor) -> Tensor:
        # Detached: the derivative of a floor, zero almost everywhere, says nothing about the hyperparameter's effect.
        share = torch.sigmoid(leaf.detach())
        return (self.low + (self.high + 1 - self.low) * share).floor().clamp(self.low, self.high)

    def __str__(self) -> str:
        return f"integer({self.low}, {self.high})"


@dataclass(frozen=True)
class Simplex(Transformed):
    """The probability vectors along the last dimension, x = softmax(leaf)."""

    @property
    def constraint(self) -> constraints.Constraint:
        return constraints.simplex

    def admit(self, value: Tensor) -> Tensor:
        wide = widen(value)
        slack = 1e-6 + 16 * torch.finfo(value.dtype).eps
        if value.ndim == 0 or (value < 0).any() or ((wide.sum(-1) - 1).abs() > slack).any():
            raise DomainError(
                "simplex(value) is defined for vectors (along the last dimension) of entries >= 0 with sum "
                f"1, got shape {tuple(value.shape)} with {span(value)}; divide by the sum, or take a softmax "
                "first."
            )
        on_face = (value <= 4 * torch.finfo(value.dtype).tiny).any(-1, keepdim=True)
        if not on_face.any():
            return wide
        warn(
            "simplex(value) has entries of 0, which a softmax can't represent and where its derivative "
            f"vanishes: the vectors concerned start mixed with {MARGIN:g} of the uniform one. Start from "
            "positive entries.",
            MetaoptWarning,
        )
        return torch.where(on_face, (1 - MARGIN) * wide + MARGIN / value.shape[-1], wide)

    def __str__(self) -> str:
        return "simplex"


@dataclass(frozen=True)
class General(Transformed):
    """Any constraint of ``torch.distributions`` that has a ``transform_to``."""

    rule: constraints.Constraint

    def __post_init__(self) -> None:
        try:
            transform_to(self.rule)
        except NotImplementedError as error:
            raise DomainError(
                f"{self} has no smooth transform from the reals (torch.distributions.transform_to knows "
                "none); use another constraint, or register one with `transform_to.register`."
            ) from error

    @property
    def constraint(self) -> constraints.Constraint:
        return self.rule

    def admit(self, value: Tensor) -> Tensor:
        if not self._accepts(value):
            raise DomainError(
                f"the initial value, {span(value)} of shape {tuple(value.shape)}, is outside {self}; "
                "start from a value of a shape and range that it accepts."
            )
        return widen(value)

    def _accepts(self, value: Tensor) -> bool:
        try:
            return bool(self.rule.check(value).all())
        except (RuntimeError, IndexError):  # a shape that it can't reduce
            return False

    def to_leaf(self, value: Tensor) -> Tensor:
        leaf = super().to_leaf(value)
        tolerance = 100 * torch.finfo(value.dtype).eps ** 0.75
        if not torch.isfinite(leaf).all() or not torch.allclose(
            self.to_value(leaf), value, rtol=tolerance, atol=tolerance
        ):
            raise DomainError(
                f"the initial value, {span(value)}, is on the boundary of {self}, which its transform can't "
                "represent; start from a value inside."
            )
        return leaf

    def __str__(self) -> str:
        return f"constrained({self.rule})"


@lru_cache(maxsize=256)
def _transform(domain: Transformed) -> Transform:
    # Kept beside the domains, each of which is no more than its bounds.
    transform: Transform = transform_to(domain.constraint)
    return transform


def signature(domain: Domain) -> list[float]:
    """What two leaves stand for, by which a saved domain is known again: numbers, as the rest of a state is."""
    if isinstance(domain, General):
        return []  # whose leaves may have any shape
    leaves = torch.tensor([-1.0, 0.5], dtype=torch.float64, device="cpu")
    found: list[float] = domain.to_value(leaves).detach().tolist()
    return found


def refuse_other(name: str, domain: Domain, saved: Sequence[float]) -> None:
    """Raise if a leaf was saved in another domain than it is to be read in: it would be another value."""
    found = signature(domain)
    if saved and found and not all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(saved, found, strict=True)):
        raise DomainError(
            f"hyperparameter {name!r} is in {domain} and was saved in another domain, where its leaf stands for "
            f"another value. Load it as it was saved, and take the value over: `new.set({name}=old.{name})`."
        )
