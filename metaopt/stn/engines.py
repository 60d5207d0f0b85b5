"""Three ways to the same linearised network output, ``y' = f(x, w0) + J_yw Θ ε``.

`manual` carries tangents function by function. `forward` runs the nonlinear pass on a perturbation that is zero and
has ε as its forward-mode tangent. `double` runs it on a zero that requires grad, and differentiates twice. Each takes
primal and tangent from one run of the model, so that they share all randomness; nothing is ever reseeded.

References:
    Bae and Grosse 2020, Sec. 3.4; the trick of differentiating twice is Townsend's (2017).
"""

from __future__ import annotations

__all__ = ["ENGINES", "Runner", "combine"]

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules._functions import BackwardHookFunction
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from metaopt.capture.third import WRITTEN_OUT
from metaopt.stn.forward_mode import dual_level
from metaopt.stn.guards import unrepeated
from metaopt.stn.linearised import LinearisedPass
from metaopt.stn.passes import Pass, Unsupported
from metaopt.stn.spelt import SPELT_OUT
from metaopt.stn.trees import leaves, mapped


class Runner(Protocol):
    """Runs the model once, with responses at coordinates ``z``."""

    def __call__(self, z: Tensor, kind: type[Pass], /) -> tuple[Any, Pass]:
        """The output, and the pass that gave it."""
        ...


def combine(primal: Any, tangent: Any) -> Any:
    """The sum of a primal and its tangent, where there is one."""
    return primal if tangent is None else primal + tangent


def manual(run: Runner, z: Tensor) -> Any:
    """Hand-written tangents, with forward mode for single functions."""
    output, p = run(z, LinearisedPass)
    if isinstance(output, Tensor):
        return combine(output, p.tangent(output))
    return mapped(lambda y: combine(y, p.tangent(y)), output)


class _Differentiated(Pass):
    """A nonlinear pass that torch differentiates: by the model's own backward, which must be its derivative."""

    def custom(self, cls: type, own: Any, args: Any, kwargs: Any) -> Any:
        if cls is BackwardHookFunction:
            raise Unsupported("a hook on a gradient")
        known = self.nature(cls, args, kwargs) if torch.is_grad_enabled() else None
        if self.trained and known is not None and not (known.linear and (known.own or known.steps)):
            raise Unsupported(f"`{cls.__name__}`, whose backward is no derivative of its forward")
        return super().custom(cls, own, args, kwargs)

    def hook(self, tensor: Tensor, hook: Any) -> Any:
        if self.trained:
            raise Unsupported("a hook on a gradient")
        return super().hook(tensor, hook)

    def begin(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        if self.trained and any(m._backward_hooks or m._backward_pre_hooks for m in modules):
            raise Unsupported("a module with a hook on gradients")
        return super().begin(modules)


class _Spelt(TorchFunctionMode):
    """Functions of which torch's own derivatives have gaps are written in terms of others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SPELT_OUT:
            with self:
                result = SPELT_OUT[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


class _Thrice(_Spelt):
    """Likewise for normalisations, whose derivative is taken a third time here; what they keep is moved as ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in WRITTEN_OUT or not torch.is_grad_enabled():
            return super().__torch_function__(func, types, args, kwargs)
        if func is not F.layer_norm and (args[1] if len(args) > 1 else kwargs.get("running_mean")) is not None:
            with torch.no_grad():
                func(*args, **kwargs)
        return WRITTEN_OUT[func](*args, **kwargs)


class _ForwardMode(_Spelt):
    """Torch's forward mode ignores ``no_grad``; what a model computes under it is a constant here, as in training."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if torch.is_grad_enabled():
            return result
        return pytree.tree_map(lambda v: forward_ad.unpack_dual(v).primal if isinstance(v, Tensor) else v, result)


def forward(run: Runner, z: Tensor) -> Any:
    """Forward-mode AD; the backward pass belongs outside of the dual level, where it is an ordinary one."""
    with dual_level():
        dual = forward_ad.make_dual(torch.zeros_like(z), z)
        try:
            with _ForwardMode(), sdpa_kernel(SDPBackend.MATH):
                output, _ = run(dual, _Differentiated)
        except (NotImplementedError, RuntimeError) as error:
            text = str(error).lower()
            # Under autocast a dual weight's tangent keeps its precision, and its type is not "the same".
            if "forward" not in text and "jvp" not in text and "same" not in text:
                raise
            raise Unsupported(str(error).splitlines()[0]) from error

        def split(y: Any) -> Any:
            if not isinstance(y, Tensor):
                return y
            primal, tangent = forward_ad.unpack_dual(y)
            return combine(primal, tangent)

        return mapped(split, output)


def double(run: Runner, z: Tensor) -> Any:
    """Two backward passes: the derivative by ``v`` of ``vᵀ J`` is ``J``, applied to ε."""
    zero = torch.zeros_like(z).requires_grad_()
    with torch.enable_grad(), _Thrice(), sdpa_kernel(SDPBackend.MATH):
        output, p = run(zero, _Differentiated)
        live = [y for y in leaves(output) if isinstance(y, Tensor) and y.requires_grad]
        tangents: dict[int, Tensor] = {}
        if live:
            adjoints = [_some(y).requires_grad_() for y in live]
            pushed: Any = ()
            try:
                with unrepeated(p.modules):
                    (pulled,) = torch.autograd.grad(live, zero, adjoints, create_graph=True, allow_unused=True)
                    if pulled is not None:
                        pushed = torch.autograd.grad(pulled, adjoints, z, create_graph=True, allow_unused=True)
            except RuntimeError as error:
                if "modified by an inplace operation" in str(error):
                    raise Unsupported(
                        "it writes in place on a value that a gradient needs (where it keeps a state or a cache in "
                        "evaluation mode, switch that off, as by `use_cache=False`)"
                    ) from error
                if "not implemented" not in str(error) and "once_differentiable" not in str(error):
                    raise
                raise Unsupported(str(error).splitlines()[0]) from error
            if pulled is not None:
                _require_adjoint(pulled, z, adjoints, pushed, p.epsilon)
                tangents = {id(y): t for y, t in zip(live, pushed, strict=True) if t is not None}
        # The primal keeps its graph: a loss may differentiate it by the model's input.
        return mapped(lambda y: combine(y, tangents.get(id(y))), output)


def _some(like: Tensor) -> Tensor:
    """Numbers with no pattern, which no generator is moved for."""
    with torch.no_grad():
        return torch.cos(torch.arange(like.numel(), device=like.device).square()).to(like.dtype).reshape(like.shape)


@torch.no_grad()
def _require_adjoint(
    pulled: Tensor, z: Tensor, adjoints: Sequence[Tensor], pushed: Sequence[Tensor | None], epsilon: float
) -> None:
    """Raise `Unsupported` if ``v · (J z)`` is not ``(Jᵀ v) · z``: then a backward hides how it depends on ``v``."""
    there = sum(((v * t).sum().real.double() for v, t in zip(adjoints, pushed, strict=True) if t is not None))
    back = (pulled * z).sum().double()
    rounding = max(epsilon, *(torch.finfo(v.dtype).eps for v in (pulled, *adjoints)))
    size = pulled.double().norm() * z.double().norm()
    if bool(torch.as_tensor(there - back).abs() > rounding**0.5 * size):
        raise Unsupported("a backward that can't be differentiated, such as one marked `once_differentiable`")


ENGINES: dict[str, Callable[[Runner, Tensor], Any]] = {"manual": manual, "forward": forward, "double": double}
