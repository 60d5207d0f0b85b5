"""Where the examples are: which axis of an intermediate tensor is the batch.

A layer's response differs from example to example, so a rule has to know the axis of the examples in what the layer
is given: usually the first, the second in sequence-first models, a part of a flattened axis in language models. Sizes
alone can't say (a sequence may be as long as the batch is large), so the model is run twice on two and on three
examples, and the axis is the one that grew.
"""

from __future__ import annotations

__all__ = ["Layout", "NeedsGroups", "Site", "infer", "layout_of", "reordered"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A use of a parameter, or of a dropout: its name, and the function.
Site = tuple[str, str]


class NeedsGroups(Exception):
    """A parameter can't respond per example here; it takes one perturbation for each group of examples."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name = name
        self.why = why


@dataclass(frozen=True)
class Layout:
    """The batch within a tensor.

    Args:
        axis: the axis that holds the examples.
        repeat: how many entries of that axis belong to each example.
        outer: whether an example's entries are neighbours (batch-major) or one batch apart.
    """

    axis: int = 0
    repeat: int = 1
    outer: bool = True

    def fitted(self, value: Tensor, examples: int) -> Layout | str:
        """The layout in a batch of its own size, or the reason why it is none: a model may select some examples.

        Args:
            value: what a site is given.
            examples: how many there are in the batch.
        """
        size = value.shape[self.axis] if value.ndim > self.axis else 0
        if size == examples * self.repeat:
            return self
        # Sequences may be of another length than when the axes were looked for.
        if self.repeat > 1 and size and size % examples == 0:
            return replace(self, repeat=size // examples)
        return f"it is given {size} of the rows of a batch of {examples}, and which ones can't be told"

    def spread(self, values: Tensor, ndim: int, feature: int | None = None) -> Tensor:
        """Numbers of each example, in a shape that multiplies a tensor.

        Args:
            values: ``(B,)``, or ``(B, features)`` where ``feature`` names an axis.
            ndim: of the tensor.
            feature: its axis of features, if any.
        """
        if self.repeat > 1:
            sizes = [1] * values.ndim
            sizes[0] = self.repeat
            values = values.repeat_interleave(self.repeat, 0) if self.outer else values.repeat(sizes)
        if ndim == 2 and self.axis == 0 and feature in (1, -1):
            return values  # (examples, features), as they are: the common case
        if ndim == 2 and self.axis == 0 and values.ndim == 1:
            return values.unsqueeze(1)
        if feature is None:
            return values.reshape([-1 if d == self.axis else 1 for d in range(ndim)])
        feature %= ndim
        shape = [values.shape[0] if d == self.axis else values.shape[1] if d == feature else 1 for d in range(ndim)]
        return (values if self.axis < feature else values.t()).reshape(shape)


def infer(
    two: Mapping[Site, Sequence[Tensor]],
    three: Mapping[Site, Sequence[Tensor]],
    known: Mapping[Site, Layout | str] | None = None,
) -> dict[Site, Layout | str]:
    """Layouts from what each site was given in runs on examples (0, 1) and on examples (0, 1, 2).

    Args:
        two: the tensors of each use in the first run.
        three: the same in the second.
        known: what was found in evaluation, where the order of a flattened axis can be read from the values; in
            training they are random, and so may be which layers are used.

    Returns:
        A layout for each site, or the reason why it has none.
    """
    found: dict[Site, Layout | str] = dict(known or {})
    for site in dict.fromkeys([*two, *three]):
        uses = two.get(site, ()), three.get(site, ())
        layout, before = _site(*uses), found.get(site)
        flat = isinstance(layout, str) and isinstance(before, Layout) and before.repeat > 1
        dropped = len(uses[0]) != len(uses[1]) and isinstance(before, Layout)
        moved = isinstance(layout, Layout) and isinstance(before, str)
        found[site] = before if (flat or dropped or moved) and before is not None else layout
    return found


def reordered(
    found: Mapping[Site, Layout | str],
    given: Mapping[Site, Sequence[Tensor]],
    permuted: Mapping[Site, Sequence[Tensor]],
    order: Tensor,
) -> dict[Site, str]:
    """The sites that see the examples in an order of the model's own, such as by length.

    Args:
        found: the layouts.
        given: what each site was given in a run on some examples.
        permuted: the same for these examples in another order; it should be in that order too.
        order: the permutation.
    """
    why = "it sees the examples in another order than they are given in; let the model keep their order"
    return {
        site: why
        for site, layout in found.items()
        if isinstance(layout, Layout)
        and any(_moved(layout, order, a, b) for a, b in zip(given.get(site, ()), permuted.get(site, ()), strict=False))
    }


def _moved(layout: Layout, order: Tensor, given: Tensor, permuted: Tensor) -> bool:
    if given.shape != permuted.shape:
        return False
    # A number for each example: values that are random, or mixed by the model, differ in any order, and say nothing.
    fitted, rows = layout.fitted(given, len(order)), []
    if isinstance(fitted, str):
        return False
    for value in (given, permuted):
        parts = value.movedim(fitted.axis, 0)
        size = len(parts) // fitted.repeat
        whole = parts.reshape(size, -1) if fitted.outer else parts.unflatten(0, (-1, size)).movedim(1, 0)
        flat = whole.reshape(size, -1).double()
        rows.append((flat * torch.cos(torch.arange(flat.shape[1], device=flat.device))).sum(1))
    return not _same(rows[0][order.to(rows[0].device)], rows[1]) and _same(rows[0].sort().values, rows[1].sort().values)


def _site(two: Sequence[Tensor], three: Sequence[Tensor]) -> Layout | str:
    if len(two) != len(three):
        return "it is used a number of times that depends on the batch"
    found = [layout_of(a, b) for a, b in zip(two, three, strict=True)]
    known = [layout for layout in found if isinstance(layout, Layout)]
    if len(known) < len(found):
        return next(layout for layout in found if isinstance(layout, str))
    # A layer that sees windows of a picture in one use and whole pictures in another: how many entries an example has
    # can be told from the size, as for sequences of another length.
    longest = max(known, key=lambda layout: layout.repeat)
    if any(u.axis != longest.axis or (u.repeat > 1 and u.outer != longest.outer) for u in known):
        return "its uses see the examples along different axes"
    return longest


def layout_of(two: Tensor, three: Tensor) -> Layout | str:
    """The layout of a tensor from its values in runs on two and on three examples, or the reason why it has none."""
    grown = [d for d, (a, b) in enumerate(zip(two.shape, three.shape, strict=False)) if a != b]
    if two.ndim != three.ndim or len(grown) != 1:
        return "what it is applied to has no axis of examples"
    axis = grown[0]
    repeat, rest = divmod(two.shape[axis], 2)
    if rest or three.shape[axis] != 3 * repeat:
        return "the examples can't be told apart along its axis"
    if repeat == 1:
        return Layout(axis)
    a, b = two.movedim(axis, 0), three.movedim(axis, 0)
    outer = _same(a.unflatten(0, (2, repeat)), b.unflatten(0, (3, repeat))[:2])
    inner = _same(a.unflatten(0, (repeat, 2)), b.unflatten(0, (repeat, 3))[:, :2])
    if outer == inner:
        return "its flattened axis of examples has an order that could not be told"
    return Layout(axis, repeat, outer)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6)
