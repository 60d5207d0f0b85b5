"""REVERSE-HG: keep the states of the loop, then walk back (Franceschi et al. 2017, algorithm 1).

The sweep runs to the first step: ``g = Σ_{t=1..T} α_t B_t`` with ``α_T = ∇E(s_T)``, ``α_{t-1} = α_t A_t``. As the
algorithm is often printed, its loop ends one step early and loses ``B_1``.
"""

from __future__ import annotations

__all__ = ["Recording", "record"]

import os
from collections.abc import Iterator, Sequence

from torch import Tensor

from metaopt.capture.compiled import backend_of
from metaopt.capture.segment import Segment
from metaopt.checkpoints import LEVELS, Keeping, Memory, bytes_of, store_of, walk
from metaopt.errors import SweepError, whole
from metaopt.modes.adjoint import Adjoint
from metaopt.modes.compiled import CompiledPullBack
from metaopt.modes.hypergradients import accumulate, collect
from metaopt.modes.named import Named, tensors_of
from metaopt.modes.outer import Objective
from metaopt.modes.progress import progressing
from metaopt.modes.pullback import PullBack
from metaopt.modes.run import Run, Watchable


def record(
    optimizer: Watchable,
    *,
    last: int | None = None,
    verify: str = "first",
    progress: bool = False,
    keep: str | None = None,
    budget: int | str | None = None,
    offload: str | os.PathLike[str] | None = None,
    compile: bool | str = False,  # noqa: A002 as torch's
) -> Recording:
    """Watch the training loop inside the ``with`` block, and differentiate through it in reverse mode.

    The loop runs as it would without the context, bit for bit. Each ``optimizer.step()`` ends an iteration
    ``s_t = Φ_t(s_{t-1}, λ)``, of which the state ``s_{t-1}`` and the constants are kept; no graph is. The memory for
    T steps is ``T · |s|`` and the batches; ``keep`` and ``budget`` trade it for time, and the hypergradient does not
    depend on them.

    Args:
        optimizer: the optimizer that trains the weights: one of `metaopt.optim`, whose settings may be hyperparameters,
            or a plain one of ``torch.optim``, whose numbers are constants. A list, if several train (two networks, Muon
            for matrices and AdamW for the rest), in the order in which they step: the last one's steps end the
            iterations.
        last: differentiate through the last so many steps only (truncated back-propagation; the rest is forgotten as
            training goes on).
        verify: ``"first"`` replays the first iteration of each structure and compares it with the loop; ``"all"``
            does so for every iteration, ``"never"`` for none.
        progress: show a progress bar during the sweep (needs tqdm).
        keep: what is kept of each step. ``"states"``: its state ``s_{t-1}``. ``"graphs"``: also what it computed on the
            way (activations, gradients), which the sweep then need not compute again; implies
            ``compile="aot_eager"`` at least. ``"checkpoints"``: the states of about √T steps, from which the others are
            computed again. None: states, or what the budget allows.
        budget: bytes for what is kept, or a text such as ``"2GiB"``. Graphs if they fit, else states, else as many
            checkpoints as do (which needs checkpoint_schedules); the number of steps need not be known. With ``keep``,
            where to begin.
        offload: where states lie: ``"cpu"`` for the host's memory, ``"disk"`` or a folder for files there. None: where
            the weights are.
        compile: compile the steps' derivative. True is ``"inductor"``, torch's compiler, which needs a C++ compiler or
            a GPU, and pays from some thousand steps of one structure on, in all runs of a process together (docs:
            benchmarks); ``"aot_eager"`` only leaves out the calls that need not be computed. A step that can't be
            compiled is differentiated call by call, with a warning.

    Returns:
        A context manager whose ``as`` target gives the hypergradients.

    Raises:
        RuleError: if there is no rule for the optimizer, or it is none.
        ValueError: if an argument is of the wrong kind, or two contradict each other.
        MissingExtraError: if checkpoints are to fit a budget and checkpoint_schedules is not installed; inside, when
            the budget comes to that.
        OSError: if the folder of ``offload`` can't be written to; inside, if it is full.
        CaptureError: on entering, if the optimizer is watched already; inside, if the loop does what can't be replayed.

    Source:
        Franceschi, Donini, Frasconi & Pontil 2017, "Forward and Reverse Gradient-Based Hyperparameter Optimization",
        algorithm 1 (REVERSE-HG).
    """
    backend = backend_of(compile)
    if keep is not None and keep not in LEVELS:
        raise ValueError(f"keep must be one of {', '.join(LEVELS)}, not {keep!r}.")
    level = keep or ("states" if budget is None else "graphs")
    if last is not None and (budget is not None or level == "checkpoints"):
        raise ValueError('`last` already bounds what is kept; leave `budget` and `keep="checkpoints"` out.')
    store = store_of(offload)
    if last is not None:
        store.scatter()  # each state goes as another comes
    keeping = Keeping(level, None if budget is None else bytes_of(budget), store)
    return Recording(optimizer, last=last, verify=verify, progress=progress, backend=backend, keeping=keeping)


