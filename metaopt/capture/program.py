"""Iterations of equal structure, stored once, as a ``torch.fx`` graph that a person can print."""

from __future__ import annotations

__all__ = ["Library", "Program"]

from collections import OrderedDict
from typing import Any

from torch import fx

from metaopt.capture.bindings import External
from metaopt.capture.cells import Cell
from metaopt.capture.lowering import Function, lower
from metaopt.capture.segment import Segment
from metaopt.capture.split import Split, split
from metaopt.capture.trace import Instruction, Trace, needed

_Known = tuple["Program", list[int], list[int], list[int]]
# Programs hold structure and no tensors, so runs share them: the next hyper-iteration need not write them again.
_known: OrderedDict[Any, _Known] = OrderedDict()
_KNOWN_AT_MOST = 256


class Library:
    """The programs of a run, one for each structure that its iterations had."""

    def __init__(self) -> None:
        self.programs: list[Program] = []
        self._numbers: dict[Any, tuple[float, ...]] = {}

    def seal(
        self,
        trace: Trace,
        *,
        inputs: list[tuple[int, Cell]],
        externals: list[External],
        constants: list[Cell],
        outputs: list[tuple[int, int]],
    ) -> Segment:
        """Turn a finished trace into a segment that shares the program of its structure."""
        structure = (
            tuple(trace.code),
            tuple(trace.inputs),
            tuple(trace.externals),
            tuple(trace.constants),
            tuple(value for value, _ in outputs),
        )
        known = _known.get(structure)
        if known is None:
            known = _known[structure] = _program(trace, [value for value, _ in outputs])
            if len(_known) > _KNOWN_AT_MOST:
                _known.popitem(last=False)
        program, ins, exts, consts = known
        if program not in self.programs:
            self.programs.append(program)
        numbers = tuple(trace.numbers)
        return Segment(
            program,
            [inputs[place] for place in ins],
            [externals[place] for place in exts],
            [constants[place] for place in consts],
            self._numbers.setdefault((numbers, tuple(map(type, numbers))), numbers),
            tuple(trace.objects),
            tuple(trace.seeds),
            {key: place for place, (_, key) in enumerate(outputs)},
        )


def _program(trace: Trace, outputs: list[int]) -> _Known:
    code = [trace.code[index] for index in needed(trace.code, set(outputs))]
    used = {value for instruction in code for value in instruction.used()} | set(outputs)
    picks = [
        [place for place, value in enumerate(values) if value in used]
        for values in (trace.inputs, trace.externals, trace.constants)
    ]
    program = Program(
        code,
        inputs=[trace.inputs[place] for place in picks[0]],
        externals=[trace.externals[place] for place in picks[1]],
        constants=[trace.constants[place] for place in picks[2]],
        outputs=outputs,
    )
    return program, picks[0], picks[1], picks[2]


class Program:
    """Straight-line code over numbered values, with the outputs that iterations of this structure leave behind."""

    def __init__(
        self,
        code: list[Instruction],
        *,
        inputs: list[int],
        externals: list[int],
        constants: list[int],
        outputs: list[int],
    ) -> None:
        self.code = code
        self.inputs = inputs
        self.externals = externals
        self.constants = constants
        self.outputs = outputs
        self.derivative_checked = False
        self.uses_autocast = any(instruction.autocast for instruction in code)
        self._functions: dict[tuple[int, ...], Function] = {}
        self._splits: dict[tuple[int, ...], Split | None] = {}

    def function(self, places: tuple[int, ...]) -> Function:
        """The program that computes the outputs at these places, and nothing else."""
        if places not in self._functions:
            self._functions[places] = lower(self, [self.outputs[place] for place in places])
        return self._functions[places]

    def split(self, places: tuple[int, ...]) -> Split | None:
        """The program cut at the loop's gradients, if they are plain gradients of a loss."""
        if places not in self._splits:
            self._splits[places] = split(self, [self.outputs[place] for place in places])
        return self._splits[places]

    @property
    def graph(self) -> fx.Graph:
        """All of the program as a ``torch.fx`` graph."""
        return self.function(tuple(range(len(self.outputs)))).module.graph

    def __str__(self) -> str:
        return self.function(tuple(range(len(self.outputs)))).module.code.strip()

    def __repr__(self) -> str:
        return (
            f"Program({len(self.code)} calls, {len(self.inputs)} carried, {len(self.externals)} "
            f"hyperparameters, {len(self.constants)} constants -> {len(self.outputs)} outputs)"
        )
