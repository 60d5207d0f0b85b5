"""Writes that the loop makes to hyperparameters: steps of theirs, and projections by hand.

A leaf that is written with what depends on weights, or on other hyperparameters, is state from there on. One that is
written with constants, or with what it held itself, has moved.
"""

from __future__ import annotations

__all__ = ["is_one", "moved_by_themselves", "renew"]

from collections.abc import Sequence

from torch import Tensor

from metaopt.capture.primitives import stop
from metaopt.capture.tape import Tape
from metaopt.capture.trace import Val


def is_one(tape: Tape, written: list[Tensor], sources: list[Tensor]) -> bool:
    """Whether this is a step of a hyperparameter (its owner says so, or nothing but constants go in) and no state."""
    if not all(tape.find(t) is None and t.requires_grad and t.is_leaf and tape.alias(t) is None for t in written):
        return False
    if all(tape.protected(target) for target in written):
        return True
    return not any(tape.is_live(s) for s in sources if not any(s is t for t in written))


def moved_by_themselves(tape: Tape, written: list[Tensor], sources: list[Tensor]) -> list[Tensor]:
    """The leaves that are written, by themselves or as ``.data``, if what goes in depends on nothing else.

    Such a write is a projection, or a step by hand: ``w.data.clamp_(0, 1)``, ``w.copy_((w - c).relu())``.
    """
    leaves = [_hyperparameter(tape, target) for target in written]
    found = [leaf for leaf in leaves if leaf is not None]
    if len(found) == len(leaves) and all(_is_of(tape, source, found) for source in sources):
        return found
    return []


def renew(tape: Tape, leaf: Tensor, written: Tensor) -> None:
    """A hyperparameter moved, through this tensor: from here on it is another one."""
    external = tape.externals.get(id(leaf))
    if external is not None:
        external.version = -1  # writes through `.data` leave no trace in the version
    if written is not leaf:
        (number,) = tape.trace.emit(stop, tape.read(leaf), phased=True)
        tape.define(written, number)


def _hyperparameter(tape: Tape, tensor: Tensor) -> Tensor | None:
    """The leaf that is a hyperparameter so far and that a tensor is, or is the ``.data`` of."""
    leaf = tensor if tensor.requires_grad else tape.externals.behind(tensor)
    if leaf is None or tape.find(leaf) is not None or not leaf.is_leaf or tape.alias(leaf) is not None:
        return None
    return leaf


def _is_of(tape: Tape, tensor: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether a value depends on these hyperparameters alone, or on nothing that is followed."""
    binding = tape.find(tensor)
    if binding is None:
        return not tape.is_live(tensor) or any(tensor is leaf for leaf in leaves)
    if binding.epoch != tape.epoch or tape.iteration.is_of_state(binding.value):
        return False
    own = {external.value for leaf in leaves if (external := tape.externals.get(id(leaf))) is not None}
    return own.issuperset(tape.trace.behind(Val(binding.value)).intersection(tape.trace.externals))
