"""A parameter of each example's own, where a function has no rule: the function is called for each example alone.

A bare parameter, such as a class token, a table of positions or the scale of a layer, meets the examples in ways that
rules can't foresee. Here the tensor itself gets an *instance* for each example, ``P + ΔP_b``, of the parameter's size
times the number of examples; what is computed from it alone gets one too; and a function that joins it to the examples
is vectorised over both, ``torch.func.vmap``, as if it were called for each example in a batch of one.
"""

from __future__ import annotations

__all__ = ["Instances", "apply"]

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from metaopt.stn.calls import Call, has_views, out_of_place, plain_sizes, written_in_place
from metaopt.stn.layouts import Layout, NeedsGroups
from metaopt.stn.spelt import SPELT_OUT

if TYPE_CHECKING:
    from metaopt.stn.passes import Pass

# A larger tensor than this is not made for each example: groups are cheaper then.
LARGEST = 2**25

_T: Any = torch.Tensor
# Layers whose rules take an axis of examples before all others.
LAYERS = {F.linear, F.embedding}
# Functions that broadcast: instances of the right shape are enough, and tangents have their rules.
BROADCASTING = {
    *(torch.add, _T.add, _T.__add__, _T.__radd__, torch.sub, _T.sub, _T.__sub__, _T.__rsub__),
    *(torch.mul, _T.mul, _T.__mul__, _T.__rmul__, torch.div, _T.div, _T.__truediv__),
}
INDICES = {torch.int64, torch.int32}
# Their result for an example depends on the others in training.
COUPLED = {F.batch_norm, torch.batch_norm}


@dataclass(frozen=True)
class Instances:
    """A tensor that differs from example to example, and has no axis for that.

    Args:
        name: the parameter's.
        path: that, and the functions that it went through.
        values: one for each example, along an axis before all others.
    """

    name: str
    path: str
    values: Tensor


