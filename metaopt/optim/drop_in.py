"""What the drop-in optimizers share: hyperparameters among the settings, plain numbers in the groups."""

from __future__ import annotations

__all__ = ["DifferentiableOptimizer", "Setting"]

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metaopt.links import Given, Link, assign, factor, rescale, unlink
from metaopt.rules import rule_of

Setting = float | Tensor


class DifferentiableOptimizer(torch.optim.Optimizer):
    """What the drop-in optimizers share: tensors among their settings are kept as links, the groups hold numbers."""

    _links: dict[int, dict[str, Link]]
    schedule_step: int

    def _link(self, **settings: Any) -> dict[str, Any]:
        """Keep the tensors among the constructor's settings aside; return the plain numbers for torch's constructor."""
        self._links = {}
        self._defaults_given = {key: Given(value) for key, value in settings.items()}
        self.schedule_step = 0
        links: dict[str, Link] = {}
        rule = rule_of(self)
        numbers = {key: unlink(key, value, links, rule) for key, value in settings.items()}
        for name, link in links.items():
            rule.check(name, float(link.at(0).detach()))
        return numbers

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; settings given as tensors that require grad are linked to it."""
        links: dict[str, Link] = {}
        group = dict(param_group)
        for key, default in self._defaults_given.items():
            group[key] = unlink(key, group.get(key, default.value), links, rule_of(self))
        super().add_param_group(group)
        self._links[len(self.param_groups) - 1] = links
        self._hook()
        self._sync()

    def _hook(self) -> None:
        if _follow not in self._optimizer_step_pre_hooks.values():
            self.register_step_pre_hook(_follow)
            self.register_step_post_hook(_count)

    def bookmark(self) -> Any:
        """Where learned schedules and schedulers' factors are, for `go_back`."""
        bases = {place: {name: link.base for name, link in links.items()} for place, links in self._links.items()}
        return self.schedule_step, bases

    def go_back(self, bookmark: Any) -> None:
        """Return to a bookmark; the hyperparameters keep their present values."""
        self.schedule_step, bases = bookmark
        for place, links in self._links.items():
            for name, link in links.items():
                link.base = bases.get(place, {}).get(name)
        self._sync(search=True)

    def _before_step(self) -> None:
        """What a subclass does before torch's step."""

    def _after_step(self) -> None:
        """What a subclass does after torch's step."""

    def _linked(self, name: str) -> Iterator[dict[str, Any]]:
        """The groups in which a setting is a hyperparameter."""
        for place, group in enumerate(self.param_groups):
            if name in self._links.get(place, {}):
                yield group

    def linked_settings(self, group: dict[str, Any]) -> dict[str, tuple[Tensor, float]]:
        """The hyperparameter behind each linked setting of a group, at the present step, and the scheduler's factor."""
        place = next(i for i, candidate in enumerate(self.param_groups) if candidate is group)
        rule = rule_of(self)
        result = {}
        for name, link in self._links.get(place, {}).items():
            number = float(rule.number(group, name))
            result[name] = (link.at(self.schedule_step), factor(name, number, link.base, group))
        return result

    def _sync(self, *, search: bool = False) -> None:
        """Give the groups the hyperparameters' present numbers, times what schedulers made of the last ones."""
        rule = rule_of(self)
        for place, links in self._links.items():
            group = self.param_groups[place]
            for name, link in links.items():
                new = float(link.at(self.schedule_step).detach())
                if link.base is not None and new == link.base:
                    continue
                rule.check(name, new)
                old = link.base
                scheduled = 1.0 if old is None else factor(name, float(rule.number(group, name)), old, group)
                assign(group, rule.settings[name], new * scheduled)
                if old:
                    rescale(self, place, name, new / old, search=search)
                link.base = new

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_links", "_defaults_given", "schedule_step")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hook()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the step that learned schedules are at and the numbers that linked settings were given."""
        result = super().state_dict()
        if any(self._links.values()):
            result["schedule_step"], result["link_bases"] = self.bookmark()
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the linked settings keep following their hyperparameters, at their present values."""
        own = ("schedule_step", "link_bases")
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in own})
        self.go_back((state_dict.get("schedule_step", 0), state_dict.get("link_bases", {})))


def _follow(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    assert isinstance(optimizer, DifferentiableOptimizer)
    with torch._C.DisableTorchFunction():  # bookkeeping, and no part of the loop that a context may be watching
        optimizer._sync()
        optimizer._before_step()


def _count(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    assert isinstance(optimizer, DifferentiableOptimizer)
    with torch._C.DisableTorchFunction():
        optimizer._after_step()
    optimizer.schedule_step += 1


_count.part_of_step = True  # type: ignore[attr-defined]