class Recording(Run):
    """What `record` watches, and the hypergradients through it."""

    def __init__(
        self,
        optimizer: Watchable,
        *,
        last: int | None,
        verify: str,
        progress: bool,
        backend: str | None,
        keeping: Keeping,
    ) -> None:
        super().__init__(optimizer, verify=verify)
        self._times: list[float] = []
        self._keeping = keeping
        self._last = None if last is None else whole("last", last, 0)
        self._progress = progress
        self._backend = backend
        self._loop.tape.cells.copy = keeping.store.copy
        self._loop.tape.keeps_values = keeping.level == "graphs"

    def _receive(self, segment: Segment, is_step: bool) -> None:
        # What follows the last step (an outer objective, say) is no step: it never falls out of the window.
        self._times.append(self._loop.steps + (0.0 if is_step else 0.5))
        self._keeping.add(segment)
        self._loop.tape.keeps_values = self._keeping.level == "graphs"
        if self._last is not None:
            while self._times and self._times[0] <= self._loop.steps - self._last:
                self._times.pop(0)
                self._keeping.forget_first()

    def _forget(self) -> None:
        self._times.clear()
        self._keeping.clear()

    def memory(self) -> Memory:
        """What the recording takes now, and (`Memory.forecast`) what it will after more steps, in bytes."""
        return self._keeping.memory(self._loop.steps, self._last)

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
        with self._sweeping():
            adjoint = self._adjoint(outer)
            self._sweep(adjoint, None, retain)
            accumulate(adjoint)

    def hypergradient(self, outer: Objective, wrt: Named, *, retain: bool = True) -> tuple[Tensor, ...]:
        """The hypergradient of the outer objective, as ``torch.autograd.grad`` would return it.

        Args:
            outer: the outer objective, as for `backward`.
            wrt: hyperparameters (the leaves, or what `metaopt.Hyperparameters` gives for their names). A trained weight
                or a tensor of the optimizer's state stands for its value where the context began.
            retain: keep what was recorded, so that another objective can be differentiated.

        Returns:
            One tensor for each entry of ``wrt``, of its shape; zeros (and a warning) for one that took no part.

        Raises:
            SweepError: as for `backward`; or if ``wrt`` has a weight whose first steps were not kept, or not watched.
            StaleError: as for `backward`.
        """
        wanted = self._wanted(wrt)
        with self._sweeping():
            adjoint = self._adjoint(outer)
            self._sweep(adjoint, wanted, retain)
            return collect(adjoint, wanted)

    def jacobian(self, outers: Sequence[Objective], wrt: Named, *, retain: bool = True) -> tuple[Tensor, ...]:
        """The hypergradients of several outer objectives, in one batched sweep.

        Args:
            outers: the objectives, each as for `backward`.
            wrt: as for `hypergradient`.
            retain: keep what was recorded.

        Returns:
            For each entry of ``wrt`` a tensor of shape ``(len(outers), *entry.shape)``.

        Raises:
            SweepError: as for `hypergradient`; or if ``outers`` is no list of objectives.
            StaleError: as for `backward`.
        """
        wanted = self._wanted(wrt)
        if callable(outers) or (isinstance(outers, Tensor) and not outers.dim()):
            raise SweepError(
                "the Jacobian is that of several objectives: give a list of them, or ask for `run.hypergradient`."
            )
        with self._sweeping():
            adjoint = Adjoint.stack([self._adjoint(outer) for outer in outers])
            self._sweep(adjoint, wanted, retain)
            return collect(adjoint, wanted)

    # -- REVERSE-HG --------------------------------------------------------------------------------------------------

    def _wanted(self, wrt: Named) -> list[Tensor]:
        wanted = tensors_of(wrt, "wrt")
        forgotten = self._last is not None and self._loop.steps > self._last
        if forgotten and any(self._loop.tape.find(tensor) is not None for tensor in wanted):
            raise SweepError(
                f"only the last {self._last} of {self._loop.steps} steps were kept, so the derivative with respect to "
                "the initial weights can't be had. Leave `last` out."
            )
        if any(id(tensor) in self._loop.guard.added for tensor in wanted):
            raise SweepError(
                "`wrt` has a weight that was added to the optimizer inside the context. The derivative with respect to "
                "its first value would lack the steps before. Give it to the optimizer before the context."
            )
        return wanted

    def _sweep(self, adjoint: Adjoint, wanted: list[Tensor] | None, retain: bool) -> None:
        segments = self._keeping.segments
        adjoint.check_value(self._walk())
        asked, batched = adjoint.wanted(wanted), adjoint.batch is not None
        backend = self._backend
        if backend is None and self._keeping.level == "graphs":
            backend = "aot_eager"  # what was computed on the way is of use to a graph of calls only
        exact = self._keeping.level != "checkpoints"
        pull = PullBack(wanted=asked, batched=batched, exact=exact)
        if backend is not None and not batched:
            pull = CompiledPullBack(segments, backend, wanted=asked, exact=exact)
        adjoint.sweep(self._walk, progressing(self._walk(), len(segments), self._progress, "reverse sweep"), pull)
        if not retain and not self._open:
            self._free()

    def _walk(self) -> Iterator[tuple[float, Segment]]:
        """The iterations, the last one first, each with its number."""
        segments = self._keeping.segments
        for place, segment in walk(self._keeping):
            if place:
                self._keeping.store.prefetch(cell.kept for _, cell in segments[place - 1].inputs)
            yield self._times[place], segment
