"""What the drop-in optimizers share: hyperparameters among the settings, plain numbers in the groups."""

from __future__ import annotations

__all__ = ["DifferentiableOptimizer", "Setting"]

import uuid
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metaopt.followed import Followed, plainly, restored, slopes_of
from metaopt.links import Given, Link, assign, follow, mixed, shift, unlink
from metaopt.rules import rule_of

Setting = float | Tensor


class DifferentiableOptimizer(torch.optim.Optimizer):
    """What the drop-in optimizers share: tensors among their settings are kept as links, the groups hold numbers."""

    _links: dict[int, dict[str, Link]]
    schedule_step: int
    _owner: str

    def _link(self, **settings: Any) -> dict[str, Any]:
        """Keep the tensors among the constructor's settings aside; return the plain numbers for torch's constructor."""
        self._links = {}
        self._owner = uuid.uuid4().hex
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
        for name, link in links.items():
            rule_of(self).check(name, float(link.at(self.schedule_step).detach()))
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
        # Groups that were added since may be gone.
        self._links = {place: links for place, links in self._links.items() if place < len(self.param_groups)}
        for place, links in self._links.items():
            for name, link in links.items():
                link.base = bases.get(place, {}).get(name)
        with torch._C.DisableTorchFunction():  # bookkeeping, and no part of the loop that a context may be watching
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

    def linked_settings(self, group: dict[str, Any]) -> dict[str, tuple[Tensor, float, float]]:
        """The hyperparameter ``λ`` behind each linked setting of a group at the present step, and ``(c, d)``.

        A scheduler has made ``c · λ + d`` of it; ``c`` and ``d`` are constants of the step.
        """
        place = next(i for i, candidate in enumerate(self.param_groups) if candidate is group)
        rule = rule_of(self)
        result = {}
        for name in rule.settings:
            number = rule.number(group, name)
            if _is_followed(number):
                continue
            link = self._links.get(place, {}).get(name)
            if link is not None:
                link.last = follow(self, (place, name), link, number)
                if link.last is not number:  # what was found out of it holds until it is set again
                    assign(group, rule.settings[name], link.last)
                number = link.last
            if isinstance(number, Followed) and (number.slope or link is not None):
                # Another setting's number, or another group's, has been put here: it comes from that one's.
                behind = self._links.get(number.origin[0], {}).get(number.origin[1])
                if behind is None or number.slope != number.slope or not number.belongs(self._owner):
                    raise mixed(name, number, self._owner)
                result[name] = self._behind(number, behind)
        return result

    def _behind(self, number: Followed, link: Link) -> tuple[Tensor, float, float]:
        value = link.at(self.schedule_step)
        rest = float(number) - number.slope * float(value.detach())
        return value, number.slope, 0.0 if abs(rest) < 1e-14 * abs(number) else rest

    def _sync(self, *, search: bool = False) -> None:
        """Give the groups the hyperparameters' present numbers, as schedulers would have made them of these."""
        rule = rule_of(self)
        for place, links in self._links.items():
            group = self.param_groups[place]
            for name, link in links.items():
                new = float(link.at(self.schedule_step).detach())
                old, origin = link.base, (place, name)
                if old is not None and new == old:
                    continue
                rule.check(name, new)
                if old is None:
                    assign(group, rule.settings[name], Followed(new, 1.0, origin, self._owner))
                elif _is_followed(found := rule.number(group, name)):
                    shift(self, origin, new - old, search=search)
                else:
                    number = follow(self, origin, link, found)
                    assign(group, rule.settings[name], number)
                    shift(self, origin, new - old, search=search)
                    if number.origin == origin and float(number) == number.slope * old:
                        # To the last digit, where it can be had.
                        exact = Followed(number.slope * new, number.slope, origin, self._owner)
                        assign(group, rule.settings[name], exact)
                link.base = new

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_links", "_defaults_given", "schedule_step", "_owner")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hook()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the step that learned schedules are at and the numbers that linked settings were given."""
        result = super().state_dict()
        groups = result["param_groups"]
        result["param_groups"] = [{key: plainly(value) for key, value in group.items()} for group in groups]
        if any(self._links.values()):
            result["schedule_step"], result["link_bases"] = self.bookmark()
            result["link_slopes"] = [
                {key: slopes for key, value in group.items() if key != "params" and (slopes := slopes_of(value))}
                for group in groups
            ]
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the linked settings keep following their hyperparameters, at their present values."""
        own = ("schedule_step", "link_bases", "link_slopes")
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in own})
        for group, slopes in zip(self.param_groups, state_dict.get("link_slopes", ()), strict=False):
            group.update({key: restored(group[key], entry) for key, entry in slopes.items()})
        self.go_back((state_dict.get("schedule_step", 0), state_dict.get("link_bases", {})))


def _is_followed(number: Any) -> bool:
    """Whether a group's number is a tensor of the loop's own, which is followed as it is."""
    return isinstance(number, Tensor) and number.requires_grad


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
