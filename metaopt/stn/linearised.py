"""The linearised pass: primal and tangent of every intermediate value, side by side, from one run of the model.

The tangent of a network's output by its weights, ``J_yw Θ ε``, is carried through the functions that the model calls:
by hand-written rules for the known ones, by forward-mode AD of the single function otherwise. Primal and tangent share
every dropout mask, since each mask is drawn once. Only the tangents have a graph.

References:
    Bae and Grosse 2020, Sec. 3.3 (linearised response), Sec. 3.4 (forward mode).
"""

from __future__ import annotations

__all__ = ["LinearisedPass", "carry", "kept_tangent"]

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from metaopt.stn.forward_mode import dual_level
from metaopt.stn.layouts import NeedsGroups
from metaopt.stn.passes import Pass, Unsupported, function_name
from metaopt.stn.spelt import SPELT_OUT

Rule = Callable[..., Any]
_ATTRIBUTE = "_metaopt_tangent"


class LinearisedPass(Pass):
    """A forward pass that carries tangents by the weights."""

    linearised = True
    # By function: how a tangent passes through. Filled by `metaopt.stn.tangents`.
    tangent_rules: ClassVar[dict[Any, Rule]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Storages that several tensors with tangents share: what writes on one would leave the others' tangents stale.
        self._shared: set[int] = set()

    def plain(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._carries(args, kwargs) or not torch.is_grad_enabled():
            # Under the user's `no_grad` a value is a constant, in training too.
            return func(*args, **kwargs)
        rule = self.tangent_rules.get(func)
        if rule is not None:
            return rule(self, func, *args, **kwargs)
        if func in SPELT_OUT:
            with self:
                result = SPELT_OUT[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.by_forward_ad(func, args, kwargs)

    def each(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], needs: NeedsGroups | None = None) -> Any:
        return super().each(func, args, kwargs, needs) if torch.is_grad_enabled() else func(*args, **kwargs)

    def differentiated(self, func: Any, values: tuple[Tensor, ...]) -> Any:
        return self.by_forward_ad(func, values, {})

    def tangent(self, value: Any) -> Tensor | None:
        """The tangent of a tensor in this pass, if it has one."""
        held = getattr(value, _ATTRIBUTE, None) if isinstance(value, Tensor) else None
        return held[1] if held is not None and held[0] is self else None

    def join(self, value: Tensor, change: Tensor | None) -> Tensor:
        if change is not None and torch.is_grad_enabled():
            carry(self, value, self.like(change, value))
        return value

    def overwrite(self, target: Tensor, value: Tensor, change: Tensor | None) -> Tensor:
        return self.write(target.copy_(value), change)

    def share(self, *tensors: Tensor) -> None:
        """Note that tensors lie on the same storage."""
        self._shared.update(t.untyped_storage().data_ptr() for t in tensors)

    def write(self, target: Tensor, tangent: Tensor | None) -> Tensor:
        """Give a tensor that was just written in place its new tangent.

        Raises:
            Unsupported: if another tensor with a tangent may lie on the same storage.
        """
        if target._is_view() or target.untyped_storage().data_ptr() in self._shared:
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
        name = getattr(func, "__name__", "")
        written = kwargs.get("out") is not None or kwargs.get("inplace") or name == "__setitem__"
        if (
            written
            or (name.endswith("_") and not name.endswith("__"))
            or (name.startswith("__i") and name != "__invert__")
        ):
            raise Unsupported(f"`{function_name(func)}` in place")
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
                raise Unsupported(f"`{function_name(func)}`, which has no forward-mode derivative") from error

            def split(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                primal, tangent = forward_ad.unpack_dual(value)
                if tangent is not None:
                    carry(self, primal, tangent)
                    self.share(primal)
                return primal

            return pytree.tree_map(split, result)

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
    setattr(value, _ATTRIBUTE, (p, tangent if tangent.shape == value.shape else tangent.expand_as(value)))
    return value


def kept_tangent(value: Tensor) -> bool:
    """Whether a tensor still has the tangent of a pass."""
    return getattr(value, _ATTRIBUTE, None) is not None
