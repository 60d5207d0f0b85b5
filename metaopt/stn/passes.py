"""A pass of the unmodified model in which weights respond: a mode of torch sees every function the model calls.

Nothing in the model is replaced. While it runs, its parameters stand aside for aliases that carry their response, and
each function of torch that is given one adds that response's effect by the rule of `metaopt.stn.rules`.
"""

from __future__ import annotations

__all__ = ["Pass", "Unsupported"]

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metaopt.stn.arguments import among, function_name, reads_no_values
from metaopt.stn.calls import Call, Place, placed
from metaopt.stn.custom import Custom
from metaopt.stn.functions import Unsupported
from metaopt.stn.instances import LARGEST, Instances, apply
from metaopt.stn.layouts import Layout, NeedsGroups, Site
from metaopt.stn.orders import Orders
from metaopt.stn.perturbations import Noise
from metaopt.stn.responses import Active
from metaopt.stn.trees import leaves

Rule = Callable[..., Any]

# Why an example can't be told from its place.
MOVED = "it is given examples that the model sorts or selects by their values"


class Pass(Custom):
    """A forward pass with responses, nonlinear in the weights.

    Args:
        marks: the responses by ``id`` of the parameter's alias.
        layouts: where the examples are, by site.
        rates: the dropout rates of each example by hyperparameter, or one number of all examples.
        calls: how functions without a rule are called, by site.
        orders: which tensors have the examples in another order, if the model reads them at indices.

    Attributes:
        rules: by function: what it does with weights that respond, or with rates. Filled by `metaopt.stn.rules`.
        composed: functions whose rule also takes what was computed from parameters.
    """

    rules: ClassVar[dict[Any, Rule]] = {}
    composed: ClassVar[set[Any]] = set()
    linearised: ClassVar[bool] = False

    def __init__(
        self,
        marks: Mapping[int, Active],
        layouts: Mapping[Site, Layout | str],
        rates: Mapping[str, Tensor | float],
        calls: Mapping[Place, Call | str] | None = None,
        orders: Orders | None = None,
    ) -> None:
        super().__init__()
        self.marks.update(marks)
        self.layouts = layouts
        self.rates = rates
        self.calls = {} if calls is None else calls
        self.orders = orders
        self.used: set[str] = set()
        self.hyper_used: set[str] = set()
        self.called: set[str] = set()
        self.functional_dropout = False
        self.noise = Noise()
        self.moves_statistics = False
        # The modules that respond: not to be called while a gradient of this pass is taken.
        self.modules: Sequence[nn.Module] = ()
        self.fixed: Layout | None = None
        self.epsilon = 0.0
        self.precision: torch.dtype | None = None
        # Parameters of which every example has an instance.
        self.apart: set[str] = set()
        # By which functions a view of a parameter came from it.
        self.paths: dict[int, str] = {}
        self._asked: set[int] = set()
        self._kept: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._within:
            self.within(func, args, kwargs)
            return func(*args, **kwargs)
        rule, given = self.rules.get(func), (args, kwargs)
        if rule is not None and kwargs and len(args) < 2:
            args, kwargs = placed(args, kwargs)
        known = among(self.marks, args, kwargs) if self.marks else ()
        if known or self.held:
            result = self._responding(func, rule, args, kwargs, known)
        else:
            result = self.plain(func, args, kwargs) if rule is None else rule(self, func, *args, **kwargs)
        if self.orders is not None:
            self.orders.follow(func, *given, result)
        return result

    def _responding(
        self, func: Any, rule: Rule | None, args: tuple[Any, ...], kwargs: dict[str, Any], known: Sequence[int]
    ) -> Any:
        """Call a function that may be given what responds."""
        # What was computed from parameters; they themselves may have a rule here.
        derived = self.held and any(key not in self.marks for key in among(self.held, args, kwargs))
        if derived and not reads_no_values(func) and func not in self.composed:
            return self.each(func, args, kwargs)
        asked, self._asked = self._asked, set()
        try:
            if rule is None:
                self.refuse(func, known)
                return self.plain(func, args, kwargs)
            result = rule(self, func, *args, **kwargs)
            self.refuse(func, known)
            return result
        except NeedsGroups as needs:
            if self.fixed is not None or not known:
                raise
            return self.each(func, args, kwargs, needs)
        finally:
            self._asked = asked

    # -- responses

    def mark_of(self, tensor: Any) -> Active | None:
        """The response of an alias, if it is one; who asks has a rule for it."""
        key = id(tensor)
        active = self.marks.get(key)
        if active is not None:
            self._asked.add(key)
        return active

    def mark(self, tensor: Tensor, active: Active) -> Tensor:
        """Let a part of a parameter, such as its first rows, respond as it does."""
        self._kept.append(tensor)
        self.marks[id(tensor)] = active
        return tensor

    def times(self, alias: Tensor, mask: Tensor) -> Tensor:
        """A weight with some entries dropped: it responds, or carries its tangent, as it did, with the same mask."""
        product, active, tangent = alias * mask, self.mark_of(alias), self.tangent(alias)
        if active is not None:
            self.mark(product, active.masked(mask))
        return product if tangent is None else self.join(product, tangent * mask)

    def layout(self, active: Active, func: Any, value: Tensor) -> Layout | None:
        """Where the examples are in what ``func`` is given; None where that is being found out."""
        self.used.add(active.entry.name)
        return self.fixed or self.locate((active.entry.name, func.__name__), value, active.coefficients[0].shape[0])

    def locate(self, site: Site, value: Tensor, examples: int) -> Layout | None:
        """The layout of a site, with the number of examples and their order checked."""
        found = self.layouts.get(site, "it was not used when the axes of examples were looked for")
        if type(found) is Layout:
            known = self.orders is None and found.repeat == 1 and value.ndim > found.axis
            if known and value.shape[found.axis] == examples:
                return found  # at once, as it is nearly always
            moved = self.orders is not None and value in self.orders
            found = MOVED if moved else found.fitted(value, examples)
            if type(found) is Layout:
                return found
        raise NeedsGroups(site[0], str(found))

    def refuse_marked(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Raise `NeedsGroups` if a responding weight is given to a function that has no rule for it."""
        self.refuse(func, among(self.marks, args, kwargs))

    def refuse(self, func: Any, known: Sequence[int]) -> None:
        """The same of the weights that it is given, by their ``id``."""
        for key in known:
            if key not in self._asked and not reads_no_values(func):
                raise NeedsGroups(
                    self.marks[key].entry.name, f"it is used by `{function_name(func)}`, which has no rule per example"
                )

    # -- instances

    def depends(self, tensor: Any) -> bool:
        """Whether a tensor is a responding parameter, or was computed from some alone."""
        return id(tensor) in self.held or id(tensor) in self.marks

    def instances(self, tensor: Any) -> Instances | None:
        """What a tensor is for each example, if it depends on a responding parameter, and on no example."""
        held, active = self.held.get(id(tensor)), self.marks.get(id(tensor))
        if held is not None or active is None:
            return held
        name, examples = active.entry.name, active.coefficients[0].shape[0]
        if examples * tensor.numel() > LARGEST:
            raise NeedsGroups(name, "it is too large to be made for each example")
        held = Instances(
            name, self.paths.get(id(tensor), name), self.join(tensor.expand(examples, *tensor.shape), active.changes())
        )
        self.used.add(name)
        self.apart.add(name)
        self.hold(tensor, held)
        return held

    def hold(self, tensor: Tensor, instances: Instances) -> Tensor:
        """Let a tensor stand for its instances."""
        self._kept.append(tensor)
        self.held[id(tensor)] = instances
        return tensor

    def require_joined(self, output: Any) -> None:
        """Raise `NeedsGroups` if a result was computed from parameters alone: it has no axis of examples."""
        if self.recording or (type(output) is Tensor and not self.depends(output)):
            return
        for leaf in leaves(output):
            held = self.instances(leaf)
            if held is not None:
                raise NeedsGroups(held.name, "the model returns what was computed from it alone")

    def each(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], needs: NeedsGroups | None = None) -> Any:
        """Call a function for each example alone.

        Raises:
            NeedsGroups: if it can't be; the reason is that of the rule, if there was one.
        """
        try:
            return apply(self, func, function_name(func), args, kwargs)
        except NeedsGroups as why:
            # The first reason is the rule's, if there is one.
            raise (why if needs is None or func not in self.rules else needs) from None

    def differentiated(self, func: Any, values: tuple[Tensor, ...]) -> Any:
        """A function's result, with its tangent in a linearised pass."""
        return func(*values)

    # -- tangents: none in the nonlinear pass

    def tangent(self, value: Any) -> Tensor | None:
        """The tangent that a tensor carries, in a linearised pass."""
        return None

    def join(self, value: Tensor, change: Tensor | None) -> Tensor:
        """A function's result with the change by the responses: added, or as its tangent."""
        return value if change is None else value + self.like(change, value)

    def like(self, change: Tensor, value: Tensor) -> Tensor:
        """A change in the precision of what changes, which autocast may have lowered; the lowest is noted."""
        if value.dtype is not self.precision:
            self.note_precision(value.dtype)
        return change if change.dtype == value.dtype else change.to(value.dtype)

    def note_precision(self, precision: torch.dtype) -> None:
        """Note that values are of a precision; the lowest decides which differences are rounding."""
        self.precision, self.epsilon = precision, max(self.epsilon, torch.finfo(precision).eps)

    def overwrite(self, target: Tensor, value: Tensor, change: Tensor | None) -> Tensor:
        """Write a function's result in place."""
        return target.copy_(value)
