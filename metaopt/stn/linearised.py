"""The linearised pass: primal and tangent of every intermediate value, side by side, from one run of the model.

The tangent of a network's output by its weights, ``J_yw Θ ε``, is carried through the functions that the model calls:
by hand-written rules for the known ones, by forward-mode AD of the single function otherwise. Primal and tangent share
every dropout mask, since each mask is drawn once. Only the tangents have a graph.

References:
    Bae and Grosse 2020, Sec. 3.3 (linearised response), Sec. 3.4 (forward mode).
"""

from __future__ import annotations

__all__ = ["LinearisedPass", "carry", "kept_tangent"]

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules._functions import BackwardHookFunction
from torch.utils import _pytree as pytree

from metaopt.stn.arguments import function_name, reads_no_values
from metaopt.stn.calls import has_views, out_of_place, placed, written_in_place
from metaopt.stn.forward_mode import dual_level
from metaopt.stn.functions import Call, by_value, pushed
from metaopt.stn.layouts import NeedsGroups
from metaopt.stn.passes import Pass, Unsupported
from metaopt.stn.spelt import SPELT_OUT

Rule = Callable[..., Any]
_ATTRIBUTE = "_metaopt_tangent"


class LinearisedPass(Pass):
    """A forward pass that carries tangents by the weights."""

    linearised = True
    # By function: how a tangent passes through. Filled by `metaopt.stn.tangents`.
    tangent_rules: ClassVar[dict[Any, Rule]] = {}

    def plain(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._carries(args, kwargs) or not torch.is_grad_enabled():
            # Under the user's `no_grad` a value is a constant, in training too.
            return func(*args, **kwargs)
        rule = self.tangent_rules.get(func)
        if rule is not None:
            args, kwargs = placed(args, kwargs) if kwargs and len(args) < 2 else (args, kwargs)
            return rule(self, func, *args, **kwargs)
        if func in SPELT_OUT:
            with self:
                result = SPELT_OUT[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.by_forward_ad(func, args, kwargs)

    def each(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], needs: NeedsGroups | None = None) -> Any:
        return super().each(func, args, kwargs, needs) if torch.is_grad_enabled() else func(*args, **kwargs)

    def within(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        # What the function is given, it sees without the tangent or as a dual number. A tangent here is that of a value
        # of which it has no gradient, such as a weight that is passed on only where it requires one.
        if self._carries(args, kwargs) and not reads_no_values(func):
            raise Unsupported("a custom autograd.Function that uses a value which it isn't given")

    def custom(self, cls: type, own: Any, args: Any, kwargs: Any) -> Any:
        if not self._carries(args, kwargs) or not torch.is_grad_enabled():
            return own(*args, **kwargs)
        tangents = [self.tangent(a) for a in args]
        if cls is BackwardHookFunction:
            # The identity, of which a module's hooks take hold.
            values = tuple(a.view_as(a) for a in args)
            given = [torch.zeros_like(a) if t is None else t for a, t in zip(args, tangents, strict=True)]
            with torch._C.DisableTorchFunction():
                found = own(*given)
            return tuple(v if t is None else carry(self, v, f) for v, t, f in zip(values, tangents, found, strict=True))
        with torch._C.DisableTorchFunction():
            graph = any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if graph:
            # A loss may differentiate the values by the model's input.
            return self.plain(own, args, kwargs)
        known = self.nature(cls, args, kwargs)
        if not self.trained and not (known.own and known.linear) and not known.steps:
            return by_value(known, cls, own, args, kwargs)
        result, changed = pushed(Call(cls, args, kwargs, tangents), known, own)
        for value, tangent in changed:
            carry(self, value, tangent)
        return result

    def hook(self, tensor: Tensor, hook: Any) -> Any:
        tangent = self.tangent(tensor)
        if tangent is None or not (self.trained and tangent.requires_grad):
            return super().hook(tensor, hook)
        return tangent.register_hook(hook)

    def begin(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        if any(m._backward_hooks and not m._is_full_backward_hook for m in modules):
            raise Unsupported("a backward hook of the old kind; `register_full_backward_hook` has the right gradients")
        return super().begin(modules)

    def differentiated(self, func: Any, values: tuple[Tensor, ...]) -> Any:
        return self.by_forward_ad(func, values, {})

    def tangent(self, value: Any) -> Tensor | None:
        """The tangent of a tensor in this pass, if it has one."""
        held = getattr(value, _ATTRIBUTE, None)
        return held[1] if held is not None and held[0] is self else None

    def join(self, value: Tensor, change: Tensor | None) -> Tensor:
        if change is None or not torch.is_grad_enabled():
            return value
        return carry(self, value, change if change.dtype == value.dtype else change.to(value.dtype))

    def overwrite(self, target: Tensor, value: Tensor, change: Tensor | None) -> Tensor:
        return self.write(target.copy_(value), change)

    def write(self, target: Tensor, tangent: Tensor | None) -> Tensor:
        """Give a tensor that was just written in place its new tangent.

        Raises:
            Unsupported: if another tensor lies on the same storage: its tangent would be stale, or missing.
        """
        if has_views(target):
            raise Unsupported("an in-place operation on a tensor that has views")
        if tangent is None:
            target.__dict__.pop(_ATTRIBUTE, None)
            return target
        return self.join(target, tangent)

    def by_forward_ad(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One function's primal and tangent by torch's forward mode, from a single call.

        Raises:
            Unsupported: if it writes in place, or has no forward derivative.
        """
        name = function_name(func)
        if func is torch.autograd.grad:
            raise Unsupported("a gradient within the model")
        if kwargs.get("out") is not None:
            raise Unsupported(f"`{name}` in place")
        if kwargs.get("inplace"):
            return self._write(name, func, args, {**kwargs, "inplace": False})
        if written_in_place(name):
            return self._write(name, out_of_place(name), args, kwargs)
        with dual_level():

            def dual(value: Any) -> Any:
                tangent = self.tangent(value)
                if tangent is None:
                    return value
                # Forward mode refuses expanded tensors, whose entries lie on one another.
                lies = value.contiguous() if 0 in value.stride() else value
                return forward_ad.make_dual(lies, tangent.expand_as(value).contiguous())

            try:
                result = func(*pytree.tree_map(dual, args), **pytree.tree_map(dual, dict(kwargs)))
            except (NotImplementedError, RuntimeError) as error:
                if "forward" not in str(error).lower():
                    raise
                raise Unsupported(f"`{name}`, which has no forward-mode derivative") from error

            def split(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                primal, tangent = forward_ad.unpack_dual(value)
                # What is unpacked is a view of the dual number, on which nothing could be written.
                primal = primal if primal.requires_grad else primal.detach()
                return primal if tangent is None else carry(self, primal, tangent)

            return pytree.tree_map(split, result)

    def _write(self, name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """A new tensor is computed, by a function that does not write, and written."""
        target = args[0] if args else None
        if func is None or not isinstance(target, Tensor) or target._is_view():
            raise Unsupported(f"`{name}` in place")
        # Of a copy: the tangent's derivative may need what is overwritten.
        value = self.plain(func, (self.join(target.clone(), self.tangent(target)), *args[1:]), dict(kwargs))
        if not isinstance(value, Tensor) or value.shape != target.shape:
            raise Unsupported(f"`{name}` in place")
        return self.overwrite(target, value, self.tangent(value))

    def _carries(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                if self.tangent(value) is not None:
                    return True
            elif isinstance(value, (list, tuple)) and any(self.tangent(v) is not None for v in value):
                return True
        return False


def carry(p: Pass, value: Tensor, tangent: Tensor) -> Tensor:
    """Let a tensor carry a tangent for the rest of a pass."""
    if value.dtype is not p.precision and value.is_floating_point():
        p.note_precision(value.dtype)
    setattr(value, _ATTRIBUTE, (p, tangent if tangent.shape == value.shape else tangent.expand_as(value)))
    return value


def kept_tangent(value: Tensor) -> bool:
    """Whether a tensor still has the tangent of a pass."""
    return getattr(value, _ATTRIBUTE, None) is not None
