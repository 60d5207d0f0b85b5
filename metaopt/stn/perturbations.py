"""Coordinates: the hyperparameters as one vector, its perturbations, and the values that each example then sees."""

from __future__ import annotations

__all__ = ["Coordinates", "Noise", "Perturbation", "Values", "draw", "entropy", "inverse_softplus"]

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import DomainError
from metaopt.hyperparameters import Hyperparameters
from metaopt.hyperparameters.domains import Domain
from metaopt.stn.generators import random_state, set_random_state
from metaopt.stn.trees import mapped


class Values(dict[str, Tensor]):
    """Hyperparameters' values by name, one for each example along the first axis; also read as attributes.

    They are constants: what the loss does with them trains the weights, not the hyperparameters. The names that were
    read are noted, so that one that nothing uses can be named.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__") or name == "read":  # while it is copied
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}; there are: {', '.join(self) or 'none'}") from None


class Noise:
    """The uniform numbers that one pass drew, for the next pass on the same examples.

    A number is taken again only if the generator is where it was, and the generator then moves on as if it had been
    drawn: so the passes agree with what drawing again would give, in a fraction of the time.
    """

    def __init__(self, kept: Noise | None = None) -> None:
        self._old = iter([] if kept is None else kept._drawn)
        self._drawn: list[tuple[Any, Tensor | None, Any]] = []

    def uniform(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) of a shape."""
        before = random_state(like.device)
        kept, numbers, after = next(self._old, (before, None, before))
        if (
            numbers is not None
            and numbers.shape == shape
            and numbers.dtype == like.dtype
            and all(a is None or b is None or torch.equal(a, b) for a, b in zip(kept, before, strict=True))
        ):
            set_random_state(like.device, after)
            return numbers
        numbers = torch.rand(shape, dtype=like.dtype, device=like.device)
        self._drawn.append((before, numbers, random_state(like.device)))
        return numbers


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
        self._present: tuple[Tensor, Values] | None = None

    def leaf(self) -> Tensor:
        """``λ``, shape ``(H,)``, differentiable by the leaves."""
        return torch.cat([self.hyper.get_leaf(name).reshape(-1) for name in self.slices])

    def scales(self) -> Tensor:
        """The initial ``σ``, shape ``(H,)``."""
        scales = self.hyper.scales
        return torch.cat([self.hyper.get_leaf(n).detach().reshape(-1) * 0 + scales[n] for n in self.slices])

    @torch.no_grad()
    def values(self, points: Tensor) -> Values:
        """The constrained values at points of shape ``(B, H)``, each of shape ``(B, *shape)``."""
        found: dict[str, Tensor] = {}
        together: dict[Domain, list[str]] = {}
        for name, where in self.slices.items():
            domain, shape = self.hyper.domains[name], self.hyper.get_leaf(name).shape
            if not shape:
                # Numbers of one domain are transformed as one: looking the transform up costs more than it does.
                together.setdefault(domain, []).append(name)
            else:
                found[name] = domain.to_value(points[:, where].reshape(-1, *shape)).detach()
        for domain, names in together.items():
            columns = torch.stack([points[:, self.slices[name].start] for name in names])
            found |= zip(names, domain.to_value(columns).detach().unbind(), strict=True)
        return Values({name: found[name] for name in self.slices})

    def present(self, examples: int) -> Values:
        """The values at ``λ0``, the same for each example."""
        leaf = self.leaf().detach()
        if self._present is None or not torch.equal(self._present[0], leaf):
            # Hyperparameters move once in many steps of the weights. Compared by value: a leaf may be set in any way.
            self._present = leaf.clone(), self.values(leaf.unsqueeze(0))
        # A copy: what a loss function writes into its values must not stay.
        return Values({n: v.clone().expand(examples, *v.shape[1:]) for n, v in self._present[1].items()})


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
