"""What is watched: the optimizers of a loop, and the weights that they train."""

from __future__ import annotations

__all__ = ["WatchedWeights", "listed", "weights_of"]

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from metaopt.capture.cells import version_of
from metaopt.capture.tape import Tape
from metaopt.errors import CaptureError, RuleError


def listed(optimizers: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers to watch, as a list."""
    found: list[Any] = list(optimizers) if isinstance(optimizers, list | tuple) else [optimizers]
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise RuleError(
                f"a training is told by its optimizer, a torch.optim.Optimizer, and this is {optimizer!r:.60}. Give "
                "the object that the loop calls `step()` of, or a list of these."
            )
    if not found:
        raise RuleError("the list of optimizers to watch is empty. Give those that the loop steps.")
    if len({id(optimizer) for optimizer in found}) < len(found):
        raise RuleError(
            "the list of optimizers to watch names one of them twice. Give each whose `step()` the loop calls once, in "
            "the order in which they step."
        )
    return found


def weights_of(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """Every weight of the optimizers, in their order; what two of them train comes once."""
    found: list[Tensor] = []
    for optimizer in optimizers:
        known = {id(weight) for weight in found}
        found += [w for group in optimizer.param_groups for w in group["params"] if id(w) not in known]
    return found


class WatchedWeights:
    """The weights that the optimizers train, of which none may be exchanged.

    Attributes:
        trainable: the identities of those that required grad when they came.
        added: the identities of those that the optimizers got since.
    """

    def __init__(self, optimizers: Sequence[Optimizer], tape: Tape) -> None:
        self.optimizers = optimizers
        self.tape = tape
        self.trainable: set[int] = set()
        self.added: set[int] = set()
        self._known = 0
        self._received: set[int] = set()
        self._sums: list[Tensor] = []

    def weights(self) -> list[Tensor]:
        """Every weight, in the optimizers' order."""
        return weights_of(self.optimizers)

    def begin(self) -> None:
        """The context begins; raise `CaptureError` if a weight can't be followed."""
        self._refuse_shared_memory()
        for weight in self.weights():
            _check(weight)
        self.trainable = {id(weight) for weight in self.weights() if weight.requires_grad}
        self.tape.arrivals.note_present(self.weights())

    def grow(self) -> None:
        """The optimizers may have got weights; raise `CaptureError` if one can't be followed from here on."""
        tape = self.tape
        for weight in [weight for weight in self.weights() if not tape.is_trained(weight)]:
            _check(weight)
            external = tape.externals.get(id(weight))
            if external is not None and (external.epoch == tape.epoch or external.moving):
                raise CaptureError(
                    f"a parameter of shape {tuple(weight.shape)} was added to the optimizer, and taken for a "
                    "hyperparameter so far: it required grad, and nobody trained it. Freeze parameters until they are "
                    "added (`requires_grad_(False)`), and add them between two steps."
                )
            if tape.find(weight) is None and tape.alias(weight) is None:  # it may be a copy of what is followed
                tape.refuse_hidden(weight)
            tape.train(weight)
            tape.arrivals.note_present([weight])
            self.added.add(id(weight))
            self.trainable |= {id(weight)} if weight.requires_grad else set()
        self._refuse_shared_memory()

    def end(self) -> None:
        """The context has ended."""
        self._sums = [weight.detach().sum() for weight in self.weights()]

    def changed_since(self) -> Tensor | None:
        """A weight that was changed since the context ended, if there is one."""
        for weight, total in zip(self.weights(), self._sums, strict=False):
            binding = self.tape.find(weight)
            written = binding is not None and version_of(weight) != binding.version
            # Writes through `.data` leave no trace in the version.
            if written or not torch.allclose(weight.detach().sum(), total, rtol=0, atol=0, equal_nan=True):
                return weight
        return None

    def check(self) -> None:
        """Raise `CaptureError` if the optimizer has other weights now, or the model has."""
        self.tape.memory.refuse_written()
        weights = self.weights()
        self._refuse_other_weights(weights)
        self._refuse_replaced(weights)

    def _refuse_shared_memory(self) -> None:
        # Each would be followed by itself.
        found = (place for weight in self.weights() if (place := _place(weight)) is not None)
        places = sorted(found, key=lambda place: place[:2])
        for (_, end, one), (start, _, other) in itertools.pairwise(places):
            if start < end and one is other:
                raise CaptureError(
                    f"a weight of shape {tuple(one.shape)} is in the groups of the watched optimizers twice, so that "
                    "it is stepped twice. Give each weight to one optimizer, in one group, once."
                )
            if start < end:
                raise CaptureError(
                    f"two weights of the optimizer, of shapes {tuple(one.shape)} and {tuple(other.shape)}, share "
                    "memory, so that its step writes one place twice. Tie weights by giving the modules one Parameter "
                    "(`decoder.weight = encoder.weight`), and give that to the optimizer once."
                )

    def _refuse_other_weights(self, weights: list[Tensor]) -> None:
        if set(map(id, weights)) != self.tape.trained.keys():
            raise CaptureError(
                "parameters were added to or removed from the optimizer's groups inside the context. Add some by "
                "`optimizer.add_param_group`, and freeze (`requires_grad_(False)`) those that are to rest."
            )

    def _refuse_replaced(self, weights: list[Tensor]) -> None:
        # A parameter that was replaced in the model looks like a new hyperparameter, while the old one, which the
        # optimizer still holds, gets no gradient any more.
        known, self._known = self._known, len(self.tape.externals)
        trained, self._received = self._received, {id(weight) for weight in weights if weight.grad is not None}
        if trained <= self._received:
            return
        lost = [weight for weight in weights if id(weight) in trained - self._received]
        new = [external.tensor for external in list(self.tape.externals.values())[known:]]
        made = [b.ref() for b in self.tape.bindings() if b.leaf]
        # A copy that the loop trains itself takes nobody's place.
        new += [leaf for leaf in made if leaf is not None and not self.tape.is_moved(leaf)]
        shapes = {tensor.shape for tensor in new if isinstance(tensor, torch.nn.Parameter)}
        replaced = [weight for weight in lost if weight.shape in shapes]
        if replaced:
            raise CaptureError(
                f"a parameter of shape {tuple(replaced[0].shape)} was replaced inside the context: the optimizer "
                "still holds the old one, which gets no gradient any more, and the new one is not trained. Change "
                "the values in place, `with torch.no_grad(): parameter.copy_(new)`."
            )


def _check(weight: Tensor) -> None:
    if weight.is_meta:
        raise CaptureError(
            f"a weight of shape {tuple(weight.shape)} is on the meta device, and has no values. "
            "Build the model on a real device, or fill it (`model.to_empty(device=...)`, initialise) before "
            "the optimizer is built: filling exchanges the parameters, and the optimizer keeps the old."
        )
    if weight.is_complex():
        raise CaptureError("complex weights are not supported; train their real and imaginary parts.")
    if getattr(weight, "_post_accumulate_grad_hooks", None):
        raise CaptureError(
            "a weight has a post-accumulate-grad hook, which runs code inside `backward` that metaopt does "
            "not see. Remove the hook and do the same in the loop, after `loss.backward()`."
        )


def _place(weight: Tensor) -> tuple[int, int, Tensor] | None:
    """Where a trained weight lies in memory, if all that lies there is its own."""
    if not weight.requires_grad or not weight.numel() or weight.layout is not torch.strided:
        return None
    if not torch.ops.aten.is_non_overlapping_and_dense(weight):
        return None  # rows of a larger matrix, say, between which there is something else
    start = weight.data_ptr()
    return (start, start + weight.nbytes, weight) if start else None
