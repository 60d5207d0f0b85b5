"""Batches: how many examples there are, and parts of them."""

from __future__ import annotations

__all__ = ["Shared", "count", "join", "shared", "size_of", "split"]

from collections.abc import Sequence, Set
from itertools import count as count_up
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from metaopt.errors import ResponseError
from metaopt.stn.trees import leaves, mapped

# Arguments by their place among all, their number of axes and their type.
Shared = Set[tuple[int, int, torch.dtype]]


def count(args: Any, kwargs: Any, dim: int) -> int:
    """The number of examples in a model's arguments: the size of the first tensor along an axis.

    Raises:
        ResponseError: if no tensor has that axis, or sequences are packed already.
    """
    if args and not kwargs and all(type(a) is Tensor for a in args) and args[0].ndim > dim:
        return args[0].shape[dim]  # without the time that it takes to look into other things
    for value in pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, PackedSequence)):
        if isinstance(value, PackedSequence):
            raise ResponseError(
                "the model is called with a packed sequence, which has no axis of examples; pass the padded sequences "
                "and their lengths, and let the model pack them."
            )
    for leaf in leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.ndim > dim:
            return leaf.shape[dim]
    raise ResponseError(
        f"the model is called without a tensor that has axis {dim}, the axis of examples; pass the batch as a tensor."
    )


def shared(args: Any, kwargs: Any, dim: int, examples: int) -> Shared:
    """The arguments that all examples have in common, as a mask of attention, by place and kind."""
    found, places = set(), count_up()

    def note(leaf: Any) -> Any:
        place = next(places)
        if isinstance(leaf, Tensor) and leaf.ndim > dim and leaf.shape[dim] != examples:
            found.add((place, leaf.ndim, leaf.dtype))
        return leaf

    mapped(note, (args, kwargs))
    return found


def split(
    args: Any, kwargs: Any, part: Tensor, dim: int, examples: int, whole: Shared = frozenset()
) -> tuple[Any, Any]:
    """The arguments for some of the examples; what has no axis of examples stays whole.

    Args:
        args: the model's.
        kwargs: the same.
        part: the numbers of the examples.
        dim: their axis.
        examples: how many there are.
        whole: what is shared, though it may be as long as the batch is large.
    """
    places = count_up()

    def take(leaf: Any) -> Any:
        place = next(places)
        if isinstance(leaf, Tensor) and leaf.ndim > dim and leaf.shape[dim] == examples:
            return leaf if (place, leaf.ndim, leaf.dtype) in whole else leaf.index_select(dim, part.to(leaf.device))
        return leaf

    taken: tuple[Any, Any] = mapped(take, (args, kwargs))
    return taken


def join(outputs: Sequence[Any], dim: int) -> Any:
    """What a model returns for all examples, from what it returns for groups of them.

    Raises:
        ResponseError: if its tensors have no axis of examples, or other shapes for other groups.
    """
    return mapped(lambda *parts: _joined(parts, dim), *outputs)


def _joined(parts: tuple[Any, ...], dim: int) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    if parts[0].ndim <= dim:
        raise ResponseError(
            "the model returns a tensor without an axis of examples, which can't be put together from groups of "
            "examples; return one value for each example, or set `groups=1` in `transform`."
        )
    if len({part.shape[:dim] + part.shape[dim + 1 :] for part in parts}) > 1:
        raise ResponseError(
            "the model returns tensors of several shapes for groups of examples, which can't be put together; pad "
            "them to one length (`total_length=` of `pad_packed_sequence`), or set `groups=1` in `transform`."
        )
    return torch.cat(parts, dim)


def size_of(batch: Any, dim: int) -> int:
    """The number of examples in a batch of data: the size of the first tensor that has their axis.

    Raises:
        ResponseError: if it holds no tensor with examples.
    """
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim > dim:
            if not leaf.shape[dim]:
                raise ResponseError("a batch has no examples; leave empty batches out.")
            return leaf.shape[dim]
    raise ResponseError(
        f"a batch must hold a tensor with its examples along axis {dim}, and this one holds none; pass what the loss "
        "function needs, such as `(x, y)`."
    )
