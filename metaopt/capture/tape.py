"""The tensors that are followed, and the iteration that is being written."""

from __future__ import annotations

__all__ = ["Tape"]

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import Tensor

from metaopt.capture.bindings import BASE, Binding, External, Geometry, Unseen, View, leaves_of
from metaopt.capture.cells import Cell, Cells, version_of
from metaopt.capture.memory import Memory, part_of
from metaopt.capture.primitives import hooked, leaf, overwrite, stop
from metaopt.capture.segment import Segment
from metaopt.capture.trace import Group, Instruction, Num, Obj, Trace, Val, needed
from metaopt.errors import CaptureError

_LITERALS = (str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(Ellipsis))
_COMPACT_EVERY = 512


class Tape:
    """Follows tensors through the loop and writes each iteration as a `Segment`."""

    def __init__(self, trained: Iterable[Tensor], *, moving: bool = False) -> None:
        self.moving = moving
        self.cells = Cells()
        self.trace = Trace()
        self.epoch = 0
        self.externals: dict[int, External] = {}
        self.trained: dict[int, Tensor] = {}
        self._keys = itertools.count()
        self._bindings: dict[int, Binding] = {}
        self._constants: dict[int, tuple[Tensor, int, int]] = {}
        self._constant_cells: list[Cell] = []
        self.memory = Memory()
        self._stopped: dict[int, int] = {}
        self._compact_at = _COMPACT_EVERY
        self._behind: dict[int, Tensor] = {}
        # Keys of values of which nobody knows the derivative and that were read, and how they came about.
        self.opaque: dict[int, Unseen] = {}
        # What the loop computes on the way, by number, if that is to be kept.
        self.keeps_values = False
        self._known: dict[int, Cell] = {}
        self.protected: Callable[[Tensor], bool] = lambda tensor: False
        self._led: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._moved: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self.before_first_write: Callable[[Tensor], None] | None = None
        for tensor in trained:
            self.train(tensor)

    # -- which tensors are followed ---------------------------------------------------------------------------------

    def train(self, tensor: Tensor) -> Binding:
        """Follow a weight that the optimizer trains."""
        self.trained[id(tensor)] = tensor
        binding = self.bind(tensor)
        binding.leaf = tensor.requires_grad
        binding.inner = int(binding.leaf)
        self.own_memory(tensor)
        return binding

    def is_trained(self, tensor: Tensor) -> bool:
        """Whether this is a weight of a watched optimizer."""
        return self.trained.get(id(tensor)) is tensor

    def is_moved(self, leaf: Tensor) -> bool:
        """Whether a leaf is trained: by a watched optimizer, or by the loop itself."""
        return id(leaf) in self.trained or id(leaf) in self._moved

    def bind(self, tensor: Tensor) -> Binding:
        """Follow a tensor object whose value is carried over from before this iteration."""
        binding = Binding(next(self._keys), tensor)
        self._bindings[id(tensor)] = binding
        return binding

    def begin_with(self, value: Tensor) -> Binding:
        """A state that the optimizer has not made yet enters the iteration with this value."""
        binding = Binding(next(self._keys), value)
        binding.value, binding.epoch, binding.cell = self.trace.new(), self.epoch, Cell(value, owned=True)
        self.trace.inputs.append(binding.value)
        self._inputs.append(binding)
        self._input_cells.append(binding.cell)
        return binding

    def succeed(self, binding: Binding, tensor: Tensor) -> None:
        """The optimizer has made the tensor of a state that it began with."""
        if self.find(tensor) is None:
            self._bindings[id(tensor)] = Binding(binding.key, tensor)

    def _bear(self, tensor: Tensor) -> Binding:
        """Follow a tensor object that an iteration makes: it has no value from before, and a negative key says so."""
        binding = Binding(-1 - next(self._keys), tensor)
        self._bindings[id(tensor)] = binding
        return binding

    def find(self, tensor: Tensor) -> Binding | None:
        """The binding of a tensor object, if it is followed."""
        binding = self._bindings.get(id(tensor))
        if binding is None or binding.ref() is not tensor:
            return None
        return binding

    def is_live(self, tensor: Tensor) -> bool:
        """Whether the tensor depends on weights or hyperparameters."""
        return self.find(tensor) is not None or tensor.requires_grad or self.alias(tensor) is not None

    def own_memory(self, tensor: Tensor) -> None:
        """Other tensors in this one's memory, made out of sight, are views of it."""
        self.memory.own(tensor, self.find(tensor))

    def alias(self, tensor: Tensor) -> Binding | None:
        """The binding of a tensor that was made out of sight in the memory of one that is followed."""
        known = self.memory.owner(tensor)
        if known is None:
            return None
        base, geometry = known
        owner = base.ref()
        if owner is None and base.epoch != self.epoch:
            return self._inherit(tensor, base, geometry)
        if not tensor.requires_grad:
            return self._bind_view(tensor, base, geometry)
        if owner is not None:
            raise CaptureError(
                f"a parameter of shape {tuple(tensor.shape)} was made in the memory of another tensor that depends on "
                "the weights, so that writing the one changes the other. Give it memory of its own (`x.clone()`)."
            )
        # A parameter made of a detached copy (`copy.deepcopy(model)`): a leaf of the loop with a known value.
        value = self.read_binding(self._bind_view(tensor, base, geometry))
        (number,) = self.trace.emit(leaf, Val(value))
        return self.define(tensor, number, inner=1, leaf=True)

    def _bind_view(self, tensor: Tensor, base: Binding, geometry: Geometry) -> Binding:
        via = part_of(tensor, geometry)
        binding = self._bear(tensor)
        binding.base, binding.via = base, via
        return binding

    def _inherit(self, tensor: Tensor, base: Binding, geometry: Geometry) -> Binding:
        """A tensor in the memory of one that is gone: it carries that one's value on."""
        part_of(tensor, geometry, whole=True)
        binding = self._bindings[id(tensor)] = Binding(base.key, tensor)
        binding.leaf = tensor.requires_grad and tensor.is_leaf
        binding.inner, binding.buffer = int(binding.leaf), base.buffer
        self.own_memory(tensor)
        return binding

    def adopt(self, tensor: Tensor) -> None:
        """A leaf that the loop writes with live values is no hyperparameter: it is carried, like a weight."""
        external = self.externals.pop(id(tensor), None)
        if external is not None:
            external.moving = True
        binding = self.bind(tensor)
        binding.leaf = tensor.requires_grad
        binding.inner, binding.buffer = int(binding.leaf), 1
        self.own_memory(tensor)

    def shade(self, tensor: Tensor, how: Unseen) -> None:
        """A tensor has a value that depends on what is followed, in a way that was not seen."""
        self.bind(tensor).opaque = how
        self.own_memory(tensor)

    def lead(self, leaf: Tensor) -> None:
        """A leaf that is not followed is about to be moved, out of sight, along a gradient that may be followed."""
        gradient = None if leaf.grad is None else self.find(leaf.grad)
        if self.find(leaf) is None and gradient is not None and self._is_of_state(gradient):
            self._led[id(leaf)] = leaf
            del self._bindings[id(leaf.grad)]

    def _is_of_state(self, binding: Binding) -> bool:
        """Whether a value depends on what is carried, and not on hyperparameters and data alone."""
        behind = self.trace.behind(Val(binding.value)) if binding.epoch == self.epoch else set()
        return binding.epoch != self.epoch or not behind.isdisjoint(self.trace.inputs)

    def is_led(self, leaf: Tensor) -> bool:
        """Whether a leaf was moved along a gradient that depends on the weights, which is not followed."""
        return id(leaf) in self._led

    def note_behind(self, leaf: Tensor) -> None:
        """Somebody took ``.data`` of a leaf that is a hyperparameter so far."""
        self._behind[leaf.untyped_storage()._cdata] = leaf

    def adopt_behind(self, tensor: Tensor) -> None:
        """A write through ``.data`` or ``detach`` reaches a leaf that was taken for a hyperparameter."""
        if tensor.layout is not torch.strided or not self._behind:
            return
        owner = self._behind.pop(tensor.untyped_storage()._cdata, None)
        if owner is not None and owner is not tensor and self.find(owner) is None and not self.protected(owner):
            self.adopt(owner)
            self._bindings.pop(id(tensor), None)
            self.alias(tensor)

    def numbers_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """The present values, by number, of those that were read or made in this iteration."""
        found = [binding for tensor in tensors if (binding := self.find(tensor)) is not None]
        return {binding.value for binding in found if binding.epoch == self.epoch}

    def entered(self, tensors: Iterable[Tensor]) -> set[int]:
        """The numbers by which values from before this iteration came in."""
        keys = {binding.key for tensor in tensors if (binding := self.find(tensor)) is not None}
        return {n for n, b in zip(self.trace.inputs, self._inputs, strict=True) if b.key in keys}

    def has_views(self, tensor: Tensor) -> bool:
        """Whether another living tensor is followed as a view of this one."""
        base = self.find(tensor)
        return any(binding.base is not None and binding.root is base for binding in self.bindings())

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

    # -- reading ----------------------------------------------------------------------------------------------------

    def read(self, tensor: Tensor) -> Val:
        """The number of the tensor's present value, whatever kind it is."""
        binding = self.find(tensor)
        if binding is not None:
            value = self.read_binding(binding, tensor)
            return Val(self.stopped(value) if binding.halted else value)
        alias = self.alias(tensor)
        if alias is not None:
            return Val(self.read_binding(alias, tensor))
        if tensor.requires_grad:
            return Val(self._read_external(tensor))
        return Val(self.read_constant(tensor))

    def read_through(self, tensor: Tensor) -> Val:
        """`read`, of a gradient too as it was computed: the optimizer's step follows what ``backward`` leaves."""
        binding = self.find(tensor)
        return self.read(tensor) if binding is None else Val(self.read_binding(binding, tensor))

    def read_binding(self, binding: Binding, tensor: Tensor | None = None) -> int:
        """The number of a followed tensor's present value; a view is made anew where its base was written."""
        tensor = binding.ref() if tensor is None else tensor
        if binding.base is not None:
            root = binding.root
            if root.ref() is None and root.epoch != self.epoch:
                binding.base = binding.via = None  # the memory has no other name any more
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
        carried = not root.leaf and (root.epoch != self.epoch or not root.fresh)
        return 2 if binding.inner and carried else binding.inner

    def _refresh(self, view: Binding, base: Binding) -> None:
        value = self.read_binding(base)
        if view.epoch == self.epoch and view.base_value == value:
            return
        via = view.via
        assert via is not None
        number = self.make_view(via, self.stopped(value) if via.stopped and base.inner else value)
        view.value, view.epoch, view.base_value, view.fresh = number, self.epoch, value, True

    def make_view(self, via: View, base: int) -> int:
        """Write the call that makes a view of a value."""

        def spec(argument: Any) -> Any:
            return Val(base) if argument is BASE else self.spec(argument, self.read)

        number = self.trace.new()
        outs = tuple(number if place == via.position else None for place in range(max(via.outs, 1)))
        kwargs = tuple((key, spec(value)) for key, value in via.kwargs.items())
        args = tuple(spec(argument) for argument in via.args)
        self.trace.code.append(Instruction(via.func, args, kwargs, outs, many=via.outs > 1, phased=via.func is stop))
        return number

    def _enter(self, binding: Binding, tensor: Tensor | None) -> None:
        if tensor is None:
            raise CaptureError("a value whose tensor is gone is needed by a later step; please report this loop.")
        number = self.trace.new()
        self.trace.inputs.append(number)
        self._inputs.append(binding)
        if binding.cell is None or binding.cell.owned:
            binding.cell = self.cells.keep(tensor)
        self._input_cells.append(binding.cell)
        binding.value, binding.epoch, binding.fresh = number, self.epoch, False
        binding.halted = False
        binding.leaves = [number] if binding.leaf else []
        if binding.opaque is not None:
            self.opaque[binding.key] = binding.opaque
        if binding.leaf:
            self._hook_up(number, tensor)

    def _hook_up(self, number: int, leaf: Tensor) -> None:
        """The gradient hooks of a leaf act on those at each of its values."""
        for hook in (leaf._backward_hooks or {}).values():
            place = self.spec(hook, self.read)
            self.trace.code.append(Instruction(hooked, (Val(number), place), phased=True, effect=True))

    _inputs: list[Binding]
    _input_cells: list[Cell]

    def _read_external(self, tensor: Tensor) -> int:
        external = self.externals.get(id(tensor))
        moved = external is not None and external.version != version_of(tensor)
        if external is None or moved:
            self._refuse_weights(tensor)
            external = self.externals[id(tensor)] = External(
                tensor, self.cells.keep(tensor), moving=self.moving, led=self.is_led(tensor)
            )
        if external.epoch != self.epoch:
            external.value, external.epoch = self.trace.new(), self.epoch
            self.trace.externals.append(external.value)
            self._external_list.append(external)
        return external.value

    _external_list: list[External]

    def _refuse_weights(self, tensor: Tensor) -> None:
        if any(id(found) in self.trained for found in leaves_of(tensor)):
            raise CaptureError(
                f"a tensor of shape {tuple(tensor.shape)} depends on the trained weights, but metaopt did not see "
                "how: it was computed before the context, or by an operation that hides from torch's function modes. "
                "Compute it inside the context with torch operations, or detach it (`x.detach()`) to hold it "
                "constant."
            )

    def read_constant(self, tensor: Tensor) -> int:
        """The number of a value that is a constant of the step."""
        known = self._constants.get(id(tensor))
        if known is not None and known[0] is tensor and known[1] == version_of(tensor):
            return known[2]
        number = self.trace.new()
        self.trace.constants.append(number)
        self._constant_cells.append(self.cells.keep(tensor))
        self._constants[id(tensor)] = (tensor, version_of(tensor), number)
        return number

    def stopped(self, value: int) -> int:
        """The number of a value behind a `stop`."""
        if value not in self._stopped:
            (self._stopped[value],) = self.trace.emit(stop, Val(value), phased=True)
        return self._stopped[value]

    def read_stopped(self, tensor: Tensor) -> Val:
        """The tensor's present value, as a constant of the loop's own gradients."""
        value = self.read(tensor)
        binding = self.find(tensor)
        return Val(self.stopped(value.index)) if binding is not None and binding.inner else value

    # -- arguments --------------------------------------------------------------------------------------------------

    def spec(self, argument: Any, read: Callable[[Tensor], Val]) -> Any:
        """An argument as nested tuples over values, numbers and literals."""
        if isinstance(argument, Tensor):
            return read(argument)
        kind = type(argument)
        if kind is bool or isinstance(argument, _LITERALS):
            return argument
        if kind is int or kind is float or kind is complex:
            return self.trace.number(argument)
        if kind is tuple or kind is torch.Size:
            return tuple([self.spec(entry, read) for entry in argument])
        if kind is list:
            return Group(list, tuple([self.spec(entry, read) for entry in argument]))
        if kind is slice:
            parts = (argument.start, argument.stop, argument.step)
            return Group(slice, tuple([self.spec(part, read) for part in parts]))
        if kind is dict:
            return Group(dict, tuple([(key, self.spec(entry, read)) for key, entry in argument.items()]))
        if isinstance(argument, tuple):  # a named tuple, as PackedSequence is
            return Group(kind, tuple([self.spec(entry, read) for entry in argument]))
        if isinstance(argument, (int, float)):  # numpy's scalars, enums
            return self.trace.number(argument)
        # What is mutable is copied: the loop may change it before the sweep looks (an index that is shuffled in place).
        self.trace.objects.append(argument.copy() if isinstance(argument, numpy.ndarray) else argument)
        return Obj(len(self.trace.objects) - 1)

    # -- results ----------------------------------------------------------------------------------------------------

    def define(self, tensor: Tensor, value: int, *, inner: int = 0, leaf: bool = False) -> Binding:
        """The tensor object now holds this value of the present iteration."""
        binding = self.find(tensor) or self._bear(tensor)
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
            self._known[value] = self.cells.keep(tensor.detach())

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
            self._moved[id(tensor)] = tensor

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
        self.trace = Trace()
        self._inputs, self._input_cells, self._external_list = [], [], []
        self._constants, self._constant_cells = {}, []
        self._behind = {}
        self._stopped = {}
        self._known = {}
        self._compact_at = _COMPACT_EVERY
        if self.moving:
            # What was computed from a hyperparameter that has moved since is not used again.
            self.externals = {
                key: external
                for key, external in self.externals.items()
                if external.tensor.grad_fn is None or external.epoch > self.epoch - 4
            }
        self._bindings = {key: b for key, b in self._bindings.items() if b.ref() is not None}
        self.memory.purge()

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
        segment = seal(
            self.trace,
            inputs=list(zip((b.key for b in self._inputs), self._input_cells, strict=True)),
            externals=self._external_list,
            constants=self._constant_cells,
            outputs=sorted((value, key) for key, value in outputs.items()),
            computed=self._known,
        )
        self.begin()
        return segment

    def compact(self) -> None:
        """Forget calls whose results nobody can reach any more, so that long evaluations cost no memory."""
        code = self.trace.code
        if len(code) < self._compact_at:
            return
        wanted = {binding.value for binding in self.living() if binding.epoch == self.epoch}
        for binding in self._bindings.values():
            if binding.epoch == self.epoch and binding.ref() is not None:
                wanted.update(binding.leaves)
                base = binding.base
                while base is not None:
                    wanted.add(base.value)
                    base = base.base
        wanted.update(self._stopped.values())
        keep = needed(code, wanted)
        self.trace.code = [code[index] for index in keep]
        used = {value for instruction in self.trace.code for value in instruction.used()} | wanted
        self._drop_constants(used)
        self._compact_at = max(_COMPACT_EVERY, 2 * len(self.trace.code))

    def _drop_constants(self, used: set[int]) -> None:
        pairs = [
            (number, cell)
            for number, cell in zip(self.trace.constants, self._constant_cells, strict=True)
            if number in used
        ]
        self.trace.constants = [number for number, _ in pairs]
        self._constant_cells = [cell for _, cell in pairs]
        self._constants = {key: known for key, known in self._constants.items() if known[2] in used}


def _unseen_write(tensor: Tensor) -> CaptureError:
    return CaptureError(
        f"a tensor of shape {tuple(tensor.shape)} that depends on the weights was modified in place by something that "
        "metaopt does not see: code outside of the context, an extension, another thread, or code that switches "
        "torch's function modes off. Write it with torch's own operations, inside the context; evaluate outer "
        "objectives before anything changes what the loop left."
    )
