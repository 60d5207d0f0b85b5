"""What is found out, and checked, when a transformed model is first called."""

from __future__ import annotations

__all__ = ["Prepared"]

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from metaopt.errors import ResponseError
from metaopt.stn.batches import count, shared
from metaopt.stn.calls import Call, Place, confirmed, follow
from metaopt.stn.generators import same_randomness
from metaopt.stn.layouts import Layout, NeedsGroups, Site, infer, reordered
from metaopt.stn.modes import evaluation
from metaopt.stn.orders import noted
from metaopt.stn.outputs import close, rows
from metaopt.stn.parts import MOST, Parted
from metaopt.stn.passes import Pass
from metaopt.stn.recorders import Recorder, Tracer
from metaopt.stn.running import Found

# Different perturbations of these examples.
POINTS = 4


Traced = TypeVar("Traced", bound=Recorder)


class Inseparable(Exception):
    """The model can't be run on a part of a batch."""


class Prepared(Parted):
    """The part of `Tuned` that looks at the model before it relies on it."""

    rho: Parameter
    verify: bool
    names: set[str]

    def _prepare(self, args: Any, kwargs: Any) -> None:
        """Find out where the examples are in the model, and check that every use of a weight was seen."""
        training = self.model.training
        if training in self._layouts:
            return
        self.shared |= shared(args, kwargs, self.batch_dim, count(args, kwargs, self.batch_dim))
        try:
            with self._unmoved(), torch.no_grad(), self._unwritten() as ran:
                self._look(training, args, kwargs, ran)
        except Inseparable as why:
            # As a graph's nodes are, or a state that has the examples along another axis.
            self.fallback |= dict.fromkeys(self.names, str(why))
            self.mixes, self._layouts[training] = True, Found({}, {})
        except BaseException:
            self._layouts.pop(training, None)
            raise
        if training and self.draws is None:
            self.draws = False

    @contextmanager
    def _unwritten(self) -> Iterator[Callable[[], None]]:
        """Notice a model that goes on to change its weights; one that keeps their norm within a bound does not.

        Yields:
            What is called when it ran once, at least.

        Raises:
            ResponseError: if it goes on to change them; they are put back.
        """
        weights = [p for p in self.model.parameters() if p.numel()]
        kept, versions = [p.detach().clone() for p in weights], [p._version for p in weights]
        after: list[tuple[str, Tensor, Tensor]] = []

        def ran() -> None:
            named = {id(p): name for name, p in self.model.named_parameters()}
            written = (p for p, version in zip(weights, versions, strict=True) if p._version != version)
            after.extend((named[id(p)], p, p.detach().clone()) for p in written)

        yield ran
        for name, weight, value in after:
            if not close(weight, value, 0.0):
                for p, before in zip(weights, kept, strict=True):
                    p.copy_(before)
                raise ResponseError(
                    f"the model writes on its parameter {name!r} each time it is called, or when its mode changes, and "
                    "it is called several times on one batch: its weights would be others each time. Let it compute a "
                    "new tensor, as `F.linear(x, scale * self.weight)`, or write on parameters outside of `forward`."
                )

    def _look(self, training: bool, args: Any, kwargs: Any, ran: Callable[[], None]) -> None:
        with evaluation(self.model):
            known, _ = self._infer(args, kwargs, None)
            ran()
            if self.verify:
                known.refuse(self._reordered(known.layouts, args, kwargs))
                wrong = self._in_turn(known, args, kwargs)
                self.fallback |= dict.fromkeys(wrong, "an example has another output than at changed weights")
        self._layouts[training] = self._trained(known, args, kwargs) if training else known
        if self.verify:
            self.epsilon = self._check(args, kwargs)
            self._look_for_mixing(args, kwargs)

    def _trained(self, known: Found, args: Any, kwargs: Any) -> Found:
        found, new = self._infer(args, kwargs, known)
        coupled = any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules())
        if not new or not self.verify or self.fallback or coupled:
            return found
        # What training has and evaluation has not, such as a path without a cache, is compared in training.
        trial = replace(found, calls={**found.calls, **new})
        wrong = self._in_turn(trial, args, kwargs)
        if not wrong and not self.fallback:
            return trial
        self.fallback = {}
        return found

    def _infer(self, args: Any, kwargs: Any, known: Found | None) -> tuple[Found, dict[Place, Call]]:
        """What is seen in this mode; and calls that were not seen in evaluation, where ``known`` was."""
        whole = count(args, kwargs, self.batch_dim)
        parts = [(self._part(args, kwargs, torch.arange(n) % whole), n) for n in (2, 3)]
        two, three = (self._recorded(*inputs, n, Tracer) for inputs, n in parts)
        layouts = infer(two.seen, three.seen, None if known is None else known.layouts)
        calls = follow(two.noted, three.noted, (two.starts, three.starts))
        read = noted(two.read, three.read)
        if known is None:
            return Found(layouts, calls, read), {}
        new = {place: call for place, call in calls.items() if place not in known.calls and isinstance(call, Call)}
        return Found(layouts, confirmed(calls, known.calls), known.reads | read), new

    def _reordered(self, known: Mapping[Site, Layout | str], args: Any, kwargs: Any) -> dict[Site, str]:
        whole = count(args, kwargs, self.batch_dim)
        order = _order(whole)
        first = order.sort().values
        try:
            given, permuted = (
                self._recorded(*self._part(args, kwargs, part), len(part), Recorder).seen for part in (first, order)
            )
        except Inseparable:
            # It insists on an order, such as sequences of falling length: then it keeps the one that it is given.
            return {}
        found = reordered(known, given, permuted, order)
        if found:
            # Few values that are drawn at random may be those of other examples; drawn anew they are others.
            with same_randomness(self.device):
                torch.rand(7, device=self.device)
                part = self._part(args, kwargs, first)
                again = self._recorded(*part, len(first), Recorder).seen
            found = {s: why for s, why in found.items() if all(map(torch.equal, given[s], again.get(s, ())))}
        return found

    def _recorded(self, args: Any, kwargs: Any, examples: int, kind: type[Traced]) -> Traced:
        z = self.rho.new_zeros(examples, self.coordinates.size)
        values = self.coordinates.values(self.coordinates.leaf().detach().expand(examples, -1))
        try:
            with self._unmoved():
                _, p = self._run(z, kind, values, args, kwargs, response=False)
        except ResponseError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise Inseparable(
                f"`{type(self.model).__name__}` was run on {examples} examples, to find out where they are in what "
                f"its layers see, and that failed: {error}; for a perturbation of each example, these must be along "
                f"axis {self.batch_dim} of every tensor that it is called with (`transform(..., batch_dim=...)` says "
                "which), and tensors without examples of another size along it"
            ) from error
        assert isinstance(p, kind)
        return p

    def _check(self, args: Any, kwargs: Any) -> float:
        """With the same perturbation for all examples, responses must do what changed weights do.

        Returns:
            The rounding of the lowest precision within the model.
        """
        examples = count(args, kwargs, self.batch_dim)
        z = self.rho.new_ones(1, self.coordinates.size)
        weight = 0.3 * torch.randn_like(self.responses.weight) / self.coordinates.size
        values = self.coordinates.values(self.coordinates.leaf().detach().expand(examples, -1))
        constant: dict[str, Any] = {"response": False, "weight": weight}
        before = dict(self.fallback)
        output, p = self._responses_of(z.expand(examples, -1), values, args, kwargs, constant)
        unseen = {e.name for e in self.responses.entries} - p.used - set(self.fallback)
        changed = self._changed(z, values, args, kwargs, constant)
        if close(output, changed, p.epsilon):
            return p.epsilon
        if not unseen and not p.apart:
            self.fallback = before
            if not close(changed, self._changed(z, values, args, kwargs, constant), p.epsilon):
                raise ResponseError(
                    f"`{type(self.model).__name__}` gives another output when it is called again, at the same weights "
                    "and random numbers: it keeps a state where that can't be put back. Let it be a buffer or an "
                    "attribute of a module: a tensor, a number, or a list or dictionary of these."
                )
            raise ResponseError(
                f"`{type(self.model).__name__}` uses its weights in a way that can't be seen, such as a custom "
                "autograd.Function beside a layer: its response would be wrong. Let one parameter be used either by "
                "layers or by such a function."
            )
        self.fallback |= dict.fromkeys(p.apart, "its responses by example are not those of a changed parameter")
        self.fallback |= dict.fromkeys(unseen, "no function of torch was seen to use it")
        return self._check(args, kwargs)

    def _in_turn(self, known: Found, args: Any, kwargs: Any) -> set[str]:
        """Where examples have instances of a parameter, compare each with itself at changed weights.

        Returns:
            The parameters of which they have instances, if one is not as it was there.
        """
        whole = count(args, kwargs, self.batch_dim)
        mode = self.model.training
        kept = self._layouts.get(mode)
        order = _order(whole) if whole >= POINTS else torch.arange(POINTS, device="cpu") % whole
        self._layouts[mode] = known
        try:
            try:
                # A model that sorts its examples does not keep this order.
                inputs = self._part(args, kwargs, order)
                return self._alone(len(order), *inputs)
            except (RuntimeError, ValueError, TypeError, IndexError):
                # It insists on one.
                return self._alone(len(order), *self._part(args, kwargs, order.sort().values))
        finally:
            self._layouts.pop(mode)
            if kept is not None:
                self._layouts[mode] = kept

    def _alone(self, examples: int, args: Any, kwargs: Any) -> set[str]:
        # A few points are enough to see that an example has another's.
        point = torch.arange(examples, device="cpu") % POINTS
        z = torch.randn(POINTS, self.coordinates.size, device="cpu").to(self.rho)
        weight = 0.3 * torch.randn_like(self.responses.weight) / self.coordinates.size
        values = self.coordinates.values(self.coordinates.leaf().detach().expand(examples, -1))
        how: dict[str, Any] = {"response": False, "weight": weight}
        together, p = self._responses_of(z[point.to(z.device)], values, args, kwargs, how)
        if not p.apart or self.fallback:
            # The examples of a group have one perturbation, and that is checked.
            return set()
        seen = [rows(together, examples, b, self.batch_dim) for b in range(examples)]
        right = bool(seen[0])
        for i in range(min(POINTS, examples)):
            # The others don't matter, unless they are seen: then their weights do, and groups are right.
            changed = self._changed(z[i : i + 1], values, args, kwargs, how)
            for b in range(i, examples, POINTS):
                right = right and close(seen[b], rows(changed, examples, b, self.batch_dim), p.epsilon)
        return set() if right else p.apart

    def _responses_of(self, z: Tensor, values: Mapping[str, Tensor], args: Any, kwargs: Any, how: Any) -> Any:
        """A nonlinear pass; what can't respond per example is noted."""
        while True:
            try:
                with self._unmoved():
                    return self._run(z, Pass, values, args, kwargs, **how)
            except NeedsGroups as needs:
                if needs.name not in self.names:
                    raise
                self.fallback[needs.name] = needs.why

    def _changed(self, z: Tensor, values: Mapping[str, Tensor], args: Any, kwargs: Any, how: Any) -> Any:
        """The output with all weights changed by the response at one point."""
        kept, self.fallback = self.fallback, dict.fromkeys((e.name for e in self.responses.entries), "")
        try:
            with self._unmoved():
                return self._run(z, Pass, values, args, kwargs, **how)[0]
        finally:
            self.fallback = kept


def _order(whole: int) -> Tensor:
    """Some examples in an order with which a reversal or a rotation by the model does not commute."""
    return torch.randperm(min(whole, MOST), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
