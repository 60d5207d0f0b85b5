"""The layout of ``Z``: which directions of the hyperparameters its columns are tangents along."""

from __future__ import annotations

__all__ = ["Columns", "Directions", "coordinates"]

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from metaopt.capture.bindings import leaves_of
from metaopt.capture.segment import Segment
from metaopt.errors import StaleError
from metaopt.modes.passes import reverse_pass

_runs = count(1)


class Columns:
    """A column for each entry of each hyperparameter, two for a complex one."""

    def __init__(self) -> None:
        self.count = 0
        self._places: dict[int, tuple[Tensor, int]] = {}
        self._shapes: dict[int, torch.Size] = {}

    def discover(self, leaves: Iterable[Tensor]) -> None:
        """Give columns to those of these leaves that have none yet.

        Raises:
            StaleError: if one that has columns has another shape now.
        """
        for leaf in leaves:
            if id(leaf) not in self._shapes:
                self._shapes[id(leaf)] = leaf.shape
                self._add(leaf)
            elif self._shapes[id(leaf)] != leaf.shape:
                raise StaleError(
                    f"a hyperparameter of shape {tuple(self._shapes[id(leaf)])} has the shape {tuple(leaf.shape)} "
                    "now, so its tangents no longer belong to its entries. Change its values and not its shape, or "
                    "open a new context for a new hyperparameter."
                )

    def _add(self, leaf: Tensor) -> None:
        self._places[id(leaf)] = (leaf, self.count)
        self.count += _size(leaf)

    def _known(self, external: Tensor) -> list[Tensor]:
        """The leaves behind a tensor, without those that were not to be discovered: they are constants."""
        return [leaf for leaf in leaves_of(external) if id(leaf) in self._shapes]

    def tangent(self, external: Tensor, rows: slice) -> Tensor:
        """``d external / dλ`` along some columns: the identity for a leaf, else the transform's derivative."""
        whole = external.new_zeros((self.count, *external.shape))
        for leaf in self._known(external):
            _, start = self._places[id(leaf)]
            derivative = _derivative(external, leaf)
            whole[start : start + len(derivative)] = derivative
        return whole[rows]

    def moving(self, segment: Segment, tangents: Mapping[int, Tensor]) -> tuple[bool, ...]:
        """Which of the values that an iteration reads have a tangent: of the state, then of the hyperparameters."""
        carried = [key in tangents for key, _ in segment.inputs]
        return (*carried, *(bool(self._known(external.tensor)) for external in segment.externals))

    def gradients(self, along: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The gradient of each leaf, from the derivatives along all columns."""
        return [
            (leaf, _tensors(along[start : start + _size(leaf)].unsqueeze(0), leaf)[0])
            for leaf, start in self._places.values()
        ]

    def renew(self) -> None:
        """Nothing to draw anew."""

    def leaves(self) -> list[Tensor]:
        """The hyperparameters, in the order of their columns."""
        return [leaf for leaf, _ in self._places.values()]

    def state(self) -> dict[str, Any]:
        """What, besides the hyperparameters, the columns depend on."""
        return {}

    def restore(self, leaves: Sequence[Tensor], state: dict[str, Any]) -> None:
        """Give the columns to these hyperparameters."""
        self._shapes = {id(leaf): leaf.shape for leaf in leaves}
        self._places, self.count = {}, 0
        for leaf in leaves:
            Columns._add(self, leaf)


class Directions(Columns):
    """Columns along random directions ``v`` with independent entries ±1, over all hyperparameters together.

    ``(dE/dλ · v) v`` is an unbiased estimate of ``dE/dλ``, since ``E[v vᵀ] = I``; k of them are averaged.
    """

    def __init__(self, count: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.count = count
        # Not torch's default generator: the loop's own draws must stay what they are. Each run gets another seed.
        self._generator = generator or torch.Generator().manual_seed(torch.initial_seed() + next(_runs))
        self._drawn: dict[int, tuple[Tensor, Tensor]] = {}

    def _add(self, leaf: Tensor) -> None:
        self._drawn[id(leaf)] = (leaf, self._draw(leaf))

    def _draw(self, leaf: Tensor) -> Tensor:
        shape = (self.count, _size(leaf))
        bits = torch.randint(0, 2, shape, generator=self._generator, device=self._generator.device)
        return _tensors(bits.to(leaf.device) * 2 - 1, leaf)

    def tangent(self, external: Tensor, rows: slice) -> Tensor:
        """``(d external / dλ) v`` for some of the directions."""
        whole = external.new_zeros((self.count, *external.shape))
        for leaf in self._known(external):
            _, drawn = self._drawn[id(leaf)]
            if external is leaf:
                return drawn[rows]
            derivative = coordinates(_derivative(external, leaf))
            whole += _tensors(coordinates(drawn).to(derivative.dtype) @ derivative, external)
        return whole[rows]

    def gradients(self, along: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The estimate for each leaf, ``1/k Σ_j (dE/dλ · v_j) v_j``."""
        return [
            (leaf, torch.tensordot(along.to(drawn.dtype), drawn, 1) / self.count)
            for leaf, drawn in self._drawn.values()
        ]

    def renew(self) -> None:
        """Draw new directions."""
        self._drawn = {key: (leaf, self._draw(leaf)) for key, (leaf, _) in self._drawn.items()}

    def leaves(self) -> list[Tensor]:
        return [leaf for leaf, _ in self._drawn.values()]

    def state(self) -> dict[str, Any]:
        return {"drawn": [drawn.clone() for _, drawn in self._drawn.values()], "generator": self._generator.get_state()}

    def restore(self, leaves: Sequence[Tensor], state: dict[str, Any]) -> None:
        if any(len(drawn) != self.count for drawn in state.get("drawn", [None])):
            raise StaleError(
                f"what was saved has another number of random directions than the {self.count} of this context. Give "
                "`directions=` as it was."
            )
        self._shapes = {id(leaf): leaf.shape for leaf in leaves}
        self._drawn = {
            id(leaf): (leaf, drawn.to(leaf.device)) for leaf, drawn in zip(leaves, state["drawn"], strict=True)
        }
        self._generator.set_state(state["generator"])


def _size(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def coordinates(tensors: Tensor) -> Tensor:
    """Each tensor of a batch as a row of real numbers: a complex one's real parts, then its imaginary parts."""
    rows = tensors.detach().flatten(1) if tensors.dim() > 1 else tensors.detach().unsqueeze(1)
    return torch.cat([rows.real, rows.imag], 1) if rows.is_complex() else rows


def _tensors(rows: Tensor, like: Tensor) -> Tensor:
    """Tensors of a shape and type from their `coordinates`."""
    if like.is_complex():
        rows = torch.complex(*rows.to(like.dtype.to_real()).chunk(2, 1))
    return rows.reshape(len(rows), *like.shape).to(like.dtype)


def _derivative(external: Tensor, leaf: Tensor) -> Tensor:
    """``d external / d leaf``, along each of the leaf's coordinates."""
    basis = _tensors(torch.eye(_size(external), device=external.device), external)
    if external is leaf:
        return basis
    (rows,) = reverse_pass([external], [leaf], [basis])
    assert rows is not None
    return _tensors(coordinates(rows).T, external)
