"""Perturbations: the point at which a pass runs, and the random numbers that it draws."""

from __future__ import annotations

__all__ = ["Noise", "Perturbation", "draw", "entropy", "inverse_softplus"]

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt.stn.attributes import Attributes
from metaopt.stn.coordinates import Values
from metaopt.stn.trees import mapped

# From which the seed of a pass is drawn, far from the end of the numbers that a generator takes.
SEEDS = 2**62


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


@dataclass(slots=True)
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
        attributes: where modules keep a state, which each group of examples starts from.
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
    attributes: Attributes | None = None

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
