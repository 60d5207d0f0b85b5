"""``Z`` while the loop goes on: the tangents of the state, and of what else the loop may come back to.

A tensor that is neither weight nor state gets its tangent only if a later iteration reads it. So the iterations since
the last step but one are kept, with the tangents that they began with; what outlives them is the business of
`survivors`.
"""

from __future__ import annotations

__all__ = ["Carried"]

from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from metaopt.capture.segment import Segment
from metaopt.errors import CaptureError
from metaopt.modes.adjoint import Adjoint, opaque, retold
from metaopt.modes.columns import Columns, coordinates
from metaopt.modes.pullback import PullBack, places_of
from metaopt.modes.survivors import moves, worth_keeping
from metaopt.modes.tangents import push_forward
from metaopt.step import Loop

Tangents = dict[int, Tensor]
Compiled = Callable[[Segment, list[int], Tangents, Columns, Mapping[int, Tensor]], Tangents | None]


class Carried:
    """The tangents of what the loop holds, carried from iteration to iteration.

    Args:
        loop: the loop.
        columns: the layout of ``Z``.
        compiled: pushes them through iterations for which it has compiled code; None for all others.
        chunk: how many columns to push at once; None for all.
        discount: the factor on ``Z_{t-1}``.

    Attributes:
        tangents: by key.
    """

    def __init__(
        self, loop: Loop, columns: Columns, compiled: Compiled | None, *, chunk: int | None, discount: float
    ) -> None:
        self.tangents: Tangents = {}
        self._loop = loop
        self._columns = columns
        self._compiled = compiled
        self._chunk = chunk
        self._verifies = loop.verifier.which != "never"
        self._discount = discount
        self._recent: deque[tuple[Segment, Tangents, bool]] = deque()
        self._lost: set[int] = set()
        # What was pushed and has no tangent: it depends on no hyperparameter yet, however long ago it was written.
        self._still: set[int] = set()

    def begin(self, tangents: Tangents) -> None:
        """Go on from these, without a past."""
        self.tangents = tangents
        self._recent.clear()

    def reset(self) -> None:
        """``Z = 0``: all that there is, is a constant."""
        self.begin({})
        self._still |= self._lost
        self._lost.clear()

    def products(self, adjoint: Adjoint) -> list[Tensor]:
        """``α Z`` along all columns, for each tensor; what has no tangent is pulled back to where it was computed.

        Raises:
            CaptureError: if that was longer ago than iterations are kept.
        """
        found, pending = _products(adjoint.carried, self.tangents)
        for segment, before, _ in reversed(self._recent):
            part = Adjoint(self._loop)
            part.carried = {key: pending.pop(key) for key in list(pending) if key in segment.outputs}
            part.pull_back(PullBack(), segment, self._loop.steps)
            adjoint.join(part)
            more, pulled = _products(part.carried, before)
            found += more
            for key, alpha in pulled.items():
                pending[key] = pending[key] + alpha if key in pending else alpha
        if any(key in self._lost for key in pending):
            raise _lost(next(alpha for key, alpha in pending.items() if key in self._lost))
        return found

    def widen(self, count: int) -> None:
        """There are so many columns now: those of new hyperparameters are zero."""
        self.tangents = {key: _widened(z, count) for key, z in self.tangents.items()}
        self._recent = deque(
            (earlier, {key: _widened(z, count) for key, z in tangents.items()}, step)
            for earlier, tangents, step in self._recent
        )

    def resolve(self, segment: Segment) -> None:
        """Get the tangents of what this iteration reads of the last ones besides the state."""
        for key, cell in segment.inputs:
            if key in self.tangents or key in self._still:
                continue
            if key in self._lost:
                raise _lost(cell.tensor)
            for earlier, tangents, _ in reversed(self._recent):
                if key in earlier.outputs:
                    found = self._push(earlier, [key], tangents, {})
                    self.tangents.update(found)
                    self._still |= {key} - set(found)
                    break

    def receive(self, segment: Segment, is_step: bool) -> None:
        """Carry the tangents through an iteration; ``is_step``: whether the optimizer's step ended it."""
        before = self.tangents
        if is_step and self._discount != 1.0:
            before = {key: self._discount * tangent for key, tangent in before.items()}
        state = self._state_keys()
        present = {} if self._compiled is None else self._loop.tape.present()
        keys = [key for key in segment.outputs if key in state]
        pushed = self._push(segment, keys, before, present)
        alive = {binding.key: binding.ref() for binding in self._loop.tape.living()}
        after = {key: z for key, z in before.items() if key in alive and key not in segment.outputs}
        self.tangents = {**after, **pushed}
        self._lost = (self._lost - set(segment.outputs)) & alive.keys()
        self._still = ((self._still - set(segment.outputs)) | (set(keys) - set(pushed))) & alive.keys()
        self._recent.append((segment, before, is_step))
        while sum(step for _, _, step in self._recent) > 2:
            self._drop(*self._recent.popleft()[:2], alive)

    def _drop(self, segment: Segment, tangents: Tangents, alive: Mapping[int, Tensor | None]) -> None:
        """Let go of an iteration; what outlives it gets its tangent now, or is lost."""
        recent = {key for later, _, _ in self._recent for key in later.outputs}
        tape = self._loop.tape
        grads = {id(grad) for weight in tape.trained.values() if (grad := weight.grad) is not None}
        gradients = {binding.key for binding in tape.bindings() if id(binding.ref()) in grads}
        gone = {key for key in segment.outputs if key in alive and key not in self.tangents}
        gone -= recent | self._still
        self._still |= {key for key in gone if not moves(segment, key, tangents)}
        survivors = {key: alive[key] for key in sorted(gone - self._still)}
        if survivors:
            kept = worth_keeping(segment, survivors, tape.opaque, self._room(), gradients)
            found = self._push(segment, kept, tangents, {})
            self.tangents.update(found)
            self._still |= set(kept) - set(found)
            gone -= set(kept)
        self._lost = (self._lost | gone) - recent - self._still

    def _room(self) -> int:
        """How many entries besides the state may have tangents: as many as the state's, less those that have."""
        state = self._state_keys()
        return sum(z[0].numel() if key in state else -z[0].numel() for key, z in self.tangents.items() if len(z))

    def _push(self, segment: Segment, keys: list[int], tangents: Tangents, after: Mapping[int, Tensor]) -> Tangents:
        if not keys:
            return {}
        self._refuse_opaque(segment, keys)
        if self._compiled is not None and (self._chunk is None or self._chunk >= self._columns.count):
            found = self._compiled(segment, keys, tangents, self._columns, after)
            if found is not None:
                return found
        try:
            # The loop may look for anomalies of its own; a way to push that is tried and given up is none.
            with torch.autograd.set_detect_anomaly(False):
                return push_forward(segment, keys, tangents, self._columns, self._chunk, verify=self._verifies)
        except RuntimeError as error:
            raise retold(error, self._loop.steps) from error

    def _refuse_opaque(self, segment: Segment, keys: list[int]) -> None:
        strangers = self._loop.tape.opaque
        if strangers:
            for place in segment.program.function(places_of(segment, keys)).inputs:
                key, cell = segment.inputs[place]
                if key in strangers:
                    raise opaque(cell.value().shape, strangers[key])

    def _state_keys(self) -> set[int]:
        tape = self._loop.tape
        states = {
            id(tensor) for state in self._loop.states() for tensor in state.values() if isinstance(tensor, Tensor)
        }
        return {
            binding.key
            for binding in tape.living()
            if binding.buffer or id(tensor := binding.ref()) in tape.trained or id(tensor) in states
        }


def _products(carried: Tangents, tangents: Tangents) -> tuple[list[Tensor], Tangents]:
    """``α Z`` of what has a tangent, and the adjoints of what has none."""
    found = [
        (coordinates(tangents[key]) @ coordinates(alpha.to(tangents[key].dtype).unsqueeze(0))[0]).double()
        for key, alpha in carried.items()
        if key in tangents
    ]
    return found, {key: alpha for key, alpha in carried.items() if key not in tangents}


def _lost(tensor: Tensor) -> CaptureError:
    return CaptureError(
        f"a tensor of shape {tuple(tensor.shape)} that was computed several steps ago, and not read since, is used "
        "again; its tangent was not kept, as it is a number or there are many such. Compute it again, use it in the "
        "step after the one that computes it, or take `metaopt.record`."
    )


def _widened(tangent: Tensor, count: int) -> Tensor:
    """With zeros for hyperparameters that appeared since."""
    if len(tangent) == count:
        return tangent
    return torch.cat([tangent, tangent.new_zeros((count - len(tangent), *tangent.shape[1:]))])
