"""The outer objective, and the adjoint ``α`` that the sweep carries back from it."""

from __future__ import annotations

__all__ = ["Adjoint", "Objective", "opaque", "retold"]

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metaopt.capture.bindings import Unseen, leaves_of, nodes_of
from metaopt.capture.externals import led_error
from metaopt.capture.segment import Segment
from metaopt.errors import HeldConstantWarning, StaleError, SweepError, warn
from metaopt.modes.pullback import PullBack
from metaopt.modes.statistics import statistics_gradients
from metaopt.step import Loop

_Numbered = tuple[float, Segment]
Objective = Tensor | Callable[[], Tensor] | Sequence[Any]


class Adjoint:
    """``α``: the derivative of ``E`` with respect to every carried tensor, and what the hyperparameters got so far.

    ``carried`` is by the key of the tensor, ``external`` by the identity of the tensor that requires grad, ``direct``
    is ``∂E/∂λ``. With several objectives every entry has a leading dimension for them.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.carried: dict[int, Tensor] = {}
        self.external: dict[int, Tensor] = {}
        self.direct: list[tuple[Tensor, Tensor]] = []
        self.value: Tensor | None = None
        self.batch: int | None = None

    # -- from an objective ---------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, outer: Objective, loop: Loop, watched: Callable[[Callable[[], Tensor]], Tensor] | None) -> Adjoint:
        """The adjoint at the end of the loop, ``α_T = ∇E(s_T)``.

        Args:
            outer: a scalar tensor, a function that computes one, or a list of either (their sum).
            loop: the loop that the objective looks at.
            watched: evaluates a function under watch; None while the loop itself is being watched.
        """
        if isinstance(outer, (list, tuple)):
            if not outer:
                raise SweepError("the list of outer objectives is empty.")
            return cls._sum([cls.of(entry, loop, watched) for entry in outer])
        if callable(outer) and not isinstance(outer, Tensor):
            _check_weights(loop)
            outer = outer() if watched is None else watched(outer)
        if not isinstance(outer, Tensor):
            raise SweepError(
                f"the outer objective must be a tensor (or a function that returns one), not {type(outer)}."
            )
        if outer.numel() != 1 or not outer.dtype.is_floating_point:
            raise SweepError(
                f"the outer objective must be a floating-point scalar, not {outer.dtype} of shape "
                f"{tuple(outer.shape)}; reduce it with `.mean()` or `.sum()`."
            )
        adjoint = cls(loop)
        adjoint.value = outer
        loop.flush()
        binding = loop.tape.find(outer)
        if binding is not None:
            adjoint.carried[binding.key] = torch.ones_like(outer)
        else:
            adjoint._from_graph(outer)
        return adjoint

    @classmethod
    def _sum(cls, parts: list[Adjoint]) -> Adjoint:
        result = parts[0]
        for part in parts[1:]:
            for key, value in part.carried.items():
                _add(result.carried, key, value)
            result.direct += part.direct
            assert result.value is not None
            assert part.value is not None
            result.value = result.value.detach() + part.value.detach()
        return result

    @classmethod
    def stack(cls, parts: list[Adjoint]) -> Adjoint:
        """Several objectives side by side, for a Jacobian."""
        if not parts:
            raise SweepError("the list of outer objectives is empty.")
        result = cls(parts[0].loop)
        result.batch = len(parts)
        for place, part in enumerate(parts):
            for key, value in part.carried.items():
                if key not in result.carried:
                    result.carried[key] = value.new_zeros((len(parts), *value.shape))
                result.carried[key][place] = value
            for leaf, value in part.direct:
                whole = value.new_zeros((len(parts), *value.shape))
                whole[place] = value
                result.direct.append((leaf, whole))
        values = [part.value for part in parts if part.value is not None]
        result.value = torch.stack([value.detach().reshape(()) for value in values])
        return result

    def _from_graph(self, outer: Tensor) -> None:
        """From an objective that was computed outside of the context: its autograd graph ends at the weights."""
        tape = self.loop.tape
        leaves = leaves_of(outer)
        if any(id(weight) in self.loop.guard.trainable and not weight.requires_grad for weight in self.loop.weights()):
            raise SweepError(
                "a trained weight was frozen (`requires_grad_(False)`) before the outer objective was computed, so the "
                "objective's graph does not reach it. Compute the objective with the weights unfrozen, or pass a "
                "function: `run.backward(lambda: loss(model(x), y))`."
            )
        followed = [leaf for leaf in leaves if tape.find(leaf) is not None]
        statistics = statistics_gradients(outer, tape)
        if not followed and not statistics:
            raise SweepError(
                "the outer objective does not depend on the trained weights, as the loop left them: it was computed "
                "under `no_grad`, from a copy of the model, or before the training. Compute it from the model after "
                "the loop, with grad enabled, or pass a function: `run.backward(lambda: loss(model(x), y))`."
            )
        _check_weights(self.loop)
        with _unhooked(leaves):
            grads = torch.autograd.grad(outer, leaves, retain_graph=True, allow_unused=True)
        for leaf, grad in zip(leaves, grads, strict=True):
            if grad is None:
                continue
            binding = tape.find(leaf)
            if binding is not None:
                _add(self.carried, binding.key, grad)
            elif tape.externals.is_led(leaf):
                raise led_error(leaf)
            else:
                self.direct.append((leaf, grad))
        for key, grad in statistics.items():
            _add(self.carried, key, grad)
        self._say_what_is_constant(outer, set(statistics))

    def _say_what_is_constant(self, outer: Tensor, exact: set[int]) -> None:
        tape = self.loop.tape
        # Batch norm's statistics are found in the graph where they are read, unless a compiled function hides them.
        hidden = any("CompiledFunction" in node.name() for node in nodes_of(outer))
        known = set(tape.trained) | {id(t.grad) for t in tape.trained.values() if t.grad is not None}
        known |= {id(v) for state in self.loop.states() for v in state.values()}
        buffers = [
            tensor
            for binding in tape.bindings()
            if (tensor := binding.ref()) is not None
            and binding.buffer
            and (binding.buffer != 2 or hidden)
            and binding.key not in exact
            and id(tensor) not in known
            and not tensor.requires_grad
        ]
        # A buffer that `forward` replaces by a new tensor, in place of writing it.
        buffers += _holders(
            [
                tensor
                for binding in tape.bindings()
                if (tensor := binding.ref()) is not None
                and binding.key < 0
                and tensor.dim()
                and tensor.is_floating_point()
                and not tensor.requires_grad
                and id(tensor) not in known
            ]
        )
        if buffers:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in buffers[:4])
            warn(
                f"the loop also wrote {len(buffers)} tensors that are not weights (buffers, averages; shapes "
                f"{shapes}{', …' if len(buffers) > 4 else ''}). An outer objective computed outside of the context "
                "holds them constant. If it reads them, pass it as a function, `run.backward(lambda: loss(model(x), "
                "y))`, to have it exact.",
                HeldConstantWarning,
            )

    # -- through the iterations --------------------------------------------------------------------------------------

    def wanted(self, tensors: Iterable[Tensor] | None) -> set[int] | None:
        """The identities of what stands for these hyperparameters in the loop (None: all that are found)."""
        if tensors is None:
            return None
        ids = {id(leaf) for tensor in tensors for leaf in (tensor, *leaves_of(tensor))}
        return {
            id(external.tensor)
            for external in self.loop.tape.externals.values()
            if ids & {id(leaf) for leaf in (external.tensor, *leaves_of(external.tensor))}
        }

    def pull_back(
        self, pull: PullBack, segment: Segment, step: float, after: Mapping[int, Tensor] | None = None
    ) -> None:
        """One step of REVERSE-HG: ``g += α_t B_t``, ``α_{t-1} = α_t A_t``, both at ``(s_{t-1}, λ)``.

        Args:
            pull: what does it.
            segment: the iteration.
            step: its number, for errors.
            after: what it left behind, as far as that is at hand, by key.
        """
        alpha = {key: self.carried.pop(key) for key in segment.outputs if key in self.carried}
        if not alpha:
            return
        try:
            pulled = pull(segment, alpha, after or {})
        except RuntimeError as error:
            raise retold(error, step) from error
        self._refuse_opaque(pulled.carried)
        for key, grad in pulled.carried.items():
            _add(self.carried, key, grad)
        for key, grad in pulled.external.items():
            _add(self.external, key, grad)

    def _refuse_opaque(self, adjoint: Mapping[int, Tensor]) -> None:
        known = self.loop.tape.opaque
        for key in known.keys() & adjoint.keys() if known else ():
            if bool((adjoint[key] != 0).any()):
                raise opaque(adjoint[key].shape[self.batch is not None :], known[key])

    def check_value(self, walk: Iterable[tuple[float, Segment]] = ()) -> None:
        """Raise if the objective is not finite, and say since when the training is not.

        Args:
            walk: the iterations, the last one first, as far as they are known.
        """
        assert self.value is not None
        if bool(torch.isfinite(self.value).all()):
            return
        since, before = None, True
        for step, segment in walk:
            before = any(not bool(torch.isfinite(cell.tensor).all()) for _, cell in segment.inputs)
            if not before:
                break
            since = math.ceil(step) - 1
        if since is None:
            if all(bool(torch.isfinite(weight).all()) for weight in self.loop.weights()):
                raise SweepError(
                    f"the outer objective is {self.value.tolist()}, though the weights are finite. Look at how it is "
                    "computed."
                )
            since = self.loop.steps
        if since:
            text = f"from step {since} on (counted from 1{', if not from before' if before else ''})"
        else:
            text = "from before the first step on"
        raise SweepError(
            f"the outer objective is {self.value.tolist()}: the training is not finite {text}. Lower the learning "
            "rate, clip the gradients, or look at that step's batch."
        )

    def sweep(
        self,
        walk: Callable[[], Iterable[tuple[float, Segment]]],
        shown: Iterable[tuple[float, Segment]],
        pull: PullBack,
    ) -> None:
        """Walk back through the iterations; raise if the adjoint overflows, and say where.

        Args:
            walk: gives the iterations, the last one first.
            shown: the same, once, where somebody counts them.
            pull: what takes the adjoint back through one.
        """
        start = dict(self.carried)
        for step, segment, after in self._with_ends(shown):
            self.pull_back(pull, segment, step, after)
        if self._finite():
            return
        self.carried, self.external = start, {}
        pull = pull.by_autograd()
        for step, segment, after in self._with_ends(walk()):
            self.pull_back(pull, segment, step, after)
            if not self._finite():
                raise SweepError(
                    f"the adjoint is not finite before step {int(step)}: the hypergradient overflows on its way back "
                    "(chaotic training), or an operation of that step has an infinite derivative there (a root or a "
                    "norm at 0). Differentiate the last steps only (`last=`), lower the learning rate, or look at "
                    f"step {int(step)}."
                )

    def _with_ends(self, segments: Iterable[_Numbered]) -> Iterator[tuple[float, Segment, Mapping[int, Tensor]]]:
        """The iterations, the last one first, each with what it left behind: what the next one began with."""
        after: Mapping[int, Tensor] = self.loop.tape.present()
        for step, segment in segments:
            yield step, segment, after
            after = {key: cell.value() for key, cell in segment.inputs}

    def _finite(self) -> bool:
        values = [*self.carried.values(), *self.external.values()]
        return all(bool(torch.isfinite(value).all()) for value in values)


def opaque(shape: Sequence[int], how: Unseen) -> SweepError:
    """The derivative goes through what came about out of sight."""
    return SweepError(
        f"the hypergradient goes through a tensor of shape {tuple(shape)} {how.what}. It depends on the watched "
        f"weights or on hyperparameters in a way that was not seen, which the hypergradient would lack. {how.cure}"
    )


def _add(store: dict[int, Tensor], key: int, value: Tensor) -> None:
    store[key] = store[key] + value if key in store else value


@contextmanager
def _unhooked(leaves: list[Tensor]) -> Iterator[None]:
    """While open, the user's gradient hooks on leaves rest: they belong to the training, not to the outer objective."""
    resting = [(hooks, dict(hooks)) for leaf in leaves if (hooks := leaf._backward_hooks)]
    for hooks, _ in resting:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in resting:
            hooks.update(entries)


