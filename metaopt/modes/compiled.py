"""Derivatives of an iteration by compiled code: adjoints pulled back, tangents pushed forward.

What the loop left behind is not computed again: the compiled derivative of an iteration reads the next one's state,
and what the loop computed on the way, where that was kept.
"""

from __future__ import annotations

__all__ = ["CompiledPullBack", "CompiledPush"]

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt.capture.compiled import Call
from metaopt.capture.primitives import Phase
from metaopt.capture.program import Program
from metaopt.capture.segment import Replay, Segment, nudged, undisturbed, variable
from metaopt.modes.columns import Columns
from metaopt.modes.pullback import PullBack, Pulled, gradients, places_of
from metaopt.modes.tangents import push_forward, transposed
from metaopt.modes.versions import Numbers, Versions, trusted


class CompiledPullBack(PullBack):
    """Pulls adjoints back through the iterations of a sweep, by compiled code where there are enough of them.

    Args:
        segments: the iterations that will be asked for.
        backend: what compiles.
        wanted: as for `PullBack`.
        exact: as for `PullBack`.
    """

    def __init__(
        self, segments: Iterable[Segment], backend: str, *, wanted: set[int] | None = None, exact: bool = True
    ) -> None:
        super().__init__(wanted=wanted, exact=exact)
        self._versions = Versions(backend)
        self._count: Counter[Program] = Counter()
        numbers: dict[Program, dict[tuple[float, ...], None]] = {}
        for segment in segments:
            self._count[segment.program] += 1
            numbers.setdefault(segment.program, {})[segment.numbers] = None
        for program, often in self._count.items():
            self._versions.see(program, numbers[program], often)

    def __call__(self, segment: Segment, alpha: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> Pulled:
        program = segment.program
        varying = self._versions.varying(program, self._count[program])
        if varying is None:
            return super().__call__(segment, alpha, after)
        alpha = self._filled(segment, alpha, after)
        places = places_of(segment, alpha)
        around = _Around.of(segment, places, varying, after, [a.detach() for a in alpha.values()])
        asked = tuple(self.asks(hyper) for hyper in around.hypers) + tuple(x.requires_grad for x in around.cut)
        pull = _Pull(asked)
        compiled = self._versions.find(program, (asked, *around.key), pull.derivative, around.call, places)
        if compiled is None:
            return super().__call__(segment, alpha, after)

        def own(seed: int | None) -> Pulled:
            with undisturbed():
                if seed is None:
                    return PullBack.__call__(self, segment, alpha, after)
                given = {key: nudged(a, seed) for key, a in alpha.items()}
                return PullBack.__call__(self, segment.nudged(seed), given, {})

        return trusted(
            compiled,
            around.call,
            lambda grads: self._finish(around, grads),
            own,
            lambda pulled: {**{("s", k): v for k, v in pulled.carried.items()}, **pulled.external},
        )

    def _filled(
        self, segment: Segment, alpha: Mapping[int, Tensor], after: Mapping[int, Tensor]
    ) -> Mapping[int, Tensor]:
        """An adjoint with zeros for what else was compiled along with it.

        The objective reads the weights alone, so that the last step has an adjoint with fewer parts than those before.
        """
        places = self._versions.places(segment.program)
        keys = {place: key for key, place in segment.outputs.items()}
        filled = [keys[place] for place in places if place in keys]
        if not set(alpha) < set(filled) or any(key not in alpha and key not in after for key in filled):
            return alpha
        return {key: alpha[key] if key in alpha else torch.zeros_like(after[key]) for key in filled}

    def _finish(self, around: _Around, grads: Sequence[Tensor | None]) -> Pulled:
        """Back through what was done before the call."""
        pulled = Pulled.of(around.call.segment, around.call.part, grads)
        if around.before is not None:
            cut, variables = around.cut, [x for _, x in around.before.externals]
            slopes = [torch.zeros_like(x) if g is None else g for x, g in zip(cut, grads[-len(cut) :], strict=True)]
            for (external, _), g in zip(around.before.externals, gradients(cut, variables, slopes), strict=True):
                if self.asks(external.tensor):
                    pulled.add(external.tensor, g)
        return pulled


@dataclass
class _Pull:
    """What is traced for a pull-back: ``α`` times the Jacobian."""

    asked: tuple[bool, ...]

    def derivative(
        self, call: Call, arguments: Sequence[Tensor], phase: Phase, seeds: Sequence[Any], draws: int
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor]]:
        """The gradients, and the known values."""
        first, last = len(call.values), len(call.values) + len(call.hypers)
        state = [variable(x) for x in arguments[:first]]
        hypers = [variable(x) if asked else x for x, asked in zip(arguments[first:last], self.asked, strict=True)]
        with torch.enable_grad():
            outputs, alpha = call.apply([*state, *hypers, *arguments[last:]], phase, seeds, draws)
        variables = [*state, *(x if asked else None for x, asked in zip(hypers, self.asked, strict=True))]
        return gradients(outputs[: len(alpha)], variables, alpha), [v.detach() for v in outputs[len(alpha) :]]


