"""Three ways to the same linearised network output, ``y' = f(x, w0) + J_yw Θ ε``.

`manual` carries tangents function by function. `forward` runs the nonlinear pass on a perturbation that is zero and
has ε as its forward-mode tangent. `double` runs it on a zero that requires grad, and differentiates twice. Each takes
primal and tangent from one run of the model, so that they share all randomness; nothing is ever reseeded.

References:
    Bae and Grosse 2020, Sec. 3.4; the trick of differentiating twice is Townsend's (2017).
"""

from __future__ import annotations

__all__ = ["ENGINES", "Runner", "combine"]

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from metaopt.stn.forward_mode import dual_level
from metaopt.stn.linearised import LinearisedPass
from metaopt.stn.passes import Pass, Unsupported


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
    return pytree.tree_map(lambda y: combine(y, p.tangent(y)), output)


SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}
LOG_SOFTMAX = {F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax}
LOGSUMEXP = {torch.logsumexp, torch.Tensor.logsumexp}


class _ForwardMode(TorchFunctionMode):
    """What torch's forward mode gets wrong for us.

    It ignores ``no_grad``; what the model computes under it is a constant here, as it is in training. And the backward
    of its softmax and logsumexp fails where the primal has a graph too (torch 2.13: a saved value is written in place).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAX and kwargs.get("dtype") is None:
            return _softmax(*args, **kwargs)
        if func in LOG_SOFTMAX and kwargs.get("dtype") is None:
            return _log_softmax(*args, **kwargs)
        if func in LOGSUMEXP:
            return _logsumexp(*args, **kwargs)
        result = func(*args, **kwargs)
        if torch.is_grad_enabled():
            return result
        return pytree.tree_map(lambda v: forward_ad.unpack_dual(v).primal if isinstance(v, Tensor) else v, result)


def _softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:  # noqa: A002
    axis = -1 if dim is None else dim
    exponentials = torch.exp(input - input.amax(axis, keepdim=True).detach())
    return exponentials / exponentials.sum(axis, keepdim=True)


def _log_softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:  # noqa: A002
    axis = -1 if dim is None else dim
    return input - _logsumexp(input, axis, keepdim=True)


def _logsumexp(input: Tensor, dim: Any, keepdim: bool = False) -> Tensor:  # noqa: A002
    largest = input.amax(dim, keepdim=True).detach()
    total = torch.exp(input - largest).sum(dim, keepdim=True).log() + largest
    return total if keepdim else total.squeeze(dim)


def forward(run: Runner, z: Tensor) -> Any:
    """Forward-mode AD; the backward pass belongs outside of the dual level, where it is an ordinary one."""
    with dual_level():
        dual = forward_ad.make_dual(torch.zeros_like(z), z)
        try:
            with _ForwardMode(), sdpa_kernel(SDPBackend.MATH):
                output, _ = run(dual, Pass)
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

        return pytree.tree_map(split, output)


def double(run: Runner, z: Tensor) -> Any:
    """Two backward passes: the derivative by ``v`` of ``vᵀ J`` is ``J``, applied to ε."""
    zero = torch.zeros_like(z).requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        output, _ = run(zero, Pass)
        leaves, spec = pytree.tree_flatten(output)
        live = [y for y in leaves if isinstance(y, Tensor) and y.requires_grad]
        tangents: dict[int, Tensor] = {}
        if live:
            adjoints = [torch.zeros_like(y).requires_grad_() for y in live]
            try:
                (pulled,) = torch.autograd.grad(live, zero, adjoints, create_graph=True, allow_unused=True)
                pushed: Any = ()
                if pulled is not None:
                    pushed = torch.autograd.grad(pulled, adjoints, z, create_graph=True, allow_unused=True)
            except NotImplementedError as error:
                raise Unsupported(str(error).splitlines()[0]) from error
            if pulled is not None:
                tangents = {id(y): t for y, t in zip(live, pushed, strict=True) if t is not None}
        # The primal keeps its graph: a loss may differentiate it by the model's input.
        return pytree.tree_unflatten(
            [combine(y, tangents.get(id(y))) if isinstance(y, Tensor) else y for y in leaves], spec
        )


ENGINES: dict[str, Callable[[Runner, Tensor], Any]] = {"manual": manual, "forward": forward, "double": double}
