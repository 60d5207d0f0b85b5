"""Finite differences of a loop, which know when they can't be trusted.

Two central stencils of fourth order, with steps ``h`` and ``3h``, have to agree. They agree at a kink too, on the mean
of the two slopes; what tells a kink is that the slopes to both sides differ by as much however close they are seen:
``J(h) = (f(h) - 2f(0) + f(-h)) / h`` is of the order of ``h`` where ``f`` is smooth, and a constant at a kink.
"""

from __future__ import annotations

__all__ = ["Difference", "difference"]

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """A derivative by finite differences.

    Attributes:
        value: the derivative.
        spread: by how much the second stencil gives another one.
        jump: the right slope less the left one, at the point itself.
        still: whether no displacement changed the value at all.
        sided: whether only one side could be looked at, since the other is outside of a domain.
    """

    value: float
    spread: float
    jump: float
    still: bool
    sided: bool

    def per(self, unit: float) -> Difference:
        """The same derivative by a variable that is so many times larger."""
        return Difference(self.value / unit, abs(self.spread / unit), self.jump / unit, self.still, self.sided)


def difference(function: Callable[[float], float], here: float, step: float) -> Difference:
    """The derivative at 0 of a function whose value there is ``here``.

    Args:
        function: raises a `ValueError` outside of its domain; one side suffices.
        here: its value at 0.
        step: the step of the finer stencil.
    """
    seen: dict[int, float] = {0: here}

    def at(k: int) -> float:
        if k not in seen:
            seen[k] = function(k * step)
        return seen[k]

    sign = _side(at)
    if sign:
        near, far = (_sided([at(sign * k * place) for place in range(5)], k * step) * sign for k in (1, 3))
        jump = 0.0
    else:
        near, far = (_central(at(k), at(-k), at(2 * k), at(-2 * k), k * step) for k in (1, 3))
        first, second = ((at(k) - 2 * here + at(-k)) / (k * step) for k in (1, 3))
        jump = (3 * first - second) / 2
    return Difference(near, abs(near - far), jump, len(set(seen.values())) == 1, bool(sign))


def _central(right: float, left: float, far_right: float, far_left: float, step: float) -> float:
    return (8 * (right - left) - (far_right - far_left)) / (12 * step)


def _sided(f: list[float], step: float) -> float:
    return (-25 * f[0] + 48 * f[1] - 36 * f[2] + 16 * f[3] - 3 * f[4]) / (12 * step)


def _side(at: Callable[[int], float]) -> int:
    """On which side the function is defined: both (0), right (1) or left (-1)."""
    try:
        at(-6)
    except ValueError:
        at(12)
        return 1
    try:
        at(6)
    except ValueError:
        at(-12)
        return -1
    return 0
