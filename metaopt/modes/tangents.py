"""Pushing tangents through one iteration: ``A Z + B``, all columns in one batched pass.

Two engines. Where the iteration is a gradient and an update, `_split` takes the gradient's tangent from its own graph:
a Hessian is symmetric, so ``dg = ∇_w ⟨∇_(w,λ) L, (dw, dλ)⟩`` is one reverse pass, and pushes it on through
the update. Where it is anything else, `_whole` transposes: ``v(u) = Jᵀu`` is linear in ``u``, so its own reverse
pass is ``J``. Neither needs a forward-mode formula of any operation of the model.
"""

from __future__ import annotations

__all__ = ["push_forward", "transposed"]

import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metaopt.capture.program import Program
from metaopt.capture.segment import Replay, Segment
from metaopt.capture.split import Split
from metaopt.errors import SweepError
from metaopt.modes.columns import Columns
from metaopt.modes.passes import reverse_pass
from metaopt.modes.pullback import places_of
from metaopt.modes.transposes import transposes

# From tangents of the sources (each with its columns first) to those of the outputs.
Push = Callable[[Sequence[Tensor | None]], list[Tensor | None]]

# Whether forward-mode AD pushes tangents through a program's update rightly, by which of its values have one.
_forward_is_right: weakref.WeakKeyDictionary[Program, dict[tuple[bool, ...], bool]] = weakref.WeakKeyDictionary()

# Which pushes were compared with the pull of adjoints (which outputs, and what had a tangent), and whether the program
# may be cut at its gradients.
_cut_is_right: weakref.WeakKeyDictionary[Program, dict[tuple[tuple[int, ...], tuple[bool, ...]], bool]] = (
    weakref.WeakKeyDictionary()
)


def push_forward(
    segment: Segment,
    keys: list[int],
    tangents: dict[int, Tensor],
    columns: Columns,
    chunk: int | None,
    *,
    verify: bool = True,
) -> dict[int, Tensor]:
    """``Z`` of some outputs of an iteration, from ``Z`` of its inputs and the hyperparameters' own columns.

    Args:
        segment: the iteration.
        keys: which of its outputs.
        tangents: ``Z`` before it, by key; what is missing has none.
        columns: the layout of ``Z``.
        chunk: how many columns at once.
        verify: compare the first of a kind with the pull of adjoints.

    Raises:
        SweepError: if no way to push is its transpose.
    """
    split = segment.program.split(places_of(segment, keys))
    known = _cut_is_right.setdefault(segment.program, {})
    case = places_of(segment, keys), columns.moving(segment, tangents)
    if not verify or case in known:
        cut = split if known.get(case, True) else None
        return _push(segment, cut, keys, tangents, columns, chunk)
    for cut in (split, None) if split is not None else (None,):
        push = partial(_push, cut=cut, keys=keys, tangents=tangents, columns=columns, chunk=chunk)
        found = push(segment)
        if transposes(segment, keys, tangents, columns, found, push):
            known[case] = cut is not None
            return found
    raise SweepError(
        "forward mode can't differentiate this step: its tangents are not what reverse mode says. The gradient of one "
        "of its operations has no derivative in torch (that by the values of a sparse matrix has none), or a wrong "
        "one. Take `metaopt.record`, whose derivative is compared with finite differences, or compute the same from "
        "dense operations."
    )


def _push(
    segment: Segment,
    cut: Split | None,
    keys: list[int],
    tangents: dict[int, Tensor],
    columns: Columns,
    chunk: int | None,
) -> dict[int, Tensor]:
    push = _whole(segment, keys, tangents, columns) if cut is None else _split(segment, cut, tangents, columns)
    size = chunk or max(columns.count, 1)
    chunks = [slice(start, min(start + size, columns.count)) for start in range(0, columns.count, size)]
    parts = [push(rows) for rows in chunks]
    return {
        key: joined
        for place, key in enumerate(keys)
        if (joined := _joined([part[place] for part in parts], chunks)) is not None
    }


def _joined(parts: list[Tensor | None], chunks: list[slice]) -> Tensor | None:
    known = next((z for z in parts if z is not None), None)
    if known is None or len(parts) == 1:
        return known
    filled = [
        known.new_zeros((rows.stop - rows.start, *known.shape[1:])) if z is None else z
        for z, rows in zip(parts, chunks, strict=True)
    ]
    return torch.cat(filled)


def _whole(
    segment: Segment, keys: list[int], tangents: dict[int, Tensor], columns: Columns
) -> Callable[[slice], list[Tensor | None]]:
    """Push through ``Φ_t`` as it stands."""
    replay = segment.replay(keys)
    sources = _Sources(replay, tangents, columns)
    push = transposed(replay.outputs, sources.variables)
    return lambda rows: push(sources.tangents(rows))


def _split(
    segment: Segment, split: Split, tangents: dict[int, Tensor], columns: Columns
) -> Callable[[slice], list[Tensor | None]]:
    """Push through the gradients, then through the update that is made of them."""
    before = segment.call(split.before)
    sources = _Sources(before, tangents, columns)
    gradients: list[Tensor] = []
    pushes: list[Push] = []
    for gradient in split.gradients:
        values, push = _gradient(before.outputs[gradient.losses], before.outputs[gradient.weights], sources.variables)
        gradients += values
        pushes.append(push)
    inputs, hypers = segment.arguments(split.after)
    values = [*inputs.values(), *(value for _, value in hypers), *gradients]
    after = _update(segment, split, values)

    def push_all(rows: slice) -> list[Tensor | None]:
        given = sources.tangents(rows)
        moved = [z for push in pushes for z in push(given)]
        direct: list[Tensor | None] = [tangents[key][rows] if key in tangents else None for key in inputs]
        direct += [columns.tangent(external.tensor, rows) for external, _ in hypers]
        return after([*direct, *moved])

    return push_all


