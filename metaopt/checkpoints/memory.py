"""What a recording takes, now and after more steps."""

from __future__ import annotations

__all__ = ["Memory", "bytes_of", "grid", "inputs_of"]

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import whole

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("kmgt", 1)}


def bytes_of(amount: int | str) -> int:
    """An amount of memory in bytes: a number, or a text such as ``"2GiB"`` or ``"500 MB"``."""
    if isinstance(amount, (int, float)) and not isinstance(amount, bool) and math.isfinite(amount):
        number: float = amount
    else:
        found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kmgt]?i?)b?\s*", str(amount).lower())
        if found is None or found[2] not in _UNITS:
            raise ValueError(f'a budget is a number of bytes or a text such as "2GiB" or "500MB", not {amount!r}.')
        number = float(found[1]) * _UNITS[found[2]]
    if number < 1:
        raise ValueError(f"a budget must be at least one byte, not {amount!r}.")
    return int(number)


def grid(steps: int) -> tuple[int, int]:
    """How many checkpoints so many steps get where no budget limits them, and how many steps lie between two."""
    stride = 1
    while math.ceil(steps / stride) > 2 * stride:
        stride *= 2
    return math.ceil(steps / stride), stride if stride > 1 else 0


def inputs_of(held: Sequence[Iterable[tuple[Tensor, int, bool]]]) -> tuple[int, int]:
    """The memory of the tensors that each step holds, and of those among them which more steps will not add to.

    What early and late steps share (a full batch, a data set of which batches are slices) is there once; what they
    share and is no constant is a hyperparameter, and not counted.

    Args:
        held: for each step its tensors, with their bytes and whether they are constants.
    """
    memories: dict[int, _Held] = {}
    for place, tensors in enumerate(held):
        for tensor, size, constant in tensors:
            strided = tensor.layout is torch.strided
            storage = tensor.untyped_storage() if strided else None
            known = memories.setdefault(id(tensor) if storage is None else storage._cdata, _Held({}, set()))
            part = (tensor.storage_offset(), tensor.shape, tensor.stride()) if strided else None
            known.parts[part] = size
            known.size = size if storage is None else storage.nbytes()
            known.halves.add(2 * place >= len(held))
            known.constant |= constant
    counted = [known for known in memories.values() if known.constant or len(known.halves) == 1 < len(held)]
    sizes = [(min(known.size, sum(known.parts.values())), len(known.halves) == 2) for known in counted]
    return sum(size for size, _ in sizes), sum(size for size, lasts in sizes if lasts)


@dataclass
class _Held:
    """A memory that steps hold: the parts of it, its size, whether early and late steps do, if it holds a constant."""

    parts: dict[Any, int]
    halves: set[bool]
    size: int = 0
    constant: bool = False


@dataclass(frozen=True)
class Memory:
    """What a recording takes, in bytes.

    Attributes:
        keep: what is kept of each step: ``"graphs"``, ``"states"`` or ``"checkpoints"``.
        steps: how many steps there are.
        states: the states kept, ``s_{t-1}`` of every step or of every checkpoint.
        state: one of them, ``|s|``.
        checkpoints: how many states are kept.
        values: what the steps computed on the way, kept for ``"graphs"``.
        inputs: batches and other constants of the steps. They are the loop's own tensors, alive until the sweep.
        lasting: the part of these that early and late steps share, such as a full batch.
        budget: the limit on states and values, if one was given.
        last: how many of the steps are kept at most, if ``last`` was given.
    """

    keep: str
    steps: int
    states: int
    state: int
    checkpoints: int
    values: int
    inputs: int
    lasting: int = 0
    budget: int | None = None
    last: int | None = None

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.values + self.inputs

    def forecast(self, steps: int) -> int:
        """What so many steps like these will take, by the same kind of keeping, up to the budget.

        With checkpoints, the states between two of them, which the sweep computes again, are counted too.
        """
        steps = whole("steps", steps, 0)
        if not self.steps or not steps:
            return 0
        there = self.steps if self.last is None else max(1, min(self.steps, self.last))
        steps = steps if self.last is None else min(steps, self.last)
        inputs = self.lasting + (self.inputs - self.lasting) * steps // there
        if self.keep == "checkpoints":
            few = sum(grid(steps))
            return inputs + (self.state * few if self.budget is None else min(self.state * few, self.budget))
        kept = (self.states + self.values) * steps // there
        return inputs + (kept if self.budget is None else min(kept, self.budget))

    def __str__(self) -> str:
        parts = [
            f"{self.steps} steps, keep={self.keep!r}: {_readable(self.total)}",
            f"states {_readable(self.states)} ({self.checkpoints} of {_readable(self.state)})",
            f"values {_readable(self.values)}",
            f"inputs {_readable(self.inputs)}",
        ]
        if self.budget is not None:
            parts.append(f"budget {_readable(self.budget)}")
        return "; ".join(parts)


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
