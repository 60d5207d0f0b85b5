"""Coordinates: the hyperparameters as one vector, its perturbations, and the values that each example then sees."""

from __future__ import annotations

__all__ = ["Coordinates", "Noise", "Perturbation", "Values", "draw", "entropy", "inverse_softplus"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import DomainError
from metaopt.hyperparameters import Hyperparameters
from metaopt.hyperparameters.domains import Domain
from metaopt.stn.trees import mapped

# From which the seed of a pass is drawn, far from the end of the numbers that a generator takes.
SEEDS = 2**62


class Values(dict[str, Tensor]):
    """Hyperparameters' values by name, one for each example along the first axis; also read as attributes.

    They are constants: what the loss does with them trains the weights, not the hyperparameters. The names that were
    read are noted, so that one that nothing uses can be named.
    """

    def __init__(self, values: dict[str, Tensor], same: Mapping[str, float] | None = None) -> None:
        super().__init__(values)
        self.read: set[str] = set()
        # As numbers, which functions of torch take at less cost: those that are the same for each example.
        self.same: Mapping[str, float] = {} if same is None else same

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__") or name in ("read", "same"):  # while it is copied
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}; there are: {', '.join(self) or 'none'}") from None


class Noise:
    """The uniform numbers that one pass draws, for the next pass on the same examples.

    They come from a generator of their own, which gets a seed from torch's when the first of them is drawn. A pass
    that starts where another did finds the same seed, and takes the other's numbers, which costs less than to draw
    them.
    """

    def __init__(self, kept: Noise | None = None) -> None:
        self._kept = kept
        self._seed: int | None = None
        self._drawn: list[Tensor] = []
        self._generator: torch.Generator | None = None

    def uniform(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) of a shape."""
        if self._seed is None:
            self._seed = int(torch.randint(SEEDS, (), device="cpu"))
            if self._kept is not None and self._kept._seed != self._seed:
                self._kept = None
        index = len(self._drawn)
        if self._kept is not None and index < len(self._kept._drawn):
            numbers = self._kept._drawn[index]
            if numbers.shape == shape and numbers.dtype == like.dtype and numbers.device == like.device:
                self._drawn.append(numbers)
                return numbers
        if self._generator is None or self._generator.device != like.device:
            self._generator = torch.Generator(like.device)
        # A seed for each draw: it does not matter which of the others were drawn.
        self._generator.manual_seed(self._seed + index)
        numbers = torch.rand(shape, generator=self._generator, dtype=like.dtype, device=like.device)
        self._drawn.append(numbers)
        return numbers

    def place(self) -> tuple[int | None, int]:
        """Where the pass is, to come back to."""
        return self._seed, len(self._drawn)

    def back(self, place: tuple[int | None, int]) -> None:
        """Come back to a place; torch's generator is put back too."""
        self._seed = place[0]
        del self._drawn[place[1] :]


@dataclass
class Perturbation:
    """The point at which a pass runs.

    Args:
        z: what enters the response, ``(B, H)``; None for the plain weights.
        values: the hyperparameters' values.
        groups: how many different rows ``z`` has, each for a run of neighbouring examples; None for any.
        linearised: whether the network is linearised in the weights' change.
        weights: whether the weights w0 are trained through it.
        response: whether the response is.
        uses: names of hyperparameters that the model's dropouts used.
        called: names of the dropouts.
        aliases: what stands in for w0 where it is trained.
        running: whether the model is computing.
        outputs: what it returned, where that is looked at.
        watched: whether it is.
        offset: what is added to that, in units of its size.
    """

    z: Tensor | None
    values: Values
    groups: int | None = None
    linearised: bool = False
    weights: bool = False
    response: bool = False
    uses: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    functional_dropout: bool = False
    noise: Noise = field(default_factory=lambda: Noise())
    aliases: list[Tensor] = field(default_factory=list)
    running: bool = False
    outputs: list[Tensor] = field(default_factory=list)
    watched: bool = False
    offset: float = 0.0

    def noted(self, output: Any) -> Any:
        """Note what the model returned; moved by the offset, if there is one."""

        def note(y: Any) -> Any:
            if not isinstance(y, Tensor) or not y.requires_grad:
                return y
            if self.offset:
                pattern = torch.cos(torch.arange(y.numel(), device=y.device)).reshape(y.shape).to(y.dtype)
                y = y + self.offset * pattern * (1 + y.detach().abs())
            self.outputs.append(y)
            return y

        return mapped(note, output)

    def alias(self, parameter: Tensor) -> Tensor:
        """What stands in for a parameter: a view, by which a use through the model is told from a direct one."""
        if not self.weights:
            return parameter.detach()
        self.aliases.append(parameter.view_as(parameter))
        return self.aliases[-1]


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


class _Present:
    """Values that are the same for each example.

    Args:
        point: the hyperparameters of which they are.
        named: the values, each of one example.
    """

    def __init__(self, point: Tensor, named: dict[str, Tensor]) -> None:
        self.point, self._named = point, named
        self.numbers = {name: value.item() for name, value in named.items() if value.numel() == 1}
        self._examples, self._expanded = 1, named

    def expanded(self, examples: int) -> dict[str, Tensor]:
        """The values of so many examples."""
        if examples == 1:
            # A copy, since a loss function may write on it; torch refuses to write on what is expanded.
            return {name: value.clone() for name, value in self._named.items()}
        if examples != self._examples:
            self._expanded = {name: v.expand(examples, *v.shape[1:]) for name, v in self._named.items()}
            self._examples = examples
        return self._expanded


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
            kept = self._present = _Present(point, named)
        return Values(kept.expanded(examples), kept.numbers)

    def _named(self, found: Sequence[Tensor]) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for part, value in zip(self._parts, found, strict=True):
            named.update(zip(part.names, (value,) if part.shape else value.unbind(1), strict=True))
        return named if len(found) == 1 else {name: named[name] for name in self.slices}


def draw(
    generator: torch.Generator,
    examples: int,
    width: int,
    *,
    groups: int | None = None,
    shared: list[int] | None = None,
    antithetic: bool = False,
    like: Tensor,
) -> Tensor:
    """Standard normal numbers ``n``, one row for each example, from a generator of their own.

    Args:
        generator: on the CPU, so that a run is the same on every device.
        examples: B.
        width: H.
        groups: draw one row for each of so many runs of neighbouring examples.
        shared: columns that have one number for the whole batch.
        antithetic: draw half of the rows and take the others as their negatives.
        like: a tensor whose type and device the numbers have.

    Returns:
        Shape ``(B, H)``.
    """
    rows = examples if groups is None else groups
    drawn = -(-rows // 2) if antithetic else rows
    n = torch.randn(drawn, width, generator=generator, dtype=torch.float64, device="cpu")
    if antithetic:
        n = torch.cat([n, -n])[:rows]
    if groups is not None:
        counts = [len(part) for part in torch.arange(examples, device="cpu").tensor_split(groups)]
        n = n.repeat_interleave(torch.tensor(counts, device="cpu"), 0)
    if shared:
        n[:, shared] = n[:1, shared]
    return n.to(like)


def inverse_softplus(x: Tensor) -> Tensor:
    """``ρ`` with ``softplus(ρ) = x``, as ``x + log(1 - e^{-x})``: ``log(e^x - 1)`` overflows."""
    return x + torch.log(-torch.expm1(-x))


def entropy(scales: Tensor) -> Tensor:
    """The entropy of the perturbations, ``Σ_i log(σ_i √(2πe))``."""
    return (torch.log(scales) + 0.5 * math.log(2 * math.pi * math.e)).sum()
