"""The loop's own gradients: ``backward`` and ``grad``, run as they stand and recorded as one call each."""

from __future__ import annotations

__all__ = ["autograd_backward", "autograd_grad", "tensor_backward"]

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt.capture.bindings import leaves_of
from metaopt.capture.primitives import flatten, inner_gradient, total
from metaopt.capture.tape import Tape
from metaopt.capture.trace import Group, Instruction, Val
from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def tensor_backward(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> None:
    """``loss.backward()``."""
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


def autograd_backward(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> None:
    """``torch.autograd.backward``."""
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
    trains = any(tape.inner_of(loss) for loss in losses)
    if trains:
        into = _receivers(tape) if inputs is None else flatten([inputs])
    else:
        # Nothing of the watched training: another model's, which may look at the weights, or the hyperparameters' own.
        into = _others(tape, losses)
        if not into:
            torch.autograd.backward(losses, gradients, retain_graph, create_graph, inputs=inputs)
            return
    _refuse_lost(tape, losses)
    given = [gradients] if isinstance(gradients, Tensor) else gradients
    outputs = tuple(tape.read(loss) for loss in losses)
    weights = None if given is None else Group(list, tuple(tape.trace.spec(g, tape.read_stopped) for g in given))
    present = {id(t): t.grad for t in into if t.grad is not None}
    # A tensor that this iteration has not used gets no gradient, whatever it had.
    used = {id(t) for t in into if (known := tape.find(t) or tape.externals.get(id(t))) and known.epoch == tape.epoch}
    old = {key: tape.read_stopped(grad) for key, grad in present.items() if key in used}
    before = {key: grad._version for key, grad in present.items()}
    for grad in present.values():
        tape.before_write(grad)
    if trains and inputs is None:
        watcher.withheld.add(tape, outputs)
    if into:
        with watcher.backward():
            torch.autograd.backward(losses, gradients, retain_graph, create_graph, inputs=into if trains else inputs)
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
            "the next (`x.detach()`), or compute it again after the step. With several optimizers, the last of the "
            "list ends the iteration: name them in the order in which they step."
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


def _others(tape: Tape, losses: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of a loss that are not trained here, if it depends on the state: their gradients depend on it too."""
    found = [binding for loss in losses if (binding := tape.find(loss)) is not None and binding.epoch == tape.epoch]
    behind = tape.trace.behind(tuple([Val(binding.value) for binding in found])) if found else set()
    if behind.isdisjoint(tape.trace.inputs):
        return []
    leaves = {id(leaf): leaf for loss in losses for leaf in leaves_of(loss)}
    present = [tape.externals[key] for key in leaves if key in tape.externals]
    return [external.tensor for external in present if external.epoch == tape.epoch and external.value in behind]


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
    external = tape.externals.get(id(tensor))
    if binding is None and external is not None and external.epoch == tape.epoch:
        return [external.value]
    if binding is None or binding.epoch != tape.epoch:
        raise CaptureError(
            f"a weight of shape {tuple(tensor.shape)} received a gradient, but metaopt saw no operation of this step "
            "use it. It was used by code that hides from torch's function modes, or its graph was built before the "
            "context or before the last step."
        )
    return list(binding.leaves) if binding.leaf else [binding.value]


def autograd_grad(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``torch.autograd.grad``, of what the loop follows."""
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
        None if weights is None else Group(list, tuple(tape.trace.spec(w, read) for w in weights)),
        Group(list, tuple(tape.read(tensor) for tensor in inputs)),
        bool(given.get("is_grads_batched")),
    )
    for tensor in inputs:
        tape.externals.differentiate(tensor)
    with watcher.backward():
        result = func(*args, **kwargs)
    grads = [result] if isinstance(result, Tensor) else list(result)
    outs = tuple(None if grad is None else tape.trace.new() for grad in grads)
    tape.trace.code.append(Instruction(inner_gradient, spec, outs=outs, many=True, phased=True))
    for grad, out in zip(grads, outs, strict=True):
        if grad is None or out is None:
            continue
        tape.define(grad, out, inner=int(create_graph and grad.requires_grad)).halted = not create_graph
    return result
