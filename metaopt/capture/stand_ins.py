"""What the replay calls for a custom ``torch.autograd.Function``, found out where one is seen for the first time.

Its backward may be one that autograd can't see through (``once_differentiable``, saved intermediates, numpy), or on
purpose no derivative of its forward. Both fail silently, so both are looked for.
"""

from __future__ import annotations

__all__ = ["Nature", "nature", "stand_in"]

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt.capture.custom import Plain, Surrogate, true_forward
from metaopt.capture.derivatives import disagreement
from metaopt.capture.primitives import Phase, flatten
from metaopt.capture.segment import undisturbed
from metaopt.errors import CaptureError

# Two ways to compute a gradient differ by rounding.
_SAME = {torch.float64: 1e-8}
# Powers of two, so that a gradient that is linear is scaled without rounding.
_SCALES = (2.0**-20, 2.0**20)


def stand_in(cls: type, args: Sequence[Any], kwargs: dict[str, Any]) -> type[Plain | Surrogate] | None:
    """What the replay calls in place of a user's ``autograd.Function``; None for the function itself.

    Raises:
        CaptureError: if autograd can't differentiate the backward, and the forward is none whose derivative it is; if
            the backward is no derivative of the forward, and the forward can't be differentiated by itself; or if the
            function reaches weights otherwise than by its arguments.
    """
    call = _Call(cls, args, kwargs)
    call.refuse_hidden()
    backward = getattr(cls, "backward", None)
    code = getattr(backward, "__code__", None)
    if code is not None and code.co_filename.endswith("torch/autograd/function.py"):
        why = "it is marked `once_differentiable`"
    else:
        problem = disagreement(call.pullback(call.own), call.point)
        if problem is None:
            if disagreement(call.values_of(call.own), call.point) is None and call.is_linear():
                return None
            call.refuse_without_forward()
            return Surrogate
        found, expected = problem
        why = (
            f"its derivative along a random direction is {expected:.6g} by finite differences and {found:.6g} by "
            "autograd"
        )
    if call.is_plain():
        return Plain
    if call.is_surrogate():
        return Surrogate
    raise CaptureError(
        f"the backward of {cls.__name__} (a torch.autograd.Function) can't be differentiated: {why}. A hypergradient "
        "needs its derivative. Write `backward` with torch operations on saved inputs and outputs (not on saved "
        "intermediates, numpy or detached values), or replace the function by torch operations."
    )


@dataclass(frozen=True)
class Nature:
    """What the backward of a custom function is to its forward.

    Args:
        steps: whether the forward is constant about a point, as one that rounds is.
        own: whether the backward is the derivative of the forward.
        linear: whether the backward takes gradients of any size alike.
        forward: whether torch has the derivative of the forward's own operations.
    """

    steps: bool
    own: bool
    linear: bool
    forward: bool


def nature(cls: type, args: Sequence[Any], kwargs: dict[str, Any]) -> Nature:
    """Find out what the backward of a user's ``autograd.Function`` is to its forward, from one call of it."""
    call = _Call(cls, args, kwargs)
    own = disagreement(call.values_of(call.own), call.point) is None
    return Nature(call.has_steps(), own, call.is_linear(), call._follows_forward())


