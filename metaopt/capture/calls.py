"""The calls that need more than to be called again."""

from __future__ import annotations

__all__ = ["SPECIAL", "apply_function", "inner_leaf"]

import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.capture import statistics, writes
from metaopt.capture.bindings import BASE, View
from metaopt.capture.cells import version_of
from metaopt.capture.derivatives import check_function
from metaopt.capture.gradients import autograd_backward, autograd_grad, tensor_backward
from metaopt.capture.hooks import Observed, observe_module_hooks
from metaopt.capture.primitives import Surrogate, flatten, hooked, leaf, stop
from metaopt.capture.replacements import hard_gumbel_softmax, padded_embedding
from metaopt.capture.trace import Instruction, Val
from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher


def name_of(func: Callable[..., Any]) -> str:
    """A function's plain name."""
    return getattr(func, "__name__", None) or type(func).__name__


Args = tuple[Any, ...]
Kwargs = dict[str, Any]


# -- what stops and what starts a gradient ---------------------------------------------------------------------------


def _detach(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    result = func(*args, **kwargs)
    (source, *_) = args
    tape = watcher.tape
    if not tape.is_live(source):
        return result
    value = tape.read(source)
    base = tape.find(source)
    (out,) = tape.trace.emit(stop, value, phased=True)
    binding = tape.define(result, out)
    if base is None and source.is_leaf:
        tape.note_behind(source)
    if base is not None:
        binding.base, binding.base_value = base, base.value
        binding.via = View(stop, (BASE,), {}, 1, 0, True)
    return result


def _detach_in_place(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tape = watcher.tape
    (tensor, *_) = args
    live = tape.is_live(tensor)
    value = tape.stopped(tape.read(tensor).index) if live else -1
    result = func(*args, **kwargs)
    if live:
        tape.define(tensor, value)
    return result


def _full(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    fill = args[1] if len(args) > 1 else kwargs.get("fill_value")
    if isinstance(fill, Tensor) and watcher.tape.is_live(fill):
        number = fill.detach().item()
        watcher.say_constant(name_of(func))
        args = (args[0], number, *args[2:]) if len(args) > 1 else args
        kwargs = {**kwargs, "fill_value": number} if "fill_value" in kwargs else kwargs
    return watcher.call(func, args, kwargs)


def _new(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    # ``x.new(shape)`` of a `torch.Size` is memory of that shape; of a tuple, as the replay would have it, it is data.
    sized = len(args) == 2 and isinstance(args[1], torch.Size) and not kwargs
    return watcher.call(Tensor.new_empty if sized else func, args, kwargs)


def _gamma(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    if any(watcher.tape.is_live(tensor) for tensor in flatten(args)):
        raise _rejection_sampler()
    return func(*args, **kwargs)


def _rejection_sampler() -> CaptureError:
    return CaptureError(
        "a sample of a gamma distribution, or of one made of it (Beta, Chi2, Dirichlet, StudentT), was drawn with "
        "parameters that depend on the weights or hyperparameters. It is drawn by rejection, and torch's derivative of "
        "it is not that of what the loop draws. Draw from a distribution whose samples are a function of noise "
        "(normal, Kumaraswamy, …), or with constant parameters."
    )


def _gumbel_softmax(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    given = dict(zip(("logits", "tau", "hard", "eps", "dim"), args, strict=False)) | kwargs
    if not given.get("hard") or not watcher.tape.is_live(given["logits"]):
        return watcher.call(func, args, kwargs)
    seed = watcher.generators(func, kwargs)
    result = func(*args, **kwargs)
    spec = (given["logits"], given.get("tau", 1), given.get("dim", -1))
    watcher.record(hard_gumbel_softmax, spec, {}, result, seed, phased=True)
    return result


def _get_grad(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    grad = func(*args, **kwargs)
    tensor = args[0]
    known = watcher.tape.externals.get(id(tensor)) if id(tensor) in watcher.withheld else None
    if known is not None and known.tensor is tensor and tensor.is_leaf:
        frame = sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__", "").startswith("metaopt.capture"):
            frame = frame.f_back  # type: ignore[assignment]
        reader = "" if frame is None else frame.f_code.co_name
        if reader == "zero_grad":
            watcher.withheld.discard(id(tensor))  # what it lacked would be gone too
        elif grad is None and reader not in ("record", "accumulate"):
            raise CaptureError(
                f"the `.grad` of a tensor of shape {tuple(tensor.shape)} was read inside the context, and is not "
                "there: the tensor requires grad and the watched optimizer does not train it, so it is taken for a "
                "hyperparameter, which gets no training gradient. If it is a part of the model, freeze it "
                "(`requires_grad_(False)`) or give it to the optimizer; if the loop updates it by hand, make it "
                "inside the context."
            )
    return grad


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
    viewed = binding is not None and (binding.base is not None or tape.has_views(target))
    if viewed or shared or not _alike(target, source):
        raise CaptureError(
            f"`.data` of a tensor of shape {tuple(target.shape)} was replaced inside the context; afterwards two "
            "tensors share memory and neither knows. Write `with torch.no_grad(): x.copy_(new)` instead."
        )
    # The values are written, and the memory stays: the loop's are the same as long as nobody uses the source again, nor
    # what shared the target's old memory.
    with torch.no_grad():
        writes.call(watcher, Tensor.copy_, (target, source), {}, [target])
    tape.memory.part(source, target)
    return None


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


def _requires_grad(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
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
    value = tape.read_binding(binding, tensor) if binding is not None else tape.read_constant(tensor)
    (number,) = tape.trace.emit(leaf, Val(value))
    tape.define(tensor, number, inner=1, leaf=True)


def _deepcopy(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    result = func(*args, **kwargs)
    source = args[0]
    tape = watcher.tape
    if not tape.is_live(source) or result is source:
        return result
    (out,) = tape.trace.emit(torch.clone, tape.read_stopped(source))
    tape.define(result, out)
    if result.requires_grad:
        inner_leaf(watcher, result)
    return result


def _hook(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tape = watcher.tape
    live = tape.is_live(args[0])
    # A weight that enters the iteration brings the hooks that it has: this one is not among them yet.
    value = tape.read(args[0]) if live else None
    result = func(args[0], Observed(watcher, args[1])) if live else func(*args, **kwargs)
    if live:
        place = tape.spec(args[1], tape.read)
        tape.trace.code.append(Instruction(hooked, (value, place), phased=True, effect=True))
    return result


def _refuse_post_hook(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    if watcher.tape.is_live(args[0]):
        raise CaptureError(
            "`register_post_accumulate_grad_hook` runs code inside `backward` that metaopt does not see. Do the same "
            "after `loss.backward()`, in the loop."
        )
    return func(*args, **kwargs)


# -- the user's own autograd functions -------------------------------------------------------------------------------


_checked: weakref.WeakKeyDictionary[type, Surrogate | None] = weakref.WeakKeyDictionary()


def apply_function(watcher: Watcher, cls: type, apply: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Record an ``autograd.Function`` as one call, so that the replay goes through its own backward."""
    tape = watcher.tape
    sources = flatten(args)
    if not any(tape.is_live(tensor) for tensor in sources):
        return apply(*args, **kwargs)
    if cls.__name__ == "CheckpointFunction":
        raise CaptureError(
            "`torch.utils.checkpoint` with `use_reentrant=True` runs a second backward pass inside the first one, "
            "which can't be differentiated. Pass `use_reentrant=False`."
        )
    if watcher.check_functions and cls not in _checked and any(tape.inner_of(tensor) for tensor in sources):
        _checked[cls] = None if check_function(cls, args, kwargs) else Surrogate(cls)
    if cls is torch.distributions.dirichlet._Dirichlet:
        raise _rejection_sampler()
    if cls is torch.nn.modules._functions.BackwardHookFunction:
        observe_module_hooks(watcher)
    seed = watcher.generators(apply, kwargs)
    versions = [version_of(tensor) for tensor in sources]
    result = apply(*args, **kwargs)
    if versions != [version_of(tensor) for tensor in sources]:
        raise CaptureError(
            f"`{cls.__name__}` (a torch.autograd.Function) writes its arguments in place; let it return new tensors."
        )
    surrogate = _checked.get(cls)
    if surrogate is None:
        watcher.record(cls.apply, args, kwargs, result, seed)  # type: ignore[attr-defined]
    else:
        watcher.record(surrogate, args, kwargs, result, seed, phased=True)
    return result


# -- layers with running statistics ----------------------------------------------------------------------------------


def _batch_norm(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    return statistics.batch_norm(watcher, func, args, kwargs)


def _instance_norm(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    return statistics.instance_norm(watcher, func, args, kwargs)


_signature = functools.cache(inspect.signature)


def _embedding(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    given = _signature(func).bind(*args, **kwargs).arguments
    weight = given.get("weight")
    if isinstance(weight, Tensor) and watcher.tape.is_live(weight):
        if given.get("max_norm") is not None:
            raise CaptureError(
                "an embedding with `max_norm` rewrites its weights inside the forward pass, which can't be followed. "
                "Drop `max_norm` and renormalise the rows in the loop, under `torch.no_grad()`."
            )
        if given.get("sparse"):
            raise CaptureError(
                "an embedding with `sparse=True` gives sparse gradients, which have no second derivative. Use "
                "`sparse=False`."
            )
        if func is F.embedding and given.get("padding_idx") is not None:
            result = func(*args, **kwargs)
            spec = (given["input"], weight, given["padding_idx"], bool(given.get("scale_grad_by_freq")))
            watcher.record(padded_embedding, spec, {}, result, phased=True)
            return result
    return watcher.call(func, args, kwargs)


SPECIAL: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.backward: tensor_backward,
    torch.autograd.backward: autograd_backward,
    torch.autograd.grad: autograd_grad,
    Tensor.detach: _detach,
    Tensor.detach_: _detach_in_place,
    F.gumbel_softmax: _gumbel_softmax,
    torch.full: _full,
    Tensor.new: _new,
    torch._standard_gamma: _gamma,
    torch.full_like: _full,
    Tensor.grad.__get__: _get_grad,  # type: ignore[union-attr]
    Tensor.data.__get__: _detach,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.requires_grad_: _requires_grad,
    Tensor.requires_grad.__set__: _requires_grad,  # type: ignore[attr-defined]
    Tensor.__deepcopy__: _deepcopy,
    Tensor.register_hook: _hook,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.embedding: _embedding,
    F.embedding_bag: _embedding,
}
if hasattr(Tensor, "register_post_accumulate_grad_hook"):
    SPECIAL[Tensor.register_post_accumulate_grad_hook] = _refuse_post_hook
SPECIAL[Tensor.retain_grad] = lambda watcher, func, args, kwargs: func(*args, **kwargs)
