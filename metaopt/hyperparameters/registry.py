"""Who owns a leaf, and under which name: so that a warning can name a hyperparameter."""

from __future__ import annotations

__all__ = ["enroll", "name_of", "owner_of"]

import weakref
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from metaopt.hyperparameters.module import Hyperparameters

# The owners, not their leaves: an owner always knows its present leaves, so a conversion or a load that
# replaces a leaf leaves nothing stale here, and no `id` of a freed tensor can be taken for another's.
_owners: weakref.WeakSet[Hyperparameters] = weakref.WeakSet()


def enroll(owner: Hyperparameters) -> None:
    """Let the leaves of ``owner`` be found, for as long as it lives."""
    _owners.add(owner)


def owner_of(leaf: Tensor) -> Hyperparameters | None:
    """The living ``Hyperparameters`` that holds this very tensor as a leaf, or None.

    Args:
        leaf: any tensor, compared by identity.
    """
    found = _find(leaf)
    return None if found is None else found[0]


def name_of(tensor: Tensor) -> str | None:
    """The name under which a living ``Hyperparameters`` holds this very tensor as a leaf, or None.

    Args:
        tensor: any tensor, compared by identity.
    """
    found = _find(tensor)
    return None if found is None else found[1]


def _find(tensor: Tensor) -> tuple[Hyperparameters, str] | None:
    for owner in tuple(_owners):
        for name, leaf in owner.named_parameters():
            if leaf is tensor:
                return owner, name
    return None
