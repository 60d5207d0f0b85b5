"""Is the second derivative that autograd gives for a step the derivative of that step?

The sweep differentiates gradients. torch's second derivatives are tested less than its first, and a user's own
``autograd.Function`` may have a backward that autograd can't see through (``once_differentiable``, saved intermediates,
numpy); both fail silently. So what is seen for the first time is compared with central differences along a random
direction, in float64. Where two stencils disagree (a kink is near) nothing is concluded.
"""

from __future__ import annotations

__all__ = ["check_function", "check_segment"]

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.capture.primitives import flatten, true_forward
from metaopt.capture.segment import Segment, undisturbed
from metaopt.errors import CaptureError

_WRONG = 1e-3
_AGREE = 1e-5
# Forward and backward of these disagree on purpose.
_SURROGATES = ("fake_quantize",)


def check_segment(segment: Segment, step: int) -> None:
    """Raise if autograd's derivative of ``Φ_t`` is not the derivative of ``Φ_t``."""
    program = segment.program
    names = [getattr(instruction.func, "__name__", "") for instruction in program.code]
    surrogate = any(getattr(instruction.func, "surrogate", False) for instruction in program.code)
    if program.uses_autocast or surrogate or any(name.startswith(_SURROGATES) for name in names):
        return
    keys = list(segment.outputs)

    def phi(inputs: Sequence[Tensor]) -> list[Tensor]:
        return segment.evaluate(keys, inputs)

    problem = _disagreement(phi, segment.point(keys))
    if problem is None:
        return
    found, expected = problem
    raise CaptureError(
        f"step {step} has a derivative of {expected:.6g} along a random direction by finite differences, but "
        f"{found:.6g} by autograd. An operation of the loop has a wrong second derivative, or a backward that differs "
        f"from its forward on purpose. The step calls: {', '.join(dict.fromkeys(names))}. Replace that operation, or "
        "pass `verify='never'` if the surrogate gradient is what you want."
    )


def check_function(cls: type, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the backward of a user's ``autograd.Function`` is the derivative of its forward.

    Raises:
        CaptureError: if autograd can't differentiate the backward; or if the backward is no derivative of the
            forward, and the forward can't be differentiated by itself.
    """
    backward = getattr(cls, "backward", None)
    code = getattr(backward, "__code__", None)
    if code is not None and code.co_filename.endswith("torch/autograd/function.py"):
        raise _opaque(cls, "it is marked `once_differentiable`")
    function = _AtFloats(cls, args, kwargs)
    point = function.point()
    problem = _disagreement(function.pullback, point)
    if problem is not None:
        found, expected = problem
        raise _opaque(
            cls,
            f"its derivative along a random direction is {expected:.6g} by finite differences and {found:.6g} by "
            "autograd",
        )
    if _disagreement(function.own, point) is None:
        return True
    try:
        hopeless = _disagreement(function.true, point) is not None
    except Exception as error:
        raise _no_forward(cls) from error
    if hopeless:
        raise _no_forward(cls)
    return False


class _AtFloats:
    """A custom function as one of those of its arguments that have a derivative."""

    def __init__(self, cls: type, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.function: Any = cls
        self.args = args
        self.kwargs = kwargs
        self.places = [place for place, a in enumerate(args) if isinstance(a, Tensor) and a.dtype.is_floating_point]
        self._cotangents: list[Tensor] = []

    def point(self) -> list[Tensor]:
        """The arguments' values."""
        return [self.args[place].detach() for place in self.places]

    def own(self, points: Sequence[Tensor]) -> list[Tensor]:
        """What it gives, with its own backward."""
        return _floating(self.function.apply(*self._filled(points), **self.kwargs))

    def true(self, points: Sequence[Tensor]) -> list[Tensor]:
        """What it gives, with its forward's derivative."""
        return _floating(true_forward(self.function, self._filled(points), self.kwargs))

    def pullback(self, points: Sequence[Tensor]) -> list[Tensor]:
        """What its backward makes of some cotangents, which stay the same."""
        given = self._filled(points)
        outputs = [o for o in _floating(self.function.apply(*given, **self.kwargs)) if o.requires_grad]
        if not self._cotangents:
            self._cotangents.extend(torch.randn_like(o.detach()) for o in outputs)
        variables = [given[place] for place in self.places]
        grads = torch.autograd.grad(outputs, variables, self._cotangents, create_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(points, grads, strict=True)]

    def _filled(self, points: Sequence[Tensor]) -> list[Any]:
        given = list(self.args)
        for place, value in zip(self.places, points, strict=True):
            given[place] = value if value.requires_grad else value.detach().requires_grad_()
        return given


def _floating(result: Any) -> list[Tensor]:
    return [output for output in flatten([result]) if output.dtype.is_floating_point]


def _no_forward(cls: type) -> CaptureError:
    return CaptureError(
        f"the backward of {cls.__name__} (a torch.autograd.Function) is not the derivative of its forward, and its "
        "forward is not made of operations that torch can differentiate. The loop's gradients need the one and the "
        "hypergradient the other. Write the forward with torch operations, without `detach` and numpy."
    )


def _opaque(cls: type, why: str) -> CaptureError:
    return CaptureError(
        f"the backward of {cls.__name__} (a torch.autograd.Function) can't be differentiated: {why}. A hypergradient "
        "needs its derivative. Write `backward` with torch operations on saved inputs and outputs (not on saved "
        "intermediates, numpy or detached values), or replace the function by torch operations."
    )


def _disagreement(
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

    with_graph = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
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
