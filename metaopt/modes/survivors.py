"""Tensors besides the state that outlive the iterations which forward mode keeps: the best weights so far, old targets.

Their tangents are had from the iteration that computed them, as long as that is at hand. What a loop may come back to
much later gets its tangent when that iteration is dropped, if it can be had at a price that does not grow with the
training: a log that nobody reads is no reason to carry more than the state.
"""

from __future__ import annotations

__all__ = ["moves", "worth_keeping"]

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from metaopt.capture.segment import Segment


def moves(segment: Segment, key: int, tangents: Collection[int]) -> bool:
    """Whether an output of an iteration may depend on a hyperparameter, by what it reads.

    Args:
        segment: the iteration.
        key: the output.
        tangents: the keys of what had a tangent before it.
    """
    part = segment.program.function((segment.outputs[key],))
    return bool(part.externals) or any(segment.inputs[place][0] in tangents for place in part.inputs)


def worth_keeping(
    segment: Segment,
    survivors: Mapping[int, Tensor | None],
    opaque: Collection[int],
    room: int,
    gradients: Collection[int],
) -> list[int]:
    """Those of an iteration's outputs whose tangents are to be had before the iteration is dropped.

    Copies and averages of weights are: what is made of tensors of its own shape, or of its own size together; and the
    weights' gradients, which a late step may use (one network steps less often than it gets gradients). Others
    (targets, the records of a rollout) are while there is room, and scalars are not: they are logs of losses, each of
    which would take another pass through the model.

    Args:
        segment: the iteration.
        survivors: the outputs that are alive, by key.
        opaque: the keys of what came about out of sight.
        room: how many entries there is room for.
        gradients: the keys of the weights' gradients.
    """
    chosen = []
    for key, tensor in survivors.items():
        part = segment.program.function((segment.outputs[key],))
        read = [segment.inputs[place] for place in part.inputs]
        if any(source in opaque for source, _ in read):
            continue
        shapes = [cell.tensor.shape for _, cell in read]
        hypers = [segment.externals[place].tensor.numel() for place in part.externals]
        # Memory that lives on in a tensor made out of sight (a copied `Parameter`) has the size of what it copies.
        shape = tensor.shape if tensor is not None else shapes[0] if shapes else torch.Size()
        size = shape.numel()
        same = all(other == shape for other in shapes) or sum(other.numel() for other in shapes) == size
        if key in gradients or (same and max(hypers, default=0) <= size) or (shape and size <= room):
            chosen.append(key)
            room -= size
    return chosen
