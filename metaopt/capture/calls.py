"""The calls that need more than to be called again."""

from __future__ import annotations

__all__ = ["SPECIAL"]

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.capture import embeddings, made, statistics, writes
from metaopt.capture.arrivals import set_grad
from metaopt.capture.bindings import BASE, View
from metaopt.capture.ctc import LOSSES, ctc
from metaopt.capture.gradients import autograd_backward, autograd_grad, tensor_backward
from metaopt.capture.hooks import Observed, in_forward
from metaopt.capture.primitives import flatten, stop
from metaopt.capture.replacements import rejection_sampler
from metaopt.capture.surrogates import fake_quantize, hard_gumbel_softmax
from metaopt.capture.surroundings import generators
from metaopt.capture.turns import TURNS, turn
from metaopt.capture.withheld import get_grad
from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher


Args = tuple[Any, ...]
Kwargs = dict[str, Any]


# -- what stops and what starts a gradient ---------------------------------------------------------------------------


def _detach(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    result = func(*args, **kwargs)
    source = args[0] if args else kwargs["input"]
    tape = watcher.tape
    if not tape.is_live(source):
        return result
    value = tape.read(source)
    base = tape.find(source)
    (out,) = tape.trace.emit(stop, value, phased=True)
    binding = tape.define(result, out)
    if base is None and source.is_leaf:
        tape.externals.note_behind(source)
    if base is not None:
        binding.base, binding.base_value = base, base.value
        binding.via = View(stop, (BASE,), {}, 1, 0, True)
    made = source._base if source._is_view() else source
    if made is not None and not made.is_leaf and not tape.memory.is_owned(result):
        tape.own_memory(result)  # a parameter may be made of it, out of sight; a part of a leaf is the leaf's
    return result


def _detach_in_place(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tape = watcher.tape
    tensor = args[0] if args else kwargs["input"]
    live = tape.is_live(tensor)
    value = tape.iteration.stopped(tape.read(tensor).index) if live else -1
    result = func(*args, **kwargs)
    if live:
        tape.define(tensor, value)
    return result


def _gamma(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    if any(watcher.tape.is_live(tensor) for tensor in flatten(args)):
        raise rejection_sampler()
    return func(*args, **kwargs)


def _gumbel_softmax(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    given = dict(zip(("logits", "tau", "hard", "eps", "dim"), args, strict=False)) | kwargs
    if not given.get("hard") or not watcher.tape.is_live(given["logits"]):
        return watcher.call(func, args, kwargs)
    seed = generators(func, kwargs)
    result = func(*args, **kwargs)
    spec = (given["logits"], given.get("tau", 1), given.get("dim", -1))
    watcher.record(hard_gumbel_softmax, spec, {}, result, seed, phased=True)
    return result


def _fake_quantize(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    axis = ("axis",) if func is torch.fake_quantize_per_channel_affine else ()
    names = ("input", "scale", "zero_point", *axis, "quant_min", "quant_max")
    given = dict(zip(names, args, strict=False)) | kwargs
    if not any(watcher.tape.is_live(tensor) for tensor in flatten(given.values())):
        return watcher.call(func, args, kwargs)
    result = func(*args, **kwargs)
    watcher.record(fake_quantize, (func, *(given[name] for name in names)), {}, result, phased=True)
    return result


def _set_data(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    target, source = args
    tape = watcher.tape
    if _same_memory(target, source):
        return func(*args, **kwargs)  # how Python ends `x.data -= y`, which was written in place before
    binding, live = tape.find(target), tape.is_live(source)
    if binding is None and not live:
        tape.before_write(target)
        return func(*args, **kwargs)
    given = tape.find(source)
    owner = None if given is None else given.root.ref()
    shared = owner is not None and owner.requires_grad and owner.is_leaf
    viewed = binding is not None and binding.base is not None
    if (source.dtype, source.device) != (target.dtype, target.device):
        raise CaptureError(
            f"a tensor of shape {tuple(target.shape)} became one of {source.dtype} on {source.device} inside the "
            "context, by `.data`, as `module.to(...)`, `.half()` and `.double()` do it, which is not followed. Convert "
            "modules before the context, or make them so (`nn.Linear(3, 1, dtype=..., device=...)`, `with "
            "torch.device(...)`). For a converted copy of what the loop trains make a module of that kind, and "
            "`load_state_dict(model.state_dict())`."
        )
    if viewed or shared or not _alike(target, source):
        raise CaptureError(
            f"`.data` of a tensor of shape {tuple(target.shape)} was replaced inside the context; afterwards two "
            "tensors share memory and neither knows. Write `with torch.no_grad(): x.copy_(new)` instead."
        )
    # The values are written, and the memory stays: the loop's are the same as long as nobody uses the source again, nor
    # what shared the target's old memory.
    views = tape.views(target)
    with torch.no_grad():
        writes.call(watcher, Tensor.copy_, (target, source), {}, [target])
    tape.memory.part(source, target, views)
    for view in views:
        tape.lose(view)
    return None


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


def _hook(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tape = watcher.tape
    live = tape.is_live(args[0])
    # A weight that enters the iteration brings the hooks that it has: this one is not among them yet.
    value = tape.read(args[0]) if live else None
    if value is None:
        return func(*args, **kwargs)
    result = func(args[0], Observed(watcher, args[1], inside=not args[0].is_leaf and in_forward()))
    tape.iteration.hook(value.index, args[1])
    return result


def _refuse_post_hook(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    if watcher.tape.is_live(args[0]):
        raise CaptureError(
            "`register_post_accumulate_grad_hook` runs code inside `backward` that metaopt does not see. Do the same "
            "after `loss.backward()`, in the loop."
        )
    return func(*args, **kwargs)


SPECIAL: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.backward: tensor_backward,
    torch.autograd.backward: autograd_backward,
    torch.autograd.grad: autograd_grad,
    **dict.fromkeys((Tensor.detach, torch.detach, torch.ops.aten.detach, torch.ops.aten.detach.default), _detach),
    **dict.fromkeys((Tensor.detach_, torch.detach_), _detach_in_place),
    **dict.fromkeys((torch.tensor, Tensor.new_tensor), made.tensor),
    **dict.fromkeys((torch.as_tensor, torch.asarray), made.as_tensor),
    torch.arange: made.arange,
    **dict.fromkeys((torch.linspace, torch.logspace), made.spaced),
    **dict.fromkeys((torch.full, torch.full_like, Tensor.new_full), made.full),
    F.gumbel_softmax: _gumbel_softmax,
    torch.fake_quantize_per_tensor_affine: _fake_quantize,
    torch.fake_quantize_per_channel_affine: _fake_quantize,
    Tensor.new: made.new,
    torch._standard_gamma: _gamma,
    Tensor.grad.__get__: get_grad,  # type: ignore[union-attr]
    Tensor.grad.__set__: set_grad,  # type: ignore[union-attr]
    Tensor.data.__get__: _detach,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.requires_grad_: made.requires_grad,
    Tensor.requires_grad.__set__: made.requires_grad,  # type: ignore[attr-defined]
    Tensor.__deepcopy__: made.deepcopy,
    Tensor.register_hook: _hook,
    **dict.fromkeys(TURNS, turn),
    **dict.fromkeys(statistics.NORMS, statistics.norm),
    **dict.fromkeys(LOSSES, ctc),
    **dict.fromkeys(embeddings.TABLES, embeddings.table),
    **dict.fromkeys(embeddings.BAGS, embeddings.bag),
}
if hasattr(Tensor, "register_post_accumulate_grad_hook"):
    SPECIAL[Tensor.register_post_accumulate_grad_hook] = _refuse_post_hook
SPECIAL[Tensor.retain_grad] = lambda watcher, func, args, kwargs: func(*args, **kwargs)
