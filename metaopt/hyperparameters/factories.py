"""What the user writes for a hyperparameter: its initial value and its domain."""

from __future__ import annotations

__all__ = [
    "Constrained",
    "box",
    "constrained",
    "integer",
    "interval",
    "l1_box",
    "nonnegative",
    "positive",
    "real",
    "simplex",
]

import math
import numbers
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributions import constraints

from metaopt.errors import DomainError
from metaopt.hyperparameters.domains import Box, Domain, L1Box, Real, Value, as_value
from metaopt.hyperparameters.transformed import General, Integer, Interval, Positive, Simplex

# The perturbation scale where none is given: the authors of STN start at 0.5, those of Δ-STN at 1.
SCALE = 0.5


@dataclass(frozen=True, eq=False)
class Constrained:
    """A hyperparameter to be: its domain, and the leaf of its initial value.

    Args:
        domain: where it lives.
        leaf: the tensor from which ``domain.to_value`` reads the initial value; copied when it is used.
        scale: the initial standard deviation σ of the perturbations of the leaf, by which `metaopt.stn` learns the
            best response; other modes don't perturb, and don't look at it.

    Raises:
        DomainError: if the scale is no positive, finite number.
    """

    domain: Domain
    leaf: Tensor
    scale: float = SCALE

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise DomainError(
                f"a perturbation scale is a positive, finite number, got {self.scale:g}; 0.5 is a usual start. To "
                "tune a hyperparameter of another mode, leave it out."
            )

    @property
    def value(self) -> Tensor:
        """The initial value, as ``domain`` reads it from the leaf."""
        return self.domain.to_value(self.leaf)

    def __repr__(self) -> str:
        return f"Constrained({self.domain}, shape {tuple(self.leaf.shape)})"


def real(value: Value, *, scale: float = SCALE) -> Constrained:
    """An unconstrained hyperparameter, which is its own leaf.

    Args:
        value: a number or an array of any shape; integers take the default dtype.
        scale: the standard deviation σ of `metaopt.stn`'s perturbations of the leaf.

    Raises:
        DomainError: if an entry is not finite.
    """
    return _constrained(value, Real(), scale)


def positive(value: Value, *, scale: float = SCALE) -> Constrained:
    """A positive hyperparameter, ``x = exp(u)``: a hyper-step moves it by a factor.

    Args:
        value: a number or an array of any shape, > 0.
        scale: the standard deviation σ of `metaopt.stn`'s perturbations of the leaf, ``log x``.

    Raises:
        DomainError: if an entry is not positive; `box(0.0, 0, None)` reaches 0.
    """
    return _constrained(value, Positive(), scale)


def nonnegative(value: Value) -> Constrained:
    """A hyperparameter ``x ≥ 0`` that reaches 0, kept there by projection: ``box(value, 0, None)``.

    Args:
        value: a number or an array of any shape, >= 0.

    Raises:
        DomainError: if an entry is negative.
    """
    return box(value, 0.0, None)


def interval(value: Value, low: float, high: float, *, scale: float = SCALE) -> Constrained:
    """A hyperparameter between two bounds, ``x = low + (high - low) σ(u)``.

    A value on a bound has no finite ``u``: it starts inside, by a thousandth of the width, with a
    warning.

    Args:
        value: a number or an array of any shape, in [low, high].
        low: the lower bound, finite.
        high: the upper bound, finite.
        scale: the standard deviation σ of `metaopt.stn`'s perturbations of the leaf.

    Raises:
        DomainError: if an entry is outside, or the dtype can't resolve the interval.
    """
    return _constrained(value, Interval(_number("low", low), _number("high", high)), scale)


