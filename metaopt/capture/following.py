"""Which tensor objects are followed: by identity, and by the memory that they lie in."""

from __future__ import annotations

__all__ = ["Following"]

import itertools
from collections.abc import Iterable

from torch import Tensor

from metaopt.capture.arrivals import Arrivals
from metaopt.capture.bindings import Binding, Geometry, Unseen, leaves_of, tensor_geometry
from metaopt.capture.cells import version_of
from metaopt.capture.externals import Externals
from metaopt.capture.memory import Memory, overlap, part_of
from metaopt.capture.primitives import stop
from metaopt.errors import CaptureError


class Following:
    """The bindings of the tensors that are followed: trained weights, and what the loop makes of them.

    Args:
        trained: the weights of the watched optimizers.
        moving: whether hyperparameters may change from one iteration to the next.

    Attributes:
        trained: the weights of the watched optimizers, by identity.
        externals: the tensors that were taken for hyperparameters, by identity.
        memory: whose memory is whose.
        arrivals: the gradients that are there without a backward pass of the loop.
        hooked_inside: whether a hook that a model's ``forward`` has set has changed a gradient.
    """

    def __init__(self, trained: Iterable[Tensor], *, moving: bool = False) -> None:
        self.trained: dict[int, Tensor] = {}
        self.externals = Externals(moving=moving)
        self.memory = Memory()
        self.arrivals = Arrivals()
        self.hooked_inside = False
        self._keys = itertools.count()
        self._bindings: dict[int, Binding] = {}
        for tensor in trained:
            self.train(tensor)

    # -- from when on -------------------------------------------------------------------------------------------------

    def train(self, tensor: Tensor) -> Binding:
        """Follow a weight that the optimizer trains from here on, as what it is followed as already, if it is."""
        self.externals.give_up(tensor)
        self.trained[id(tensor)] = tensor
        return self.find(tensor) or self._follow_leaf(tensor)

    def adopt(self, tensor: Tensor) -> None:
        """A leaf that the loop writes with live values is no hyperparameter: it is carried, like a weight."""
        self.externals.give_up(tensor)
        self._follow_leaf(tensor).buffer = 1

    def _follow_leaf(self, tensor: Tensor) -> Binding:
        binding = self.bind(tensor)
        binding.leaf = tensor.requires_grad
        binding.inner = int(binding.leaf)
        self.own_memory(tensor)
        return binding

    def bind(self, tensor: Tensor) -> Binding:
        """Follow a tensor object whose value is carried over from before this iteration."""
        binding = self._bindings[id(tensor)] = self.name(tensor)
        return binding

    def name(self, tensor: Tensor) -> Binding:
        """A binding with a key of its own, for a value that is carried over from before this iteration."""
        return Binding(next(self._keys), tensor)

    def bear(self, tensor: Tensor) -> Binding:
        """Follow a tensor object that an iteration makes: it has no value from before, and a negative key says so."""
        binding = Binding(-1 - next(self._keys), tensor)
        self._bindings[id(tensor)] = binding
        return binding

    def succeed(self, binding: Binding, tensor: Tensor) -> None:
        """The optimizer has made the tensor of a state that it began with."""
        if self.find(tensor) is None:
            self._bindings[id(tensor)] = Binding(binding.key, tensor)

    def shade(self, tensor: Tensor, how: Unseen) -> None:
        """A tensor has a value that depends on what is followed, in a way that was not seen."""
        self.bind(tensor).opaque = how
        self.own_memory(tensor)

    def lose(self, tensor: Tensor) -> None:
        """Follow a tensor no longer."""
        self._bindings.pop(id(tensor), None)

    def purge(self) -> None:
        """Forget tensors that are gone."""
        self._bindings = {key: b for key, b in self._bindings.items() if b.ref() is not None}
        self.memory.purge()

    # -- by memory ----------------------------------------------------------------------------------------------------

    def own_memory(self, tensor: Tensor) -> None:
        """Other tensors in this one's memory, made out of sight, are views of it."""
        self.memory.own(tensor, self.find(tensor))

    def bear_view(self, tensor: Tensor, base: Binding, geometry: Geometry, *, stopped: bool = True) -> Binding:
        """Follow a tensor that was made out of sight, as a view of the one in whose memory it lies.

        Args:
            tensor: the view.
            base: the binding of that one.
            geometry: where it lies.
            stopped: whether gradients don't pass from the one to the other.
        """
        via = part_of(tensor, geometry, stopped=stopped)
        binding = self.bear(tensor)
        binding.base, binding.via = base, via
        return binding

    def inherit(self, tensor: Tensor, base: Binding, geometry: Geometry) -> Binding:
        """A tensor in the memory of one that is gone: it carries that one's value on."""
        part_of(tensor, geometry, whole=True)
        binding = self._bindings[id(tensor)] = Binding(base.key, tensor)
        binding.leaf = tensor.requires_grad and tensor.is_leaf
        binding.inner, binding.buffer = int(binding.leaf), base.buffer
        self.own_memory(tensor)
        return binding

    def outlive(self, view: Binding, epoch: int) -> None:
        """A view whose base went with an earlier iteration: one of those in its memory is the base from here on."""
        root = view.root
        if root is view or root.ref() is not None or root.epoch == epoch:
            return
        family = [binding for binding in self.bindings() if binding.base is not None and binding.root is root]
        heir = next((binding for binding in family if _is_all(binding)), view)
        tensor = heir.ref()
        assert tensor is not None
        heir.base = heir.via = None
        heir.buffer = heir.buffer or root.buffer
        for other in family:
            base, own = other.base, other.ref()
            if base is not None and base.ref() is None and own is not None:
                other.base, other.base_value, other.via = heir, -1, part_of(own, tensor_geometry(tensor))

    # -- which they are -----------------------------------------------------------------------------------------------

    def find(self, tensor: Tensor) -> Binding | None:
        """The binding of a tensor object, if it is followed."""
        binding = self._bindings.get(id(tensor))
        if binding is None or binding.ref() is not tensor:
            return None
        return binding

    def is_trained(self, tensor: Tensor) -> bool:
        """Whether this is a weight of a watched optimizer."""
        return self.trained.get(id(tensor)) is tensor

    def is_moved(self, leaf: Tensor) -> bool:
        """Whether a leaf is trained: by a watched optimizer, or by the loop itself."""
        return id(leaf) in self.trained or self.externals.is_moved(leaf)

    def kept_leaves(self) -> list[Tensor]:
        """Leaves that an iteration made of constants and that later ones read as they were."""
        made = [(leaf, self.find(leaf)) for leaf in self.externals.made_leaves.values() if not self.is_moved(leaf)]
        return [leaf for leaf, binding in made if binding is not None and binding.leaf and not binding.fresh]

    def views(self, tensor: Tensor) -> list[Tensor]:
        """The other living tensors that are followed and lie in this one's memory, weights aside."""
        living = [binding.ref() for binding in self.bindings()]
        return [
            x for x in living if x is not None and x is not tensor and not self.is_trained(x) and overlap(x, tensor)
        ]

    def bindings(self) -> list[Binding]:
        """The bindings whose tensors are alive."""
        return [binding for binding in self._bindings.values() if binding.ref() is not None]

    def living(self) -> list[Binding]:
        """Those, and the ones whose tensors are gone and whose memory lives on in one that was made out of sight."""
        return [*self.bindings(), *self.memory.outlived()]

    def present(self) -> dict[int, Tensor]:
        """The values that the followed tensors hold, by key, where nobody wrote to them since."""
        found = {b.key: t.detach() for b in self._bindings.values() if (t := b.ref()) is not None and b.base is None}
        versions = {b.key: b.version for b in self._bindings.values()}
        return {key: tensor for key, tensor in found.items() if version_of(tensor) == versions[key]}

    def refuse_hidden(self, tensor: Tensor) -> None:
        """Raise if a tensor depends on the trained weights, out of sight."""
        if tensor.is_leaf and self.memory.has_passed(tensor):
            raise CaptureError(
                f"a parameter of shape {tuple(tensor.shape)} was made of a result that depends on weights or "
                "hyperparameters, and has a graph (`nn.Parameter(a @ b)`), which was not seen. Detach the result, "
                "`nn.Parameter((a @ b).detach())`: its value is followed then."
            )
        if any(id(found) in self.trained for found in leaves_of(tensor)):
            raise CaptureError(
                f"a tensor of shape {tuple(tensor.shape)} depends on the trained weights, but metaopt did not see "
                "how: it was computed before the context, in another thread, or by code that hides from torch's "
                "function modes (a function or model compiled by `torch.jit`, an extension). Compute it inside the "
                "context, with torch operations called from Python: the function as it was before `torch.jit.script` "
                "or `torch.jit.trace`, say. Or detach it (`x.detach()`) to hold it constant."
            )


def _is_all(view: Binding) -> bool:
    """Whether a view is nothing but another name of its base, as ``detach`` makes it."""
    binding: Binding | None = view
    while binding is not None and binding.base is not None:
        if binding.via is None or binding.via.func is not stop:
            return False
        binding = binding.base
    return True
