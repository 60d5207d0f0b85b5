"""Leaves that no watched optimizer trains: hyperparameters, until they turn out to be weights of somebody else."""

from __future__ import annotations

__all__ = ["External", "Externals", "led_error"]

import weakref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from metaopt.capture.bindings import leaves_of
from metaopt.capture.cells import Cell, version_of
from metaopt.errors import CaptureError, MetaoptWarning, StaleError, warn

_COPIED_AT_MOST = 100_000


class External:
    """A tensor that requires grad and is not trained: a hyperparameter, or something computed from one.

    One that changes is a new external from then on; what used the old value keeps the old one.
    """

    __slots__ = ("behind", "cell", "copy", "epoch", "inner", "led", "moving", "tensor", "value", "version")

    def __init__(self, tensor: Tensor, cell: Cell, *, moving: bool, led: bool = False, inner: bool = False) -> None:
        self.tensor = tensor
        self.cell = cell
        self.version = version_of(tensor)
        self.value = -1
        self.epoch = -1
        self.moving = moving
        self.led = led
        # Whether the loop made it to take gradients at: a constant, that nobody asks for.
        self.inner = inner
        self.behind: list[tuple[Tensor, _Value]] = []
        # Writes through `.data` leave no trace in the version.
        self.copy = tensor.detach().clone() if tensor.numel() <= _COPIED_AT_MOST and not moving else None

    def check(self, *, derived: bool = True) -> None:
        """Raise if the hyperparameter is not what it was when these steps used it, or is none and differentiated."""
        if self.led and derived:
            raise led_error(self.tensor)
        if self.moving:
            return
        unchanged = version_of(self.tensor) == self.version
        if not unchanged or (self.copy is not None and not torch.equal(self.copy, self.tensor)):
            raise StaleError(
                f"a hyperparameter of shape {tuple(self.tensor.shape)} was changed in place after the recorded steps "
                "used it, so their derivative at its old value can't be taken. Call `run.backward` before the "
                "hyperparameter's optimizer steps; to change hyperparameters within a context, use `metaopt.stream`."
            )


class _Value:
    """What a leaf held when something that was computed from it was first used."""

    def __init__(self, leaf: Tensor) -> None:
        self.version = version_of(leaf)
        self.copy = leaf.detach().clone() if leaf.numel() <= _COPIED_AT_MOST else None

    def is_of(self, leaf: Tensor) -> bool:
        """Whether the leaf holds it still, or again."""
        return self.version == version_of(leaf) or (self.copy is not None and torch.equal(self.copy, leaf))


# The last known value of each leaf, and those of the leaves behind each tensor that was computed before a context.
_values: WeakIdKeyDictionary = WeakIdKeyDictionary()
_computed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _value_of(leaf: Tensor) -> _Value:
    known: _Value | None = _values.get(leaf)
    if known is None or known.version != version_of(leaf):
        known = _values[leaf] = _Value(leaf)
    return known


def _is_old(tensor: Tensor, behind: list[tuple[Tensor, _Value]]) -> bool:
    """Whether what a tensor was computed from has moved since it was first used."""
    if all(value.is_of(leaf) for leaf, value in behind):
        return False
    # A leaf may move by less than its value can show.
    source = getattr(tensor, "_metaopt_source", None)
    return source is None or not torch.equal(source().detach(), tensor.detach())