class _Call:
    """One call of a function, to be made again at other points.

    Attributes:
        places: the arguments by which derivatives are taken.
    """

    def __init__(self, cls: type, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.cls: Any = cls
        self.args = args
        self.kwargs = kwargs
        self.phase = Phase()
        floats = [place for place, a in enumerate(args) if isinstance(a, Tensor) and a.dtype.is_floating_point]
        moving = [place for place in floats if args[place].requires_grad]
        self.places = floats
        if self._attempt(lambda: self._at_point(self.values_of(self.own))) is None:
            self.places = moving  # it refuses to be differentiated by the others

    def own(self, given: Sequence[Any]) -> Any:
        return self.cls.apply(*given, **self.kwargs)

    def true(self, given: Sequence[Any]) -> Any:
        return true_forward(self.cls, given, self.kwargs)

    def filled(self, places: Sequence[int], values: Sequence[Tensor]) -> list[Any]:
        """The arguments, with other values at some places."""
        given = list(self.args)
        for place, value in zip(places, values, strict=True):
            given[place] = (value + value.mT) / 2 if _is_symmetric(self.args[place]) else value
        return given

    def values_of(self, function: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """The function of the point."""
        return lambda points: _drawn(function, self.filled(self.places, [_variable(p) for p in points]))

    def pullback(
        self, function: Callable[[Sequence[Any]], Any], scale: float = 1.0
    ) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """The gradient by the point of a random combination of the results, of this scale: the same for each call."""
        cotangents: list[Tensor] = []

        def pulled(points: Sequence[Tensor]) -> list[Tensor]:
            inputs = [_variable(p) for p in points]
            given = self.filled(self.places, inputs)
            outputs = [output for output in _drawn(function, given) if output.requires_grad]
            if not cotangents:
                cotangents.extend(scale * torch.randn_like(output.detach()) for output in outputs)
            with self.phase.loop():
                grads = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, allow_unused=True)
            return [torch.zeros_like(p) if g is None else g for p, g in zip(points, grads, strict=True)]

        return pulled

    def is_plain(self) -> bool:
        """Whether the backward is what autograd makes of the forward, as ordinary operations."""

        def compare() -> bool:
            both = (self.own, self.true)
            values = [self._at_point(self.values_of(function)) for function in both]
            slopes = [self._at_point(self.pullback(function)) for function in both]
            return _same(*values) and _same(*slopes)

        return bool(self._attempt(compare)) and disagreement(self.pullback(self.true), self.point) is None

    def is_surrogate(self) -> bool:
        """Whether the backward of a saved result can be differentiated where that is no result of its own."""

        def both(given: Sequence[Any]) -> Any:
            return Surrogate(self.cls)(self.phase, *given)

        return disagreement(self.pullback(both), self.point) is None and self._follows_forward()

    def is_linear(self) -> bool:
        """Whether the backward takes gradients of any size alike; one that clips them is no derivative of anything."""

        def compare() -> bool:
            slopes = self._at_point(self.pullback(self.own))
            for scale in _SCALES:
                scaled = [slope / scale for slope in self._at_point(self.pullback(self.own, scale))]
                # What is not finite, in half precision, tells nothing.
                if all(bool(slope.isfinite().all()) for slope in scaled) and not _same(scaled, slopes):
                    return False
            return True

        return self._attempt(compare) is not False

    def has_steps(self) -> bool:
        """Whether most of the results stay as they are where one of the arguments moves a little."""

        def compare() -> bool:
            point = [p.double() for p in self.point]
            values = self.values_of(self.own)
            here = values(point)
            # A function may compute in single precision whatever it is given.
            eps = max((torch.finfo(y.dtype).eps for y in here), default=0.0)
            for place, p in enumerate(point):
                torch.manual_seed(0)
                size = (float(p.norm()) / max(1, p.numel()) ** 0.5 or 1e-2) * max(1e-7, 64 * eps)
                near = values([*point[:place], p + size * torch.randn_like(p), *point[place + 1 :]])
                if all(float((a == b).double().mean()) > 0.9 for a, b in zip(here, near, strict=True)):
                    return True
            return False

        return self._attempt(compare) is True

    def refuse_hidden(self) -> None:
        """Raise if the function's gradient is another where its arguments are equal, but other tensors."""
        moving = {id(a): place for place, a in enumerate(self.args) if isinstance(a, Tensor) and a.requires_grad}
        places = list(moving.values())  # of each tensor one
        copies = {key: self.args[place].detach().requires_grad_() for key, place in moving.items()}

        def pulled(outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
            grads = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, retain_graph=True)
            return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]

        def gradients(given: list[Any]) -> list[Tensor]:
            torch.manual_seed(0)
            outputs = [output for output in floating(self.own(given)) if output.requires_grad]
            return pulled(outputs, [given[p] for p in places], [torch.randn_like(o.detach()) for o in outputs])

        def compare() -> bool:
            inputs = [self.args[place] for place in places]
            direct = gradients([copies.get(id(a), a) for a in self.args])
            # One argument may have been computed from another, and its graph is needed once more.
            return _same(gradients(list(self.args)), pulled(inputs, inputs, direct))

        if self._attempt(compare) is False:  # what can't be asked shows in the replay
            raise CaptureError(
                f"{self.cls.__name__} (a torch.autograd.Function) reaches tensors that depend on the weights otherwise "
                "than by its arguments: with equal tensors in their place its gradient is another. It can't be "
                "replayed as a function of its arguments. Have it compute with the arguments that it is given, or "
                "replace it by torch operations (`odeint` for `odeint_adjoint` of torchdiffeq, say)."
            )

    def refuse_without_forward(self) -> None:
        """Raise if autograd does not have the derivative of the forward."""
        if not self._follows_forward():
            raise CaptureError(
                f"the backward of {self.cls.__name__} (a torch.autograd.Function) is not the derivative of its "
                "forward, and its forward is not made of operations that torch can differentiate. The loop's gradients "
                "need the one and the hypergradient the other. Write the forward with torch operations, without "
                "`detach` and numpy."
            )

    def _follows_forward(self) -> bool:
        return bool(self._attempt(lambda: disagreement(self.values_of(self.true), self.point) is None))

    @property
    def point(self) -> list[Tensor]:
        """Where these arguments are."""
        return [self.args[place].detach() for place in self.places]

    def _at_point(self, function: Callable[[Sequence[Tensor]], list[Tensor]]) -> list[Tensor]:
        torch.manual_seed(0)
        return [value.detach() for value in function(self.point)]

    def _attempt(self, ask: Callable[[], Any]) -> Any:
        """An answer of the user's code, with nothing of the loop moved; None if it can't be had."""
        try:
            with undisturbed(), warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                return ask()
        except Exception:  # noqa: BLE001 (whatever a user's function may raise)
            return None


def _drawn(function: Callable[[Sequence[Any]], Any], given: Sequence[Any]) -> list[Tensor]:
    """The results of a call that draws the same random numbers each time, but for empty ones, which have no values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return [result for result in floating(function(given)) if result.numel()]


def _variable(value: Tensor) -> Tensor:
    return value if value.requires_grad else value.detach().requires_grad_()


def _is_symmetric(argument: Tensor) -> bool:
    """Whether an argument is a symmetric matrix, as covariances are: functions of these may read one triangle only.

    A weight may move in any direction.
    """
    square = argument.dim() >= 2 and argument.shape[-1] == argument.shape[-2] > 1
    if not square or argument.is_leaf:
        return False
    matrix = argument.detach()
    return bool((matrix - matrix.mT).norm() <= 16 * torch.finfo(matrix.dtype).eps * matrix.norm())


def floating(result: Any) -> list[Tensor]:
    """The tensors of a result that have derivatives."""
    return [output for output in flatten([result]) if output.dtype.is_floating_point]


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    if len(found) != len(expected):
        return False
    pairs = list(zip(found, expected, strict=True))
    size = max((float(e.double().norm()) for _, e in pairs), default=0.0)
    return all(
        f.shape == e.shape
        and float((f.double() - e.double()).norm())
        <= _SAME.get(f.dtype, 1e-3) * max(float(e.double().norm()), 1e-3 * size)
        for f, e in pairs
    )
