"""The ``TorchFunctionMode`` that shows every torch call of the loop to the tape."""

from __future__ import annotations

__all__ = ["Watcher"]

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from metaopt.capture import calls, made, writes
from metaopt.capture.bindings import BASE, Binding, View, one_of_many
from metaopt.capture.cells import versions_of
from metaopt.capture.functions import apply_function
from metaopt.capture.hooks import observed
from metaopt.capture.notices import Notices, name_of
from metaopt.capture.overwrites import OVERWRITES, last_written
from metaopt.capture.primitives import flatten, has_graph
from metaopt.capture.replacements import REPLACEMENTS
from metaopt.capture.steps import ROOTS, in_step
from metaopt.capture.surroundings import generators, surroundings
from metaopt.capture.tape import Tape
from metaopt.capture.trace import Instruction
from metaopt.capture.withheld import Withheld
from metaopt.errors import CaptureError
from metaopt.followed import Followed

_NUMBERS = {"item", "tolist", "numpy", "__float__", "__int__", "__index__", "__complex__", "__array__", "__format__"}
# How many calls are looked at for a compiler above them.
_LOOKS = 64

# What describes a tensor, and changes none: nothing to record.
_PASS = {
    getattr(Tensor, name).__get__
    for name in (
        "shape dtype device requires_grad is_leaf grad_fn ndim layout is_cuda is_cpu is_sparse names "
        "is_quantized is_nested is_meta is_mps is_xpu itemsize nbytes output_nr _version _base _backward_hooks"
    ).split()
    if hasattr(getattr(Tensor, name, None), "__get__")
} | {
    getattr(Tensor, name)
    for name in (
        "size dim numel stride is_floating_point is_complex is_contiguous element_size __len__ __hash__ __repr__ "
        "get_device storage_offset data_ptr nelement is_signed _is_view is_inference is_pinned untyped_storage "
        "__dir__ is_same_size is_shared has_names ndimension"
    ).split()
    if hasattr(Tensor, name)
}
# The profiler's marks, of which every optimizer makes some; and what switches autograd.
_PASS |= {
    torch._C._set_grad_enabled,
    torch.ops.profiler._record_function_enter_new,
    torch.ops.profiler._record_function_exit._RecordFunction,
}


