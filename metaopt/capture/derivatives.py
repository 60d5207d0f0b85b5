"""Is the second derivative that autograd gives for a step the derivative of that step?

The sweep differentiates gradients. torch's second derivatives are tested less than its first, and fail silently. So
what is seen for the first time is compared with central differences along a random direction, in float64. Where two
stencils disagree (a kink is near) nothing is concluded.
"""

from __future__ import annotations

__all__ = ["check_segment", "disagreement"]

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.capture.segment import Segment, undisturbed
from metaopt.errors import CaptureError

_WRONG = 1e-3
_AGREE = 1e-5
# Forward and backward of these disagree on purpose.
_SURROGATES = ("fake_quantize",)


def check_segment(segment: Segment, step: int) -> None:
    """Raise if autograd's derivative of ``Φ_t`` is not the derivative of ``Φ_t``."""
    program = segment.program
    names = [_name(instruction.func) for instruction in program.code]
    surrogate = any(getattr(instruction.func, "surrogate", False) for instruction in program.code)
    if program.uses_autocast or surrogate or any(name.startswith(_SURROGATES) for name in names):
        return
    keys = list(segment.outputs)

    def phi(inputs: Sequence[Tensor]) -> list[Tensor]:
        return segment.evaluate(keys, inputs)

    problem = disagreement(phi, segment.point(keys))
    if problem is None:
        return
    found, expected = problem
    raise CaptureError(
        f"step {step} has a derivative of {expected:.6g} along a random direction by finite differences, but "
        f"{found:.6g} by autograd. An operation of the loop has a wrong second derivative, or a backward that differs "
        f"from its forward on purpose. The step calls: {', '.join(dict.fromkeys(names))}. Replace that operation, or "
        "pass `verify='never'` if the surrogate gradient is what you want."
    )


def _name(func: Callable[..., Any]) -> str:
    name, owner = getattr(func, "__name__", ""), getattr(func, "__self__", None)
    return owner.__name__ if name == "apply" and isinstance(owner, type) else name


def disagreement(
    function: Callable[[Sequence[Tensor]], Sequence[Tensor]], point: Sequence[Tensor]
) -> tuple[float, float] | None:
    """Autograd's and the finite differences' derivative, if they differ; None if they agree or nothing can be said."""
    try:
        with undisturbed(), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            first = _compare(function, point)
            return first if first is None else _compare(function, point)  # two directions, before anyone is accused
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None  # not to be had in float64: nothing can be said


def _compare(
    function: Callable[[Sequence[Tensor]], Sequence[Tensor]], point: Sequence[Tensor]
) -> tuple[float, float] | None:
    leaves = [p.detach().double().requires_grad_() for p in point]
    # In the unit of each value: an eps of 1e-8 must not be moved by more than itself.
    sizes = [float(p.detach().norm()) / max(1, p.numel()) ** 0.5 for p in leaves]
    directions = [torch.randn_like(p) * (size or 1e-3) for p, size in zip(leaves, sizes, strict=True)]
    outputs = function(leaves)
    if any(o.dtype != torch.float64 for o in outputs):
        return None
    weights = [torch.randn_like(o.detach()) / (o.detach().norm() + 1e-3) for o in outputs]

    def along(h: float) -> float:
        moved = [(p.detach() + h * d).requires_grad_() for p, d in zip(leaves, directions, strict=True)]
        return sum(float((w * o.detach()).sum()) for w, o in zip(weights, function(moved), strict=True))

    # An empty result has no values, and need not have a derivative either.
    with_graph = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad and o.numel()]
    found = 0.0
    if with_graph:
        grads = torch.autograd.grad([o for o, _ in with_graph], leaves, [w for _, w in with_graph], allow_unused=True)
        found = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True) if g is not None)
    h = 1e-5
    here = along(0.0)
    sides = [(along(k * h), along(-k * h), k * h) for k in (1, 3)]
    near, far = ((right - left) / (2 * step) for right, left, step in sides)
    scale = max(abs(near), abs(found))
    if not scale < float("inf") or not abs(near - far) <= _AGREE * scale + 1e-8:  # a stencil may have left the domain
        return None
    # Exactly at a kink the stencils agree, on the mean of two slopes. What is left of the slopes' difference as the
    # step goes to 0 gives it away.
    first, second = ((right - 2 * here + left) / step for right, left, step in sides)
    if abs(3 * first - second) / 2 > _WRONG * scale + 1e-7:
        return None
    return (found, near) if abs(found - near) > _WRONG * scale + 1e-7 else None