class Externals(dict[int, External]):
    """The tensors that were taken for hyperparameters so far, by identity, and the leaves that are none.

    Args:
        moving: whether hyperparameters may change from one iteration to the next.
    """

    def __init__(self, *, moving: bool) -> None:
        super().__init__()
        self.moving = moving
        # The leaves whose derivative is carried along, where not all are.
        self.named: dict[int, Tensor] | None = None
        # Leaves that the loop trains itself, and those moved out of sight along a gradient that depends on the weights.
        self._moved: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._led: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        # Those that it came to write by what depends on nothing else, and follows from there on.
        self.projected: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        # Those of which `.data` was taken in this iteration, by their memory.
        self._behind: dict[int, Tensor] = {}
        # The memory of the constants that this iteration made, and the leaves in such that the loop took gradients at.
        self._made: dict[int, StorageWeakRef] = {}
        self._purge_at = 256
        # Leaves that the loop made of constants in sight.
        self.made_leaves: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._inner: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def is_named(self, leaf: Tensor) -> bool:
        """Whether the derivative with respect to a leaf is asked for: that of every one is, unless some are named."""
        return self.named is None or id(leaf) in self.named

    def present(self, tensor: Tensor) -> External | None:
        """What stands for a tensor, if its value is still the one that was seen."""
        external = self.get(id(tensor))
        if external is None or external.version != version_of(tensor):
            return None
        if external.behind and self.moving and _is_old(tensor, external.behind):
            external.behind = []  # once
            warn(
                f"a tensor of shape {tuple(tensor.shape)} was computed from a hyperparameter before the context, or "
                "some steps ago, and the hyperparameter has moved since: the training goes on with the old value. "
                "Compute it in the loop, where it is used.",
                MetaoptWarning,
            )
        return external

    def meet(self, tensor: Tensor, cell: Cell) -> External:
        """A tensor is taken for a hyperparameter from here on, or has another value than before."""
        led, inner = self.is_led(tensor), self.is_inner(tensor)
        external = self[id(tensor)] = External(tensor, cell, moving=self.moving, led=led, inner=inner)
        if tensor.grad_fn is not None:
            external.behind = self._behind_it(tensor)
        return external

    def _behind_it(self, tensor: Tensor) -> list[tuple[Tensor, _Value]]:
        """The leaves that a tensor was computed from, with what they held; raise if an earlier context used it then."""
        leaves = leaves_of(tensor)
        user, values = _computed.setdefault(tensor, (weakref.ref(self), [_value_of(leaf) for leaf in leaves]))
        behind = list(zip(leaves, values, strict=True))
        if user() is not self and _is_old(tensor, behind):
            raise StaleError(
                f"a tensor of shape {tuple(tensor.shape)}, which was computed from a hyperparameter before the context "
                "and was used in an earlier one, has its old value, and the hyperparameter has moved since: the "
                "training would not follow it. Compute it again for each context. A setting of an optimizer is "
                "followed by the classes of `metaopt.optim` and by `metaopt.wrap`, where it is one of "
                "`metaopt.Hyperparameters` (`lr=hyper.lr`); where you compute it yourself, make the optimizer anew, or "
                "write it into the group again."
            )
        return behind

    def give_up(self, leaf: Tensor) -> None:
        """A leaf turns out to be no hyperparameter."""
        external = self.pop(id(leaf), None)
        if external is not None:
            external.moving = True

    def move(self, leaf: Tensor) -> None:
        """The loop trains a leaf itself."""
        self._moved[id(leaf)] = leaf

    def is_moved(self, leaf: Tensor) -> bool:
        """Whether the loop trains a leaf itself."""
        return id(leaf) in self._moved

    def lead(self, leaf: Tensor) -> None:
        """A leaf is moved along a gradient that depends on the weights, which is not followed."""
        self._led[id(leaf)] = leaf

    def is_led(self, leaf: Tensor) -> bool:
        """Whether a leaf was moved along a gradient that depends on the weights, which is not followed."""
        return id(leaf) in self._led

    def note_made(self, constant: Tensor) -> None:
        """The loop made a constant: a leaf in its memory, made out of sight (``Parameter(x)``), was made after it."""
        if not self.moving or constant.layout is not torch.strided:
            return  # in reverse mode it costs nothing to take such a leaf for a hyperparameter
        if len(self._made) >= self._purge_at:
            self._made = {key: known for key, known in self._made.items() if not known.expired()}
            self._purge_at = max(256, 2 * len(self._made))
        storage = constant.untyped_storage()
        self._made[storage._cdata] = StorageWeakRef(storage)

    def differentiate(self, leaf: Tensor) -> None:
        """The loop takes gradients at a leaf: if it made it in this iteration, it made it for that."""
        external = self.get(id(leaf))
        if external is not None and leaf.is_leaf and leaf.layout is torch.strided:
            made = self._made.get(leaf.untyped_storage()._cdata)
            if made is not None and not made.expired():
                external.inner = True
                self._inner[id(leaf)] = leaf

    def is_inner(self, leaf: Tensor) -> bool:
        """Whether the loop made a leaf to take gradients at."""
        return id(leaf) in self._inner

    def note_behind(self, leaf: Tensor) -> None:
        """Somebody took ``.data`` of a leaf that is a hyperparameter so far."""
        self._behind[leaf.untyped_storage()._cdata] = leaf

    def behind(self, tensor: Tensor) -> Tensor | None:
        """The leaf of which a tensor is the ``.data``, as a whole."""
        if tensor.layout is not torch.strided or not self._behind:
            return None
        owner = self._behind.get(tensor.untyped_storage()._cdata)
        return owner if owner is not None and _geometry(owner) == _geometry(tensor) else None

    def take_behind(self, tensor: Tensor) -> Tensor | None:
        """The leaf in whose memory, taken by ``.data`` or ``detach``, a tensor lies; it is told once."""
        if tensor.layout is not torch.strided or not self._behind:
            return None
        owner = self._behind.pop(tensor.untyped_storage()._cdata, None)
        return None if owner is tensor else owner

    def begin(self, epoch: int) -> None:
        """A new iteration begins."""
        self._behind, self._made = {}, {}
        if self.moving:
            # What was computed from a hyperparameter that has moved since is not used again; nor are most inner leaves.
            for key, external in list(self.items()):
                if external.inner or (external.tensor.grad_fn is not None and external.epoch <= epoch - 4):
                    del self[key]


def _geometry(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def led_error(leaf: Tensor) -> CaptureError:
    """The error for what looks like a hyperparameter, and follows the weights unseen."""
    return CaptureError(
        f"a tensor of shape {tuple(leaf.shape)} is no weight of the watched optimizer, but the loop moved it along a "
        "gradient that depends on those weights (a second network under its own optimizer, trained on what the first "
        "one computes), and then used it. How it follows the weights was not seen, so the hypergradient would be "
        "wrong. Watch both optimizers, `metaopt.record([first, second])`, or take the step by hand in the loop."
    )
