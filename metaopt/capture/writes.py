"""Calls that write their arguments in place.

The replay writes to a clone and gives the tensor its new value: what was saved for a derivative stays as it was, and
the same program can run many times.
"""

from __future__ import annotations

__all__ = ["call", "targets"]

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt.capture import hypersteps
from metaopt.capture.bindings import Binding
from metaopt.capture.cells import version_of
from metaopt.capture.primitives import assign, flatten, stop
from metaopt.capture.surroundings import generators, surroundings
from metaopt.capture.tape import Tape
from metaopt.capture.trace import Instruction, Val
from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher

_DUNDER = {"__setitem__"} | {f"__i{name}__" for name in "add sub mul truediv div floordiv mod pow and or xor".split()}
_NOT_WRITES = {"requires_grad_", "retain_grad_", "share_memory_", "rename_", "apply_", "map_"}
_CLEARING = {"zero_", "_foreach_zero_", "fill_", "zeros_", "ones_", "constant_"}
_RESHAPING = {"resize_", "set_", "resize_as_"}


def targets(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes, as its name and arguments tell."""
    if "out" in kwargs and kwargs["out"] is not None:
        return flatten([kwargs["out"]])
    if not _is_in_place(func) and not kwargs.get("inplace"):
        return []
    first = args[0] if args else next((v for v in kwargs.values() if isinstance(v, (Tensor, list, tuple))), None)
    return flatten([first])


@lru_cache(4096)
def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__") and name not in _NOT_WRITES) or name in _DUNDER


def call(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor]
) -> Any:
    """Run a call that writes, and record what it leaves in its targets."""
    tape = watcher.tape
    name = getattr(func, "__name__", "")
    if name in _RESHAPING:
        raise CaptureError(
            f"`{name}` changed a tensor that depends on the weights; metaopt can't replay it. Make a new tensor "
            "instead."
        )
    if name.startswith("_fused_"):
        raise CaptureError(
            f"`{name}`, a fused optimizer's kernel, has no derivative. Pass `fused=False` to the optimizer, or use the "
            "class of the same name in `metaopt.optim` without `metaopt.wrap`, which may be fused."
        )
    if hypersteps.is_one(tape, written, flatten([*args, *kwargs.values()])):
        for target in written:
            tape.before_write(target)
        return func(*args, **kwargs)
    leaves = hypersteps.moved_by_themselves(tape, written, flatten([*args, *kwargs.values()]))
    if leaves and tape.externals.moving:
        for target in written:
            tape.before_write(target)
        result = func(*args, **kwargs)
        for target, leaf in zip(written, leaves, strict=True):
            hypersteps.renew(tape, leaf, target)
        return result
    for leaf in leaves:
        tape.externals.projected[id(leaf)] = leaf
    for target in written:
        tape.adopt_behind(target)
        if tape.find(target) is None:
            _follow(tape, target)
    if name in _CLEARING and all(_whole(tape, target) for target in written):
        return _clear(watcher, func, args, kwargs, written)
    if name == "copy_" and _whole(tape, written[0]) and len(args) > 1 and isinstance(args[1], Tensor):
        return _copy(watcher, func, args, kwargs)
    if getattr(func, "__module__", "") == "torch.nn.init":
        # Initialisers overwrite, under a `no_grad` of their own that would leave the derivative of the old value.
        for target in written:
            tape.read(target)
            tape.write_whole(target, tape.trace.number(0.0))
    if "out" in kwargs:
        return _out(watcher, func, args, kwargs, written)
    return _general(watcher, func, args, kwargs, written)


def _follow(tape: Tape, target: Tensor) -> None:
    # A constant is about to receive a live value: from here on it is carried like any state.
    if tape.alias(target) is not None:
        return
    if target.requires_grad and target.is_leaf:
        tape.adopt(target)
        return
    owner = target if target._base is None else target._base
    value = tape.iteration.read_constant(owner)
    tape.bind(owner)
    tape.define(owner, value).buffer = 1
    tape.own_memory(owner)
    if owner is not target:
        tape.alias(target)


def _whole(tape: Tape, target: Tensor) -> bool:
    binding = tape.find(target)
    return binding is not None and binding.base is None


def _clear(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor]
) -> Any:
    tape = watcher.tape
    given = args[1] if len(args) > 1 else kwargs.get("value", kwargs.get("val", 0.0))
    given = {"ones_": 1.0}.get(getattr(func, "__name__", ""), given)
    value = tape.read_stopped(given) if isinstance(given, Tensor) else tape.trace.number(given)
    for target in written:
        tape.before_write(target)
    result = func(*args, **kwargs)
    for target in written:
        tape.write_whole(target, value)
    return result


def _copy(watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tape = watcher.tape
    target, source = args[0], args[1]
    grad = torch.is_grad_enabled()
    value = tape.read(source) if grad else tape.read_stopped(source)
    inner = tape.inner_of(source) if grad else 0
    tape.before_write(target)
    result = func(*args, **kwargs)
    tape.write_whole(target, value, inner=inner if target.requires_grad else 0)
    return result


def _out(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor]
) -> Any:
    if len(written) != 1:
        raise CaptureError(f"`{func.__name__}(out=...)` with several outputs can't be replayed; call it without `out`.")
    (target,) = written
    shape = target.shape
    rest = {key: value for key, value in kwargs.items() if key != "out"}
    tape = watcher.tape
    # Read what goes in before the call writes, in case the target is among it.
    args_spec, kwargs_spec = tape.trace.specs(args, rest, tape.read_stopped)
    seed = generators(func, kwargs)
    tape.before_write(target)
    result = func(*args, **kwargs)
    if target.shape != shape:
        raise CaptureError(
            f"`{func.__name__}(out=...)` resized its output, which can't be replayed; call it without `out`."
        )
    value = tape.trace.new()
    tape.trace.code.append(Instruction(func, args_spec, kwargs_spec, (value,), **surroundings(tape.trace, func, seed)))
    if _whole(tape, target):
        tape.write_whole(target, Val(value))
    else:
        _write_through(tape, [target], assign, lambda read: ((read(target), Val(value)), ()), {}, stopped=True)
    return result


def _general(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor]
) -> Any:
    tape = watcher.tape
    own_no_grad = getattr(func, "__module__", "") == "torch.nn.init"
    stopped = own_no_grad or not torch.is_grad_enabled() or any(_passes_stop(tape, target) for target in written)
    seed = generators(func, kwargs)
    result: list[Any] = []

    def specs(read: Callable[[Tensor], Val]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        before = tape.read_stopped if stopped else tape.read
        target, _ = tape.trace.specs(args[:1], {}, read)
        rest, named = tape.trace.specs(
            args[1:], kwargs, lambda tensor: before(tensor) if id(tensor) in first else read(tensor)
        )
        return (*target, *rest), named

    # Where a target is an argument too (`x.mul_(x)`), autograd needs what it was before.
    first = {id(tensor) for tensor in flatten(args[:1])}
    sources = flatten(args) + flatten(kwargs.values())
    memory = {_memory(target) for target in written}
    others = [tensor for tensor in sources if _memory(tensor) not in memory]

    def run() -> dict[str, Any]:
        for target in written:
            tape.before_write(target)
        versions = [version_of(tensor) for tensor in others]
        result.append(func(*args, **kwargs))
        if versions != [version_of(tensor) for tensor in others]:
            raise CaptureError(
                f"`{getattr(func, '__name__', '')}` writes more of its arguments in place than its first one, which "
                "metaopt can't replay. Use the version of the operation that returns new tensors."
            )
        return surroundings(tape.trace, func, seed)

    inner = 0 if stopped else max((tape.inner_of(tensor) for tensor in sources), default=0)
    called = watcher.called(func, args, kwargs)
    _write_through(tape, written, called, specs, {}, stopped=stopped, run=run, inner=inner)
    return result[0]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _passes_stop(tape: Tape, target: Tensor) -> bool:
    binding = tape.find(target)
    while binding is not None and binding.base is not None:
        if binding.via is not None and binding.via.stopped:
            return True
        binding = binding.base
    return False


def _write_through(
    tape: Tape,
    written: list[Tensor],
    func: Callable[..., Any],
    specs: Callable[[Callable[[Tensor], Val]], tuple[tuple[Any, ...], tuple[Any, ...]]],
    options: dict[str, Any],
    *,
    stopped: bool,
    run: Callable[[], dict[str, Any]] | None = None,
    inner: int = 0,
) -> None:
    """Clone the memory behind the targets, make their views of it again, and let ``func`` write there."""
    clones: dict[Binding, int] = {}
    places: dict[int, int] = {}
    for target in written:
        binding = tape.find(target)
        assert binding is not None
        tape.outlive(binding, tape.epoch)
        root = binding.root
        if root not in clones:
            clones[root] = _clone(tape, root, stopped)
        places[id(target)] = _view_of_clone(tape, binding, clones[root])

    def read(tensor: Tensor) -> Val:
        if id(tensor) in places:
            return Val(places[id(tensor)])
        return tape.read_stopped(tensor) if stopped else tape.read(tensor)

    args, kwargs = specs(read)
    if run is not None:
        options = run()
    aliases = tuple((tape.trace.new(), clone) for clone in clones.values())
    tape.trace.code.append(Instruction(func, args, kwargs, (), aliases, **options))
    for (root, _), (value, _) in zip(clones.items(), aliases, strict=True):
        _settle(tape, root, value, inner)


def _clone(tape: Tape, root: Binding, stopped: bool) -> int:
    tensor = root.ref()
    if stopped and root.inner and not root.leaf:
        raise CaptureError(
            "a tensor with a graph back to the weights was written under `no_grad` or through `.detach()`/`.data`: its "
            "value and its gradient then disagree, and metaopt can't follow both. Compute the new value as a new "
            "tensor."
        )
    value = tape.read_binding(root, tensor)
    source = tape.iteration.stopped(value) if stopped and root.inner else value
    (clone,) = tape.trace.emit(torch.clone, Val(source))
    return clone


def _view_of_clone(tape: Tape, binding: Binding, clone: int) -> int:
    if binding.base is None:
        return clone
    via = binding.recipe()
    if via.func is stop:  # detach and data are the same memory
        return _view_of_clone(tape, binding.base, clone)
    return tape.make_view(via, _view_of_clone(tape, binding.base, clone))


def _settle(tape: Tape, root: Binding, value: int, inner: int) -> None:
    tensor = root.ref()
    if tensor is None:  # its views live on
        root.value, root.fresh, root.inner = value, True, max(root.inner, inner)
    elif root.leaf:
        tape.rebind_leaf(root, value, tensor)
    else:
        # A gradient that was clipped in place is as much a constant of the loop's next gradients as before.
        halted = root.halted and not tensor.requires_grad
        tape.define(tensor, value, inner=max(root.inner, inner) if tensor.requires_grad else 0).halted = halted
