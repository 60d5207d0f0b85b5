"""The calls that need more than to be called again."""

from __future__ import annotations

__all__ = ["SPECIAL", "apply_function", "inner_leaf"]

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.capture import statistics
from metaopt.capture.bindings import BASE, View
from metaopt.capture.cells import version_of
from metaopt.capture.derivatives import check_function
from metaopt.capture.hooks import refuse_live_closure
from metaopt.capture.primitives import Surrogate, flatten, hooked, inner_gradient, leaf, stop, total
from metaopt.capture.replacements import hard_gumbel_softmax, padded_embedding
from metaopt.capture.tape import Tape
from metaopt.capture.trace import Group, Instruction, Val
from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher


def name_of(func: Callable[..., Any]) -> str:
    """A function's plain name."""
    return getattr(func, "__name__", None) or type(func).__name__


Args = tuple[Any, ...]
Kwargs = dict[str, Any]


# -- the loop's own gradients ----------------------------------------------------------------------------------------


def _tensor_backward(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> None:
    names = ("self", "gradient", "retain_graph", "create_graph", "inputs")
    given = dict(zip(names, args, strict=False)) | kwargs
    _backward(
        watcher,
        [given["self"]],
        given.get("gradient"),
        given.get("retain_graph"),
        given.get("create_graph") or False,
        given.get("inputs"),
    )


def _autograd_backward(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> None:
    names = ("tensors", "grad_tensors", "retain_graph", "create_graph", "grad_variables", "inputs")
    given = dict(zip(names, args, strict=False)) | kwargs
    tensors = given["tensors"]
    _backward(
        watcher,
        [tensors] if isinstance(tensors, Tensor) else list(tensors),
        given.get("grad_tensors"),
        given.get("retain_graph"),
        given.get("create_graph") or False,
        given.get("inputs"),
    )


def _backward(
    watcher: Watcher,
    losses: list[Tensor],
    gradients: Any,
    retain_graph: bool | None,
    create_graph: bool,
    inputs: Any,
) -> None:
    """Run the loop's backward pass into the trained weights alone, and record the gradients that they received."""
    tape = watcher.tape
    if not any(tape.inner_of(loss) for loss in losses):
        # Nothing of the watched training: another model's, or the hyperparameters' own.
        torch.autograd.backward(losses, gradients, retain_graph, create_graph, inputs=inputs)
        return
    _refuse_lost(tape, losses)
    given = [gradients] if isinstance(gradients, Tensor) else gradients
    into = _receivers(tape) if inputs is None else flatten([inputs])
    outputs = tuple(tape.read(loss) for loss in losses)
    weights = None if given is None else Group(list, tuple(tape.spec(g, tape.read_stopped) for g in given))
    present = {id(t): t.grad for t in into if t.grad is not None}
    old = {key: tape.read_stopped(grad) for key, grad in present.items()}
    before = {key: grad._version for key, grad in present.items()}
    for grad in present.values():
        tape.before_write(grad)
    if inputs is None:
        watcher.withheld.update(tape.externals)
    if into:
        torch.autograd.backward(losses, gradients, retain_graph, create_graph, inputs=into)
    received = [
        tensor
        for tensor in into
        if tensor.grad is not None
        and (tensor.grad is not present.get(id(tensor)) or tensor.grad._version != before[id(tensor)])
    ]
    _record_gradients(tape, received, outputs, weights, old, create_graph)


def _refuse_lost(tape: Tape, losses: Sequence[Tensor]) -> None:
    if any(tape.inner_of(loss) == 2 for loss in losses):
        raise CaptureError(
            "`backward` was called on a loss that uses a tensor computed, with its graph, before the last optimizer "
            "step: the gradient would reach weights that no longer exist. Detach what is carried from one step to "
            "the next (`x.detach()`), or compute it again after the step."
        )


def _receivers(tape: Tape) -> list[Tensor]:
    trained = [tensor for tensor in tape.trained.values() if tensor.requires_grad]
    made = []
    for binding in tape.bindings():
        tensor = binding.ref()
        if tensor is None or id(tensor) in tape.trained:
            continue
        if (binding.leaf and tensor.requires_grad) or (tensor.requires_grad and tensor.retains_grad):
            made.append(tensor)
    return trained + made


def _record_gradients(
    tape: Tape,
    received: list[Tensor],
    outputs: tuple[Val, ...],
    weights: Any,
    old: dict[int, Val],
    create_graph: bool,
) -> None:
    if not received:
        return
    points = [(tensor, value) for tensor in received for value in _points(tape, tensor)]
    spec = (Group(list, outputs), weights, Group(list, tuple(Val(value) for _, value in points)))
    outs = tuple(tape.trace.new() for _ in points)
    tape.trace.code.append(Instruction(inner_gradient, spec, outs=outs, many=True, phased=True))
    parts: dict[int, list[int]] = {}
    for (tensor, _), out in zip(points, outs, strict=True):
        parts.setdefault(id(tensor), []).append(out)
    for tensor in received:
        grad = tensor.grad
        assert grad is not None
        terms = [Val(part) for part in parts[id(tensor)]]
        if id(tensor) in old:
            terms.append(old[id(tensor)])
        out = terms[0].index
        if len(terms) > 1:
            out = tape.trace.new()
            tape.trace.code.append(Instruction(total, tuple(terms), (), (out,)))
        tape.define(grad, out, inner=int(create_graph)).halted = not create_graph
        tape.keep_value(grad, out)


def _points(tape: Tape, tensor: Tensor) -> list[int]:
    """The values at which the loop took gradients with respect to this tensor in the present iteration."""
    binding = tape.find(tensor)
    if binding is None or binding.epoch != tape.epoch:
        raise CaptureError(
            f"a weight of shape {tuple(tensor.shape)} received a gradient, but metaopt saw no operation of this step "
            "use it. It was used by code that hides from torch's function modes, or its graph was built before the "
            "context or before the last step."
        )
    return list(binding.leaves) if binding.leaf else [binding.value]


def _autograd_grad(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tape = watcher.tape
    names = ("outputs", "inputs", "grad_outputs", "retain_graph", "create_graph", "only_inputs", "allow_unused")
    given = dict(zip((*names, "is_grads_batched", "materialize_grads"), args, strict=False)) | kwargs
    outputs, inputs = flatten([given["outputs"]]), flatten([given["inputs"]])
    if not any(tape.is_live(tensor) for tensor in outputs):
        return func(*args, **kwargs)
    _refuse_lost(tape, outputs)
    weights = given.get("grad_outputs")
    weights = [weights] if isinstance(weights, Tensor) else weights
    create_graph = bool(given.get("create_graph"))
    read = tape.read if create_graph else tape.read_stopped
    spec = (
        Group(list, tuple(tape.read(tensor) for tensor in outputs)),
        None if weights is None else Group(list, tuple(tape.spec(w, read) for w in weights)),
        Group(list, tuple(tape.read(tensor) for tensor in inputs)),
        bool(given.get("is_grads_batched")),
    )
    result = func(*args, **kwargs)
    grads = [result] if isinstance(result, Tensor) else list(result)
    outs = tuple(None if grad is None else tape.trace.new() for grad in grads)
    tape.trace.code.append(Instruction(inner_gradient, spec, outs=outs, many=True, phased=True))
    for grad, out in zip(grads, outs, strict=True):
        if grad is None or out is None:
            continue
        tape.define(grad, out, inner=int(create_graph and grad.requires_grad)).halted = not create_graph
    return result


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
    known = watcher.tape.externals.get(id(tensor)) if grad is None else None
    if known is not None and known.tensor is tensor and tensor.is_leaf and id(tensor) in watcher.withheld:
        frame = sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__", "").startswith("metaopt.capture"):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is None or frame.f_code.co_name not in ("zero_grad", "record", "accumulate"):
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
    if tape.find(target) is not None or tape.is_live(source):
        raise CaptureError(
            f"`.data` of a tensor of shape {tuple(target.shape)} was replaced inside the context; afterwards two "
            "tensors share memory and neither knows. Write `with torch.no_grad(): x.copy_(new)` instead."
        )
    tape.before_write(target)
    return func(*args, **kwargs)


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
    result = func(*args, **kwargs)
    tape = watcher.tape
    if tape.is_live(args[0]):
        refuse_live_closure(tape, args[1])
        value = tape.read(args[0])
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


def _embedding(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, args, strict=False)) | kwargs
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
    Tensor.backward: _tensor_backward,
    torch.autograd.backward: _autograd_backward,
    torch.autograd.grad: _autograd_grad,
    Tensor.detach: _detach,
    Tensor.detach_: _detach_in_place,
    F.gumbel_softmax: _gumbel_softmax,
    torch.full: _full,
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
