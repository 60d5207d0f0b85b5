"""A pass of the unmodified model in which weights respond: a mode of torch sees every function the model calls.

Nothing in the model is replaced. While it runs, its parameters stand aside for aliases that carry their response, and
each function of torch that is given one adds that response's effect by the rule of `metaopt.stn.rules`.
"""

from __future__ import annotations

__all__ = ["Pass", "Recorder", "Unsupported", "function_name"]

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metaopt.stn.layouts import Layout, NeedsGroups, Site
from metaopt.stn.perturbations import Noise
from metaopt.stn.responses import Active

Rule = Callable[..., Any]

# Attributes of a tensor that are not tensors: reading them is no use of a weight.
PLAIN = {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_leaf", "grad_fn", "itemsize"}
PLAIN_METHODS = {"size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size", "ndimension"}
PLAIN_METHODS |= {"type", "get_device", "is_complex", "__len__", "__hash__", "__repr__", "data_ptr", "nelement"}


class Unsupported(Exception):
    """This engine can't differentiate a function."""


class Pass(TorchFunctionMode):
    """A forward pass with responses, nonlinear in the weights.

    Args:
        marks: the responses by ``id`` of the parameter's alias.
        layouts: where the examples are, by site.
        rates: the dropout rates of each example by hyperparameter.

    Attributes:
        rules: by function: what it does with weights that respond, or with rates. Filled by `metaopt.stn.rules`.
    """

    rules: ClassVar[dict[Any, Rule]] = {}
    linearised: ClassVar[bool] = False
    recording: ClassVar[bool] = False

    def __init__(
        self, marks: Mapping[int, Active], layouts: Mapping[Site, Layout | str], rates: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.marks = dict(marks)
        self.layouts = layouts
        self.rates = rates
        self.used: set[str] = set()
        self.hyper_used: set[str] = set()
        self.functional_dropout = False
        self.noise = Noise()
        self.moves_statistics = False
        self.fixed: Layout | None = None
        self.epsilon = 0.0
        self._kept: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = self.rules.get(func)
        if rule is not None:
            return rule(self, func, *args, **kwargs)
        self.refuse_marked(func, args, kwargs)
        return func(*args, **kwargs)

    # -- responses

    def mark_of(self, tensor: Any) -> Active | None:
        """The response of an alias, if it is one."""
        return self.marks.get(id(tensor))

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
        return self.fixed or self.locate((active.entry.name, func.__name__), value, len(active.coefficients[0]))

    def locate(self, site: Site, value: Tensor, examples: int) -> Layout | None:
        """The layout of a site, with the number of examples checked."""
        found = self.layouts.get(site, "it was not used when the axes of examples were looked for")
        if isinstance(found, Layout):
            found = found.fitted(value, examples)
        if isinstance(found, str):
            raise NeedsGroups(site[0], found)
        return found

    def refuse_marked(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Raise `NeedsGroups` if a responding weight is given to a function that has no rule for it."""
        if not self.marks:
            return
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                active = self.marks.get(id(tensor))
                if active is not None and not _reads_no_values(func):
                    raise NeedsGroups(
                        active.entry.name, f"it is used by `{function_name(func)}`, which has no rule per example"
                    )

    # -- tangents: none in the nonlinear pass

    def tangent(self, value: Any) -> Tensor | None:
        """The tangent that a tensor carries, in a linearised pass."""
        return None

    def join(self, value: Tensor, change: Tensor | None) -> Tensor:
        """A function's result with the change by the responses: added, or as its tangent."""
        return value if change is None else value + self.like(change, value)

    def like(self, change: Tensor, value: Tensor) -> Tensor:
        """A change in the precision of what changes, which autocast may have lowered; the lowest is noted."""
        self.epsilon = max(self.epsilon, torch.finfo(value.dtype).eps)
        return change.to(value.dtype)

    def overwrite(self, target: Tensor, value: Tensor, change: Tensor | None) -> Tensor:
        """Write a function's result in place."""
        return target.copy_(value)


class Recorder(Pass):
    """A pass that changes nothing and notes what each site was given."""

    recording = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[Site, list[Tensor]] = {}

    def locate(self, site: Site, value: Tensor, examples: int) -> Layout | None:
        self.seen.setdefault(site, []).append(value.detach())
        return None

    def layout(self, active: Active, func: Any, value: Tensor) -> Layout | None:
        self.used.add(active.entry.name)
        # In a composite rule the axis is known; what counts is that the composite's own input has it.
        return None if self.fixed else self.locate((active.entry.name, func.__name__), value, 0)

    def refuse_marked(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        return


def _reads_no_values(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in PLAIN
    return name in PLAIN_METHODS


def function_name(func: Any) -> str:
    """A function of torch, in words for an error."""
    if getattr(func, "__name__", "") == "__get__":
        return f"Tensor.{getattr(func.__self__, '__name__', '?')}"
    module = getattr(func, "__module__", None) or "Tensor"
    return f"{module.removeprefix('torch._C.').removeprefix('_')}.{getattr(func, '__name__', func)}"