def apply(p: Pass, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Call a function for each example alone, with instances of its own.

    Args:
        p: the pass, which knows instances and calls.
        func: the function.
        name: its name.
        args: its arguments, with the tensors that instances belong to.
        kwargs: the same.

    Raises:
        NeedsGroups: if it can't be told where the examples are, or the function can't be vectorised.
    """
    target, own, wanted = None, None, bool(kwargs.get("inplace"))
    if wanted or written_in_place(name):
        # A new tensor is computed, and written.
        target, func = args[0], func if wanted else out_of_place(name)
        own = p.instances(target)
        if own is not None and (func is None or id(target) in p.marks or has_views(target)):
            raise NeedsGroups(own.name, f"`{name}` writes on it, or on what was computed from it")
        kwargs = {**kwargs, "inplace": False} if wanted else kwargs
        if own is None:
            with p:
                args = (target.clone(), *args[1:])
    leaves, spec = pytree.tree_flatten(plain_sizes((args, kwargs)))
    if func in LAYERS:
        with suppress(NeedsGroups):
            return _of_constants(p, func, name, leaves, args, kwargs)
    held = [p.instances(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
    index, first = next((i, h) for i, h in enumerate(held) if h is not None)
    call = _known(p, func, name, (first, index), leaves, kwargs)
    given, (places, values, axes) = list(leaves), _stacked(p, leaves, held, first, call)
    for i in call.sizes:
        given[i] = leaves[i] // len(first.values)
    # What is written is `target`, after this.
    called = name if target is None else f"{name}, out of place"
    mapped = _mapped(p, func, _for_one(func, called, given, places, spec), values, axes, first, name)
    if not torch.is_grad_enabled():
        # Forward mode ignores `no_grad`.
        mapped = pytree.tree_map_only(Tensor, torch.detach, mapped)
    if target is not None and own is not None:
        return _held(p, target.copy_(func(*args, **kwargs)), mapped, first, name)
    if target is not None:
        y = _joined(p, mapped, call.inputs[0], first, name)
        return p.overwrite(target, y, p.tangent(y))
    if all(layout is None for layout in call.outputs):
        # What stands for instances is the value without a response: a use of it that can't be seen would show.
        return _held(p, func(*args, **kwargs), mapped, first, name)
    results, kind = pytree.tree_flatten(mapped)
    layouts = iter(call.outputs)
    results = [_joined(p, y, next(layouts, None), first, name) if isinstance(y, Tensor) else y for y in results]
    return pytree.tree_unflatten(results, kind)


def _for_one(func: Any, name: str, given: list[Any], places: Sequence[int], spec: Any) -> Callable[..., Any]:
    """The function of one example's tensors alone; the other arguments stay."""

    def one(*tensors: Tensor) -> Any:
        leaves = list(given)
        for i, tensor in zip(places, tensors, strict=True):
            leaves[i] = tensor
        arguments, options = pytree.tree_unflatten(leaves, spec)
        result = SPELT_OUT[func](*arguments, **options) if func in SPELT_OUT else NotImplemented
        return func(*arguments, **options) if result is NotImplemented else result

    one.__name__ = name
    return one


def _known(
    p: Pass, func: Any, name: str, use: tuple[Instances, int], leaves: list[Any], kwargs: Mapping[str, Any]
) -> Call:
    """Where the examples are in a call, with these instances at that place among its arguments."""
    first, index = use
    place = first.path, name, index, len(leaves)
    call = p.calls.get(place, "it was not used like that when the axes of examples were looked for")
    # Of parameters alone, as where a kernel is standardised by it, nothing depends on other examples.
    tensors = [v for v in leaves if isinstance(v, Tensor)]
    alone = isinstance(call, Call) and not any(call.inputs) and all(id(v) in {**p.held, **p.marks} for v in tensors)
    if (func in COUPLED and not alone) or kwargs.get("out") is not None or kwargs.get("inplace"):
        call = "it can't be called for each example alone"
    if isinstance(call, Call):
        batched = [v for v, layout in zip(leaves, call.inputs, strict=True) if layout is not None]
        indexed = any(isinstance(v, Tensor) and v.dtype in INDICES for v in leaves)
        if indexed and any(v.dtype not in INDICES for v in batched):
            # Such indices may be of other examples; out of range they would end a process that computes on a GPU.
            call = "indices there may be of other examples"
        if isinstance(call, Call) and p.orders is not None and any(v in p.orders for v in batched):
            call = "the examples there are sorted or selected by their values"
    if isinstance(call, str):
        raise NeedsGroups(first.name, f"it is used by `{name}`, and {call}")
    return call


def _stacked(
    p: Pass, leaves: list[Any], held: list[Instances | None], first: Instances, call: Call
) -> tuple[list[int], list[Tensor], list[int | None]]:
    """The places of the tensors, the tensors with their examples along a new first axis, and whether they have one."""
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    values: list[Tensor] = []
    axes: list[int | None] = []
    for i in places:
        own, layout = held[i], call.inputs[i]
        if own is not None:
            values.append(own.values)
        else:
            values.append(leaves[i] if layout is None else _apart(p, first, leaves[i], layout))
        axes.append(None if own is None and layout is None else 0)
    return places, values, axes


def _held(p: Pass, plain: Any, mapped: Any, first: Instances, name: str) -> Any:
    """What a function of instances alone gives, with instances of its own; ``plain``: without a response."""
    results, kind = pytree.tree_flatten(mapped)
    found = [
        p.hold(y, Instances(first.name, f"{first.path}.{name}", v)) if isinstance(v, Tensor) else v
        for y, v in zip(pytree.tree_leaves(plain), results, strict=True)
    ]
    return pytree.tree_unflatten(found, kind)


def _of_constants(p: Pass, func: Any, name: str, leaves: list[Any], args: Any, kwargs: Any) -> Tensor:
    """A layer of what is the same for all examples, such as a table of positions: by its rule, on a batch of copies."""
    index, active = next(((i, p.mark_of(v)) for i, v in enumerate(leaves) if p.mark_of(v) is not None), (0, None))
    call = None if active is None else p.calls.get((active.entry.name, name, index, len(leaves)))
    known = all(p.mark_of(v) is not None for v in leaves if id(v) in p.held)
    if active is None or not known or p.mark_of(args[0]) is not None or not isinstance(call, Call) or any(call.inputs):
        raise NeedsGroups("", "its rule does not apply")
    examples, before, p.fixed = len(active.coefficients[0]), p.fixed, Layout(0)
    try:
        with p:
            values = func(args[0].expand(examples, *args[0].shape), *args[1:], **kwargs)
    finally:
        p.fixed = before
    p.apart.update(mark.entry.name for mark in map(p.mark_of, leaves) if mark is not None)
    return p.hold(func(*args, **kwargs), Instances(active.entry.name, f"{active.entry.name}.{name}", values))


def _mapped(
    p: Pass,
    func: Any,
    one: Callable[..., Any],
    values: list[Tensor],
    axes: list[int | None],
    first: Instances,
    name: str,
) -> Any:
    """Call a function of the tensors of one example for all of them."""
    try:
        if func in BROADCASTING:
            with p:
                return one(*_aligned(values, axes))
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            # A function without a rule for vectors is called in a loop, which is right.
            warnings.filterwarnings("ignore", "There is a performance drop")
            return p.differentiated(torch.func.vmap(one, tuple(axes)), tuple(values))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, NotImplementedError) or "forward" in str(error).lower():
            raise  # the engine's matter
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise NeedsGroups(first.name, f"it is used by `{name}`, which can't be split into examples ({why})") from error


def _apart(p: Pass, first: Instances, x: Tensor, layout: Layout) -> Tensor:
    """The examples one by one along a new first axis; each as it is in a batch of one."""
    examples = len(first.values)
    fitted = layout.fitted(x, examples)
    if isinstance(fitted, str):
        raise NeedsGroups(first.name, f"what it is joined with has another number of examples: {fitted}")
    sizes = (examples, fitted.repeat) if fitted.outer else (fitted.repeat, examples)
    with p:
        return x.unflatten(fitted.axis, sizes).movedim(fitted.axis + (not fitted.outer), 0)


def _joined(p: Pass, y: Tensor, layout: Layout | None, first: Instances, name: str) -> Tensor:
    """The examples along one axis again."""
    if layout is None or y.ndim <= layout.axis + 1 or (layout.repeat == 1 and y.shape[layout.axis + 1] != 1):
        raise NeedsGroups(first.name, f"it is used by `{name}`, whose result for one example has another shape")
    with p:
        return y.movedim(0, layout.axis + (not layout.outer)).flatten(layout.axis, layout.axis + 1)


def _aligned(values: list[Tensor], axes: list[int | None]) -> list[Tensor]:
    """Tensors that broadcast as those of each example do."""
    ndim = max(v.ndim - (axis is not None) for v, axis in zip(values, axes, strict=True))
    return [
        v if axis is None else v.reshape(len(v), *[1] * (ndim + 1 - v.ndim), *v.shape[1:])
        for v, axis in zip(values, axes, strict=True)
    ]
