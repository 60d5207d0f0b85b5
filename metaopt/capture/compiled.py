"""Derivatives of a program, traced once and compiled, for every later iteration of the same structure."""

from __future__ import annotations

__all__ = ["BACKENDS", "Call", "Compiled", "backend_of", "build", "refusal", "say_not_compiled"]

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt.capture.aten import Graph, trace
from metaopt.capture.custom import Custom
from metaopt.capture.draws import Draw, Drawing, UntraceableError, draw_all
from metaopt.capture.hooks import module_hooks
from metaopt.capture.primitives import Phase, hooked
from metaopt.capture.segment import Segment
from metaopt.capture.trace import Val
from metaopt.errors import FallbackWarning, warn

if TYPE_CHECKING:
    from metaopt.capture.lowering import Function
    from metaopt.capture.program import Program

BACKENDS = ("inductor", "aot_eager")

# These read tensors on the way to aten calls, which a graph of such calls can't repeat.
_READS = re.compile("ctc_loss|tensor_split|packed|nested|histogram|^item$|numpy|tolist")
_RECURRENT = {"lstm": 1, "gru": 2, "rnn_tanh": 2, "rnn_relu": 2}  # where a packed sequence has another argument
# A value of these kinds is the same value in every iteration where it is equal.
_PLAIN = (str, bytes, type(None), type)


def backend_of(compile: bool | str) -> str | None:  # noqa: A002
    """The name of what compiles, as ``torch.compile`` has it, or None."""
    if isinstance(compile, bool):
        return "inductor" if compile else None
    if compile not in BACKENDS:
        raise ValueError(f"compile must be True, False, or one of {', '.join(BACKENDS)}, not {compile!r}.")
    return compile


def refusal(program: Program) -> str | None:
    """Why a program can't be written as a graph of fixed aten calls, if it can't."""
    for instruction in program.code:
        func = instruction.func
        name = getattr(func, "__name__", type(func).__name__)
        if func in (hooked, module_hooks):
            return "the loop's gradient hooks run Python code"
        if isinstance(func, Custom) or (name == "apply" and isinstance(getattr(func, "__self__", None), type)):
            return f"`{name}` is an autograd.Function, whose Python code may do anything"
        if name == "ctc_loss":
            return f"`{name}` makes some calls for each time step, too many to compile"
        packed = name in _RECURRENT and type(instruction.args[_RECURRENT[name]]) is Val
        if packed or _READS.search(name):
            return f"`{name}` reads its arguments on the processor"
    return None


