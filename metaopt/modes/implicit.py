"""The hypergradient at a stationary point, from the last iteration alone.

Where the training has converged, ``s = Φ(s, λ)``, and by the implicit function theorem
``dE/dλ = ∂E/∂λ + ∇E (I - A)⁻¹ B``. The inverse is the Neumann series ``Σ_k A^k``, which is what REVERSE-HG would give
after infinitely many steps like the last one.
"""

from __future__ import annotations

__all__ = ["Implicit", "implicit"]


import torch
from torch import Tensor

from metaopt.capture.segment import Segment
from metaopt.errors import MetaoptWarning, SweepError, warn, whole
from metaopt.modes.adjoint import Adjoint
from metaopt.modes.hypergradients import accumulate, collect
from metaopt.modes.named import Named, tensors_of
from metaopt.modes.outer import Objective
from metaopt.modes.pullback import PullBack
from metaopt.modes.run import Run, Watchable

_FAR = 1e-2
_SETTLED = 3


def implicit(
    optimizer: Watchable, *, iterations: int = 1000, tolerance: float | None = 1e-6, verify: str = "first"
) -> Implicit:
    """Watch the training loop inside the ``with`` block, and differentiate the point that it converges to.

    Only the last step is kept: ``α_{k+1} = α_k A`` from ``α_0 = ∇E``, and ``dE/dλ = ∂E/∂λ + (Σ_k α_k) B``, all there.
    It must be a contraction, and the training must have converged: on the full batch, without dropout.

    Args:
        optimizer: the optimizer that trains the weights, as for `metaopt.record`.
        iterations: the number of terms of the series at most.
        tolerance: the series ends where a term's norm falls below this share of the sum's; None takes ``iterations``
            terms, converged or not (a truncated series is biased).
        verify: as for `metaopt.record`.

    Returns:
        A context manager whose ``as`` target gives the hypergradients.

    Raises:
        RuleError: if there is no rule for the optimizer.
        ValueError: if an argument is of the wrong kind.
        CaptureError: as for `metaopt.record`.

    Source:
        Bengio 2000, "Gradient-based optimization of hyperparameters"; Lorraine, Vicol & Duvenaud 2020, algorithm 3, for
        the series.
    """
    return Implicit(optimizer, iterations=iterations, tolerance=tolerance, verify=verify)


class Implicit(Run):
    """What `implicit` watches, and the hypergradients at the point that it led to."""

    def __init__(self, optimizer: Watchable, *, iterations: int, tolerance: float | None, verify: str) -> None:
        iterations = whole("iterations", iterations, 1)
        if tolerance is not None and not (isinstance(tolerance, (int, float)) and tolerance > 0):
            raise ValueError(f"tolerance must be a number above 0 (or None), not {tolerance!r}.")
        super().__init__(optimizer, verify=verify)
        self._iterations = iterations
        self._tolerance = tolerance
        self._last: Segment | None = None
        self._before: set[int] = set()
        self._after: list[Segment] = []

    def _receive(self, segment: Segment, is_step: bool) -> None:
        if is_step:
            self._before = {key for known in (self._last, *self._after) if known is not None for key in known.outputs}
            self._last, self._after = segment, []
        else:
            self._after.append(segment)

    def _forget(self) -> None:
        self._last = None
        self._after.clear()

    def backward(self, outer: Objective) -> None:
        """Add the hypergradient of the outer objective at the stationary point to the hyperparameters' ``.grad``.

        Args:
            outer: the outer objective, as for `metaopt.Recording.backward`.

        Raises:
            SweepError: if the series does not converge.
        """
        with self._sweeping():
            accumulate(self._solved(outer))

    def hypergradient(self, outer: Objective, wrt: Named) -> tuple[Tensor, ...]:
        """The hypergradient at the stationary point, as ``torch.autograd.grad`` would return it.

        Args:
            outer: the outer objective, as for `backward`.
            wrt: hyperparameters. A stationary point does not depend on where the training began.

        Returns:
            One tensor for each entry of ``wrt``, of its shape.

        Raises:
            SweepError: if the series does not converge, or ``wrt`` has a trained weight.
        """
        wanted = tensors_of(wrt, "wrt")
        if any(self._loop.tape.find(tensor) is not None for tensor in wanted):
            raise SweepError(
                "`wrt` has a trained weight, but a stationary point does not depend on the initial weights. Use "
                "`metaopt.record` for a training that ends before."
            )
        with self._sweeping():
            return collect(self._solved(outer), wanted)

    def _solved(self, outer: Objective) -> Adjoint:
        adjoint = self._adjoint(outer)
        adjoint.check_value()
        last = self._last
        if last is not None:
            self._refuse_unsettled(last)
        for segment in reversed(self._after):
            adjoint.pull_back(PullBack(), segment, self._loop.steps)
        if last is not None:
            series = _Series(last, adjoint.carried, self._loop.steps)
            adjoint.carried = series.sum(self._iterations, self._tolerance)
            self._warn_if_far(last, series.rate)
            adjoint.pull_back(PullBack(), last, self._loop.steps)
        return adjoint

    def _refuse_unsettled(self, last: Segment) -> None:
        if any(key in self._before and key not in last.outputs for key, _ in last.inputs):
            raise SweepError(
                "the last iteration reads a tensor that the one before it made, and makes no such tensor for the next: "
                "it is a new object each time (`previous = loss.detach()`), so the last step does not say how it goes "
                "on. Write it in place (`previous.copy_(loss.detach())`). With several optimizers, name them in the "
                "order in which they step."
            )
        # A tensor from before the context (its key is not negative) is a constant of the iteration that writes it
        # first, and part of the state from the next one on.
        if self._loop.steps >= _SETTLED:
            return
        known = {key for key, _ in last.inputs}
        written = {key for segment in (last, *self._after) for key in segment.outputs if key >= 0} - known
        grads = {id(weight.grad) for weight in self._loop.weights()}
        for binding in self._loop.tape.bindings():
            tensor = binding.ref()
            if binding.key in written and tensor is not None and tensor.is_floating_point() and id(tensor) not in grads:
                raise SweepError(
                    f"a tensor of shape {tuple(tensor.shape)} (an average, a buffer) was first written inside the "
                    "context in its last iterations, so the last step does not say how it goes on. Let the context "
                    f"watch at least {_SETTLED} iterations at the stationary point."
                )

    def _warn_if_far(self, last: Segment, rate: float) -> None:
        tape = self._loop.tape
        before = {key: cell.value() for key, cell in last.inputs}
        moved = size = 0.0
        for weight in self._loop.weights():
            binding = tape.find(weight)
            if binding is not None and binding.key in before:
                moved += float((weight.detach() - before[binding.key]).double().square().sum())
                size += float(weight.detach().double().square().sum())
        distance = (moved / size) ** 0.5 / max(1 - rate, 1e-12) if size else 0.0
        if distance > _FAR:
            warn(
                f"the training has not converged: its last step moved the weights by {(moved / size) ** 0.5:.1e} of "
                f"their norm, and the stationary point is about {distance:.1e} away. The hypergradient is that of a "
                "point which was not reached. Train longer, or use `metaopt.record`.",
                MetaoptWarning,
            )


