"""Where the examples are: which axis of an intermediate tensor is the batch.

A layer's response differs from example to example, so a rule has to know the axis of the examples in what the layer
is given: usually the first, the second in sequence-first models, a part of a flattened axis in language models. Sizes
alone can't say (a sequence may be as long as the batch is large), so the model is run twice on two and on three
examples, and the axis is the one that grew.
"""

from __future__ import annotations

__all__ = ["Layout", "NeedsGroups", "Site", "infer"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
            training they are random.

    Returns:
        A layout for each site, or the reason why it has none.
    """
    found: dict[Site, Layout | str] = {}
    for site in dict.fromkeys([*two, *three]):
        layout = _site(two.get(site, ()), three.get(site, ()))
        before = (known or {}).get(site)
        flat = isinstance(layout, str) and isinstance(before, Layout) and before.repeat > 1
        found[site] = before if flat and before is not None else layout
    return found


def _site(two: Sequence[Tensor], three: Sequence[Tensor]) -> Layout | str:
    if len(two) != len(three):
        return "it is used a number of times that depends on the batch"
    found = [_layout(a, b) for a, b in zip(two, three, strict=True)]
    first = found[0]
    if any(layout != first for layout in found):
        return "its uses see the examples along different axes"
    return first


def _layout(two: Tensor, three: Tensor) -> Layout | str:
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
