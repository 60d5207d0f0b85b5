"""Links: settings of an optimizer's param groups that come from hyperparameters."""

from __future__ import annotations

__all__ = ["Given", "Link", "assign", "factor", "rescale", "unlink"]

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import DomainError, RuleError
from metaopt.rules import Rule

# What a scheduler keeps in the group besides the setting itself, in the same unit.
_SCALED_WITH = {
    "lr": ("initial_lr", "max_lr", "min_lr"),
    "momentum": ("base_momentum", "max_momentum"),
    "beta1": ("base_momentum", "max_momentum"),
}


class Link:
    """A setting of a param group that comes from a hyperparameter.

    ``base`` is the number that the group was given; the group's number over it is the scheduler's factor.
    """

    def __init__(self, value: Tensor) -> None:
        self.source: Callable[[], Tensor] | None = getattr(value, "_metaopt_source", None)
        self.fixed = value
        self.base: float | None = None
        self._current: Tensor | None = None
        self._stamp: Any = None

    def value(self) -> Tensor:
        """The hyperparameter's present value; the same tensor object for as long as it does not change."""
        if self.source is None:
            return self.fixed
        value = self.source()
        stamp = value.detach()
        if self._current is None or not torch.equal(stamp, self._stamp):
            self._current, self._stamp = value, stamp.clone()
        return self._current

    def at(self, step: int) -> Tensor:
        """The value for a step (from 0): the scalar, or that entry of a learned schedule."""
        value = self.value()
        if value.dim() == 0 or value.numel() == 1:
            return value.reshape(()) if value.dim() else value
        if value.dim() != 1:
            raise DomainError(
                "a setting of an optimizer is a scalar or a vector with one entry per step, not of shape "
                f"{tuple(value.shape)}."
            )
        if step >= len(value):
            raise DomainError(
                f"a learned schedule has {len(value)} entries, but the optimizer takes step {step + 1}. Make it as "
                "long as the training, or call `run.rewind()` between hyper-iterations so that it starts again."
            )
        return value[step]

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        # A copied optimizer follows the same hyperparameters, unless they are copied along with it.
        copied = Link(memo.get(id(self.fixed), self.fixed))
        copied.source, copied.base = self.source, self.base
        if isinstance(self.source, functools.partial) and id(self.source.args[0]) in memo:
            copied.source = functools.partial(self.source.func, memo[id(self.source.args[0])], *self.source.args[1:])
        return copied


class Given:
    """A setting as the constructor was given it; copies share the hyperparameters behind it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Given:
        return Given(memo.get(id(self.value), self.value))


def rescale(optimizer: torch.optim.Optimizer, place: int, name: str, ratio: float, *, search: bool = False) -> None:
    """Scale what schedulers keep of a setting, in the group and in themselves, when its hyperparameter has moved."""
    group = optimizer.param_groups[place]
    for key in _SCALED_WITH.get(name, ()):
        if key in group:
            group[key] = group[key] * ratio
    if name != "lr" or not (search or "initial_lr" in group):
        return
    # Schedulers in closed form multiply their own copy of the first rate, and the optimizer does not know them.
    for holder in gc.get_referrers(optimizer):
        state = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
        bases = state.get("base_lrs") if state.get("optimizer") is optimizer else None
        if isinstance(bases, list) and place < len(bases):
            bases[place] = bases[place] * ratio


def factor(name: str, number: float, base: float | None, group: dict[str, Any]) -> float:
    """The factor that a scheduler put on a linked setting.

    Raises:
        DomainError: if the hyperparameter is exactly 0, so that the factor can't be seen.
    """
    if base is None or number == base:
        if base == 0 and name == "lr" and "initial_lr" in group:
            raise DomainError(
                "lr is exactly 0 under a scheduler, so the factor that the scheduler put on it can't be seen. Start "
                "from a small positive lr."
            )
        return 1.0
    if base == 0:
        raise DomainError(
            f"{name} is linked to a hyperparameter that is exactly 0, but a scheduler set it to {number:g}; what it "
            "should be multiplied with can't be told. Start the hyperparameter from a small positive value."
        )
    return number / base


def unlink(key: str, given: Any, links: dict[str, Link], rule: Rule) -> Any:
    """The plain number for a setting; what it came from goes to ``links``, under the rule's name for it.

    Raises:
        RuleError: if a hyperparameter is where the rule has no continuous setting.
        DomainError: if the weights have no derivative in that setting, or 0 everywhere.
    """
    if _differentiable(given):
        links[_linkable(rule, key, None)] = Link(given)
        return _first(given)
    if isinstance(given, tuple | list) and any(_differentiable(entry) for entry in given):
        for place, entry in enumerate(given):
            if _differentiable(entry):
                links[_linkable(rule, key, place)] = Link(entry)
        return tuple(None if entry is None else _first(entry) for entry in given)
    return given


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _linkable(rule: Rule, key: str, place: int | None) -> str:
    name = rule.name_of(key, place)
    if name is None:
        raise RuleError(
            f"{key} of {rule.optimizer.__name__} can't be a hyperparameter: it is no continuous setting of its rule. "
            f"Continuous are {', '.join(rule.settings)}."
        )
    rule.refuse_flat(name)
    return name


def _first(value: Any) -> float:
    return float(value.detach().reshape(-1)[0]) if isinstance(value, Tensor) else float(value)


def assign(group: dict[str, Any], where: str | tuple[str, int], number: float) -> None:
    """Put a number where a rule finds the setting."""
    if isinstance(where, str):
        group[where] = number
        return
    key, place = where
    group[key] = tuple(number if i == place else entry for i, entry in enumerate(group[key]))
