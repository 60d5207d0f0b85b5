"""Steps along gradients that are clipped, and left out where they are not finite."""

from __future__ import annotations

__all__ = ["Descent", "moving"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metaopt.errors import SkippedStepWarning, warn
from metaopt.stn.guards import differentiate, unrepeated


class Descent:
    """Moves parameters down a loss.

    Args:
        clip: the largest norm of the gradients that an optimizer gets, or None.
        modules: those of the model that respond; a backward may not call them.

    Attributes:
        skipped: how many steps were left out.
    """

    def __init__(self, clip: float | None, modules: Sequence[nn.Module]) -> None:
        self.clip, self.modules = clip, modules
        self.skipped = 0

    def step(self, what: str, loss: Tensor, *moves: tuple[Sequence[Tensor], Optimizer | None]) -> bool:
        """A step of each optimizer, unless the loss or a gradient is not finite.

        Args:
            what: what is moved, in words.
            loss: what is differentiated.
            moves: parameters, and what moves them (None: they are given their gradient).

        Returns:
            Whether it was taken.
        """
        everything = [parameter for parameters, _ in moves for parameter in parameters]
        for parameter in everything:
            parameter.grad = None
        with unrepeated(self.modules):
            differentiate(loss, everything)
        if not _finite(loss, [parameter.grad for parameter in everything]):
            self.skipped += 1
            for parameter in everything:
                parameter.grad = None
            warn(
                f"a step of the {what} was left out: its loss or gradient is not finite. Lower the learning rates, set "
                "`clip`, or bound the hyperparameters (a dropout rate by `interval(p, 0, 0.95)`).",
                SkippedStepWarning,
            )
            return False
        for parameters, optimizer in moves:
            if optimizer is not None:
                if self.clip is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, self.clip)
                optimizer.step()
        return True


def moving(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Those that are tuned. One that was frozen is a constant, and an optimizer would step by the gradient it had."""
    for leaf in leaves:
        if not leaf.requires_grad:
            leaf.grad = None
    return [leaf for leaf in leaves if leaf.requires_grad]


def _finite(loss: Tensor, gradients: Sequence[Tensor | None]) -> bool:
    # A sum is finite if its terms are; in half precision, unless it overflows.
    found = [loss.detach(), *(g for g in gradients if g is not None)]
    sums = [t.sum(dtype=torch.float) if t.dtype is torch.half else t.sum() for t in found]
    # A device is waited for once, not once a tensor.
    numbers = [s.item() for s in sums] if loss.is_cpu else [torch.stack(sums).sum().item()]
    return all(map(math.isfinite, numbers))
