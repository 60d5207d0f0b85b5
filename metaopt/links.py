"""Links: settings of an optimizer's param groups that come from hyperparameters."""

from __future__ import annotations

__all__ = ["Given", "Link", "assign", "follow", "label_of", "links_of", "mixed", "shift", "unlink"]

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import DomainError, HeldConstantWarning, RuleError, warn
from metaopt.followed import Followed, shifted
from metaopt.hyperparameters import Constrained, Hyperparameters
from metaopt.rules import Rule


class Link:
    """A setting of a param group that comes from a hyperparameter.

    ``base`` is the number that the group was given, ``last`` the group's number at the last step.
    """

    def __init__(self, value: Tensor) -> None:
        self.source: Callable[[], Tensor] | None = getattr(value, "_metaopt_source", None)
        self.fixed = value
        self.base: float | None = None
        self.last: float | None = None
        self.said = False
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

    def __getstate__(self) -> dict[str, Any]:
        if self.source is None and self.fixed.grad_fn is not None:
            raise TypeError(
                "an optimizer with a setting that was computed from a hyperparameter can't be pickled: the setting "
                "would come back as a hyperparameter of its own. Save `optimizer.state_dict()`, and make the optimizer "
                "anew."
            )
        # What was computed from the hyperparameter is computed again, from the one that is pickled along.
        return {**self.__dict__, "_current": None, "_stamp": None}

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


def shift(optimizer: torch.optim.Optimizer, origin: tuple[int, str], change: float, *, search: bool = False) -> None:
    """Move what schedulers keep of a setting, in the group and in themselves, when its hyperparameter has moved."""
    (place, name), owner = origin, label_of(optimizer)
    for group in optimizer.param_groups:
        for key in [key for key in group if key != "params"]:
            group[key] = shifted(group[key], origin, change, owner)
    group = optimizer.param_groups[place]
    if name != "lr" or not (search or "initial_lr" in group):
        return
    # Schedulers in closed form compute with their own copy of the first rate, and the optimizer does not know them.
    for state in _schedulers(optimizer):
        for key in ("base_lrs", "max_lrs"):
            if isinstance(state.get(key), list):
                state[key][:] = shifted(state[key], origin, change, owner)


def _schedulers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    holders = gc.get_referrers(optimizer)
    states = [holder if isinstance(holder, dict) else getattr(holder, "__dict__", {}) for holder in holders]
    return [state for state in states if state.get("optimizer") is optimizer]


def follow(optimizer: torch.optim.Optimizer, origin: tuple[int, str], link: Link, number: float) -> Followed:
    """The group's number for a linked setting, with its derivative by the hyperparameter that it comes from.

    Raises:
        DomainError: if it was computed from two of them, or from another optimizer's.
    """
    owner = label_of(optimizer)
    if isinstance(number, Followed):
        if number.slope and (number.slope != number.slope or not number.belongs(owner)):
            raise mixed(origin[1], number, owner)
        return number
    if link.base is None:
        return Followed(number, 1.0, origin, owner)
    found = _plateau(optimizer, origin, link, number)
    if found is not None:
        return found
    if not link.said:
        link.said = True
        warn(
            f"{origin[1]} of group {origin[0]} is linked to a hyperparameter ({link.base:g}), but a scheduler or the "
            f"loop set it to {number:g}, a number that does not come from it: with another hyperparameter it would be "
            "the same. So it has no derivative there. If it should follow, compute it from the group's own number, as "
            'in `OneCycleLR(optimizer, max_lr=2 * optimizer.param_groups[0]["lr"], …)`, `group["lr"] *= 0.5`.',
            HeldConstantWarning,
        )
    return Followed(number, 0.0, origin, owner)


def links_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Link]]:
    """The links of each param group, by the rule's names for the settings; none where it is no drop-in."""
    return list(getattr(optimizer, "_links", {}).values())


def label_of(optimizer: torch.optim.Optimizer) -> str | None:
    """The label that an optimizer's numbers carry, so that one that strays into another optimizer is known."""
    found: str | None = getattr(optimizer, "_owner", None)
    return found


def mixed(name: str, number: Followed, owner: str | None) -> DomainError:
    """The error for a number whose derivative has no place here."""
    if not number.belongs(owner):
        return DomainError(
            f"{name} was computed from a number in the groups of another optimizer, which comes from a hyperparameter "
            "there; its derivative can't be followed here. Give both optimizers the hyperparameter (a drop-in of "
            "`metaopt.optim` each), and compute each number from the optimizer's own; or take a plain one, `float(x)`, "
            "to hold it constant."
        )
    return DomainError(
        f"{name} was computed from the numbers of two linked settings; its derivative by both can't be followed. "
        "Compute each from its own, or in tensors."
    )


def _plateau(optimizer: torch.optim.Optimizer, origin: tuple[int, str], link: Link, number: float) -> Followed | None:
    """The same for `ReduceLROnPlateau`, which computes with ``float(lr)``, a number that follows nothing any more."""
    place, name = origin
    if name != "lr" or not isinstance(link.last, Followed):
        return None
    for state in _schedulers(optimizer):
        if "min_lrs" not in state or "factor" not in state:
            continue
        reduced: Any = link.last
        for _ in range(8):
            reduced = max(reduced * state["factor"], state["min_lrs"][place])
            if reduced == number:
                return reduced if isinstance(reduced, Followed) else Followed(number, 0.0, origin)
    return None


def unlink(key: str, given: Any, links: dict[str, Link], rule: Rule) -> Any:
    """The plain number for a setting; what it came from goes to ``links``, under the rule's name for it.

    Raises:
        RuleError: if a hyperparameter is where the rule has no continuous setting.
        DomainError: if the weights have no derivative in that setting, or 0 everywhere.
    """
    for entry in given if isinstance(given, tuple | list) else [given]:
        if isinstance(entry, Constrained | Hyperparameters):
            raise RuleError(
                f"{key} of {rule.optimizer.__name__} is {type(entry).__name__}, which is no number and no tensor. Name "
                "it in a `metaopt.Hyperparameters(name=...)`, and pass its value, `hyper.name`."
            )
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
    if name is None and rule.name_of(key, None) is not None:
        raise RuleError(
            f"{key} of {rule.optimizer.__name__} is a list with a hyperparameter in it, and is to be the "
            f"hyperparameter itself, `{key}=hyper.{key}`; a value for each step is a vector, `torch.stack([...])`."
        )
    if name is None:
        raise RuleError(
            f"{key} of {rule.optimizer.__name__} can't be a hyperparameter: it is no continuous setting of its rule. "
            f"Continuous are {', '.join(rule.settings)}."
        )
    rule.refuse_flat(name)
    return name


def _first(value: Any) -> float:
    if isinstance(value, Tensor) and (value.is_complex() or not value.numel()):
        raise DomainError(
            "a setting of an optimizer is a real scalar, or a vector with one entry per step, and not "
            f"{value.dtype} of shape {tuple(value.shape)}."
        )
    return float(value.detach().reshape(-1)[0]) if isinstance(value, Tensor) else float(value)


def assign(group: dict[str, Any], where: str | tuple[str, int], number: float) -> None:
    """Put a number where a rule finds the setting."""
    if isinstance(where, str):
        group[where] = number
        return
    key, place = where
    group[key] = tuple(number if i == place else entry for i, entry in enumerate(group[key]))
