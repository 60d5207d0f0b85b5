"""Iterations of equal structure, stored once, as a ``torch.fx`` graph that a person can print."""

from __future__ import annotations

__all__ = ["Library", "Program"]

from collections import OrderedDict
from typing import Any

import torch
from torch import fx

from metaopt.capture.cells import Cell
from metaopt.capture.custom import Custom
from metaopt.capture.externals import External
from metaopt.capture.hooks import module_hooks
from metaopt.capture.lowering import Function, lower
from metaopt.capture.primitives import hooked, inner_gradient
from metaopt.capture.segment import Segment
from metaopt.capture.split import Split, split
from metaopt.capture.third import written_out
from metaopt.capture.trace import Instruction, Trace, needed, numbers_in

_Known = tuple["Program", list[int], list[int], list[int]]
# Programs hold structure and no tensors, so runs share them: the next hyper-iteration need not write them again.
_known: OrderedDict[Any, _Known] = OrderedDict()
_KNOWN_AT_MOST = 256


class Library:
    """The programs of a run, one for each structure that its iterations had."""

    def __init__(self) -> None:
        self.programs: list[Program] = []
        # The last iteration's: the next one's is the same, as a rule, and then need not be looked up.
        self._last: tuple[Any, _Known] | None = None
        self._numbers: dict[Any, tuple[float, ...]] = {}

    def seal(
        self,
        trace: Trace,
        *,
        inputs: list[tuple[int, Cell]],
        externals: list[External],
        constants: list[Cell],
        outputs: list[tuple[int, int]],
        computed: dict[int, Cell],
    ) -> Segment:
        """Turn a finished trace into a segment that shares the program of its structure."""
        structure = (
            tuple(trace.code),
            tuple(trace.inputs),
            tuple(trace.externals),
            tuple(trace.constants),
            tuple(value for value, _ in outputs),
        )
        if self._last is None or self._last[0] != structure:
            self._last = structure, self._look_up(structure, trace)
        program, ins, exts, consts = self._last[1]
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
            {value: cell for value, cell in computed.items() if program.keeps(value)},
        )

    def _look_up(self, structure: Any, trace: Trace) -> _Known:
        known = _known.get(structure)
        if known is None:
            known = _known[structure] = _program(trace, list(structure[-1]))
            if len(_known) > _KNOWN_AT_MOST:
                _known.popitem(last=False)
        if known[0] not in self.programs:
            self.programs.append(known[0])
        return known


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


def _is_users(instruction: Instruction) -> bool:
    func = instruction.func
    owner = func.function if isinstance(func, Custom) else getattr(func, "__self__", None)
    function = (
        isinstance(owner, type)
        and issubclass(owner, torch.autograd.Function)
        and not owner.__module__.startswith("torch.")
    )
    return func in (hooked, module_hooks) or function


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
        self.code = written_out(code)
        self.inputs = inputs
        self.externals = externals
        self.constants = constants
        self.outputs = outputs
        self.derivative_checked = False
        # Of what comes up on the way, what a compiled derivative was given, and what of that it read.
        self.offered: set[int] = set()
        self.useful: set[int] = set()
        self.uses_autocast = any(instruction.autocast for instruction in code)
        # Gradient hooks and custom functions are the user's own Python, which may depend on more than its arguments.
        self.runs_user_code = any(_is_users(instruction) for instruction in code)
        # Whether the loop may differentiate its own gradients, as a gradient penalty does.
        self.nests = sum(instruction.func is inner_gradient for instruction in code) > 1
        self._functions: dict[tuple[int, ...], Function] = {}
        self._splits: dict[tuple[int, ...], Split | None] = {}
        self._passed: dict[tuple[int, ...], frozenset[int]] = {}
        self._between: dict[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], Function] = {}
        self._prologues: dict[tuple[int, ...], Function | None] = {}
        self._prologue_values: dict[tuple[int, ...], tuple[int, ...]] = {}

    def function(self, places: tuple[int, ...]) -> Function:
        """The program that computes the outputs at these places, and nothing else."""
        if places not in self._functions:
            self._functions[places] = lower(self, [self.outputs[place] for place in places])
        return self._functions[places]

    def keeps(self, value: int) -> bool:
        """Whether a value that comes up on the way is of use to a compiled derivative, as far as that is known."""
        return value in self.useful or value not in self.offered

    def passed(self, places: tuple[int, ...]) -> frozenset[int]:
        """The values that come up on the way to the outputs at these places, those included."""
        if places not in self._passed:
            wanted = {self.outputs[place] for place in places}
            code = [self.code[index] for index in needed(self.code, set(wanted))]
            self._passed[places] = frozenset(v for instruction in code for v in instruction.defined())
        return self._passed[places]

    def between(self, places: tuple[int, ...], values: tuple[int, ...], given: tuple[int, ...]) -> Function:
        """`function`, which also returns some of the values on the way, and is given others."""
        key = (places, values, given)
        if key not in self._between:
            self._between[key] = lower(self, [*(self.outputs[place] for place in places), *values], given)
        return self._between[key]

    def prologue(self, varying: tuple[int, ...]) -> Function | None:
        """The calls that cut hyperparameters by whole numbers that vary (a slice of the examples' weights), if any."""
        values = self.prologue_values(varying)
        if varying not in self._prologues:
            self._prologues[varying] = lower(self, values) if values else None
        return self._prologues[varying]

    def prologue_values(self, varying: tuple[int, ...]) -> tuple[int, ...]:
        """What `prologue` computes."""
        if varying not in self._prologue_values:
            self._prologue_values[varying] = tuple(self._cut_by(varying))
        return self._prologue_values[varying]

    def _cut_by(self, varying: tuple[int, ...]) -> list[int]:
        free = {*self.externals, *self.constants}
        found: list[int] = []
        for instruction in self.code:
            plain = not (instruction.phased or instruction.many or instruction.aliases or instruction.effect)
            if not plain or instruction.seed is not None or not all(value in free for value in instruction.used()):
                continue
            free.update(instruction.defined())
            whole = [n for n in numbers_in((instruction.args, instruction.kwargs)) if n.kind is int]
            if any(number.index in varying for number in whole):
                found += instruction.defined()
        return found

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
