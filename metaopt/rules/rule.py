"""What a rule is: the optimizer's half of ``Φ``, as a pure formula per tensor."""

from __future__ import annotations

__all__ = [
    "ABOVE_ZERO",
    "FRACTION",
    "NONNEGATIVE",
    "Rule",
    "Setting",
    "State",
    "add_scaled",
    "always",
    "decayed",
    "double",
    "is_on",
    "lerp",
    "norm",
    "safe_sqrt",
    "scalar",
]

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import DomainError

Setting = Tensor | float
State = Mapping[str, Tensor | None]

# Domains that many settings share.
NONNEGATIVE = (lambda x: x >= 0, "at least 0")
ABOVE_ZERO = (lambda x: x > 0, "above 0")
FRACTION = (lambda x: 0 <= x < 1, "at least 0 and below 1")


def always(*names: str) -> Callable[[Mapping[str, Any], frozenset[str]], tuple[str, ...]]:
    """The same names whatever the settings are."""
    return lambda settings, differentiable: names


@dataclass(frozen=True)
class Rule:
    """One optimizer's update as a function that autograd can follow.

    Attributes:
        optimizer: the ``torch.optim`` class whose step the rule describes; subclasses inherit it.
        update: ``(w, g, state, step, **settings, **flags) -> (w', state')``. Pure, for one tensor; ``state`` maps
            names to tensors, with None for what the optimizer has not made yet; ``step`` counts from 1.
        settings: the continuous settings, by the rule's name for them: where each is found in a param group, as
            a key or as (key, index) for a member of a tuple such as ``betas``. One that is None there is not passed on.
        flags: the settings that choose a formula (``nesterov``, ``amsgrad``, ``ns_steps``, …), as the group has them.
        state: the names of the tensors in ``optimizer.state[w]`` that are part of the dynamics.
        scalars: those of them that are numbers, whatever the weight's shape is.
        zeros: looks at a param group's settings, and at which of them are hyperparameters, and names the tensors of the
            state that the optimizer has not made before its first step and that are zero then, by the same formula as
            ever: a first step is a step like others, and shares their program.
        domain: for each setting the test that it must pass, and the words for it.
        refuse: looks at a param group's settings and flags and raises if the update has no derivative there.
        flat: settings in which the trained weights have derivative 0 wherever they have one, each with the reason; a
            hyperparameter there is an error, and not a hypergradient of 0.
        blind: why the weights have derivative 0 in the gradient wherever they have one, in words; empty if they do not.
        surrogate: whether value and derivative differ on purpose, so that finite differences are no check.
        elementwise: whether each element goes its own way, so that many small tensors may be updated as one.
    """

    optimizer: type[torch.optim.Optimizer]
    update: Callable[..., tuple[Tensor, dict[str, Tensor | None]]]
    settings: Mapping[str, str | tuple[str, int]]
    flags: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    zeros: Callable[[Mapping[str, Any], frozenset[str]], tuple[str, ...]] = field(default_factory=always)
    domain: Mapping[str, tuple[Callable[[float], bool], str]] = field(default_factory=dict)
    refuse: Callable[[Mapping[str, Any], frozenset[str]], None] | None = None
    flat: Mapping[str, str] = field(default_factory=dict)
    blind: str = ""
    surrogate: bool = False
    elementwise: bool = False

    def __repr__(self) -> str:
        return f"Rule({self.optimizer.__name__}: {', '.join(self.settings)})"

    def number(self, group: Mapping[str, Any], name: str) -> Any:
        """The group's present number for a setting."""
        where = self.settings[name]
        return group[where] if isinstance(where, str) else group[where[0]][where[1]]

    def name_of(self, key: str, place: int | None = None) -> str | None:
        """The rule's name for a group's setting, or for one entry of it; None if it is not continuous."""
        where = key if place is None else (key, place)
        return next((name for name, found in self.settings.items() if found == where), None)

    def refuse_flat(self, name: str) -> None:
        """Raise `DomainError` if the weights have derivative 0 in a setting wherever they have one."""
        if name in self.flat:
            raise DomainError(
                f"{name} of {self.optimizer.__name__} can't be a hyperparameter: {self.flat[name]} Give a plain number."
            )

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


def is_on(value: Setting) -> bool:
    """Whether a term is there: a hyperparameter's always is, since its derivative at 0 is asked for."""
    return isinstance(value, Tensor) or value != 0


def decayed(w: Tensor, g: Tensor, weight_decay: Setting, maximize: bool) -> Tensor:
    """The descent direction's gradient with ``weight_decay · w`` added to it, as most of torch's optimizers begin."""
    g = -g if maximize else g
    return add_scaled(g, w, weight_decay) if is_on(weight_decay) else g


def lerp(x: Tensor, y: Tensor, weight: Setting) -> Tensor:
    """``x + weight · (y - x)`` as ``torch.lerp`` rounds it, differentiable in all three."""
    return torch.lerp(x, y, weight.to(x) if isinstance(weight, Tensor) else weight)


def norm(x: Tensor) -> Tensor:
    """The Euclidean norm, whose derivative at 0 is 0."""
    return safe_sqrt((x * x).sum())


def scalar(value: Setting, before: Tensor | None, w: Tensor) -> Tensor:
    """A number that an optimizer keeps in its state, as a tensor of torch's scalar type or that of ``before``."""
    if before is not None:
        dtype, device = before.dtype, before.device
    else:
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        device = value.device if isinstance(value, Tensor) else w.device
    return torch.as_tensor(value, dtype=dtype, device=device)
