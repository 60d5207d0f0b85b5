"""What the loop does to the tensors that are followed, as numbers of the iteration that is being written."""

from __future__ import annotations

__all__ = ["Tape"]

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.capture.bindings import BASE, Binding, Unseen, View
from metaopt.capture.cells import Cell, Cells, version_of
from metaopt.capture.following import Following
from metaopt.capture.iteration import Iteration
from metaopt.capture.primitives import flatten, leaf, overwrite, stop
from metaopt.capture.segment import Segment
from metaopt.capture.trace import Instruction, Num, Val
from metaopt.errors import CaptureError


class Tape(Following):
    """Follows tensors through the loop and writes each iteration as a `Segment`."""

    def __init__(self, trained: Iterable[Tensor], *, moving: bool = False) -> None:
        super().__init__(trained, moving=moving)
        self.cells = Cells()
        self.epoch = 0
        self._turn_to(Iteration(self.cells))
        # Keys of values of which nobody knows the derivative and that were read, and how they came about.
        self.opaque: dict[int, Unseen] = {}
        # Whether what the loop computes on the way is to be kept.
        self.keeps_values = False
        self.protected: Callable[[Tensor], bool] = lambda tensor: False
        self.before_first_write: Callable[[Tensor], None] | None = None

    def _turn_to(self, iteration: Iteration) -> None:
        self.iteration = iteration
        self.trace = iteration.trace  # which each call of the loop asks for

    # -- what becomes of tensors --------------------------------------------------------------------------------------

    def begin_with(self, value: Tensor) -> Binding:
        """A state that the optimizer has not made yet enters the iteration with this value."""
        binding = self.name(value)
        binding.cell = Cell(value, owned=True)
        binding.value, binding.epoch = self.iteration.enter(binding, binding.cell), self.epoch
        return binding

    def is_live(self, tensor: Tensor) -> bool:
        """Whether the tensor depends on weights or hyperparameters."""
        return self.find(tensor) is not None or tensor.requires_grad or self.alias(tensor) is not None

    def alias(self, tensor: Tensor) -> Binding | None:
        """The binding of a tensor that was made out of sight in the memory of one that is followed."""
        known = self.memory.owner(tensor)
        if known is None:
            return None
        base, geometry = known
        owner = base.ref()
        if owner is None and base.epoch != self.epoch:
            return self.inherit(tensor, base, geometry)
        # One that torch knows to be a view, of what was a constant then, follows what is written to it with its graph.
        graph = owner is not None and tensor._base is owner
        if graph or not tensor.requires_grad:
            return self.bear_view(tensor, base, geometry, stopped=not graph)
        if owner is not None:
            raise CaptureError(
                f"a parameter of shape {tuple(tensor.shape)} was made in the memory of another tensor that depends on "
                "the weights, so that writing the one changes the other. Give it memory of its own (`x.clone()`)."
            )
        # A parameter made of a detached copy (`copy.deepcopy(model)`): a leaf of the loop with a known value.
        value = self.read_binding(self.bear_view(tensor, base, geometry))
        (number,) = self.trace.emit(leaf, Val(value))
        return self.define(tensor, number, inner=1, leaf=True)

    def lead(self, leaf: Tensor) -> None:
        """A leaf that is not followed is about to be moved, out of sight, along a gradient that may be followed."""
        grad = leaf.grad
        followed = None if grad is None else self.find(grad)
        if grad is not None and followed is not None and self.find(leaf) is None and self._is_of_state(followed):
            self.externals.lead(leaf)
            self.lose(grad)

    def _is_of_state(self, binding: Binding) -> bool:
        return binding.epoch != self.epoch or self.iteration.is_of_state(binding.value)

    def are_of_state(self, arguments: Sequence[Any]) -> bool:
        """Whether all of these tensors depend on what is carried, and not on hyperparameters and data alone."""
        return all((binding := self.find(x)) is not None and self._is_of_state(binding) for x in flatten(arguments))

    def adopt_behind(self, tensor: Tensor) -> None:
        """A write through ``.data`` or ``detach`` reaches a leaf that was taken for a hyperparameter."""
        owner = self.externals.take_behind(tensor)
        if owner is not None and self.find(owner) is None and not self.protected(owner):
            self.adopt(owner)
            self.lose(tensor)
            self.alias(tensor)

    def numbers_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """The present values, by number, of those that were read or made in this iteration."""
        found = [binding for tensor in tensors if (binding := self.find(tensor)) is not None]
        return {binding.value for binding in found if binding.epoch == self.epoch}

    def entered(self, tensors: Iterable[Tensor]) -> set[int]:
        """The numbers by which values from before this iteration came in."""
        return self.iteration.entered({b.key for tensor in tensors if (b := self.find(tensor)) is not None})

    # -- reading ----------------------------------------------------------------------------------------------------

    def read(self, tensor: Tensor) -> Val:
        """The number of the tensor's present value, whatever kind it is."""
        binding = self.find(tensor)
        if binding is not None:
            value = self.read_binding(binding, tensor)
            return Val(self.iteration.stopped(value) if binding.halted else value)
        alias = self.alias(tensor)
        if alias is not None:
            return Val(self.read_binding(alias, tensor))
        if tensor.requires_grad:
            return Val(self._read_external(tensor))
        return Val(self.iteration.read_constant(tensor))

    def read_through(self, tensor: Tensor) -> Val:
        """`read`, of a gradient too as it was computed: the optimizer's step follows what ``backward`` leaves."""
        binding = self.find(tensor)
        return self.read(tensor) if binding is None else Val(self.read_binding(binding, tensor))

    def read_binding(self, binding: Binding, tensor: Tensor | None = None) -> int:
        """The number of a followed tensor's present value; a view is made anew where its base was written."""
        tensor = binding.ref() if tensor is None else tensor
        if binding.base is not None:
            self.outlive(binding, self.epoch)
        if binding.base is not None:
            self._refresh(binding, binding.base)
            return binding.value
        if tensor is not None and version_of(tensor) != binding.version:
            raise _unseen_write(tensor)
        if binding.epoch != self.epoch:
            self._enter(binding, tensor)
        return binding.value

    def inner_of(self, tensor: Tensor) -> int:
        """Whether the loop's own gradients pass through this tensor (see `Binding`)."""
        binding = self.find(tensor)
        if binding is None and tensor.requires_grad:
            binding = self.alias(tensor)  # a copy of weights that is a leaf of its own
        if binding is None:
            return 0
        root = binding.root
        inner, view = binding.inner, binding
        while view.base is not None and view.via is not None and not view.via.stopped:
            view = view.base
            inner = max(inner, view.inner)  # it has the graph of what was written to its base since
        carried = not root.leaf and (root.epoch != self.epoch or not root.fresh)
        return 2 if inner and carried else inner

    def _refresh(self, view: Binding, base: Binding) -> None:
        value = self.read_binding(base)
        if view.epoch == self.epoch and view.base_value == value:
            return
        via = view.recipe()
        if not via.stopped:
            view.inner = max(view.inner, base.inner)
        number = self.make_view(via, self.iteration.stopped(value) if via.stopped and base.inner else value)
        view.value, view.epoch, view.base_value, view.fresh = number, self.epoch, value, True

    def make_view(self, via: View, base: int) -> int:
        """Write the call that makes a view of a value."""

        def spec(argument: Any) -> Any:
            return Val(base) if argument is BASE else self.trace.spec(argument, self.read)

        number = self.trace.new()
        outs = tuple(number if place == via.position else None for place in range(max(via.outs, 1)))
        kwargs = tuple((key, spec(value)) for key, value in via.kwargs.items())
        args = tuple(spec(argument) for argument in via.args)
        self.trace.code.append(Instruction(via.func, args, kwargs, outs, many=via.outs > 1, phased=via.func is stop))
        return number

    def _enter(self, binding: Binding, tensor: Tensor | None) -> None:
        if tensor is None:
            raise CaptureError("a value whose tensor is gone is needed by a later step; please report this loop.")
        if binding.cell is None or binding.cell.owned:
            binding.cell = self.cells.keep(tensor)
        number = self.iteration.enter(binding, binding.cell)
        binding.value, binding.epoch, binding.fresh = number, self.epoch, False
        binding.halted = False
        binding.leaves = [number] if binding.leaf else []
        if binding.opaque is not None:
            self.opaque[binding.key] = binding.opaque
        if binding.leaf:
            self._hook_up(number, tensor)

    def _hook_up(self, number: int, leaf: Tensor) -> None:
        for hook in (leaf._backward_hooks or {}).values():  # which act on the gradients at each of its values
            self.iteration.hook(number, hook)

    def _read_external(self, tensor: Tensor) -> int:
        external = self.externals.present(tensor)
        if external is None:
            self.refuse_hidden(tensor)
            external = self.externals.meet(tensor, self.cells.keep(tensor))
        if external.epoch != self.epoch:
            external.value, external.epoch = self.iteration.enter_external(external), self.epoch
        return external.value

    def read_stopped(self, tensor: Tensor) -> Val:
        """The tensor's present value, as a constant of the loop's own gradients."""
        value = self.read(tensor)
        binding = self.find(tensor)
        return Val(self.iteration.stopped(value.index)) if binding is not None and binding.inner else value

    # -- results ----------------------------------------------------------------------------------------------------

    def define(self, tensor: Tensor, value: int, *, inner: int = 0, leaf: bool = False) -> Binding:
        """The tensor object now holds this value of the present iteration."""
        binding = self.find(tensor) or self.bear(tensor)
        binding.cell = binding.base = binding.via = binding.opaque = None
        binding.halted = False
        binding.version = version_of(tensor)
        binding.value, binding.epoch, binding.fresh = value, self.epoch, True
        binding.inner, binding.leaf = inner, leaf
        binding.leaves = [value] if leaf else []
        return binding

    def before_write(self, tensor: Tensor) -> None:
        """Save what lies in this tensor's memory for those who still need it."""
        if self.before_first_write is not None:
            self.before_first_write(tensor)
        self.cells.before_write(tensor)

    def keep_value(self, tensor: Tensor, value: int) -> None:
        """Keep what the loop computed, so that the sweep need not."""
        if self.keeps_values and tensor.is_floating_point() and not tensor._is_view():
            self.iteration.keep(value, self.cells.keep(tensor.detach()))

    def rebind_leaf(self, binding: Binding, value: int, tensor: Tensor) -> None:
        """A weight that requires grad was written under ``no_grad``: a new value to take gradients at."""
        (number,) = self.trace.emit(leaf, Val(value))
        leaves = binding.leaves if binding.epoch == self.epoch else []
        value = number
        if tensor._backward_hooks:
            # On a value of its own: behind one with a graph, autograd takes the gradient before the hooks change it.
            (value,) = self.trace.emit(torch.clone, Val(number))
            self._hook_up(value, tensor)
        self.define(tensor, value, inner=1, leaf=True)
        binding.leaves = [*leaves, number]
        if id(tensor) not in self.trained:
            self.externals.move(tensor)

    def write_whole(self, tensor: Tensor, value: Val | Num, *, inner: int = 0) -> None:
        """The whole tensor was overwritten with a value that does not depend on what it held."""
        binding = self.find(tensor)
        target = (tuple(tensor.shape), tensor.dtype, tensor.device)
        (number,) = self.trace.emit(overwrite, value, *target)
        if binding is not None and binding.leaf:
            self.rebind_leaf(binding, number, tensor)
        else:
            self.define(tensor, number, inner=inner)

    # -- iterations -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a new iteration."""
        self.epoch += 1
        self._turn_to(Iteration(self.cells))
        self.externals.begin(self.epoch)
        self.purge()

    def end(self, seal: Callable[..., Segment]) -> Segment:
        """Finish the iteration: what it left behind in living tensors is what it computed."""
        for view in self.bindings():
            # A view may outlive its base: it gets a value of its own.
            if view.base is not None and view.root.epoch == self.epoch and view.root.fresh:
                self.read_binding(view)
                view.buffer = view.buffer or view.root.buffer
                if (tensor := view.ref()) is not None:
                    view.version = version_of(tensor)
        outputs = {
            b.key: b.value
            for b in self._bindings.values()
            if b.epoch == self.epoch
            and b.fresh
            and (t := b.ref()) is not None
            and (t.dtype.is_floating_point or t.dtype.is_complex)
        }
        # The tensor may be gone and its memory live on, in one that was made of it out of sight.
        for b in self.memory.outlived():
            if b.epoch == self.epoch and b.fresh:
                outputs.setdefault(b.key, b.value)
        segment = self.iteration.seal(seal, outputs)
        self.begin()
        return segment

    def compact(self) -> None:
        """Forget calls whose results nobody can reach any more, so that long evaluations cost no memory."""
        if len(self.trace.code) < self.iteration.compact_at:
            return
        wanted = {binding.value for binding in self.living() if binding.epoch == self.epoch}
        for binding in self.bindings():
            if binding.epoch == self.epoch:
                wanted.update(binding.leaves)
                base = binding.base
                while base is not None:
                    wanted.add(base.value)
                    base = base.base
        self.iteration.compact(wanted)


def _unseen_write(tensor: Tensor) -> CaptureError:
    return CaptureError(
        f"a tensor of shape {tuple(tensor.shape)} that depends on the weights was modified in place by something that "
        "metaopt does not see: code outside of the context, an extension, another thread, or code that switches "
        "torch's function modes off. Write it with torch's own operations, inside the context; evaluate outer "
        "objectives before anything changes what the loop left."
    )
