"""One step of REVERSE-HG: from the adjoint of what an iteration leaves behind to that of what it began with.

``α_{t-1} = α_t A_t`` and ``α_t B_t``, in one reverse pass through ``Φ_t``, as autograd finds it or compiled.
"""

from __future__ import annotations

__all__ = ["PullBack", "Pulled", "gradients", "places_of"]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.capture.lowering import Function
from metaopt.capture.segment import Segment
from metaopt.capture.verify import check_replay
from metaopt.modes.passes import reverse_pass


@dataclass(slots=True)
class Pulled:
    """The adjoint of what an iteration began with, by key, and what the hyperparameters get, by identity."""

    carried: dict[int, Tensor]
    external: dict[int, Tensor]

    @classmethod
    def of(cls, segment: Segment, part: Function, grads: Sequence[Tensor | None]) -> Pulled:
        """From the gradients with respect to what a part of the iteration reads, in its order."""
        keys = [segment.inputs[place][0] for place in part.inputs]
        carried = {key: g for key, g in zip(keys, grads, strict=False) if g is not None}
        pulled = cls(carried, {})
        for place, g in zip(part.externals, grads[len(keys) :], strict=False):
            pulled.add(segment.externals[place].tensor, g)
        return pulled

    def add(self, hyper: Tensor, grad: Tensor | None) -> None:
        """Add to what a hyperparameter gets."""
        if grad is not None:
            known = self.external.get(id(hyper))
            self.external[id(hyper)] = grad if known is None else known + grad


class PullBack:
    """Pulls adjoints back through iterations, by autograd.

    Args:
        wanted: the identities of the hyperparameters that are asked for; None for all.
        batched: whether the adjoints have a leading dimension.
        exact: whether the states are those of the loop, and not computed again from others, which in low precision
            drifts away from them.
    """

    def __init__(self, *, wanted: set[int] | None = None, batched: bool = False, exact: bool = True) -> None:
        self._wanted = wanted
        self._batched = batched
        self._exact = exact

    def __call__(self, segment: Segment, alpha: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> Pulled:
        """The adjoint before an iteration.

        Args:
            segment: the iteration.
            alpha: the adjoint of its outputs, by key.
            after: what it left behind, as far as that is at hand, by key.
        """
        grads = self.gradients(segment, alpha, after)
        return Pulled.of(segment, segment.program.function(places_of(segment, alpha)), grads)

    def gradients(
        self, segment: Segment, alpha: Mapping[int, Tensor], after: Mapping[int, Tensor]
    ) -> list[Tensor | None]:
        """The gradients with respect to what the iteration reads, in its order."""
        replay = segment.replay(list(alpha))
        check_replay(segment, dict(zip(alpha, replay.outputs, strict=True)), after, exact=self._exact)
        hypers = [x if self.asks(external.tensor) else None for external, x in replay.externals]
        variables = [*replay.inputs.values(), *hypers]
        return gradients(replay.outputs, variables, list(alpha.values()), batched=self._batched)

    def by_autograd(self) -> PullBack:
        """The same by autograd, for which what has no adjoint has none: zeros times infinity are not a number."""
        return PullBack(wanted=self._wanted, batched=self._batched, exact=self._exact)

    def asks(self, hyper: Tensor) -> bool:
        """Whether the sweep is for this hyperparameter."""
        return self._wanted is None or id(hyper) in self._wanted


def places_of(segment: Segment, keys: Iterable[int]) -> tuple[int, ...]:
    """The places of these outputs in the iteration's program."""
    return tuple(segment.outputs[key] for key in keys)


def gradients(
    outputs: Sequence[Tensor], variables: Sequence[Tensor | None], alpha: Sequence[Tensor], *, batched: bool = False
) -> list[Tensor | None]:
    """``α`` times the Jacobian; None for a variable that does not take part."""
    pairs = [(output, a) for output, a in zip(outputs, alpha, strict=True) if output.requires_grad]
    targets = [x for x in variables if x is not None and x.requires_grad]
    if not pairs or not targets:
        return [None] * len(variables)
    given = [output for output, _ in pairs], targets, [a for _, a in pairs]
    found = reverse_pass(*given, retain=False) if batched else torch.autograd.grad(*given, allow_unused=True)
    grads = iter(found)
    return [next(grads) if x is not None and x.requires_grad else None for x in variables]
