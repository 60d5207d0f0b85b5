"""FORWARD-HG: carry the tangent of the state along with the loop (Franceschi et al. 2017, algorithm 2).

``Z_t = A_t Z_{t-1} + B_t`` with ``Z_0 = 0`` is the derivative ``ds_t/dλ``; the hypergradient is ``∇E(s_t) Z_t`` at
any moment, and nothing of the past is kept. Real-time hyperparameter optimisation moves ``λ`` while ``Z`` goes on.
"""

from __future__ import annotations

__all__ = ["Streaming", "stream"]

from types import NoneType

import torch
from torch import Tensor, nn

from metaopt.capture.bindings import leaves_of
from metaopt.capture.compiled import backend_of
from metaopt.capture.segment import Segment
from metaopt.errors import MetaoptWarning, SweepError, warn, whole
from metaopt.hyperparameters import name_of
from metaopt.modes.adjoint import Adjoint
from metaopt.modes.carried import Carried
from metaopt.modes.columns import Columns, Directions
from metaopt.modes.compiled import CompiledPush
from metaopt.modes.hypergradients import accumulate, collect, made_inside
from metaopt.modes.named import Named, leaves_of_named, tensors_of
from metaopt.modes.outer import Objective
from metaopt.modes.resuming import Saved, load, save
from metaopt.modes.run import Run, Watchable

_MANY = 1000
_NAMED = 5
_CHECK_EVERY = 10


def stream(
    optimizer: Watchable,
    *,
    hyper: Named | None = None,
    chunk: int | None = None,
    discount: float = 1.0,
    directions: int | None = None,
    generator: torch.Generator | None = None,
    verify: str = "first",
    compile: bool | str = False,  # noqa: A002 as torch's
) -> Streaming:
    """Watch the training loop inside the ``with`` block, and carry the derivative of its state along (forward mode).

    After each ``optimizer.step()``: ``Z_t = A_t Z_{t-1} + B_t``, one tangent for each entry of each hyperparameter.
    The loop runs as it would without the context, bit for bit. Memory: ``m · |s|`` for m entries, whatever the number
    of steps.

    Args:
        optimizer: the optimizer that trains the weights, as for `record`.
        hyper: the hyperparameters to carry tangents for: tensors, a `metaopt.Hyperparameters`, or several of either.
            What else the loop uses and requires grad is a constant then, and its hypergradient can't be asked for.
            None: all that are found.
        chunk: how many tangents to push forward at once; None for all. A smaller number needs less memory.
        discount: the factor on ``Z_{t-1}``; below 1 it forgets the past, which bounds the tangent of a chaotic training
            and biases the hypergradient.
        directions: carry tangents along so many random directions of the hyperparameters, in place of one for each of
            their entries; the hypergradient is then an unbiased estimate, ``1/k Σ_j (dE/dλ · v_j) v_j`` with entries
            ±1 in ``v_j``, whose mean squared error is ``(m - 1)/k · ‖dE/dλ‖²`` for m entries. The directions stay
            until `Streaming.reset_tangents` draws new ones.
        generator: draws the directions; None for one of the run's own, seeded by ``torch.initial_seed()`` and a count
            of the runs, so that the loop's own draws stay what they are.
        verify: as for `record`.
        compile: compile the push of the tangents, as for `record`; it begins with the eighth step of a structure, and
            what the loop computed in a step is not computed again. A ``chunk`` of fewer tangents than there are is not
            pushed by compiled code.

    Returns:
        A context manager whose ``as`` target gives hypergradients at any moment, inside the context or after it.
        Hyperparameters may be changed in place between the steps; the optimizer follows at once.

    Raises:
        RuleError: if there is no rule for the optimizer.
        ValueError: if an argument is of the wrong kind.
        CaptureError: on entering, if the optimizer is watched already; inside, if the loop does what can't be replayed.

    Source:
        Franceschi, Donini, Frasconi & Pontil 2017, algorithm 2 (FORWARD-HG) and section 3.3 (real time).
    """
    return Streaming(
        optimizer,
        hyper=hyper,
        chunk=chunk,
        discount=discount,
        directions=directions,
        generator=generator,
        verify=verify,
        backend=backend_of(compile),
    )


