"""Coordinates: the hyperparameters as one vector, and the values that each example sees at a point."""

from __future__ import annotations

__all__ = ["Coordinates", "Values"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.errors import DomainError
from metaopt.hyperparameters import Hyperparameters
from metaopt.hyperparameters.domains import Domain


class Values(dict[str, Tensor]):
    """Hyperparameters' values by name, one for each example along the first axis; also read as attributes.

    They are constants: what the loss does with them trains the weights, not the hyperparameters. The names that were
    read are noted, so that one that nothing uses can be named.
    """

    def __init__(self, values: dict[str, Tensor], numbers: Mapping[str, float] | None = None) -> None:
        super().__init__(values)
        self.read: set[str] = set()
        self._given, self._numbers = values, {} if numbers is None else numbers

    def number(self, name: str) -> Tensor | float:
        """The first example's value: a number, which functions of torch take at less cost, where that is known."""
        value = super().__getitem__(name)
        # A loss function may have put another in its place, or written on it: it was new, and never written on.
        if name in self._numbers and value is self._given[name] and not value._version:
            return self._numbers[name]
        return value[0] if value.ndim == 1 else value.flatten()[0]

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__") or name in ("read", "_given", "_numbers"):  # while it is copied
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}; there are: {', '.join(self) or 'none'}") from None


@dataclass(frozen=True)
class Part:
    """Hyperparameters that one transform gives the values of: numbers, or one that is a tensor.

    Args:
        domain: theirs.
        names: theirs.
        columns: where they are among the coordinates.
        shape: of the one.
    """

    domain: Domain
    names: tuple[str, ...]
    columns: list[int]
    shape: tuple[int, ...] = ()

    def values(self, points: Tensor) -> Tensor:
        """The values at points ``(B, H)``: of shape ``(B, *shape)``, or with a column for each of the numbers."""
        whole = len(self.columns) == points.shape[1]
        picked = points if whole else points[:, self.columns]
        values = self.domain.to_value(picked.reshape(-1, *self.shape) if self.shape else picked).detach()
        # What a loss function writes into its values must not reach the points.
        shared = values.untyped_storage().data_ptr() == points.untyped_storage().data_ptr()
        return values.clone() if shared else values


@dataclass(frozen=True)
class _Present:
    """Values that are the same for each example.

    Args:
        point: the hyperparameters of which they are.
        named: the values, each of one example.
        numbers: those that are numbers.
    """

    point: Tensor
    named: dict[str, Tensor]
    numbers: dict[str, float]


class Coordinates:
    """The unconstrained hyperparameters as one vector ``λ`` of H entries.

    Args:
        hyper: the hyperparameters, without projected ones.
        per_batch: names of those that have one draw for a minibatch, not one for each example.

    Raises:
        DomainError: if there is none, one is projected, or a name is unknown.
    """

    def __init__(self, hyper: Hyperparameters, per_batch: tuple[str, ...] = ()) -> None:
        if not len(hyper):
            raise DomainError("a best response needs hyperparameters to respond to; add one to `Hyperparameters(...)`.")
        self.hyper = hyper
        self.slices: dict[str, slice] = {}
        size = 0
        for name, domain in hyper.domains.items():
            if domain.projected:
                raise DomainError(
                    f"hyperparameter {name!r} is in {domain}, which a Gaussian perturbation would leave; use "
                    "`interval`, `positive`, `integer` or `real`, whose leaf may be any number."
                )
            count = self.hyper.get_leaf(name).numel()
            self.slices[name] = slice(size, size + count)
            size += count
        self.size = size
        unknown = set(per_batch) - set(self.slices)
        if unknown:
            raise DomainError(
                f"no hyperparameter {sorted(unknown)[0]!r} to draw per batch; there are: {', '.join(hyper)}."
            )
        self.per_batch = frozenset(per_batch)
        self.shared = [i for name in per_batch for i in range(size)[self.slices[name]]]
        self._parts = self._split()
        self._present: _Present | None = None

    def _split(self) -> list[Part]:
        # Numbers of one domain are transformed as one: looking the transform up costs more than it does.
        numbers: dict[Domain, list[str]] = {}
        parts = []
        for name, domain in self.hyper.domains.items():
            shape = self.hyper.get_leaf(name).shape
            if shape:
                parts.append(Part(domain, (name,), list(range(self.size)[self.slices[name]]), shape))
            else:
                numbers.setdefault(domain, []).append(name)
        return parts + [Part(d, tuple(n), [self.slices[name].start for name in n]) for d, n in numbers.items()]

    def leaf(self) -> Tensor:
        """``λ``, shape ``(H,)``, differentiable by the leaves."""
        return self._joined([self.hyper.get_leaf(name) for name in self.slices])

    def point(self) -> Tensor:
        """``λ`` as a constant."""
        return self._joined([self.hyper.get_leaf(name).detach() for name in self.slices])

    def _joined(self, leaves: list[Tensor]) -> Tensor:
        if self.size == len(leaves) and not any(leaf.ndim for leaf in leaves):
            return torch.stack(leaves)
        return torch.cat([leaf.reshape(-1) for leaf in leaves])

    def scales(self) -> Tensor:
        """The initial ``σ``, shape ``(H,)``."""
        scales = self.hyper.scales
        return torch.cat([self.hyper.get_leaf(n).detach().reshape(-1) * 0 + scales[n] for n in self.slices])

    def values(self, points: Tensor) -> Values:
        """The constrained values at points of shape ``(B, H)``, each of shape ``(B, *shape)``; they have no graph."""
        points = points.detach()  # also from a pass with a graph
        return Values(self._named([part.values(points) for part in self._parts]))

    def present(self, examples: int, point: Tensor | None = None) -> Values:
        """The values at ``λ0``, the same for each example.

        Args:
            examples: how many there are.
            point: ``λ0``, where it is at hand.
        """
        point = self.point() if point is None else point
        kept = self._present
        # Hyperparameters move once in many steps of the weights. Compared by value: a leaf may be set in any way.
        if kept is None or not torch.equal(kept.point, point):
            named = self._named([part.values(point.unsqueeze(0)) for part in self._parts])
            numbers = {name: value.item() for name, value in named.items() if value.numel() == 1}
            kept = self._present = _Present(point, named, numbers)
        # Copies: what a loss function writes into its values must not stay.
        copies = {name: v.clone().expand(examples, *v.shape[1:]) for name, v in kept.named.items()}
        return Values(copies, kept.numbers)

    def _named(self, found: Sequence[Tensor]) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for part, value in zip(self._parts, found, strict=True):
            named.update(zip(part.names, (value,) if part.shape else value.unbind(1), strict=True))
        return named if len(found) == 1 else {name: named[name] for name in self.slices}
