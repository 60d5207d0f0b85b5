"""What an objective that was computed outside of the context was made of inside: losses of a log, outputs of the model.

Their graphs end at the weights, which have moved since. Where torch does not look (a linear layer keeps no copy of its
weight), its gradient is that of the old values as if they were computed by the last weights.
"""

from __future__ import annotations

__all__ = ["computed_inside"]

from typing import Any

from torch import Tensor

from metaopt.capture.bindings import Binding
from metaopt.errors import SweepError
from metaopt.step import Loop


def computed_inside(outer: Tensor, loop: Loop) -> list[tuple[Binding, Tensor]]:
    """The tensors through which an objective's graph enters what the loop computed; none, if the weights rest since.

    Raises:
        SweepError: if the graph reaches leaves in other ways too.
    """
    made = _made(loop)
    found: list[tuple[Binding, Tensor]] = []
    besides = False
    seen: set[Any] = set()
    stack: list[tuple[Any, int]] = [(outer.grad_fn, 0)] if made else []
    while stack:
        edge = stack.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        if edge in made:
            found.append(made[edge])
            continue
        besides |= hasattr(edge[0], "variable")
        stack += edge[0].next_functions
    if not _are_stale([binding for binding, _ in found], loop):
        return []  # their graph ends at the weights as they are
    if besides:
        shapes = ", ".join(str(tuple(tensor.shape)) for _, tensor in found[:4])
        raise SweepError(
            f"the outer objective was computed outside of the context, from the model and from {len(found)} tensors "
            f"that the loop had computed before its last step (losses of a log, say; shapes {shapes}). Their graph "
            "ends at weights that have moved since. Give the parts as a list, `run.backward([first, second])`, for "
            "their sum, or compute the objective inside the context, or pass a function."
        )
    return found


def _made(loop: Loop) -> dict[tuple[Any, int], tuple[Binding, Tensor]]:
    """What the loop computed of its weights, by its place in a graph."""
    return {
        (tensor.grad_fn, tensor.output_nr): (binding, tensor)
        for binding in loop.tape.bindings()
        if (tensor := binding.ref()) is not None
        and tensor.grad_fn is not None
        and binding.inner
        and (binding.base is None or binding.root.ref() is None)
    }


def _are_stale(bindings: list[Binding], loop: Loop) -> bool:
    """Whether one of these is from before the weights moved for the last time."""
    weights = [b for weight in loop.weights() if (b := loop.tape.find(weight)) is not None]
    moved = any(b.fresh and b.epoch > loop.stepped_at for b in weights)  # by hand, after the last step
    return any(moved or not b.fresh or b.epoch <= loop.stepped_at for b in bindings)