class Streaming(Run):
    """What `stream` watches, and the hypergradients that it has at any moment."""

    def __init__(
        self,
        optimizer: Watchable,
        *,
        hyper: Named | None,
        chunk: int | None,
        discount: float,
        directions: int | None,
        generator: torch.Generator | None,
        verify: str,
        backend: str | None,
    ) -> None:
        chunk = None if chunk is None else whole("chunk", chunk, 1)
        if not isinstance(discount, (int, float, Tensor)) or not 0 <= discount <= 1:
            raise ValueError(f"discount must be a number between 0 and 1, not {discount!r}.")
        if not isinstance(generator, (torch.Generator, NoneType)):
            raise ValueError(f"generator must be a torch.Generator or None, not {generator!r}.")
        directions = None if directions is None else whole("directions", directions, 1)
        super().__init__(optimizer, verify=verify, moving=True)
        if hyper is not None:
            self._loop.tape.externals.named = {id(leaf): leaf for leaf in self._named(hyper)}
        self._loop.tape.keeps_values = backend is not None
        self._columns = Columns() if directions is None else Directions(directions, generator)
        compiled = None if backend is None else CompiledPush(backend)
        self._carried = Carried(self._loop, self._columns, compiled, chunk=chunk, discount=discount)
        self._warned = False

    def _named(self, hyper: Named) -> list[Tensor]:
        leaves = leaves_of_named(hyper, "hyper")
        weights = {id(weight) for weight in self._loop.weights()}
        if any(id(leaf) in weights for leaf in leaves):
            raise _weight_named("hyper")
        return leaves

    def reset_tangents(self) -> None:
        """Forget how the state came to be: ``Z = 0``, as if the training began here with constant weights.

        With random directions, new ones are drawn.
        """
        self._columns.renew()
        self._carried.reset()

    def state_dict(self, *modules: nn.Module) -> Saved:
        """``Z``, to go on from in another process; save it between two steps, beside the rest of the training.

        Args:
            modules: those whose buffers the training writes (BatchNorm's statistics), which have tangents too.

        Raises:
            SweepError: if a tensor that is no weight, no state of the optimizer and no such buffer has a tangent.
        """
        return save(self._loop, self._columns, self._carried.tangents, modules)

    def load_state_dict(self, state: Saved, hyperparameters: Named, *modules: nn.Module) -> None:
        """Go on from what `state_dict` kept: call it where the context begins, after the optimizer's state was loaded.

        Args:
            state: what was saved.
            hyperparameters: the `metaopt.Hyperparameters`, or the leaves (``hyper.parameters()``), which are known by
                their names; others are taken in the order that ``run.hyperparameters`` had.
            modules: as for `state_dict`.

        Raises:
            StaleError: if hyperparameters or tensors are missing, or have other shapes.
            SweepError: after the first step.
        """
        self._carried.begin(load(self._loop, self._columns, state, hyperparameters, modules))

    # -- FORWARD-HG ----------------------------------------------------------------------------------------------------

    def _receive(self, segment: Segment, is_step: bool) -> None:
        self._carried.resolve(segment)
        self._discover(segment)
        self._carried.receive(segment, is_step)
        if is_step and self._loop.steps % _CHECK_EVERY == 0:
            self._check_finite()

    def _discover(self, segment: Segment) -> None:
        externals = self._loop.tape.externals
        found = [leaf for external in segment.externals if not external.inner for leaf in leaves_of(external.tensor)]
        self._columns.discover(leaf for leaf in found if externals.is_named(leaf))
        if self._columns.count > _MANY and not self._warned:
            self._warned = True
            warn(_many(self._columns), MetaoptWarning)  # before there is no memory for them
        self._carried.widen(self._columns.count)

    def _check_finite(self) -> None:
        for z in self._carried.tangents.values():
            if not bool(torch.isfinite(z).all()):
                norms = [float(z.norm()) for z in self._carried.tangents.values()]
                raise SweepError(
                    f"the tangent Z is not finite by step {self._loop.steps} (norms {max(norms):.3g}): the training "
                    "is chaotic, or diverges, or an operation of the step has an infinite derivative (a root or a norm "
                    "at 0, a quotient by 0). Lower the learning rate, pass `discount=` below 1, call "
                    "`run.reset_tangents()` now and then, or look at that step."
                )

    # -- hypergradients ----------------------------------------------------------------------------------------------

    def backward(self, outer: Objective) -> None:
        """Add the hypergradient of the outer objective, as things stand, to the hyperparameters' ``.grad``.

        ``dE/dλ = ∂E/∂λ + ∇E(s_t) Z_t``. Neither the state nor ``Z`` is reset.

        Args:
            outer: the outer objective, as for `metaopt.Recording.backward`.

        Raises:
            SweepError: if ``E`` does not depend on the trained weights, or ``Z`` overflowed.
        """
        with self._sweeping():
            accumulate(self._evaluate(outer))

    def hypergradient(self, outer: Objective, wrt: Named) -> tuple[Tensor, ...]:
        """The hypergradient of the outer objective as things stand, as ``torch.autograd.grad`` would return it.

        Args:
            outer: the outer objective, as for `backward`.
            wrt: hyperparameters; the initial weights are for `metaopt.record`.

        Returns:
            One tensor for each entry of ``wrt``, of its shape.

        Raises:
            SweepError: as for `backward`; or if ``wrt`` has a trained weight, or a tensor that the loop made.
        """
        wanted = tensors_of(wrt, "wrt")
        found = [binding for tensor in wanted if (binding := self._loop.tape.find(tensor)) is not None]
        if any(binding.key < 0 for binding in found):
            raise made_inside()
        if found:
            raise _weight_named("wrt")
        externals = self._loop.tape.externals
        if any(externals.is_inner(tensor) for tensor in wanted):
            raise made_inside()
        for leaf in [leaf for tensor in wanted for leaf in leaves_of(tensor) if not externals.is_named(leaf)]:
            raise SweepError(
                f"`wrt` has {name_of(leaf) or 'a hyperparameter'} of shape {tuple(leaf.shape)}, which was not named in "
                "`metaopt.stream(optimizer, hyper=...)`, so that no tangent was carried along for it. Name it there, "
                "or leave `hyper=` out, and all that the loop uses are found."
            )
        with self._sweeping():
            return collect(self._evaluate(outer), wanted)

    def _evaluate(self, outer: Objective) -> Adjoint:
        adjoint = self._adjoint(outer)
        adjoint.check_value()
        parts = self._carried.products(adjoint)
        if parts:
            along = torch.stack(parts).sum(0)
            adjoint.direct += self._columns.gradients(along)
        if not all(bool(torch.isfinite(grad).all()) for _, grad in adjoint.direct):
            self._check_finite()
        return adjoint

    def _forget(self) -> None:
        self._carried.begin({})