@dataclass
class Call:
    """One call of a part of ``Φ_t``: all that it depends on.

    Attributes:
        segment: the iteration.
        part: the part.
        varying: the places of the Python numbers that differ between iterations, which become tensors; those that
            are always equal (the step counts of all weights) become one.
        values: the carried values that it reads.
        hypers: the hyperparameters that it reads, and what it is given.
        extra: what the derivative of it reads besides.
        known: values that come up on the way, and that the iteration has, by their number in the program.
    """

    segment: Segment
    part: Function
    varying: tuple[tuple[int, ...], ...]
    values: list[Tensor]
    hypers: list[Tensor]
    extra: list[Tensor]
    known: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.constants = [self.segment.constants[place].value() for place in self.part.constants]
        numbers = self.segment.numbers
        self.numbers = [torch.tensor(numbers[places[0]], dtype=torch.float64) for places in self.varying]

    def key(self) -> tuple[Any, ...]:
        """What a compiled version of it is specialised to."""
        tensors = (*self.values, *self.hypers, *self.constants, *self.extra, *self.known.values())
        moving = {place for places in self.varying for place in places}
        fixed = [number for place, number in enumerate(self.segment.numbers) if place not in moving]
        return (
            tuple([(t.shape, t.stride(), t.dtype, t.device) for t in tensors]),
            tuple([(type(number), number) for number in fixed]),
            tuple([thing if isinstance(thing, _PLAIN) else None for thing in self.segment.objects]),
            torch.get_num_threads(),
        )

    def arguments(self, draws: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, in the order of a compiled function's arguments."""
        return [*self.values, *self.hypers, *self.constants, *self.numbers, *draws, *self.extra, *self.known.values()]

    def read_by(self, compiled: Compiled) -> set[int]:
        """Which of the known values a compiled derivative reads."""
        numbers = list(self.known)
        return {numbers[place] for place in compiled.knows(len(numbers))}

    def apply(self, arguments: Sequence[Tensor], phase: Phase, seeds: Sequence[Any], draws: int) -> Any:
        """Call the part with other tensors; also what is left of them: ``extra``."""
        rest = iter(arguments)

        def take(count: int) -> list[Tensor]:
            return [next(rest) for _ in range(count)]

        values, hypers, constants = (take(len(group)) for group in (self.values, self.hypers, self.constants))
        numbers: list[Any] = list(self.segment.numbers)
        for places, number in zip(self.varying, take(len(self.varying)), strict=True):
            for place in places:
                numbers[place] = number
        take(draws)
        holder: Any = SimpleNamespace(numbers=numbers, objects=self.segment.objects, seeds=seeds)
        count = len(self.part.externals)
        outputs = self.part(phase, values, hypers[:count], constants, holder, hypers[count:])
        return outputs, take(len(self.extra))


class Compiled:
    """A derivative of a part of ``Φ_t`` as compiled code."""

    def __init__(self, graph: Graph, draws: list[Draw], call: Callable[..., Any] | None, arguments: int) -> None:
        self._arguments = arguments
        self.graph = graph
        self.draws = draws
        self.calls = 0
        self.wrong = False
        self._call = call

    def __call__(self, call: Call) -> list[Tensor | None]:
        self.calls += 1
        draws = draw_all(self.draws, call.segment.seeds) if self.draws else []
        return self.graph(call.arguments(draws), self._call)

    def knows(self, count: int) -> list[int]:
        """The places, among that many known values, of those that it reads."""
        first = self._arguments - count
        return [place - first for reads in self.graph.reads for place in reads if place >= first]

    def is_due(self) -> bool:
        """Whether its next result shall be compared: the first, second, fourth, eighth, … is."""
        return (self.calls & (self.calls + 1)) == 0


def build(function: Callable[..., Any], call: Call, backend: str) -> Compiled:
    """Trace and compile.

    Args:
        function: ``(call, arguments, phase, seeds, draws) -> (results, known)``, made of `Call.apply`.
        call: the call at whose shapes and numbers it is traced.
        backend: one of `BACKENDS`.

    Raises:
        UntraceableError: if the calls depend on what the tensors hold.
    """
    segment = call.segment
    if not all(isinstance(thing, _PLAIN) for thing in segment.objects):
        raise UntraceableError("an argument of a call is neither a tensor nor a number")
    drawing = Drawing()
    if segment.seeds:
        try:
            function(call, call.arguments([]), Phase(), drawing.seeds(segment.seeds), 0)
        except UntraceableError:
            raise
        except Exception as error:  # whatever a call says of a tensor where the loop had a number
            raise UntraceableError(_reason(error, call)) from error
    draws = draw_all(drawing.draws, segment.seeds)

    def traced(given: Sequence[Tensor]) -> Any:
        first = len(call.values) + len(call.hypers) + len(call.constants) + len(call.numbers)
        supply = Drawing(given[first : first + len(draws)])
        return function(call, given, Phase(), supply.seeds(segment.seeds), len(draws))

    arguments = call.arguments(draws)
    try:
        graph = trace(traced, arguments[: len(arguments) - len(call.known)], list(call.known.values()))
    except UntraceableError:
        raise
    except Exception as error:
        raise UntraceableError(_reason(error, call)) from error
    return Compiled(graph, drawing.draws, _compile(graph, arguments, backend), len(arguments))


def _reason(error: Exception, call: Call) -> str:
    """Why calls could not be traced."""
    if call.varying and (isinstance(error, (IndexError, TypeError)) or "_local_scalar_dense" in str(error)):
        return (
            "a Python number that differs from step to step (a size, an index, the rate of a dropout) decides what it "
            "computes"
        )
    return _first_line(error)


def _compile(graph: Graph, arguments: Sequence[Tensor], backend: str) -> Callable[..., Any] | None:
    if backend != "inductor" or not any(graph.results):
        return None
    try:
        from torch import _inductor

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            inputs: Any = graph.inputs(arguments)
            return _inductor.compile(graph.module, inputs)
    except Exception as error:  # noqa: BLE001 a compiler that is not there fails in many ways
        _say_once(
            f"torch's inductor could not compile a step's derivative ({_first_line(error)}); its calls run one by one, "
            'as with compile="aot_eager". It needs a C++ compiler (`apt install g++`) on a CPU and Triton on a GPU.'
        )
        return None


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        warn(text, FallbackWarning)


def say_not_compiled(program: Program, reason: str) -> None:
    """Say once that a program's derivative is not compiled."""
    names = dict.fromkeys(getattr(i.func, "__name__", type(i.func).__name__) for i in program.code)
    _say_once(
        f"a step can't be compiled: {reason}. It is differentiated call by call, which gives the same. The step "
        f"calls: {', '.join(names)}."
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
