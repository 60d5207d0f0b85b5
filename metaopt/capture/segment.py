"""One recorded iteration: a program, its constants, and the state that it started from."""

from __future__ import annotations

__all__ = ["Replay", "Segment", "nudged", "undisturbed", "variable"]

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt.capture.cells import LOST, Cell
from metaopt.capture.primitives import Phase

if TYPE_CHECKING:
    from metaopt.capture.externals import External
    from metaopt.capture.lowering import Function
    from metaopt.capture.program import Program


@dataclass(slots=True)
class Replay:
    """What one call of an iteration gave: its outputs, and the leaves that they were computed from."""

    inputs: dict[int, Tensor]
    externals: list[tuple[External, Tensor]]
    outputs: list[Tensor]
    phase: Phase


@dataclass(slots=True)
class Segment:
    """``Φ_t`` as (reference to a shared program, this step's constants, the state ``s_{t-1}``).

    ``inputs`` pairs the key of each carried tensor with its value, ``outputs`` says which key each computed value
    belongs to afterwards. Keys are the same from one iteration to the next; they tie the iterations together.
    ``known`` are values that the loop computed on the way, by their number in the program, where they were kept.
    """

    program: Program
    inputs: list[tuple[int, Cell]]
    externals: list[External]
    constants: list[Cell]
    numbers: tuple[float, ...]
    objects: tuple[Any, ...]
    seeds: tuple[Any, ...]
    outputs: dict[int, int]
    known: dict[int, Cell]

    def replay(self, keys: Sequence[int]) -> Replay:
        """Call ``Φ_t`` at the recorded state, with a graph from its inputs to the outputs named.

        Args:
            keys: which of ``outputs`` to compute.
        """
        return self.call(self._function(keys))

    def values(self, keys: Sequence[int]) -> list[Tensor]:
        """Outputs of ``Φ_t`` without a graph, as `replay` computes them but at the cost of a plain step."""
        part = self._function(keys)
        found = self.call(part, phase=Phase(graph=self.program.nests), derived=False).outputs
        return [value.detach() for value in found]

    def call(self, part: Function, *, phase: Phase | None = None, derived: bool = True) -> Replay:
        """Call a part of ``Φ_t``, with a graph from its inputs, as `replay` does; ``derived``: to differentiate it."""
        phase = phase or Phase()
        values, hypers = self.arguments(part, derived=derived)
        inputs = {key: variable(value) for key, value in values.items()}
        externals = [(external, variable(value)) for external, value in hypers]
        with torch.enable_grad():
            outputs = self.apply(part, [*inputs.values(), *(value for _, value in externals)], phase=phase)
        return Replay(inputs, externals, outputs, phase)

    def arguments(
        self, part: Function, *, derived: bool = True
    ) -> tuple[dict[int, Tensor], list[tuple[External, Tensor]]]:
        """What a part of ``Φ_t`` was recorded with: carried values by key, and hyperparameters."""
        for place in part.externals:
            self.externals[place].check(derived=derived)
        hypers = [(self.externals[place], self.externals[place].cell.value()) for place in part.externals]
        return {key: cell.value() for key, cell in self._pick(part.inputs)}, hypers

    def apply(self, part: Function, values: Sequence[Tensor], *, phase: Phase | None = None) -> list[Tensor]:
        """Call a part of ``Φ_t`` with other values: carried ones, hyperparameters, then what the part is given."""
        first, second = len(part.inputs), len(part.inputs) + len(part.externals)
        constants = [self.constants[place].value() for place in part.constants]
        with undisturbed():
            return part(phase or Phase(), values[:first], values[first:second], constants, self, values[second:])

    def point(self, keys: Sequence[int]) -> list[Tensor]:
        """Where the iteration was recorded: the floating-point values that these outputs depend on."""
        call = self._function(keys)
        values = [cell.value() for _, cell in self._pick(call.inputs)]
        values += [self.externals[place].cell.value() for place in call.externals]
        return [value for value in values if value.dtype.is_floating_point]

    def evaluate(self, keys: Sequence[int], point: Sequence[Tensor]) -> list[Tensor]:
        """``Φ_t`` at another point (see `point`), of another precision if need be, with the graph of its arguments."""
        call = self._function(keys)
        given = iter(point)
        dtype = point[0].dtype if point else torch.float64

        def replaced(value: Tensor) -> Tensor:
            return next(given) if value.dtype.is_floating_point else value

        inputs = [replaced(cell.value()) for _, cell in self._pick(call.inputs)]
        externals = [replaced(self.externals[place].cell.value()) for place in call.externals]
        constants = [self.constants[place].value() for place in call.constants]
        constants = [c.to(dtype) if c.dtype.is_floating_point else c for c in constants]
        with undisturbed():
            return call(Phase(), inputs, externals, constants, self)

    def nudged(self, seed: int) -> Segment:
        """The same iteration from a state with another last digit: what it gives differs by as much as rounding may."""
        return replace(self, inputs=[(key, Cell(nudged(cell.value(), seed), owned=True)) for key, cell in self.inputs])

    # -- what is kept --------------------------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """The memory of the state that it began with, as far as that is a copy."""
        return sum(cell.nbytes for cell in self.copies())

    def copies(self) -> list[Cell]:
        """The copies that the state consists of; what nobody has overwritten yet is no copy."""
        return [cell for _, cell in self.inputs if cell.owned and cell is not LOST]

    def value_bytes(self) -> int:
        """The memory of what it computed on the way."""
        return sum(cell.nbytes for cell in self.known.values())

    def held(self) -> list[tuple[Tensor, int, bool]]:
        """The tensors that it keeps alive, with their bytes: the loop's own, batches mostly, and what requires grad.

        The last entry says whether a tensor is a constant. One that requires grad is a hyperparameter, which is there
        anyway, or something that the loop made of it, or to take gradients at.
        """
        leaves = [external.cell for external in self.externals]
        return [(c.tensor, c.nbytes, True) for c in self.constants] + [(c.tensor, c.nbytes, False) for c in leaves]

    def drop_values(self) -> None:
        """Give up what it computed on the way."""
        self.known = {}

    def drop_state(self, keys: set[int]) -> None:
        """Give up a part of the state that it began with."""
        self.inputs = [(key, LOST if key in keys and cell.owned else cell) for key, cell in self.inputs]

    def lacks(self) -> set[int]:
        """The keys of what was given up."""
        return {key for key, cell in self.inputs if cell is LOST}

    def at(self, state: Mapping[int, Tensor]) -> Segment:
        """The iteration with what was given up, computed again."""
        if not self.lacks():
            return self
        whole = [(key, Cell(state[key], owned=True) if cell is LOST else cell) for key, cell in self.inputs]
        return replace(self, inputs=whole)

    def _function(self, keys: Sequence[int]) -> Function:
        return self.program.function(tuple(self.outputs[key] for key in keys))

    def _pick(self, places: Sequence[int]) -> list[tuple[int, Cell]]:
        return [self.inputs[place] for place in places]


@contextmanager
def undisturbed() -> Iterator[None]:
    """The random generators are afterwards where they were."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def nudged(tensor: Tensor, seed: int) -> Tensor:
    """A tensor with another last digit, drawn from a seed; the generators of the loop are left alone."""
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return tensor
    noise = torch.empty_like(tensor).normal_(generator=torch.Generator(tensor.device).manual_seed(seed))
    return tensor * (1 + torch.finfo(tensor.dtype).eps * noise)


def variable(value: Tensor) -> Tensor:
    """A leaf at this value, sharing its memory."""
    return value.detach().requires_grad_(value.dtype.is_floating_point or value.dtype.is_complex)
