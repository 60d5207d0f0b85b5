"""The adjoint ``α`` that the sweep carries back through the iterations."""

from __future__ import annotations

__all__ = ["Adjoint", "opaque", "retold"]

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from metaopt.capture.bindings import Unseen, leaves_of
from metaopt.capture.segment import Segment
from metaopt.errors import SweepError
from metaopt.modes.pullback import PullBack
from metaopt.step import Loop

_Numbered = tuple[float, Segment]


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

    def add(self, key: int, grad: Tensor) -> None:
        """Add to the derivative with respect to a carried tensor."""
        _add(self.carried, key, grad)

    # -- several objectives -------------------------------------------------------------------------------------------

    @classmethod
    def sum(cls, parts: list[Adjoint]) -> Adjoint:
        """Several objectives, added up."""
        if not parts:
            raise _no_objective()
        result = parts[0]
        for part in parts[1:]:
            for key, value in part.carried.items():
                result.add(key, value)
            result.direct += part.direct
            assert result.value is not None
            assert part.value is not None
            result.value = result.value.detach() + part.value.detach()
        return result

    @classmethod
    def stack(cls, parts: list[Adjoint]) -> Adjoint:
        """Several objectives side by side, for a Jacobian."""
        if not parts:
            raise _no_objective()
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

    # -- through the iterations --------------------------------------------------------------------------------------

    def wanted(self, tensors: Iterable[Tensor] | None) -> set[int] | None:
        """The identities of what stands for these hyperparameters in the loop (None: all that are found)."""
        if tensors is None:
            return None
        ids = {id(leaf) for tensor in tensors for leaf in (tensor, *leaves_of(tensor))}
        # Those that the loop came to write are no hyperparameters any more, but were to the steps before.
        return ids | {
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
            self.add(key, grad)
        for key, grad in pulled.external.items():
            _add(self.external, key, grad)

    def join(self, part: Adjoint) -> None:
        """Add what the hyperparameters got from a part of the objective."""
        for key, grad in part.external.items():
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


def retold(error: RuntimeError, step: float) -> Exception:
    """An error of torch's in a derivative of a step, with what to do about it."""
    text = str(error)
    if isinstance(error, SweepError):
        return error
    hints = ("not implemented", "once_differentiable", "double backward", "does not require grad")
    if any(hint in text for hint in hints):
        return SweepError(
            f"step {int(step)} can't be differentiated a second time: {text.splitlines()[0].rstrip('.')}. An operation "
            "of the loop has no second derivative in torch; its backward is named above. Compute the same from "
            "operations that have one (sums, products, `gather`, `index_add`, `logsumexp`, …), or, if the training may "
            "do without that operation's gradient, detach what it computes."
        )
    return error


def _no_objective() -> SweepError:
    return SweepError("the list of outer objectives is empty.")


def _add(store: dict[int, Tensor], key: int, value: Tensor) -> None:
    store[key] = store[key] + value if key in store else value