class _Sources:
    """The variables of a replay that have a tangent."""

    def __init__(self, replay: Replay, tangents: dict[int, Tensor], columns: Columns) -> None:
        carried = [(x, key) for key, x in replay.inputs.items() if key in tangents and x.requires_grad]
        hypers = [(x, external.tensor) for external, x in replay.externals if x.requires_grad]
        self.variables = [x for x, _ in carried] + [x for x, _ in hypers]
        self._carried = [tangents[key] for _, key in carried]
        self._hypers = [tensor for _, tensor in hypers]
        self._columns = columns

    def tangents(self, rows: slice) -> list[Tensor | None]:
        """Theirs, for some of the columns."""
        carried: list[Tensor | None] = [z[rows] for z in self._carried]
        return carried + [self._columns.tangent(x, rows) for x in self._hypers]


def _gradient(losses: list[Tensor], weights: list[Tensor], sources: list[Tensor]) -> tuple[list[Tensor], Push]:
    """``g = ∇_w L``, and the push of its tangent over its own graph."""
    losses = [loss for loss in losses if loss.requires_grad]
    zeros = [torch.zeros_like(weight) for weight in weights]
    if not losses:
        return zeros, lambda _: [None] * len(weights)
    with torch.enable_grad():
        found = torch.autograd.grad(losses, [*weights, *sources], create_graph=True, allow_unused=True)
    values = [zero if g is None else g.detach() for zero, g in zip(zeros, found, strict=False)]
    slopes = found[len(weights) :]
    used = [(place, slope) for place, slope in enumerate(slopes) if slope is not None and slope.requires_grad]

    def push(tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        given = [(slope, z) for place, slope in used if (z := tangents[place]) is not None]
        if not given:
            return [None] * len(weights)
        return reverse_pass([slope for slope, _ in given], weights, [z for _, z in given])

    return values, push


def _update(segment: Segment, split: Split, values: list[Tensor]) -> Push:
    """The push through what follows the gradients, in forward mode if it can be had."""
    fallback: list[Push] = []

    def in_reverse(tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        if not fallback:
            variables = [v.detach().requires_grad_(v.dtype.is_floating_point) for v in values]
            with torch.enable_grad():
                fallback.append(transposed(segment.apply(split.after, variables), variables))
        return fallback[0](tangents)

    def push(tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        known = _forward_is_right.setdefault(segment.program, {})
        moving = tuple(z is not None for z in tangents)
        # For several columns the reverse pass needs fewer passes over the memory than batched forward formulas do.
        if any(z is not None and len(z) > 1 for z in tangents) or known.get(moving) is False:
            return in_reverse(tangents)
        try:
            found = _dual(lambda moved: segment.apply(split.after, moved), values, tangents)
        except (RuntimeError, NotImplementedError):
            known[moving] = False
            return in_reverse(tangents)
        if moving in known:
            return found
        # Forward mode drops the tangent of what an operation detaches, in silence: the two must have agreed once.
        expected = in_reverse(tangents)
        known[moving] = _agree(found, expected)
        return expected

    return push


def _dual(
    function: Callable[[Sequence[Tensor]], list[Tensor]], values: list[Tensor], tangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Forward-mode AD of one column."""
    _prepare_forward()
    with torch.no_grad(), forward_ad.dual_level():
        moved = [v if z is None else forward_ad.make_dual(v, z[0]) for v, z in zip(values, tangents, strict=True)]
        found = [forward_ad.unpack_dual(output).tangent for output in function(moved)]
        return [None if z is None else z.detach().unsqueeze(0) for z in found]


def _agree(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    for a, b in zip(found, expected, strict=True):
        if a is None and b is None:
            continue
        size = 0.0 if b is None else float(b.norm())
        difference = b if a is None else a if b is None else a - b
        if difference is not None and not float(difference.norm()) <= 1e-3 * size:
            return False
    return True


@cache
def _prepare_forward() -> None:
    # The first dual number of a process scripts torch's own decompositions, with a warning about scripting.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.ones(()), torch.ones(()))


def transposed(outputs: Sequence[Tensor], sources: Sequence[Tensor], *, batched: bool = False) -> Push:
    """The push over any graph: the reverse pass of its reverse pass; ``batched`` or not at all, if asked so."""
    moving = [place for place, output in enumerate(outputs) if output.requires_grad]
    wanted = [place for place, source in enumerate(sources) if source.requires_grad]
    nothing: list[Tensor | None] = [None] * len(outputs)
    if not moving or not wanted:
        return lambda _: nothing
    with torch.enable_grad():
        u = [torch.zeros_like(outputs[place], requires_grad=True) for place in moving]
        v = torch.autograd.grad(
            [outputs[place] for place in moving],
            [sources[place] for place in wanted],
            u,
            create_graph=True,
            allow_unused=True,
        )
    linear = [(place, part) for place, part in zip(wanted, v, strict=True) if part is not None and part.requires_grad]

    def push(tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        given = [(part, z) for place, part in linear if (z := tangents[place]) is not None]
        result = list(nothing)
        if given:
            found = reverse_pass([part for part, _ in given], u, [z for _, z in given], strictly=batched)
            for place, z in zip(moving, found, strict=True):
                result[place] = z
        return result

    return push
