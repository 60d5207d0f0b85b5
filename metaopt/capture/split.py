"""A program cut where the loop takes its gradients: the losses before, the update after.

Between the two stands ``g = ∇_w L(w, λ)``. Because the Hessian of ``L`` is symmetric, the tangent of ``g`` is one
reverse pass over the gradient's own graph: ``dg = ∇_w ⟨∇_(w,λ) L, (dw, dλ)⟩``.
"""

from __future__ import annotations

__all__ = ["Gradient", "Split", "split"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metaopt.capture.lowering import Function, lower
from metaopt.capture.primitives import inner_gradient
from metaopt.capture.trace import needed

if TYPE_CHECKING:
    from metaopt.capture.program import Program


@dataclass(frozen=True, slots=True)
class Gradient:
    """One gradient of the loop: where its losses and its weights are among what ``before`` computes."""

    losses: slice
    weights: slice


@dataclass(frozen=True, slots=True)
class Split:
    """``before`` computes losses and the weights' aliases; ``after`` is given the gradients."""

    before: Function
    gradients: tuple[Gradient, ...]
    after: Function


def split(program: Program, wanted: Sequence[int]) -> Split | None:
    """Cut a program at its gradients, or return None where that would lose something.

    It would where a gradient enters the loss of another, is weighted, or where something in the forward pass acts on
    the loop's own backward pass only (``detach``, a hook, a surrogate): then ``g`` is not the gradient of the function
    that autograd sees.
    """
    code = program.code
    steps = [code[index] for index in needed(code, set(wanted)) if code[index].func is inner_gradient]
    if not steps:
        return None
    asked: list[int] = []
    given: list[int] = []
    gradients: list[Gradient] = []
    for step in steps:
        outputs, weighting, inputs, *rest = step.args
        if weighting is not None or any(rest):
            return None
        losses = [loss.index for loss in outputs.items]
        received = [(at.index, out) for at, out in zip(inputs.items, step.outs, strict=True) if out is not None]
        first, second = len(asked), len(asked) + len(losses)
        gradients.append(Gradient(slice(first, second), slice(second, second + len(received))))
        asked += [*losses, *(at for at, _ in received)]
        given += [out for _, out in received]
    if any(code[index].phased for index in needed(code, set(asked))):
        return None
    return Split(lower(program, asked, leaves=True), tuple(gradients), lower(program, wanted, given))