class Watcher(TorchFunctionMode):
    """Runs every call as it stands, then writes down those that depend on weights or hyperparameters."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.paused = False
        self.left = False
        self.in_backward = False
        self.check_functions = True
        self.withheld = Withheld()
        self.notices = Notices()
        # Whether the step of a wrapped optimizer is running, and whether it may take numbers out of tensors.
        self.stepping: Callable[[], bool] = lambda: False
        self.numbers_held = True
        self._looked_for_compiler = 0

    def __exit__(self, *error: Any) -> None:
        if any(mode is self for mode in _get_current_function_mode_stack()):
            super().__exit__(*error)
        else:  # entered in another thread, and nobody else can take it off there
            self.left = self.paused = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused or func in _PASS:
            return func(*args, **kwargs)
        self.paused = True
        try:
            if _follows((*args, *kwargs.values())):
                self.notices.number_given(func)
            if torch._C._are_functorch_transforms_active():
                return self._inside_transform(func, args, kwargs)
            if self.tape.memory.parted or self.tape.memory.stale:
                self.tape.memory.refuse_parted(flatten([*args, *kwargs.values()]), writes.targets(func, args, kwargs))
            special = calls.SPECIAL.get(func)
            if special is not None:
                return special(self, func, args, kwargs)
            return self.call(func, args, kwargs)
        finally:
            self.paused = False

    def _inside_transform(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        unwrapped = torch._C._functorch.get_unwrapped
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        for tensor in flatten([*args, *kwargs.values()]):
            while wrapped(tensor):
                tensor = unwrapped(tensor)
            if self.tape.is_live(tensor):
                raise CaptureError(
                    f"`{name_of(func)}` was called on a tensor that depends on the weights inside a torch.func "
                    "transform, which can't be followed. Use `torch.autograd.grad(..., create_graph=True)` in the "
                    "loop instead of `torch.func.grad`, and a loop or a batch dimension instead of `vmap`."
                )
        return func(*args, **kwargs)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The span of a backward pass of the loop, in which its gradient hooks run."""
        before, self.in_backward = self.in_backward, True
        try:
            with observed(self, self.tape.trained.values()):
                yield
        finally:
            self.in_backward = before

    def apply(self, cls: type, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a custom ``autograd.Function``, and record it as one call."""
        if self.paused:
            return apply(*args, **kwargs)
        self.paused = True
        try:
            return apply_function(self, cls, apply, args, kwargs)
        finally:
            self.paused = False

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call; record it if it depends on something that is followed."""
        tape = self.tape
        tensors = flatten(args)
        if kwargs:
            flatten(kwargs.values(), tensors)
        targets = writes.targets(func, args, kwargs)
        for tensor in tensors:
            if tensor.requires_grad or tape.is_live(tensor):
                break
        else:
            return self._constant_call(func, args, kwargs, targets)
        if forward_ad._current_level >= 0:
            raise CaptureError(
                f"`{name_of(func)}` was called on a tensor that depends on the weights or hyperparameters inside "
                "forward-mode AD (`dual_level`), which can't be followed. Take the derivative along a direction by "
                "two calls of `torch.autograd.grad(..., create_graph=True)`."
            )
        if targets:
            return writes.call(self, func, args, kwargs, targets)
        seed = generators(func, kwargs)
        versions = versions_of(tensors)
        result = func(*args, **kwargs)
        if versions != versions_of(tensors):
            raise CaptureError(
                f"`{name_of(func)}` wrote one of its arguments in place, in a way that metaopt does not know and so "
                "can't replay. Use the version of the operation that returns a new tensor."
            )
        self.record(func, args, kwargs, result, seed, sources=tensors)
        return result

    def record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        seed: Any = None,
        *,
        grad: bool | None = None,
        phased: bool = False,
        sources: list[Tensor] | None = None,
    ) -> None:
        """Write a call without side effects, and follow its results; ``sources``: the tensors among its arguments."""
        tape = self.tape
        many = not isinstance(result, Tensor)
        results = flatten([result]) if many else [result]
        if not results:
            self._escaped(func, args, result)
            return
        grad = torch.is_grad_enabled() if grad is None else grad
        read = tape.read if grad else tape.read_stopped
        if sources is None:
            sources = flatten(args) + flatten(kwargs.values())
        known = {id(source) for source in sources}
        if all(id(tensor) in known for tensor in results):
            return
        inner = max(map(tape.inner_of, sources), default=0) if grad else 0
        trace = tape.trace
        args_spec, kwargs_spec = trace.specs(args, kwargs, read)
        outs = tuple([None if id(tensor) in known else trace.new() for tensor in results])
        called = self.called(func, args, kwargs)
        around = surroundings(trace, func, seed)
        trace.code.append(Instruction(called, args_spec, kwargs_spec, outs, many=many, phased=phased, **around))
        for place, (tensor, out) in enumerate(zip(results, outs, strict=True)):
            if out is None:
                continue
            is_view = tensor._is_view()
            if is_view and not tensor.requires_grad and self._lies_in_constant(tensor, sources):
                continue  # `mask.expand_as(x)`: of what is followed the shape alone was asked
            binding = self._follow_result(tensor, out, inner, is_view)
            if is_view:
                self._mark_view(binding, tensor, sources, View(called, args, kwargs, len(results), place, not grad))
        tape.compact()
        if self._looked_for_compiler < _LOOKS:
            self._looked_for_compiler = _LOOKS if self.notices.compiled() else self._looked_for_compiler + 1

    def _follow_result(self, tensor: Tensor, value: int, inner: int, is_view: bool) -> Binding:
        tape, requires_grad = self.tape, tensor.requires_grad
        binding = tape.define(tensor, value, inner=inner if requires_grad else 0)
        if tape.keeps_values:
            tape.keep_value(tensor, value)
        if not requires_grad:
            if tensor.is_floating_point():
                tape.own_memory(tensor)
        elif not is_view:
            tape.memory.passes(tensor)
        return binding

    def _lies_in_constant(self, view: Tensor, sources: list[Tensor]) -> bool:
        storage = view.untyped_storage()._cdata
        owners = [source for source in sources if source.untyped_storage()._cdata == storage]
        return bool(owners) and not any(map(self.tape.is_live, owners))

    def called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """What the replay calls in place of a function."""
        if self.stepping():
            replaced = in_step(func, args, kwargs)
            if replaced is not None:
                return replaced
        if func in ROOTS and not has_graph(args[:1]) and self.tape.are_of_state(args[:1]):
            return ROOTS[func]  # an optimizer that the loop has written out
        if func in OVERWRITES and not kwargs and len(args) > 2:
            sources = flatten(args)
            loops_own = torch.is_grad_enabled() and any(self.tape.inner_of(tensor) for tensor in sources)
            # The loop's own gradient is torch's, whatever it is.
            if not loops_own and self.tape.is_live(sources[-1]):
                return last_written(func, *args) or func
        return REPLACEMENTS.get(func, func)

    def _mark_view(self, binding: Binding, tensor: Tensor, sources: list[Tensor], view: View) -> None:
        storage = tensor.untyped_storage()._cdata
        for source in sources:
            base = self.tape.find(source)
            if base is not None and source.untyped_storage()._cdata == storage:
                args = tuple(BASE if argument is source else argument for argument in view.args)
                if not any(argument is BASE for argument in args):
                    continue
                alone = one_of_many(source, tensor) if view.outs > 1 else None
                binding.base, binding.base_value = base, base.value
                binding.via = view._replace(args=args) if alone is None else alone._replace(stopped=view.stopped)
                return

    def _constant_call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], targets: list[Tensor]
    ) -> Any:
        for target in targets:
            self.tape.before_write(target)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            if kwargs.get("requires_grad"):
                made.inner_leaf(self, result)
            elif not (targets or result._is_view() or any(result is argument for argument in args)):
                self.tape.externals.note_made(result)
        return result

    def _escaped(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
        name = name_of(func)
        source = args[0] if args else None
        if name in _NUMBERS and isinstance(source, Tensor) and source.dtype.is_floating_point:
            if isinstance(result, numpy.ndarray):
                binding = self.tape.find(source) or self.tape.alias(source)
                root = None if binding is None else binding.root.ref()
                if root is not None:
                    self.tape.memory.expose(root, result)
            self.say_constant(name)

    def say_constant(self, name: str) -> None:
        """Say once a line that a value which depends on the weights became a Python number."""
        if not self.numbers_held and self.stepping():
            raise CaptureError(
                f"the step of the wrapped optimizer took a Python number (`{name}`) out of a tensor that depends on "
                "the weights or hyperparameters. What it computes from that number would have no derivative. If the "
                "number only decides a branch or is logged, pass `metaopt.wrap(optimizer, hold_numbers=True)`; else "
                "keep the value a tensor, or write a rule for the optimizer (docs: extending)."
            )
        self.notices.number_taken(name)


def _follows(arguments: Sequence[Any]) -> bool:
    """Whether a number that carries its derivative is among the arguments, or in a list of them."""
    for argument in arguments:
        kind = type(argument)
        if (kind is Followed and argument.slope) or ((kind is list or kind is tuple) and _follows(argument)):
            return True
    return False