class _Series:
    """``Σ_k α A^k`` over the state that an iteration takes from itself."""

    def __init__(self, segment: Segment, carried: dict[int, Tensor], step: int) -> None:
        inputs = {key for key, _ in segment.inputs}
        self._keys = [key for key in segment.outputs if key in inputs or key in carried]
        replay = segment.replay(self._keys)
        self._moving = [
            (key, output) for key, output in zip(self._keys, replay.outputs, strict=True) if output.requires_grad
        ]
        self._sources = [(key, x) for key, x in replay.inputs.items() if key in self._keys and x.requires_grad]
        self._first = {key: carried[key] for key, _ in self._moving if key in carried}
        self._step = step
        self.rate = 0.0

    def _pulled(self, alpha: dict[int, Tensor]) -> dict[int, Tensor]:
        """``α A``."""
        pairs = [(output, alpha[key]) for key, output in self._moving if key in alpha]
        if not pairs or not self._sources:
            return {}
        grads = torch.autograd.grad(
            [output for output, _ in pairs],
            [x for _, x in self._sources],
            [a for _, a in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        moving = {key for key, _ in self._moving}
        return {key: g for (key, _), g in zip(self._sources, grads, strict=True) if g is not None and key in moving}

    def sum(self, iterations: int, tolerance: float | None) -> dict[int, Tensor]:
        """The series.

        Raises:
            SweepError: if it has not converged after so many terms, or grows.
        """
        total = {key: value.clone() for key, value in self._first.items()}
        term, size = self._first, _norm(self._first)
        first = size
        for count in range(1, iterations):
            term = self._pulled(term)
            previous, size = size, _norm(term)
            self.rate = size / previous if previous else 0.0
            for key, value in term.items():
                total[key] = total[key] + value if key in total else value
            if not size < 1e6 * first + 1e-30:
                raise self._diverges(count)
            if size == 0 or (tolerance is not None and size <= tolerance * _norm(total) * max(1 - self.rate, 1e-6)):
                return total
        if tolerance is not None and self.rate >= 1:
            raise self._diverges(iterations)
        if tolerance is not None and iterations > 1 and size:
            raise SweepError(
                f"the series of the implicit hypergradient has not converged after {iterations} terms: each term is "
                f"still {self.rate:.6f} of the last one. Pass more `iterations`, a larger `tolerance`, or None to take "
                "the terms there are; a larger learning rate makes the last step contract faster."
            )
        return total

    def _diverges(self, count: int) -> SweepError:
        return SweepError(
            f"the series of the implicit hypergradient grows: after {count} terms, each is {self.rate:.4g} times the "
            f"last one. Step {self._step} is no contraction, so the training is not at a stable stationary point. "
            "Lower the learning rate, train longer, or use `metaopt.record`."
        )


def _norm(tensors: dict[int, Tensor]) -> float:
    return float(sum(float(value.double().square().sum()) for value in tensors.values())) ** 0.5
