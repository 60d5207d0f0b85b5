"""Numbers that follow a hyperparameter: schedulers compute with them, and the derivative goes along.

A drop-in optimizer's groups hold numbers, since schedulers, loggers and torch's own steps want numbers. What a
scheduler makes of one is a number again, and whether it is a multiple of the hyperparameter, or
``eta_min + (λ - eta_min) · c``, or nothing of the sort, can't be told from it. So the number knows its derivative, and
its arithmetic carries that on (forward mode, in one variable).
"""

from __future__ import annotations

__all__ = ["Followed", "plainly", "restored", "shifted", "slopes_of"]

import math
from collections.abc import Callable
from typing import Any

import torch

Derivative = Callable[[float, float, float], tuple[float, float]]


class Followed(float):
    """A float with its derivative by the hyperparameter that it comes from.

    Attributes:
        slope: the derivative; not a number where two hyperparameters were mixed.
        origin: which setting of which group, as (group, name).
        owner: the optimizer whose group that is, by a name of its own; None if it was saved and loaded.
    """

    __slots__ = ("origin", "owner", "slope")
    slope: float
    origin: tuple[int, str]
    owner: str | None

    def __new__(cls, number: float, slope: float, origin: tuple[int, str], owner: str | None = None) -> Followed:
        made = super().__new__(cls, number)
        made.slope, made.origin, made.owner = slope, origin, owner
        return made

    def belongs(self, owner: str | None) -> bool:
        """Whether the number may come from an optimizer's groups."""
        return self.owner is None or owner is None or self.owner == owner

    def __neg__(self) -> Followed:
        return Followed(-float(self), -self.slope, self.origin, self.owner)

    def __pos__(self) -> Followed:
        return self

    def __abs__(self) -> Followed:
        return -self if self < 0 else self

    def __copy__(self) -> Followed:
        return self

    def __deepcopy__(self, memo: Any) -> Followed:
        return self

    def __reduce__(self) -> Any:
        return Followed, (float(self), self.slope, self.origin)


def _binary(name: str, derivative: Derivative, *, reflected: bool) -> Callable[[Followed, Any], Any]:
    plain = getattr(float, name)

    def operate(self: Followed, other: Any) -> Any:
        value = plain(float(self), other) if isinstance(other, int | float) else NotImplemented
        if not isinstance(value, float):  # a tensor's business; or complex
            return value
        x, y = (float(other), float(self)) if reflected else (float(self), float(other))
        by_x, by_y = derivative(x, y, value)
        own, others = (by_y, by_x) if reflected else (by_x, by_y)
        slope, owner = own * self.slope, self.owner
        if isinstance(other, Followed):
            same = other.origin == self.origin and other.belongs(owner)
            slope, owner = slope + others * other.slope if same else math.nan, owner or other.owner
        return Followed(value, slope, self.origin, owner)

    operate.__name__ = name
    return operate


def _power(x: float, y: float, value: float) -> tuple[float, float]:
    return (y * x ** (y - 1) if x or y >= 1 else math.nan), (value * math.log(x) if x > 0 else math.nan)


_OPERATIONS: dict[str, Derivative] = {
    "add": lambda x, y, value: (1.0, 1.0),
    "sub": lambda x, y, value: (1.0, -1.0),
    "mul": lambda x, y, value: (y, x),
    "truediv": lambda x, y, value: (1 / y, -value / y),
    "mod": lambda x, y, value: (1.0, -(x // y)),
    "pow": _power,
}
for _name, _derivative in _OPERATIONS.items():
    setattr(Followed, f"__{_name}__", _binary(f"__{_name}__", _derivative, reflected=False))
    setattr(Followed, f"__r{_name}__", _binary(f"__r{_name}__", _derivative, reflected=True))

# A scheduler's state is saved with the numbers that it computes from.
torch.serialization.add_safe_globals([Followed])


def shifted(value: Any, origin: tuple[int, str], change: float, owner: str | None = None) -> Any:
    """What a number, or a list or tuple of them, becomes when its hyperparameter moves by so much."""
    if isinstance(value, tuple | list):
        return type(value)(shifted(entry, origin, change, owner) for entry in value)
    if not isinstance(value, Followed) or value.origin != origin or not value.belongs(owner):
        return value
    return Followed(float(value) + value.slope * change, value.slope, origin, owner)


def plainly(value: Any) -> Any:
    """A group's entry with plain numbers."""
    if isinstance(value, tuple | list):
        return type(value)(plainly(entry) for entry in value)
    return float(value) if isinstance(value, Followed) else value


def slopes_of(value: Any) -> Any:
    """What `restored` needs besides the plain numbers; None if nothing follows."""
    if isinstance(value, tuple | list):
        parts = [slopes_of(entry) for entry in value]
        return parts if any(part is not None for part in parts) else None
    return (value.slope, *value.origin) if isinstance(value, Followed) else None


def restored(value: Any, slopes: Any) -> Any:
    """The entry that `plainly` and `slopes_of` were made of."""
    if slopes is None:
        return value
    if isinstance(value, tuple | list):
        return type(value)(restored(entry, part) for entry, part in zip(value, slopes, strict=True))
    slope, place, name = slopes
    return Followed(float(value), slope, (place, name))