def _check_weights(loop: Loop) -> None:
    weight = loop.guard.changed_since()
    if weight is not None:
        raise StaleError(
            f"a weight of shape {tuple(weight.shape)} was changed after the context ended, so the outer objective "
            "does not look at the weights that the recorded training led to. Evaluate it, and call `backward`, "
            "before training goes on or `rewind` is called."
        )


def _holders(tensors: list[Tensor]) -> list[Tensor]:
    """Those of the tensors that a module (or another dict of tensors) keeps by name, as it keeps its buffers."""
    held = []
    for holder in gc.get_referrers(*tensors) if tensors else ():
        if type(holder) is dict and all(isinstance(v, (Tensor, type(None))) for v in holder.values()):
            held += [tensor for tensor in tensors if any(value is tensor for value in holder.values())]
    return held


def retold(error: RuntimeError, step: float) -> Exception:
    """An error of torch's in a derivative of a step, with what to do about it."""
    text = str(error)
    if isinstance(error, SweepError):
        return error
    hints = ("not implemented", "once_differentiable", "double backward", "does not require grad")
    if any(hint in text for hint in hints):
        return SweepError(
            f"step {int(step)} can't be differentiated a second time: {text.splitlines()[0]} An operation of the loop "
            "has no second derivative in torch. Write it with operations that have one, or detach what it computes."
        )
    return error
