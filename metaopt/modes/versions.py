"""The compiled derivatives of the programs that a run meets, and whether they can be trusted."""

from __future__ import annotations

__all__ = ["ENOUGH", "Numbers", "Versions", "trusted"]

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from metaopt.capture.compiled import Call, Compiled, build, refusal, say_not_compiled
from metaopt.capture.draws import UntraceableError
from metaopt.capture.program import Program
from metaopt.capture.segment import undisturbed

# An iteration's structure that is met less often is not worth a compilation, in one run or in all of the process; nor
# is a derivative that a sweep asks for once, as it does of the last step.
ENOUGH, ENOUGH_EVER = 8, 64
AGAIN = 2
_VERSIONS = 8
# What rounding makes of a single number may be nothing by chance.
_NUDGES = 4
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-3, torch.complex64: 1e-3}

Numbers = tuple[tuple[int, ...], ...]
R = TypeVar("R")


@dataclass
class _Known:
    """What the process knows of compiling a program's derivatives."""

    seen: int = 0
    refused: bool = False
    places: tuple[int, ...] = ()
    keys: dict[Any, int] = field(default_factory=dict)
    asked: Counter[int] = field(default_factory=Counter)
    versions: dict[int, Compiled] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[Program, _Known] = weakref.WeakKeyDictionary()


class Versions:
    """The compiled derivatives that a run may use.

    Args:
        backend: what compiles.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._asked: Counter[tuple[Program, int]] = Counter()
        self._numbers: dict[Program, dict[tuple[float, ...], None]] = {}
        self._varying: dict[Program, Numbers] = {}

    def see(self, program: Program, numbers: Iterable[tuple[float, ...]], often: int) -> None:
        """Iterations of a program, with the Python numbers that they had."""
        known = _known.setdefault(program, _Known())
        known.seen += often
        seen = self._numbers.setdefault(program, {})
        before = len(seen)
        seen.update(dict.fromkeys(numbers))
        if len(seen) != before:
            self._varying[program] = _varying(list(seen))

    def varying(self, program: Program, often: int) -> Numbers | None:
        """The places of the program's numbers that vary; None if it is not worth a compilation, or can't be."""
        known = _known[program]
        if known.refused or not (often >= ENOUGH or known.seen >= ENOUGH_EVER):
            return None
        return self._varying[program]

    def places(self, program: Program) -> tuple[int, ...]:
        """The outputs that the last compiled derivative of a program was made for."""
        return _known[program].places

    def find(
        self,
        program: Program,
        key: Any,
        derivative: Callable[..., Any],
        call: Call,
        places: tuple[int, ...] = (),
    ) -> Compiled | None:
        """The compiled derivative for a call, made where there is none yet; None if there shall be none.

        Args:
            program: the program.
            key: what the derivative is specialised to.
            derivative: what is traced (see `build`).
            call: the call.
            places: the outputs that it is the derivative of, if others may be filled up to these.
        """
        known = _known[program]
        # The key is long; from here on a number stands for it.
        key = known.keys.setdefault((self.backend, key), len(known.keys))
        known.asked[key] += 1
        self._asked[program, key] += 1
        often = self._asked[program, key] >= AGAIN or known.asked[key] >= ENOUGH_EVER
        if key not in known.versions and often and len(known.versions) < _VERSIONS:
            reason = refusal(program)
            if reason is None:
                try:
                    with undisturbed():
                        if not program.offered.issuperset(call.known):
                            # Which of the known values are read decides which are kept from now on, and so the key.
                            read = call.read_by(build(derivative, call, "aot_eager"))
                            program.useful = program.useful.difference(call.known) | read
                            program.offered.update(call.known)
                            return None
                        known.versions[key] = build(derivative, call, self.backend)
                        known.places = places or known.places
                except UntraceableError as error:
                    reason = str(error)
            if reason is not None:
                known.refused = True
                say_not_compiled(program, reason)
        found = known.versions.get(key)
        return None if found is None or found.wrong else found


def trusted(
    compiled: Compiled,
    call: Call,
    finish: Callable[[list[Tensor | None]], R],
    own: Callable[[int | None], R],
    entries: Callable[[R], Mapping[Any, Tensor]],
) -> R:
    """The result of a compiled derivative, compared now and then with what it stands for.

    Args:
        compiled: the compiled derivative.
        call: what it is called with.
        finish: makes the result of what it returns.
        own: the result as autograd finds it, or of arguments whose last digit is another, drawn from this seed.
        entries: the tensors of a result.
    """
    if not compiled.is_due():
        return finish(compiled(call))
    expected = own(None)
    try:
        found = finish(compiled(call))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = f"its compiled derivative failed, {(str(error) or 'without a reason').splitlines()[0]}"
    else:
        wrong = _wrong(entries(found), entries(expected))
        for seed in range(_NUDGES if wrong else 0):
            wrong = _beyond_rounding(wrong, entries(found), entries(expected), entries(own(seed)))
            if not wrong:
                break
        if not wrong:
            return expected
        reason = "its compiled derivative is another than its own, which is a bug of the compiler or of metaopt"
    compiled.wrong = True
    say_not_compiled(call.segment.program, reason)
    return expected


def _varying(numbers: Sequence[tuple[float, ...]]) -> Numbers:
    """The places of numbers that differ between iterations, those together that are always equal."""
    columns: dict[tuple[float, ...], list[int]] = {}
    for place, column in enumerate(zip(*numbers, strict=True)):
        if len(set(column)) > 1:
            columns.setdefault(column, []).append(place)
    return tuple(tuple(places) for places in columns.values())


def _wrong(found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor]) -> list[Any]:
    keys = dict.fromkeys((*found, *expected))
    return [key for key in keys if not _same(found.get(key), expected.get(key))]


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


def _beyond_rounding(
    wrong: Iterable[Any], found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor], other: Mapping[Any, Tensor]
) -> list[Any]:
    """Those of which the difference is not of the size that the last digit of the arguments makes."""

    def is_rounding(key: Any) -> bool:
        if not (key in found and key in expected and key in other) or found[key].shape != expected[key].shape:
            return False
        by = float((other[key] - expected[key]).norm())
        # What is not finite on either side tells nothing.
        return by < float("inf") and float((found[key] - expected[key]).norm()) <= 30 * by

    return [key for key in wrong if not is_rounding(key)]
