"""Is the push of tangents through an iteration the transpose of the pull: ``⟨u, A Z + B⟩ = ⟨uA, Z⟩ + ⟨uB, 1⟩``?

The push differentiates gradients with respect to other values than the pull does, and torch has gradients that know
nothing of what they depend on: that by the values of a sparse matrix has no graph, and a tangent is lost in silence.
The pull was compared with finite differences (`metaopt.capture.derivatives`), so that it is the one to trust.
"""

from __future__ import annotations

__all__ = ["transposes"]

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from metaopt.capture.segment import Segment
from metaopt.modes.columns import Columns, coordinates
from metaopt.modes.pullback import gradients

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2}
_LOOSE = 0.2
# What rounding makes of a single number may be nothing by chance.
_NUDGES = 3

Pushed = Mapping[int, Tensor]


def transposes(
    segment: Segment,
    keys: Sequence[int],
    tangents: Mapping[int, Tensor],
    columns: Columns,
    found: Pushed,
    again: Callable[[Segment], Pushed],
) -> bool:
    """Whether what was pushed through an iteration is what the pull says, for one random cotangent.

    Args:
        segment: the iteration.
        keys: the outputs whose tangents were asked for.
        tangents: ``Z`` before it, by key.
        columns: the layout of ``Z``.
        found: ``Z`` of the outputs; what is missing has none.
        again: pushes through another iteration; it tells what is rounding.
    """
    pushed, pulled, size, dtype = _products(segment, keys, tangents, columns, found)
    loose = segment.program.uses_autocast or dtype not in _TOLERANCE
    difference = (pushed - pulled).abs()
    wrong = difference > (_LOOSE if loose else _TOLERANCE[dtype]) * size
    for seed in range(_NUDGES):
        if not bool(wrong.any()):
            return True
        # A sum of terms that cancel (a scale of weights before a normalisation) may be rounding, and nothing else.
        other = segment.nudged(seed)
        others = _products(other, keys, tangents, columns, again(other))
        rounding = (others[0] - pushed).abs() + (others[1] - pulled).abs()
        wrong &= difference > 30 * rounding
    return not bool(wrong.any())


def _products(
    segment: Segment, keys: Sequence[int], tangents: Mapping[int, Tensor], columns: Columns, found: Pushed
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """Both sides for each column, the size of their terms, and the lowest precision among the outputs."""
    replay = segment.replay(list(keys))
    moving = [(key, output) for key, output in zip(keys, replay.outputs, strict=True) if output.requires_grad]
    u = {key: _random(output, place) for place, (key, output) in enumerate(moving)}
    variables = [*replay.inputs.values(), *(x for _, x in replay.externals)]
    pulls = gradients([output for _, output in moving], variables, list(u.values()))
    inner = [(found[key], a) for key, a in u.items() if key in found]
    outer = [(tangents.get(key), a) for key, a in zip(replay.inputs, pulls, strict=False)]
    everything = slice(0, columns.count)
    hypers = zip(replay.externals, pulls[len(replay.inputs) :], strict=True)
    outer += [(None if a is None else columns.tangent(external.tensor, everything), a) for (external, _), a in hypers]
    # A finite product of what is not finite tells nothing; the run looks for that itself.
    pushed, size = _sum(inner, columns.count)
    pulled, other = _sum(outer, columns.count)
    lowest = min((output.dtype for _, output in moving), key=lambda d: -torch.finfo(d).eps, default=torch.float64)
    return pushed, pulled, torch.nan_to_num(size + other, nan=float("inf")), lowest


def _sum(pairs: Sequence[tuple[Tensor | None, Tensor | None]], count: int) -> tuple[Tensor, Tensor]:
    """``⟨z, a⟩`` for each column of the tangents, and the root of the sum of the terms' squares."""
    total, squares = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for z, a in pairs:
        if z is not None and a is not None:
            rows, row = coordinates(z).double(), coordinates(a.unsqueeze(0)).double()[0]
            total += (rows @ row).cpu()
            squares += (rows.square() @ row.square()).cpu()
    return total, squares.sqrt()


def _random(output: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(output.device).manual_seed(seed)
    return torch.empty_like(output).normal_(generator=generator).detach()
