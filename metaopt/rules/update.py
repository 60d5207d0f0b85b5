"""A rule applied to the tensors of a param group, the small ones together."""

from __future__ import annotations

__all__ = ["Update"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.rules.rule import Rule, Setting

# Below this many elements a call costs more than the memory that it goes through.
_SMALL = {"cpu": 2**14}
_SMALL_ELSEWHERE = 2**18

_States = Sequence[Tensor | None]


class Update:
    """A rule with its flags, applied to the tensors of one param group."""

    def __init__(self, rule: Rule, flags: tuple[tuple[str, Any], ...]) -> None:
        self.rule = rule
        self.flags = flags
        self.surrogate = rule.surrogate
        self.__name__ = f"{rule.optimizer.__name__.lower()}_update"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Update) and self.rule is other.rule and self.flags == other.flags

    def __hash__(self) -> int:
        return hash((id(self.rule), self.flags))

    def __call__(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[_States],
        steps: Sequence[int],
        **settings: Setting,
    ) -> list[Tensor]:
        """The new weights and states, tensor by tensor: ``[w1', *state1', w2', *state2', …]``."""
        results: list[list[Tensor]] = [[] for _ in weights]
        for places in self._together(weights, grads, states, steps):
            if len(places) == 1:
                (place,) = places
                results[place] = self._one(weights[place], grads[place], states[place], steps[place], settings)
            else:
                found = self._joined(
                    [weights[place] for place in places],
                    [grads[place] for place in places],
                    [states[place] for place in places],
                    steps[places[0]],
                    settings,
                )
                for place, values in zip(places, found, strict=True):
                    results[place] = values
        return [value for found in results for value in found]

    def _together(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[_States], steps: Sequence[int]
    ) -> list[list[int]]:
        """The places of the tensors that are updated by one call each."""
        calls: dict[Any, list[int]] = {}
        for place, (w, g, state, step) in enumerate(zip(weights, grads, states, steps, strict=True)):
            kind: Any = place
            if self.rule.elementwise and w.numel() <= _SMALL.get(w.device.type, _SMALL_ELSEWHERE):
                kinds = tuple(None if s is None else s.dtype for s in state)
                kind = (step, w.dtype, g.dtype, w.device, kinds) if w.shape == g.shape else place
            calls.setdefault(kind, []).append(place)
        return list(calls.values())

    def _one(self, w: Tensor, g: Tensor, state: _States, step: int, settings: dict[str, Setting]) -> list[Tensor]:
        named = dict(zip(self.rule.state, state, strict=True))
        # Beside a weight without a dimension, a setting's precision would win over the weight's.
        shaped = [name for name in named if name not in self.rule.scalars] if w.dim() == 0 else []
        named |= {name: s.reshape(1) for name in shaped if (s := named[name]) is not None}
        x, y = (w.reshape(1), g.reshape(1)) if w.dim() == 0 else (w, g)
        new, after = self.rule.update(x, y, named, step, **settings, **dict(self.flags))
        after |= {name: s.reshape(w.shape) for name in shaped if (s := after.get(name)) is not None}
        kept = [value for name in self.rule.state if (value := after.get(name)) is not None]
        return [new.reshape(w.shape), *kept]

    def _joined(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[_States],
        step: int,
        settings: dict[str, Setting],
    ) -> list[list[Tensor]]:
        """One call for all of them, laid end to end: a hundred small tensors cost as much as one."""
        shapes = [w.shape for w in weights]
        state = [None if column[0] is None else _end_to_end(column) for column in zip(*states, strict=True)]
        found = self._one(_end_to_end(weights), _end_to_end(grads), state, step, settings)
        sizes = [w.numel() for w in weights]
        columns = [whole.split(sizes) for whole in found]
        return [[part.view(shape) for part in parts] for shape, *parts in zip(shapes, *columns, strict=True)]


def _end_to_end(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors if tensor is not None])
