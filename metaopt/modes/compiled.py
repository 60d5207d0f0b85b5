"""Pulling adjoints back through compiled iterations.

What the loop left behind is not computed again: the compiled derivative of an iteration reads the next one's state.
Its first, second, fourth, eighth, … result is compared with autograd's.
"""

from __future__ import annotations

__all__ = ["CompiledPullBack"]

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt.capture.compiled import Call, Compiled, build, refusal, say_not_compiled
from metaopt.capture.draws import UntraceableError
from metaopt.capture.primitives import Phase
from metaopt.capture.program import Program
from metaopt.capture.segment import Replay, Segment, undisturbed, variable
from metaopt.modes.pullback import PullBack, Pulled, gradients, places_of

# An iteration's structure that is met less often is not worth a compilation, in one sweep or in all of the process;
# nor is a derivative that a sweep asks for once, as it does of the last step.
_ENOUGH, _ENOUGH_EVER = 8, 64
_AGAIN = 2
_VERSIONS = 8
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-3, torch.complex64: 1e-3}


@dataclass
class _Known:
    """What the process knows of compiling a program's derivative."""

    seen: int = 0
    asked: Counter[Any] = field(default_factory=Counter)
    refused: bool = False
    versions: dict[Any, Compiled] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[Program, _Known] = weakref.WeakKeyDictionary()