class CompiledPush:
    """Pushes tangents forward through iterations, by compiled code from the eighth of a structure on.

    Args:
        backend: what compiles.
    """

    def __init__(self, backend: str) -> None:
        self._versions = Versions(backend)
        self._count: Counter[Program] = Counter()

    def __call__(
        self,
        segment: Segment,
        keys: list[int],
        tangents: Mapping[int, Tensor],
        columns: Columns,
        after: Mapping[int, Tensor],
    ) -> dict[int, Tensor] | None:
        """As `metaopt.modes.tangents.push_forward`; None if that is to be asked.

        Args:
            segment: the iteration.
            keys: which of its outputs.
            tangents: ``Z`` before it, by key.
            columns: the layout of ``Z``.
            after: what it left behind, by key.
        """
        program = segment.program
        self._count[program] += 1
        self._versions.see(program, [segment.numbers], 1)
        varying = self._versions.varying(program, self._count[program])
        if varying is None or not columns.count:
            return None
        around = _Around.of(segment, places_of(segment, keys), varying, after, [])
        call, rows = around.call, slice(None)
        moving = [tangents.get(segment.inputs[place][0]) for place in call.part.inputs]
        moving += [columns.tangent(hyper, rows) for hyper in around.hypers]
        if around.before is not None:
            hypers = [columns.tangent(external.tensor, rows) for external, _ in around.before.externals]
            moving += transposed(around.cut, [x for _, x in around.before.externals])(hypers)
        push = _Push(tuple(z is not None for z in moving), len(keys))
        call.extra = [z for z in moving if z is not None]
        compiled = self._versions.find(program, (push.moving, *around.key, *call.key()), push.derivative, call)
        if compiled is None:
            return None

        def own(seed: int | None) -> dict[int, Tensor]:
            with undisturbed():
                if seed is None:
                    return push_forward(segment, keys, dict(tangents), columns, None)
                given = {key: nudged(z, seed) for key, z in tangents.items()}
                return push_forward(segment.nudged(seed), keys, given, columns, None)

        def finish(found: Sequence[Tensor | None]) -> dict[int, Tensor]:
            return {key: z for key, z in zip(keys, found, strict=True) if z is not None}

        return trusted(compiled, call, finish, own, lambda pushed: pushed)


@dataclass
class _Push:
    """What is traced for a push: the Jacobian times the tangents, as the reverse pass of a reverse pass."""

    moving: tuple[bool, ...]
    outputs: int

    def derivative(
        self, call: Call, arguments: Sequence[Tensor], phase: Phase, seeds: Sequence[Any], draws: int
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor]]:
        """The tangents of the outputs, and the known values."""
        last = len(call.values) + len(call.hypers)
        state = [variable(x) for x in arguments[: len(call.values)]]
        variables = [*state, *(variable(x) for x in arguments[len(call.values) : last])]
        with torch.enable_grad():
            outputs, extra = call.apply([*variables, *arguments[last:]], phase, seeds, draws)
        given = iter(extra)
        tangents = [next(given) if moves else None for moves in self.moving]
        with torch.enable_grad():
            found = transposed(outputs[: self.outputs], variables, batched=True)(tangents)
        return [None if z is None else z.detach() for z in found], [v.detach() for v in outputs[self.outputs :]]


@dataclass
class _Around:
    """A call of a part of an iteration, and what has to be done before it.

    Attributes:
        call: the call.
        key: what its compiled version is specialised to.
        hypers: the hyperparameters that it reads.
        before: what cut the hyperparameters for it, by numbers that vary (a slice of the examples' weights).
    """

    call: Call
    key: tuple[Any, ...]
    hypers: list[Tensor]
    before: Replay | None

    @classmethod
    def of(
        cls,
        segment: Segment,
        places: tuple[int, ...],
        varying: Numbers,
        after: Mapping[int, Tensor],
        extra: list[Tensor],
    ) -> _Around:
        """For some outputs of an iteration, and what it is known to have left behind."""
        program = segment.program
        passed = program.passed(places)
        # The last step has left more behind (gradients) than is kept of those before it, which share its code.
        carried = {key for key, _ in segment.inputs}
        left = [key for key in segment.outputs if key in carried and key in after]
        known = {program.outputs[segment.outputs[key]]: after[key] for key in left}
        known |= {value: cell.value() for value, cell in segment.known.items()}
        known = {value: x for value, x in known.items() if value in passed and program.keeps(value)}
        moving = tuple(place for group in varying for place in group)
        prologue = program.prologue(moving)
        before = None if prologue is None else segment.call(prologue)
        cut = [] if before is None else before.outputs
        part = program.between(places, tuple(known), program.prologue_values(moving))
        inputs, hypers = segment.arguments(part)
        given = [*(value for _, value in hypers), *(x.detach() for x in cut)]
        call = Call(segment, part, varying, list(inputs.values()), given, extra, known)
        key = (places, tuple(known), varying, *call.key())
        return cls(call, key, [external.tensor for external, _ in hypers], before)

    @property
    def cut(self) -> list[Tensor]:
        """The pieces of hyperparameters."""
        return [] if self.before is None else self.before.outputs
