"""Tensors that the loop makes out of values: leaves to take gradients at, copies, and Python data that holds tensors.

torch follows nothing through these calls, so they are constants to the loop's own gradients. The training depends on
the values all the same.
"""

from __future__ import annotations

__all__ = [
    "arange",
    "as_tensor",
    "deepcopy",
    "full",
    "gathered",
    "inner_leaf",
    "new",
    "requires_grad",
    "spaced",
    "tensor",
]

from collections.abc import Callable, Sequence
from numbers import Number
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from metaopt.capture.notices import name_of
from metaopt.capture.primitives import flatten, leaf, overwrite
from metaopt.capture.trace import Val

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
_NUMBERS = {bool, int, float}


# -- leaves ----------------------------------------------------------------------------------------------------------


def requires_grad(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``x.requires_grad_()``, which makes a leaf of a tensor, or ends its being one."""
    tensor = args[0]
    before = tensor.requires_grad
    result = func(*args, **kwargs)
    if tensor.requires_grad and not before and tensor.is_leaf:
        inner_leaf(watcher, tensor)
    elif before and not tensor.requires_grad and (binding := watcher.tape.find(tensor)) is not None:
        watcher.tape.read_binding(binding, tensor)
        binding.leaf, binding.inner = False, 0
    return result


def inner_leaf(watcher: Watcher, tensor: Tensor) -> None:
    """The loop made a tensor to take gradients at, as adversarial training does with its inputs."""
    tape = watcher.tape
    binding = tape.find(tensor)
    if binding is not None and id(tensor) in tape.trained:
        binding.leaf, binding.inner = True, 1
        tape.read_binding(binding, tensor)
        binding.leaves = [binding.value]
        return
    if binding is None:
        tape.externals.made_leaves[id(tensor)] = tensor
    # What is kept of it for the sweep is its value, without its gradient.
    value = tape.read_binding(binding, tensor) if binding is not None else tape.iteration.read_constant(tensor.detach())
    (number,) = tape.trace.emit(leaf, Val(value))
    tape.define(tensor, number, inner=1, leaf=True)


# -- copies ----------------------------------------------------------------------------------------------------------


def deepcopy(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``copy.deepcopy(x)``."""
    result = func(*args, **kwargs)
    if watcher.tape.is_live(args[0]) and result is not args[0]:
        _copied(watcher, args[0], result)
    return result


def _copied(watcher: Watcher, source: Tensor, result: Tensor) -> None:
    """A tensor is a copy of another one, which the loop's gradients don't pass."""
    tape = watcher.tape
    value = tape.read(source)
    (out,) = tape.trace.emit(torch.clone, Val(tape.iteration.stopped(value.index)))
    if result.dtype != source.dtype:
        (out,) = tape.trace.emit(Tensor.to, Val(out), result.dtype)
    tape.define(result, out)
    if result.requires_grad:
        inner_leaf(watcher, result)


# -- data ------------------------------------------------------------------------------------------------------------


def tensor(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``torch.tensor(x)``, ``x.new_tensor(y)`` and their kin: the values of a tensor, or of what holds tensors."""
    place = int(func in (Tensor.new_tensor, Tensor.new))
    data = args[place] if len(args) > place else kwargs.get("data", kwargs.get("obj"))
    data = data if isinstance(data, Tensor) else _listed(data)
    result = func(*args, **kwargs)
    if not any(watcher.tape.is_live(part) for part in flatten([data])):
        if result.requires_grad:
            inner_leaf(watcher, result)
    elif isinstance(data, Tensor):
        _copied(watcher, data, result)
    elif not _plain(data):
        watcher.say_constant(name_of(func))
    elif result.is_floating_point() or result.is_complex():
        watcher.record(gathered, (data, result.dtype, result.device), {}, result, grad=False)
        if result.requires_grad:
            inner_leaf(watcher, result)
    return result


def as_tensor(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``torch.as_tensor(x)`` and ``torch.asarray(x)``: of a tensor, itself or a conversion."""
    data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
    if not isinstance(data, Tensor):
        return tensor(watcher, func, args, kwargs)
    if func is torch.as_tensor:
        return watcher.call(func, args, kwargs)
    result = func(*args, **kwargs)
    if watcher.tape.is_live(data) and result.untyped_storage()._cdata != data.untyped_storage()._cdata:
        _copied(watcher, data, result)
    return result


def gathered(data: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.tensor(data)`` of nested lists of tensors and numbers, with the tensors' derivatives."""
    if isinstance(data, Tensor):
        return data.to(dtype=dtype, device=device).reshape(())  # one entry is a number, whatever its shape
    if isinstance(data, list) and flatten(data):
        return torch.stack([gathered(part, dtype, device) for part in data])
    return torch.tensor(data, dtype=dtype, device=device)


def _listed(data: Any) -> Any:
    """Nested sequences (a deque, a `ParameterList`) as lists; torch takes whatever has a length and entries."""
    if isinstance(data, Sequence | torch.nn.ParameterList) and not isinstance(data, str | bytes):
        return [part if type(part) in _NUMBERS else _listed(part) for part in data]  # long lists are of numbers
    return data.item() if isinstance(data, numpy.generic) else data


def _plain(data: Any) -> bool:
    if isinstance(data, list):
        return all(map(_plain, data))
    return isinstance(data, Tensor | Number)


def full(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``torch.full(shape, x)`` and its kin."""
    place = 2 if func is Tensor.new_full else 1
    fill = args[place] if len(args) > place else kwargs.get("fill_value")
    if not (isinstance(fill, Tensor) and watcher.tape.is_live(fill)):
        return watcher.call(func, args, kwargs)
    result = func(*args, **kwargs)
    if result.is_floating_point():
        spec = (fill, tuple(result.shape), result.dtype, result.device)
        watcher.record(overwrite, spec, {}, result, grad=False)
    return result


def new(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``x.new(shape)`` of a `torch.Size` is memory of that shape; of a tuple, as the replay would have it, data."""
    if len(args) == 2 and isinstance(args[1], torch.Size) and not kwargs:
        return watcher.call(Tensor.new_empty, args, kwargs)
    if len(args) == 2 and isinstance(args[1], list | tuple):
        return tensor(watcher, func, args, kwargs)
    return watcher.call(func, args, kwargs)


def spaced(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``torch.linspace`` and ``torch.logspace``, which follow their ends, and whose gradients don't."""
    names = ("start", "end", "steps", *(("base",) if func is torch.logspace else ()))
    given = dict(zip(names, args, strict=False)) | kwargs
    result = func(*args, **kwargs)
    start, end = given["start"], given["end"]
    if any(watcher.tape.is_live(x) for x in flatten([start, end])) and result.is_floating_point():
        base = given.get("base", 10.0) if func is torch.logspace else None
        watcher.record(between, (start, end, len(result), base, result.dtype), {}, result, grad=False)
    return result


def between(start: Tensor | float, end: Tensor | float, steps: int, base: float | None, dtype: torch.dtype) -> Tensor:
    """Numbers at equal distances from ``start`` to ``end``, or the powers of ``base`` with such exponents."""
    device = next((end.device for end in (start, end) if isinstance(end, Tensor)), None)
    part = torch.linspace(0.0, 1.0, steps, dtype=dtype, device=device)
    # Its ends are exact, whatever it lies between.
    exponents = start * (1.0 - part) + end * part
    return exponents if base is None else torch.pow(base, exponents)


def arange(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``torch.arange``, whose ends may be tensors: they have no derivative in torch, and decide how many there are."""
    if any(watcher.tape.is_live(end) for end in flatten([*args, *kwargs.values()]) if end.is_floating_point()):
        watcher.say_constant(name_of(func))
        return func(*args, **kwargs)
    return watcher.call(func, args, kwargs)