class CompiledPullBack(PullBack):
    """Pulls adjoints back through the iterations of a sweep, by compiled code where there are enough of them.

    Args:
        segments: the iterations that will be asked for.
        backend: what compiles.
        wanted: as for `PullBack`.
    """

    def __init__(self, segments: Iterable[Segment], backend: str, *, wanted: set[int] | None = None) -> None:
        super().__init__(wanted=wanted)
        self._backend = backend
        self._varying: dict[Program, tuple[tuple[int, ...], ...]] = {}
        self._asked: Counter[Any] = Counter()
        count: Counter[Program] = Counter()
        numbers: dict[Program, dict[tuple[float, ...], None]] = {}
        for segment in segments:
            count[segment.program] += 1
            numbers.setdefault(segment.program, {})[segment.numbers] = None
        for program, often in count.items():
            known = _known.setdefault(program, _Known())
            known.seen += often
            if not known.refused and (often >= _ENOUGH or known.seen >= _ENOUGH_EVER):
                self._varying[program] = _varying(list(numbers[program]))

    def __call__(self, segment: Segment, alpha: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> Pulled:
        found = self._compiled(segment, alpha, after) if segment.program in self._varying else None
        return super().__call__(segment, alpha, after) if found is None else found

    def _compiled(self, segment: Segment, alpha: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> Pulled | None:
        call = _Call.of(self, segment, self._varying[segment.program], alpha, after)
        compiled = self._version(call)
        if compiled is None or compiled.wrong:
            return None
        if not compiled.is_due():
            return call.pulled(self, compiled(call.call))
        # Trust, but verify.
        expected = super().__call__(segment, alpha, after)
        try:
            found = call.pulled(self, compiled(call.call))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = f"its compiled derivative failed, {(str(error) or 'without a reason').splitlines()[0]}"
        else:
            if _agree(found, expected) or self._is_rounding(segment, alpha, found, expected):
                return expected
            reason = "its compiled derivative is another than its own, which is a bug of the compiler or of metaopt"
        compiled.wrong = True
        say_not_compiled(segment.program, reason)
        return expected

    def _version(self, call: _Call) -> Compiled | None:
        program = call.call.segment.program
        known = _known[program]
        key = (self._backend, call.key)
        known.asked[key] += 1
        self._asked[program, key] += 1
        often = self._asked[program, key] >= _AGAIN or known.asked[key] >= _ENOUGH_EVER
        if key not in known.versions and often and len(known.versions) < _VERSIONS:
            reason = refusal(program)
            if reason is None:
                try:
                    with undisturbed():
                        known.versions[key] = build(call.derivative, call.call, self._backend)
                    program.useful = (program.useful or set()) | call.read(known.versions[key])
                except UntraceableError as error:
                    reason = str(error)
            if reason is not None:
                known.refused = True
                del self._varying[program]
                say_not_compiled(program, reason)
        return known.versions.get(key)

    def _is_rounding(self, segment: Segment, alpha: Mapping[int, Tensor], found: Pulled, expected: Pulled) -> bool:
        """Whether the difference is of the size that the last digit of the adjoint makes."""
        nudged = {key: a * (1 + torch.finfo(a.dtype).eps * torch.randn_like(a)) for key, a in alpha.items()}
        with undisturbed():
            other = super().__call__(segment, nudged, {})
        return all(
            a is not None and b is not None and c is not None and float((a - b).norm()) <= 30 * float((c - b).norm())
            for a, b, c in _paired(found, expected, other)
            if not _same(a, b)
        )


@dataclass
class _Call:
    """A call of the compiled derivative of an iteration, and what has to be done around it.

    Attributes:
        call: the call.
        asked: which of what the iteration reads besides its state are asked for.
        key: what its compiled version is specialised to.
        before: what cut the hyperparameters for it, by numbers that vary (a slice of the examples' weights).
    """

    call: Call
    asked: tuple[bool, ...]
    key: tuple[Any, ...]
    before: Replay | None

    @classmethod
    def of(
        cls,
        pull: PullBack,
        segment: Segment,
        varying: tuple[tuple[int, ...], ...],
        alpha: Mapping[int, Tensor],
        after: Mapping[int, Tensor],
    ) -> _Call:
        """For an adjoint, and what the iteration is known to have left behind."""
        program = segment.program
        places = places_of(segment, alpha)
        passed = program.passed(places)
        known = {program.outputs[place]: after[key] for key, place in segment.outputs.items() if key in after}
        known |= {value: cell.value() for value, cell in segment.known.items()}
        known = {value: tensor for value, tensor in known.items() if value in passed}
        moving = tuple(place for group in varying for place in group)
        prologue = program.prologue(moving)
        before = None if prologue is None else segment.call(prologue)
        cut = [] if before is None else before.outputs
        part = program.between(places, tuple(known), program.prologue_values(moving))
        inputs, hypers = segment.arguments(part)
        call = Call(
            segment,
            part,
            varying,
            list(inputs.values()),
            [*(value for _, value in hypers), *(x.detach() for x in cut)],
            [a.detach() for a in alpha.values()],
            list(known.values()),
        )
        asked = (*(pull.asks(external.tensor) for external, _ in hypers), *(x.requires_grad for x in cut))
        return cls(call, asked, (places, asked, tuple(known), varying, *call.key()), before)

    def derivative(
        self, call: Call, arguments: Sequence[Tensor], phase: Phase, seeds: Sequence[Any], draws: int
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor]]:
        """What is traced: the gradients, and the known values."""
        first, last = len(call.values), len(call.values) + len(call.hypers)
        state = [variable(x) for x in arguments[:first]]
        hypers = [variable(x) if asked else x for x, asked in zip(arguments[first:last], self.asked, strict=True)]
        with torch.enable_grad():
            outputs, alpha = call.apply([*state, *hypers, *arguments[last:]], phase, seeds, draws)
        variables = [*state, *(x if asked else None for x, asked in zip(hypers, self.asked, strict=True))]
        return gradients(outputs[: len(alpha)], variables, alpha), [v.detach() for v in outputs[len(alpha) :]]

    def read(self, compiled: Compiled) -> set[int]:
        """Which of the known values the compiled derivative reads."""
        _, _, values, *_ = self.key
        return {values[place] for place in compiled.knows(len(values))}

    def pulled(self, pull: PullBack, grads: Sequence[Tensor | None]) -> Pulled:
        """The result of the call, taken back through what was done before it."""
        pulled = Pulled.of(self.call.segment, self.call.part, grads)
        if self.before is not None:
            cut = self.before.outputs
            slopes = [torch.zeros_like(x) if g is None else g for x, g in zip(cut, grads[-len(cut) :], strict=True)]
            variables = [x for _, x in self.before.externals]
            for (external, _), g in zip(self.before.externals, gradients(cut, variables, slopes), strict=True):
                if pull.asks(external.tensor):
                    pulled.add(external.tensor, g)
        return pulled


def _varying(numbers: Sequence[tuple[float, ...]]) -> tuple[tuple[int, ...], ...]:
    """The places of numbers that differ between iterations, those together that are always equal."""
    columns: dict[tuple[float, ...], list[int]] = {}
    for place, column in enumerate(zip(*numbers, strict=True)):
        if len(set(column)) > 1:
            columns.setdefault(column, []).append(place)
    return tuple(tuple(places) for places in columns.values())


def _paired(*pulled: Pulled) -> list[tuple[Tensor | None, ...]]:
    stores = [{**{("carried", k): v for k, v in p.carried.items()}, **dict(p.external.items())} for p in pulled]
    return [tuple(store.get(key) for store in stores) for key in dict.fromkeys(key for s in stores for key in s)]


def _agree(found: Pulled, expected: Pulled) -> bool:
    return all(_same(a, b) for a, b in _paired(found, expected))


def _same(found: Tensor | None, expected: Tensor | None) -> bool:
    if expected is None or found is None:
        there = expected if found is None else found
        return there is None or not bool(there.any())
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    wide = torch.complex128 if expected.is_complex() else torch.float64
    size = float(expected.to(wide).norm())
    if not size < float("inf"):
        return True  # the sweep is about to say so
    return float((found.to(wide) - expected.to(wide)).norm()) <= _TOLERANCE.get(expected.dtype, 5e-2) * size
