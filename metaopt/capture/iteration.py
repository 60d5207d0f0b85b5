"""The iteration that is being written: a trace, and the values that stand behind the numbers which enter it."""

from __future__ import annotations

__all__ = ["Iteration"]

from collections.abc import Callable
from typing import Any

from torch import Tensor

from metaopt.capture.bindings import Binding
from metaopt.capture.cells import Cell, Cells, version_of
from metaopt.capture.externals import External
from metaopt.capture.primitives import hooked, stop
from metaopt.capture.segment import Segment
from metaopt.capture.trace import Instruction, Trace, Val, needed

_COMPACT_EVERY = 512


class Iteration:
    """A trace, with the carried values, the hyperparameters and the constants that it reads.

    Args:
        cells: keeps the values of constants.
    """

    def __init__(self, cells: Cells) -> None:
        self.trace = Trace()
        self._cells = cells
        self._inputs: list[tuple[Binding, Cell]] = []
        self._externals: list[External] = []
        self._constants: dict[int, tuple[Tensor, int, int]] = {}
        self._constant_cells: list[Cell] = []
        self._stopped: dict[int, int] = {}
        # What the loop computed on the way, by number, as far as that is kept.
        self._computed: dict[int, Cell] = {}
        # The length from which on it is to be compacted.
        self.compact_at = _COMPACT_EVERY

    # -- what enters --------------------------------------------------------------------------------------------------

    def enter(self, binding: Binding, cell: Cell) -> int:
        """A number for a value that is carried over from before."""
        number = self.trace.new()
        self.trace.inputs.append(number)
        self._inputs.append((binding, cell))
        return number

    def enter_external(self, external: External) -> int:
        """A number for a hyperparameter."""
        number = self.trace.new()
        self.trace.externals.append(number)
        self._externals.append(external)
        return number

    def entered(self, keys: set[int]) -> set[int]:
        """The numbers by which carried values came in."""
        return {n for n, (b, _) in zip(self.trace.inputs, self._inputs, strict=True) if b.key in keys}

    def read_constant(self, tensor: Tensor) -> int:
        """The number of a value that is a constant of the step."""
        known = self._constants.get(id(tensor))
        if known is not None and known[0] is tensor and known[1] == version_of(tensor):
            return known[2]
        number = self.trace.new()
        self.trace.constants.append(number)
        self._constant_cells.append(self._cells.keep(tensor))
        self._constants[id(tensor)] = (tensor, version_of(tensor), number)
        return number

    # -- what is computed ---------------------------------------------------------------------------------------------

    def stopped(self, value: int) -> int:
        """The number of a value behind a `stop`."""
        if value not in self._stopped:
            (self._stopped[value],) = self.trace.emit(stop, Val(value), phased=True)
        return self._stopped[value]

    def hook(self, value: int, hook: Callable[..., Any]) -> None:
        """A gradient hook of the user's acts on a value."""
        args = (Val(value), self.trace.object(hook))
        self.trace.code.append(Instruction(hooked, args, phased=True, effect=True))

    def keep(self, value: int, cell: Cell) -> None:
        """Keep what the loop computed, so that the sweep need not."""
        self._computed[value] = cell

    def is_of_state(self, value: int) -> bool:
        """Whether a value depends on what is carried, and not on hyperparameters and data alone."""
        return not self.trace.behind(Val(value)).isdisjoint(self.trace.inputs)

    # -- its end ------------------------------------------------------------------------------------------------------

    def seal(self, seal: Callable[..., Segment], outputs: dict[int, int]) -> Segment:
        """The finished iteration; ``outputs``: the numbers of what it leaves behind, by key."""
        return seal(
            self.trace,
            inputs=[(binding.key, cell) for binding, cell in self._inputs],
            externals=self._externals,
            constants=self._constant_cells,
            outputs=sorted((value, key) for key, value in outputs.items()),
            computed=self._computed,
        )

    def compact(self, wanted: set[int]) -> None:
        """Forget calls on which none of these values depends, so that long evaluations cost no memory."""
        wanted = wanted.union(self._stopped.values())
        trace = self.trace
        trace.code = [trace.code[index] for index in needed(trace.code, wanted)]
        used = {value for instruction in trace.code for value in instruction.used()} | wanted
        constants = [pair for pair in zip(trace.constants, self._constant_cells, strict=True) if pair[0] in used]
        trace.constants = [number for number, _ in constants]
        self._constant_cells = [cell for _, cell in constants]
        self._constants = {key: known for key, known in self._constants.items() if known[2] in used}
        self.compact_at = max(_COMPACT_EVERY, 2 * len(trace.code))
