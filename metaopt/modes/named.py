"""Hyperparameters as a user names them: tensors, modules that hold them, or several of either."""

from __future__ import annotations

__all__ = ["Named", "leaves_of_named", "tensors_of"]

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from torch import Tensor, nn

from metaopt.capture.bindings import leaves_of
from metaopt.errors import SweepError

Named: TypeAlias = Tensor | nn.Module | Iterable[Tensor | nn.Module]


def tensors_of(named: Named, argument: str) -> list[Tensor]:
    """What is named, as a list; a module (`metaopt.Hyperparameters`) stands for its parameters that require grad.

    Args:
        named: what was given.
        argument: which argument it was, for the error.

    Raises:
        SweepError: if there is anything but tensors and modules.
    """
    several = isinstance(named, Iterable) and not isinstance(named, (Tensor, nn.Module, str, Mapping))
    found: list[Tensor] = []
    for entry in named if several else [named]:  # type: ignore[union-attr]
        if isinstance(entry, nn.Module):
            found += [parameter for parameter in entry.parameters() if parameter.requires_grad]
        elif isinstance(entry, Tensor):
            found.append(entry)
        else:
            raise SweepError(
                f"`{argument}` must be a hyperparameter or several, which are tensors, and has a "
                f"{type(entry).__name__}. Give `hyper.lr` for one by name, `hyper` or `list(hyper.parameters())` for "
                "all of them."
            )
    return found


def leaves_of_named(named: Named, argument: str) -> list[Tensor]:
    """The leaves behind what is named.

    Args:
        named: as for `tensors_of`.
        argument: likewise.

    Raises:
        SweepError: likewise; or if nothing is named, or a tensor that depends on no leaf that requires grad.
    """
    tensors = tensors_of(named, argument)
    for tensor in tensors:
        if not tensor.requires_grad:
            raise SweepError(
                f"`{argument}` names a tensor of shape {tuple(tensor.shape)} that does not require grad, so that it "
                "can't be a hyperparameter. Name the tensor that the loop uses, after `requires_grad_()`."
            )
    found = {id(leaf): leaf for tensor in tensors for leaf in leaves_of(tensor)}
    if not found:
        raise SweepError(
            f"`{argument}` names no hyperparameter. Leave it out, and all that the loop uses are found, or give "
            "tensors that require grad."
        )
    return list(found.values())
