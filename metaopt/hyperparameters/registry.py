"""Who owns a leaf, and under which name: so that a warning can name a hyperparameter."""

from __future__ import annotations

__all__ = ["enroll", "name_of", "owner_of", "strayed"]

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from metaopt.hyperparameters.module import Hyperparameters

# The owners, not their leaves: an owner always knows its present leaves, so a conversion or a load that
# replaces a leaf leaves nothing stale here, and no `id` of a freed tensor can be taken for another's.
_owners: weakref.WeakSet[Hyperparameters] = weakref.WeakSet()
_told: weakref.WeakKeyDictionary[Hyperparameters, set[str]] = weakref.WeakKeyDictionary()


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


def strayed(leaf: Tensor) -> str | None:
    """The name and the set of a leaf that should be kept in one by projection and is not, the first time; or None.

    Args:
        leaf: any tensor, compared by identity.
    """
    found = _find(leaf)
    if found is None:
        return None
    owner, name = found
    domain, told = owner.domains[name], _told.setdefault(owner, set())
    if not domain.projected or name in told:
        return None
    with torch._C.DisableTorchFunction(), torch.no_grad():
        # What is not finite has other errors of its own.
        inside = torch.equal(domain.project(leaf), leaf) or not bool(leaf.isfinite().all())
    if inside:
        return None
    told.add(name)
    return f"{name}, {domain},"


def _find(tensor: Tensor) -> tuple[Hyperparameters, str] | None:
    for owner in tuple(_owners):
        for name, leaf in owner.named_parameters():
            if leaf is tensor:
                return owner, name
    return None
