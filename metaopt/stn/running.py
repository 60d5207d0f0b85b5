"""Forward passes of a model: at one set of weights for all examples, or with a response for each."""

from __future__ import annotations

__all__ = ["Found", "Running"]

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.capture.applied import see_functions
from metaopt.stn.calls import Call, Place
from metaopt.stn.coordinates import Coordinates, Values
from metaopt.stn.guards import guarded
from metaopt.stn.layouts import Layout, Site
from metaopt.stn.masks import Mask
from metaopt.stn.orders import Key, Orders
from metaopt.stn.passes import Pass
from metaopt.stn.perturbations import Noise, Perturbation
from metaopt.stn.recorders import Tracer
from metaopt.stn.responses import Active, Responses
from metaopt.stn.substitution import Slots, substituted


@dataclass(frozen=True)
class Found:
    """What is known of a model in one mode.

    Args:
        layouts: where the examples are.
        calls: how functions without a rule are called.
        reads: where examples are read at indices.
    """

    layouts: dict[Site, Layout | str]
    calls: dict[Place, Call | str]
    reads: dict[Key, Layout | str] = field(default_factory=dict)

    def refuse(self, why: Mapping[Site, str]) -> None:
        """Note why examples can't be told apart at some sites."""
        self.layouts.update(why)
        for name, function in why:
            for place in self.calls:
                if place[0] == name and place[1].rpartition(".")[2] == function:
                    self.calls[place] = why[name, function]


class Running(nn.Module):
    """The part of `Tuned` that calls the model."""

    model: nn.Module
    coordinates: Coordinates
    responses: Responses
    rho: nn.Parameter
    slots: Slots
    bound: dict[str, str]
    # The hyperparameters that are rates of dropouts.
    rated: frozenset[str]
    fallback: dict[str, str]
    _layouts: dict[bool, Found]
    # Whether it draws from other generators than torch's, such as Python's; None until that was seen.
    draws: bool | None

    @property
    def device(self) -> torch.device:
        """Where the response is."""
        rho: nn.Parameter = self._parameters["rho"]  # type: ignore[assignment]  # at less cost than as an attribute
        return rho.device

    def _plain(
        self, changes: Mapping[str, Tensor], values: Values, args: Any, kwargs: Any, at: Perturbation | None
    ) -> Any:
        """The model at one set of weights for all examples, with the dropout rates of the present hyperparameters."""
        replaced = {name: self.slots.parameter(name) + change for name, change in changes.items()}
        # All examples have the same rates: one number each.
        p = Pass({}, {}, {name: values.number(name) for name, _ in self._rates(values)})
        p.noise = Noise() if at is None else at.noise
        p.moves_statistics = True
        masked = self._masked(p, replaced, values)
        seen = p if self.slots.rates and self.model.training else nullcontext()
        same = seen is not p and not masked and not replaced
        with (
            guarded(args, kwargs, recomputes=same),
            substituted(self.slots, replaced, buffers=False, rates=self.model.training, masked=masked),
            seen,
        ):
            output = self.model(*args, **kwargs)
        self._note(p, at)
        return output

    def _masked(
        self, p: Pass, replaced: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> list[tuple[Mask, Tensor]]:
        """What stands in for weights of which connections or words are dropped; each responds as it does, masked."""
        found = []
        for mask in self.slots.masks:
            if not mask.module.training:
                continue
            p.hyper_used.add(mask.hyper)
            weight = replaced[mask.name] if mask.name in replaced else self.slots.parameter(mask.name)
            found.append((mask, p.times(weight, mask.draw(weight, values, p.noise))))
        return found

    def _rates(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The values that are dropout rates; whether the model uses them is another matter."""
        return ((name, value) for name, value in values.items() if name in self.rated)

    def _note(self, p: Pass, at: Perturbation | None) -> None:
        if at is not None:
            at.uses |= p.hyper_used
            at.called |= p.called
            at.functional_dropout |= p.functional_dropout

    def _stand_ins(
        self, z: Tensor, kind: type[Pass], *, response: bool, at: Perturbation | None, weight: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[int, Active], list[tuple[Tensor, Tensor]]]:
        """What stands for the parameters in a pass, by name; which of it rules know; which has a tangent, and what."""
        replaced: dict[str, Tensor] = {}
        marks: dict[int, Active] = {}
        held: list[tuple[Tensor, Tensor]] = []
        for active in self.responses.active(z, frozen=not response, weight=weight):
            name = active.entry.name
            parameter = self.slots.parameter(name)
            alias = parameter.detach() if at is None else at.alias(parameter)
            if name in self.fallback:
                change = active.change()
                if kind.linearised:
                    held.append((alias, change))
                else:
                    alias = alias + change
            else:
                marks[id(alias)] = active
            replaced[name] = alias
        return replaced, marks, held

    def _run(
        self,
        z: Tensor,
        kind: type[Pass],
        values: Mapping[str, Tensor],
        args: Any,
        kwargs: Any,
        *,
        response: bool,
        at: Perturbation | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Any, Pass]:
        """One forward pass of the model with responses at ``z``.

        Args:
            z: the coordinates, ``(B, H)``.
            kind: the kind of pass.
            values: the hyperparameters' values.
            args: the model's.
            kwargs: the model's.
            response: whether Θ is.
            at: where to note what was used; without it w0 is a constant.
            weight: another ``U``.
        """
        replaced, marks, held = self._stand_ins(z, kind, response=response, at=at, weight=weight)
        # A rate that has one draw for a minibatch, or for a group, is one number, wherever the examples are.
        grouped = bool(self.fallback) and (at is None or at.groups is not None)
        shared = self.rated if grouped else self.coordinates.per_batch
        rates = {n: _first(value) if n in shared else value for n, value in self._rates(values)}
        found = self._layouts.get(self.model.training, Found({}, {}))
        orders = Orders(found.reads, z.shape[0]) if found.reads and not kind.recording else None
        p = kind(marks, found.layouts, rates, found.calls, orders)
        p.modules, p.trained = self.slots.responding, response or weight is not None
        if isinstance(p, Tracer):
            p.originals = {id(self.slots.parameter(name)): name for name in replaced}
        if at is not None:
            p.noise, p.moves_statistics = at.noise, at.weights
        for alias, change in held:
            p.join(alias, change)
        masked = self._masked(p, replaced, values)
        with (
            guarded(args, kwargs),
            substituted(self.slots, replaced, buffers=not p.moves_statistics, rates=True, masked=masked),
            p.begin(self.slots.modules),
            p,
            see_functions(p),
        ):
            output = self.model(*args, **kwargs)
        p.require_joined(output)
        self._note(p, at)
        return output, p


def _first(value: Tensor) -> Tensor:
    return value[0] if value.ndim == 1 else value.flatten()[0]
