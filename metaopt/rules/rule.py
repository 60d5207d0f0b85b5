"""What a rule is: the optimizer's half of ``Φ``, as a pure formula per tensor."""

from __future__ import annotations

__all__ = ["Rule", "Setting", "Update", "add_scaled", "double", "safe_sqrt"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import DomainError

Setting = Tensor | float


@dataclass(frozen=True)
class Rule:
    """One optimizer's update as a function that autograd can follow.

    Attributes:
        optimizer: the ``torch.optim`` class whose step the rule describes; subclasses inherit it.
        update: ``(w, g, state, step, **settings, **flags) -> (w', state')``. Pure, for one tensor; ``state`` maps
            names to tensors, with None for what the optimizer has not made yet; ``step`` counts from 1.
        settings: the continuous settings, by the rule's name for them: where each is found in a param group, as
            a key or as (key, index) for a member of a tuple such as ``betas``.
        flags: the settings that choose a formula (``nesterov``, ``amsgrad``, …).
        state: the names of the tensors in ``optimizer.state[w]`` that are part of the dynamics.
        domain: for each setting the test that it must pass, and the words for it.
        refuse: looks at a param group's settings and flags and raises if the update has no derivative there.
    """

    optimizer: type[torch.optim.Optimizer]
    update: Callable[..., tuple[Tensor, dict[str, Tensor | None]]]
    settings: Mapping[str, str | tuple[str, int]]
    flags: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    domain: Mapping[str, tuple[Callable[[float], bool], str]] = field(default_factory=dict)
    refuse: Callable[[Mapping[str, Any], frozenset[str]], None] | None = None

    def number(self, group: Mapping[str, Any], name: str) -> Any:
        """The group's present number for a setting."""
        where = self.settings[name]
        return group[where] if isinstance(where, str) else group[where[0]][where[1]]

    def check(self, name: str, value: float) -> None:
        """Raise `DomainError` if a setting lies outside its formula's domain."""
        if name in self.domain:
            inside, words = self.domain[name]
            if not inside(value):
                raise DomainError(
                    f"{self.optimizer.__name__}'s {name} is {value:g}, but must be {words}. Constrain the "
                    "hyperparameter (`metaopt.positive`, `metaopt.interval`), or project it after each step "
                    "(`metaopt.box`)."
                )


class Update:
    """A rule with its flags, applied to the tensors of one param group."""

    def __init__(self, rule: Rule, flags: tuple[tuple[str, Any], ...]) -> None:
        self.rule = rule
        self.flags = flags
        self.__name__ = f"{rule.optimizer.__name__.lower()}_update"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Update) and self.rule is other.rule and self.flags == other.flags

    def __hash__(self) -> int:
        return hash((id(self.rule), self.flags))

    def __call__(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Tensor | None]],
        steps: Sequence[int],
        **settings: Setting,
    ) -> list[Tensor]:
        """The new weights and states, tensor by tensor: ``[w1', *state1', w2', *state2', …]``."""
        flags = dict(self.flags)
        results: list[Tensor] = []
        for w, g, state, step in zip(weights, grads, states, steps, strict=True):
            named = dict(zip(self.rule.state, state, strict=True))
            new, after = self.rule.update(w, g, named, step, **settings, **flags)
            results.append(new)
            results += [value for name in self.rule.state if (value := after.get(name)) is not None]
        return results


def double(value: Setting) -> Setting:
    """A setting in the precision that torch's optimizers have theirs in, Python's."""
    return value.double() if isinstance(value, Tensor) and value.dim() == 0 and value.device.type != "mps" else value


def add_scaled(x: Tensor, y: Tensor, factor: Setting) -> Tensor:
    """``x + factor · y``, in one pass over the memory, differentiable in all three."""
    return torch.addcmul(x, y, factor) if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def safe_sqrt(x: Tensor) -> Tensor:
    """``√x`` whose derivative at 0 is 0, where that of the root is infinite.

    Adam's ``m/(√v + ε)`` is differentiable in the gradient where all gradients so far were zero, but through
    autograd's ``√v`` it is ``0 · ∞``; the part that goes through ``√v`` vanishes there.
    """
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())