def integer(value: Value, low: int, high: int, *, scale: float = SCALE) -> Constrained:
    """A whole number between two bounds, both included: ``x = ⌊low + (high + 1 - low) σ(u)⌋``.

    Every number has the same share of the interval, and the leaf starts in the middle of its number's share. A
    floor has no derivative, so no hypergradient passes through the value: `metaopt.stn`, which learns the effect
    of the leaf from perturbations of it, tunes these; for other modes the value is a constant.

    Args:
        value: a whole number or an array of them, in [low, high].
        low: the least number.
        high: the greatest number.
        scale: the standard deviation σ of `metaopt.stn`'s perturbations of the leaf.

    Raises:
        DomainError: if an entry is not whole or outside, or a bound is not whole.
    """
    return _constrained(value, Integer(low, high), scale)


def simplex(value: Value, *, scale: float = SCALE) -> Constrained:
    """Probability vectors along the last dimension, ``x = softmax(u)``.

    A vector with a zero has no finite ``u``: it starts mixed with a thousandth of the uniform one, with a
    warning.

    Args:
        value: an array of shape ``(..., n)``, each vector >= 0 with sum 1.
        scale: the standard deviation σ of `metaopt.stn`'s perturbations of the leaf.

    Raises:
        DomainError: if a vector is not a probability vector.
    """
    return _constrained(value, Simplex(), scale)


def box(value: Value, low: float | None = None, high: float | None = None) -> Constrained:
    """A hyperparameter ``low ≤ x ≤ high``, its own leaf, kept there by projection.

    The projection is done by `Hyperparameters.project_`, after each hyper-step (projected
    hyper-gradient descent, Franceschi et al. 2017).

    Args:
        value: a number or an array of any shape, in the box.
        low: the lower bound; None or ``-inf`` for none.
        high: the upper bound; None or ``inf`` for none.

    Raises:
        DomainError: if an entry is outside, or the box is empty.
    """
    return _constrained(value, Box(_bound("low", low, -math.inf), _bound("high", high, math.inf)))


def l1_box(value: Value, radius: float, low: float = 0.0, high: float | None = 1.0) -> Constrained:
    """A hyperparameter in an L1 ball in a box, its own leaf, kept there by projection.

    ``low ≤ x_i ≤ high`` and ``Σ_i x_i ≤ R``.

    The set of the example weights of data hyper-cleaning (Franceschi et al. 2017, Sec. 5.1): the bound on the
    sum, the L1 norm, drives weights to 0. The projection is done by `Hyperparameters.project_`, after each hyper-step.

    Args:
        value: an array of any shape in the set; ``radius / n`` each is the usual start.
        radius: the bound ``R`` on the sum.
        low: the lower bound, at least 0.
        high: the upper bound; None or ``inf`` for none.

    Raises:
        DomainError: if the value is outside, ``low < 0``, or the set is empty.
    """
    return _constrained(value, L1Box(_number("radius", radius), _number("low", low), _bound("high", high, math.inf)))


def constrained(value: Value, constraint: constraints.Constraint) -> Constrained:
    """A hyperparameter under any constraint of ``torch.distributions`` that has a ``transform_to``.

    Args:
        value: an array of a shape that the constraint accepts, inside it.
        constraint: such as ``torch.distributions.constraints.lower_cholesky``. Tensors that it holds stay on
            their device.

    Raises:
        DomainError: if there is no transform, or the value is outside or on the boundary.
    """
    if isinstance(constraint, constraints.interval):
        low, high = constraint.lower_bound, constraint.upper_bound
        if isinstance(low, numbers.Real) and isinstance(high, numbers.Real):
            return interval(value, float(low), float(high))
    return _constrained(value, General(constraint))


def _bound(name: str, bound: float | None, default: float) -> float:
    return default if bound is None else _number(name, bound)


def _number(name: str, given: Any) -> float:
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DomainError(
            f"{name} is one number for all entries, and this is {type(given).__name__}. Give a number; entries with "
            "bounds of their own are hyperparameters of their own, or a computed tensor, `low + (high - low) * "
            "hyper.share` with `share=metaopt.interval(..., 0, 1)`."
        ) from error


def _constrained(value: Value, domain: Domain, scale: float = SCALE) -> Constrained:
    return Constrained(domain, domain.to_leaf(as_value(value)), _number("scale", scale))
