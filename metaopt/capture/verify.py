"""Trust, but verify: replay an iteration where it was recorded, and compare with what the loop did."""

from __future__ import annotations

__all__ = ["Verifier", "check_replay"]

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metaopt.capture.bindings import Binding
from metaopt.capture.cells import version_of
from metaopt.capture.derivatives import check_segment
from metaopt.capture.program import Program
from metaopt.capture.segment import Segment
from metaopt.capture.tape import Tape
from metaopt.errors import CaptureError, SweepError

# Relative to the norm of what is compared. The replay may use other kernels than the loop did (math attention for flash
# attention), so agreement is to some digits and not bitwise; what goes wrong goes wrong by much more.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# What rounding makes of a single number may be nothing by chance.
_NUDGES = 3


class Verifier:
    """Compares replays with the loop: the first of each structure, all of them, or none.

    Args:
        which: ``"first"``, ``"all"`` or ``"never"``.
        optimizers: those that are watched.
    """

    def __init__(self, which: str, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if which not in ("first", "all", "never"):
            raise ValueError(f'verify must be "first", "all" or "never", not {which!r}.')
        self.which = which
        self._optimizers = optimizers
        self._seen: set[Program] = set()
        self._waiting: tuple[Segment, int] | None = None

    def check(self, segment: Segment, tape: Tape, step: int, *, last: bool = True) -> None:
        """Raise `CaptureError` if the replay of a segment that has just been finished differs from the loop.

        Args:
            segment: the segment.
            tape: what the loop left behind.
            step: its number, for the error.
            last: whether its program need not be looked at again. Where the optimizer's state is zero, a wrong factor
                before it does not show. A program that an earlier run has checked waits for the step that tells more.
        """
        program = segment.program
        self._waiting = None
        if self.which == "never" or (self.which == "first" and program in self._seen):
            return
        if self.which == "first" and not last and program.derivative_checked:
            self._waiting = segment, step
            return
        self._compare(segment, tape, step, tape.bindings())
        if last:
            self._seen.add(program)
        if not program.derivative_checked:
            check_segment(segment, step)
            program.derivative_checked = last

    def settle(self, tape: Tape) -> None:
        """The context ends: raise if the last step still waits for one that tells more, and differs from the loop."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            segment, step = waiting
            # What the loop has written since the step is something else.
            unwritten = [b for b in tape.bindings() if not (b.fresh and b.epoch == tape.epoch)]
            self._compare(
                segment, tape, step, [b for b in unwritten if (t := b.ref()) is not None and b.version == version_of(t)]
            )

    def _compare(self, segment: Segment, tape: Tape, step: int, bindings: list[Binding]) -> None:
        actual = {binding.key: tensor for binding in bindings if (tensor := binding.ref()) is not None}
        keys = [key for key in segment.outputs if key in actual]
        try:
            outputs = segment.values(keys)
        except TypeError as error:
            raise CaptureError(
                f"step {step} can't be replayed: {str(error).splitlines()[0]} A hyperparameter arrives where torch "
                "takes Python numbers only, which have no derivative. Multiply with the tensor instead."
            ) from error
        pairs = {key: (value, actual[key]) for key, value in zip(keys, outputs, strict=True)}
        loose = 5e-2 if segment.program.uses_autocast else 0.0
        wrong = _wrong(pairs, loose, {})
        if wrong:
            wrong = _wrong(pairs, loose, self._floors([tensor for _, tensor in pairs.values()]))
        again = dict(zip(wrong, segment.values(list(wrong)), strict=True)) if wrong else {}
        for seed in range(_NUDGES if wrong else 0):
            others = dict(zip(wrong, segment.nudged(seed).values(list(wrong)), strict=True))
            wrong = {key: by for key, by in wrong.items() if not _is_rounding(*pairs[key], again[key], others[key])}
        if wrong:
            raise CaptureError(_report([(actual[key], by) for key, by in wrong.items()], tape, step, len(keys)))

    def _floors(self, tensors: list[Tensor]) -> dict[int, float]:
        # A gradient that is zero but for rounding (a bias before a normalisation) is nothing but noise, and so are its
        # moments: what counts is its size among the gradients of the step, and theirs among their like.
        kinds: dict[int, str] = {}
        for optimizer in self._optimizers:
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                kinds |= {id(weight): "weight", id(weight.grad): "gradient"}
                kinds |= {id(x): f"state {name}" for name, x in optimizer.state.get(weight, {}).items()}
        norms: dict[str, float] = {}
        for tensor in tensors:
            kind = kinds.get(id(tensor))
            if kind is not None:
                norm = float(tensor.detach().double().norm())
                norms[kind] = max(norms.get(kind, 0.0), 1e-3 * norm if norm < float("inf") else 0.0)
        return {id(tensor): norms[kinds[id(tensor)]] for tensor in tensors if id(tensor) in kinds}


def check_replay(segment: Segment, found: Mapping[int, Tensor], known: Mapping[int, Tensor], *, exact: bool) -> None:
    """Raise if a replay in the sweep, which runs the user's own code, does not give what the loop left behind.

    Args:
        segment: the iteration.
        found: what the replay gave, by key.
        known: what the loop left behind, by key.
        exact: whether both began with the loop's own state; if not, only double precision is compared.
    """
    if not segment.program.runs_user_code:
        return
    pairs = [(value, known[key]) for key, value in found.items() if key in known]
    pairs = [pair for pair in pairs if exact or pair[0].dtype == torch.float64]
    floor = 1e-3 * max((float(actual.detach().double().norm()) for _, actual in pairs), default=0.0)
    for replayed, actual in pairs:
        difference = _difference(replayed, actual, floor)
        loose = 5e-2 if segment.program.uses_autocast else _TOLERANCE.get(replayed.dtype, 5e-2)
        if difference > loose:
            raise SweepError(
                f"replaying an iteration does not give what the loop computed (a tensor of shape {tuple(actual.shape)} "
                f"differs by {difference:.1e} of its norm), though it did when it was recorded: a gradient hook, or an "
                "autograd.Function of yours, depends on something in Python that has changed since, such as a counter. "
                "Pass what changes to the function as an argument, or change the gradients in the loop, after "
                "`loss.backward()`."
            )


def _wrong(pairs: Mapping[int, tuple[Tensor, Tensor]], loose: float, floors: Mapping[int, float]) -> dict[int, float]:
    """The tensors of the loop that the replay does not give, by key, and by how much."""
    found = {}
    for key, (replayed, actual) in pairs.items():
        difference = _difference(replayed, actual, floors.get(id(actual), 0.0))
        if difference > max(loose, _TOLERANCE.get(replayed.dtype, 5e-2)):
            found[key] = difference
    return found


def _is_rounding(replayed: Tensor, actual: Tensor, again: Tensor, other: Tensor) -> bool:
    """Whether the replay differs by no more than what the last digit of the state makes of it.

    A mean that is zero but for rounding, which a batch norm keeps, has no size to be compared with.

    Args:
        replayed: what the replay gave.
        actual: what the loop left behind.
        again: what another replay gave; if it is another value, the user's own code depends on more than its arguments.
        other: what a replay from a state with another last digit gave.
    """
    if replayed.shape != actual.shape or not torch.equal(replayed, again):
        return False
    by = float((other - replayed).norm())
    # What is not finite on either side tells nothing.
    return by < float("inf") and float((replayed - actual.detach()).norm()) <= 30 * by


def _difference(replayed: Tensor, actual: Tensor, floor: float = 0.0) -> float:
    """The difference relative to the larger magnitude; values that are not finite on both sides agree."""
    if replayed.shape != actual.shape:
        return float("inf")
    with torch.no_grad():
        # Mere rounding, as nearly always; what follows is slower, and needed for what is not finite, or tiny.
        if replayed.dtype == actual.dtype and actual.dtype.is_floating_point:
            rounding, size = 16 * torch.finfo(actual.dtype).eps, float(actual.norm())
            # The squares of what is very large or very small are infinite, or zero, and so would anything pass.
            told = torch.finfo(actual.dtype).tiny ** 0.25 < size < float("inf")
            if told and float((replayed - actual).norm()) <= rounding * size:
                return 0.0
    wide = torch.complex128 if actual.is_complex() else torch.float64
    a, b = replayed.detach().to(wide), actual.detach().to(wide)
    same = (a == b) | (~torch.isfinite(a) & ~torch.isfinite(b))
    if bool(same.all()):
        return 0.0
    finite = torch.isfinite(a) & torch.isfinite(b)
    scale = max(float(torch.where(finite, a, 0.0).norm()), float(torch.where(finite, b, 0.0).norm()), floor)
    difference = float(torch.where(same, 0.0, a - b).norm()) / max(scale, 1e-12)
    return float("inf") if difference != difference else difference


def _report(wrong: list[tuple[Tensor, float]], tape: Tape, step: int, count: int) -> str:
    weights = [tensor for tensor, _ in wrong if id(tensor) in tape.trained]
    grads = {id(weight.grad) for weight in tape.trained.values() if weight.grad is not None}
    wrong_grads = [tensor for tensor, _ in wrong if id(tensor) in grads]
    others = [t for t, _ in wrong if id(t) not in tape.trained and id(t) not in grads]
    seen = ", ".join(
        f"{len(found)} {name}"
        for name, found in (("weights", weights), ("gradients", wrong_grads), ("other tensors", others))
        if found
    )
    if any(tensor.dim() == 0 for tensor in others):
        cause = (
            "already the loss differs, so the forward pass depends on something that the replay does not have: an "
            "input that was modified in place after it was used (a buffer that numpy shares, say), hidden state "
            "outside of tensors (what a `with` block sets for it), a Python number taken out of a tensor, "
            "or random numbers from a generator of your own"
        )
    elif wrong_grads:
        cause = (
            "the gradients differ: a backward hook that changes them, or an operation whose backward is not a "
            "function of its tensor arguments (an autograd.Function that looks at a flag, say, which was another where "
            "it was called)"
        )
    else:
        cause = "the weights were written behind the optimizer's back (through `.data`, numpy or an extension)"
    worst = max(difference for _, difference in wrong)
    return (
        f"replaying step {step} does not give what the loop computed: {seen} of {count} values differ, by up to "
        f"{worst:.1e} of their norm. The likely cause: {cause}. A hypergradient of this loop would be wrong. If you "
        "know the difference "
        'to be harmless (nondeterministic kernels, say), pass verify="never".'
    )