def _weight_named(argument: str) -> SweepError:
    return SweepError(
        f"`{argument}` has a trained weight. Forward mode would need a tangent for every weight to differentiate with "
        "respect to the initial weights. Use `metaopt.record`."
    )


def _many(columns: Columns) -> str:
    """What is said of hyperparameters with many entries: which they are, and what they may be instead."""
    leaves = sorted(columns.leaves(), key=Tensor.numel, reverse=True)
    named = [f"{name_of(leaf) or type(leaf).__name__} {tuple(leaf.shape)}" for leaf in leaves[:_NAMED]]
    more = f" and {len(leaves) - _NAMED} more" if len(leaves) > _NAMED else ""
    return (
        f"the hyperparameters have {columns.count} entries, and forward mode carries a tangent of the whole state for "
        "each. With thousands of them `metaopt.record` is the right mode: its cost does not depend on their number. "
        f"They are {', '.join(named)}{more}: what the loop uses, that requires grad, and that no watched optimizer "
        "trains. If you ask for some of them only, name those: `metaopt.stream(optimizer, hyper=[...])`. The weights "
        "of a fixed network (a feature extractor, a teacher) are no hyperparameters after "
        "`network.requires_grad_(False)`; a leaf that the loop makes to take gradients at, "
        "`nn.Parameter(x)`, after `x.requires_grad_()` instead."
    )
