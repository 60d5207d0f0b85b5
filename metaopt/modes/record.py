"""REVERSE-HG: keep the states of the loop, then walk back (Franceschi et al. 2017, algorithm 1).

The sweep runs to the first step: ``g = Σ_{t=1..T} α_t B_t`` with ``α_T = ∇E(s_T)``, ``α_{t-1} = α_t A_t``. As the
algorithm is often printed, its loop ends one step early and loses ``B_1``.
"""

from __future__ import annotations

__all__ = ["Recording", "record"]

from collections import deque
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from metaopt.capture.compiled import backend_of
from metaopt.capture.segment import Segment
from metaopt.errors import SweepError
from metaopt.modes.compiled import CompiledPullBack
from metaopt.modes.outer import Adjoint, Objective
from metaopt.modes.progress import progressing
from metaopt.modes.pullback import PullBack
from metaopt.modes.run import Run


def record(
    optimizer: Optimizer,
    *,
    last: int | None = None,
    verify: str = "first",
    progress: bool = False,
    compile: bool | str = False,  # noqa: A002 as torch's
) -> Recording:
    """Watch the training loop inside the ``with`` block, and differentiate through it in reverse mode.

    The loop runs as it would without the context, bit for bit. Each ``optimizer.step()`` ends an iteration
    ``s_t = Φ_t(s_{t-1}, λ)``, of which the state ``s_{t-1}`` and the constants are kept; no graph is. The memory for
    T steps is ``T · |s|`` and the batches.

    Args:
        optimizer: the optimizer that trains the weights: one of `metaopt.optim`, whose settings may be hyperparameters,
            or a plain one of ``torch.optim``, whose numbers are constants.
        last: differentiate through the last so many steps only (truncated back-propagation; the rest is forgotten as
            training goes on).
        verify: ``"first"`` replays the first iteration of each structure and compares it with the loop; ``"all"``
            does so for every iteration, ``"never"`` for none.
        progress: show a progress bar during the sweep (needs tqdm).
        compile: compile the steps' derivative, which pays from some hundred steps of one structure on (see
            docs/benchmarks). True is ``"inductor"``, torch's compiler, which needs a C++ compiler or a GPU;
            ``"aot_eager"`` is its first half only, the calls left out that need not be computed.

    Returns:
        A context manager whose ``as`` target gives the hypergradients.

    Raises:
        RuleError: if there is no rule for the optimizer.
        CaptureError: on entering, if the optimizer is watched already; inside, if the loop does what can't be replayed.

    Source:
        Franceschi, Donini, Frasconi & Pontil 2017, "Forward and Reverse Gradient-Based Hyperparameter Optimization",
        algorithm 1 (REVERSE-HG).
    """
    return Recording(optimizer, last=last, verify=verify, progress=progress, backend=backend_of(compile))


class Recording(Run):
    """What `record` watches, and the hypergradients through it."""

    def __init__(
        self, optimizer: Optimizer, *, last: int | None, verify: str, progress: bool, backend: str | None
    ) -> None:
        if last is not None and last < 0:
            raise ValueError(f"last must be at least 0, not {last}.")
        super().__init__(optimizer, verify=verify)
        self._segments: deque[tuple[float, Segment]] = deque()
        self._last = last
        self._progress = progress
        self._backend = backend

    def _receive(self, segment: Segment, is_step: bool) -> None:
        # What follows the last step (an outer objective, say) is no step: it never falls out of the window.
        self._segments.append((self._loop.steps + (0.0 if is_step else 0.5), segment))
        if self._last is not None:
            while self._segments and self._segments[0][0] <= self._loop.steps - self._last:
                self._segments.popleft()

    def _forget(self) -> None:
        self._segments.clear()

    # -- hypergradients -----------------------------------------------------------------------------------------------

    def backward(self, outer: Objective, *, retain: bool = False) -> None:
        """Add the hypergradient of the outer objective to the hyperparameters' ``.grad``, as ``loss.backward()`` does.

        ``dE/dλ = ∂E/∂λ + Σ_{t=1..T} α_t B_t``. The weights' own ``.grad`` stays as it is.

        Args:
            outer: the outer objective ``E``: a scalar tensor computed from the model as the loop left it; a function
                without arguments that computes it; or a list of either, which are summed.
            retain: keep what was recorded, so that another objective can be differentiated.

        Raises:
            SweepError: if ``E`` does not depend on the trained weights, if nothing was recorded, or if it was freed.
            StaleError: if weights, inputs or hyperparameters changed since they were recorded.
        """
        with self._loop.paused():
            adjoint = self._adjoint(outer)
            self._sweep(adjoint, None, retain)
            adjoint.accumulate()

    def hypergradient(
        self, outer: Objective, wrt: Tensor | Iterable[Tensor], *, retain: bool = True
    ) -> tuple[Tensor, ...]:
        """The hypergradient of the outer objective, as ``torch.autograd.grad`` would return it.

        Args:
            outer: the outer objective, as for `backward`.
            wrt: hyperparameters (the leaves, or what `metaopt.Hyperparameters` gives for their names). A trained weight
                or a tensor of the optimizer's state stands for its value where the context began.
            retain: keep what was recorded, so that another objective can be differentiated.

        Returns:
            One tensor for each entry of ``wrt``, of its shape; zeros (and a warning) for one that took no part.
        """
        wanted = self._wanted(wrt)
        with self._loop.paused():
            adjoint = self._adjoint(outer)
            self._sweep(adjoint, wanted, retain)
            return adjoint.collect(wanted)

    def jacobian(
        self, outers: Sequence[Objective], wrt: Tensor | Iterable[Tensor], *, retain: bool = True
    ) -> tuple[Tensor, ...]:
        """The hypergradients of several outer objectives, in one batched sweep.

        Args:
            outers: the objectives, each as for `backward`.
            wrt: as for `hypergradient`.
            retain: keep what was recorded.

        Returns:
            For each entry of ``wrt`` a tensor of shape ``(len(outers), *entry.shape)``.
        """
        wanted = self._wanted(wrt)
        with self._loop.paused():
            adjoint = Adjoint.stack([self._adjoint(outer) for outer in outers])
            self._sweep(adjoint, wanted, retain)
            return adjoint.collect(wanted)

    # -- REVERSE-HG --------------------------------------------------------------------------------------------------

    def _wanted(self, wrt: Tensor | Iterable[Tensor]) -> list[Tensor]:
        wanted = [wrt] if isinstance(wrt, Tensor) else list(wrt)
        forgotten = self._last is not None and self._loop.steps > self._last
        if forgotten and any(self._loop.tape.find(tensor) is not None for tensor in wanted):
            raise SweepError(
                f"only the last {self._last} of {self._loop.steps} steps were kept, so the derivative with respect to "
                "the initial weights can't be had. Leave `last` out."
            )
        return wanted

    def _sweep(self, adjoint: Adjoint, wanted: list[Tensor] | None, retain: bool) -> None:
        segments = list(self._segments)
        adjoint.check_value(segments)
        asked, batched = adjoint.wanted(wanted), adjoint.batch is not None
        pull = PullBack(wanted=asked, batched=batched)
        if self._backend is not None and not batched:
            pull = CompiledPullBack([segment for _, segment in segments], self._backend, wanted=asked)
        shown = progressing(reversed(segments), len(segments), self._progress, "reverse sweep")
        adjoint.sweep(segments, shown, pull)
        if not retain and not self._open:
            self._free()
