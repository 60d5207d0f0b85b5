"""What the user writes for a hyperparameter: its initial value and its domain."""

from __future__ import annotations

__all__ = [
    "Constrained",
    "box",
    "constrained",
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

from torch import Tensor
from torch.distributions import constraints

from metaopt.hyperparameters.domains import Box, Domain, L1Box, Real, Value, as_value
from metaopt.hyperparameters.transformed import General, Interval, Positive, Simplex


@dataclass(frozen=True, eq=False)
class Constrained:
    """A hyperparameter to be: its domain, and the leaf of its initial value.

    Args:
        domain: where it lives.
        leaf: the tensor from which ``domain.to_value`` reads the initial value; copied when it is used.
    """

    domain: Domain
    leaf: Tensor

    @property
    def value(self) -> Tensor:
        """The initial value, as ``domain`` reads it from the leaf."""
        return self.domain.to_value(self.leaf)

    def __repr__(self) -> str:
        return f"Constrained({self.domain}, shape {tuple(self.leaf.shape)})"


def real(value: Value) -> Constrained:
    """An unconstrained hyperparameter, which is its own leaf.

    Args:
        value: a number or an array of any shape; integers take the default dtype.

    Raises:
        DomainError: if an entry is not finite.
    """
    return _constrained(value, Real())


def positive(value: Value) -> Constrained:
    """A positive hyperparameter, ``x = exp(u)``: a hyper-step moves it by a factor.

    Args:
        value: a number or an array of any shape, > 0.

    Raises:
        DomainError: if an entry is not positive; `box(0.0, 0, None)` reaches 0.
    """
    return _constrained(value, Positive())


def nonnegative(value: Value) -> Constrained:
    """A hyperparameter ``x ≥ 0`` that reaches 0, kept there by projection: ``box(value, 0, None)``.

    Args:
        value: a number or an array of any shape, >= 0.

    Raises:
        DomainError: if an entry is negative.
    """
    return box(value, 0.0, None)


def interval(value: Value, low: float, high: float) -> Constrained:
    """A hyperparameter between two bounds, ``x = low + (high - low) σ(u)``.

    A value on a bound has no finite ``u``: it starts inside, by a thousandth of the width, with a
    warning.

    Args:
        value: a number or an array of any shape, in [low, high].
        low: the lower bound, finite.
        high: the upper bound, finite.

    Raises:
        DomainError: if an entry is outside, or the dtype can't resolve the interval.
    """
    return _constrained(value, Interval(float(low), float(high)))


def simplex(value: Value) -> Constrained:
    """Probability vectors along the last dimension, ``x = softmax(u)``.

    A vector with a zero has no finite ``u``: it starts mixed with a thousandth of the uniform one, with a
    warning.

    Args:
        value: an array of shape ``(..., n)``, each vector >= 0 with sum 1.

    Raises:
        DomainError: if a vector is not a probability vector.
    """
    return _constrained(value, Simplex())


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
    return _constrained(value, Box(_bound(low, -math.inf), _bound(high, math.inf)))


def l1_box(value: Value, radius: float, low: float = 0.0, high: float | None = 1.0) -> Constrained:
    """A hyperparameter in an L1 ball in a box, its own leaf, kept there by projection.

    ``low ≤ x_i ≤ high`` and ``Σ_i x_i ≤ R``.

    The set of the example weights of data hyper-cleaning (Franceschi et al. 2017, Sec. 5.1): the bound on the
    sum, the L1 norm, drives weights to 0. See `project_l1_box`.

    Args:
        value: an array of any shape in the set; ``radius / n`` each is the usual start.
        radius: the bound ``R`` on the sum.
        low: the lower bound, at least 0.
        high: the upper bound; None or ``inf`` for none.

    Raises:
        DomainError: if the value is outside, ``low < 0``, or the set is empty.
    """
    return _constrained(value, L1Box(float(radius), float(low), _bound(high, math.inf)))


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


def _bound(bound: float | None, default: float) -> float:
    return default if bound is None else float(bound)


def _constrained(value: Value, domain: Domain) -> Constrained:
    return Constrained(domain, domain.to_leaf(as_value(value)))
