"""The outer objective, and the adjoint ``α_T`` at the end of the loop that it begins with."""

from __future__ import annotations

__all__ = ["Objective", "adjoint_of"]

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metaopt.capture.bindings import leaves_of, nodes_of
from metaopt.capture.externals import led_error
from metaopt.errors import HeldConstantWarning, MetaoptWarning, StaleError, SweepError, warn
from metaopt.modes.adjoint import Adjoint
from metaopt.modes.statistics import statistics_gradients
from metaopt.modes.within import computed_inside
from metaopt.step import Loop

Objective = Tensor | Callable[[], Tensor] | Sequence[Any]


def adjoint_of(outer: Objective, loop: Loop, watched: Callable[[Callable[[], Tensor]], Tensor] | None) -> Adjoint:
    """The adjoint at the end of the loop, ``α_T = ∇E(s_T)``.

    Args:
        outer: a scalar tensor, a function that computes one, or a list of either (their sum).
        loop: the loop that the objective looks at.
        watched: evaluates a function under watch; None while the loop itself is being watched.
    """
    if isinstance(outer, (list, tuple)):
        return Adjoint.sum([adjoint_of(entry, loop, watched) for entry in outer])
    if callable(outer) and not isinstance(outer, Tensor):
        _check_weights(loop)
        outer = outer() if watched is None else watched(outer)
    if not isinstance(outer, Tensor):
        raise SweepError(
            f"the outer objective must be a tensor (or a function that returns one), not {type(outer).__name__}: a "
            "number knows nothing of the weights. Leave `.item()` and `float(...)` out."
        )
    if outer.numel() != 1 or not outer.dtype.is_floating_point:
        raise SweepError(
            f"the outer objective must be a floating-point scalar, not {outer.dtype} of shape "
            f"{tuple(outer.shape)}; reduce it with `.mean()` or `.sum()`."
        )
    adjoint = Adjoint(loop)
    adjoint.value = outer
    loop.flush()
    binding = loop.tape.find(outer)
    if binding is not None:
        adjoint.carried[binding.key] = torch.ones_like(outer)
    else:
        _differentiate(outer, adjoint)
    return adjoint


def _differentiate(outer: Tensor, adjoint: Adjoint) -> None:
    """From an objective that was computed outside of the context: its autograd graph ends at the weights."""
    loop = adjoint.loop
    tape = loop.tape
    leaves = leaves_of(outer)
    if any(id(weight) in loop.guard.trainable and not weight.requires_grad for weight in loop.weights()):
        raise SweepError(
            "a trained weight was frozen (`requires_grad_(False)`) before the outer objective was computed, so the "
            "objective's graph does not reach it. Compute the objective with the weights unfrozen, or pass a "
            "function: `run.backward(lambda: loss(model(x), y))`."
        )
    inside = computed_inside(outer, loop)
    if inside:
        grads = torch.autograd.grad(outer, [tensor for _, tensor in inside], retain_graph=True)
        for (at, _), grad in zip(inside, grads, strict=True):
            adjoint.add(at.key, grad)
        return
    followed = [leaf for leaf in leaves if tape.find(leaf) is not None]
    with _unhooked(outer, leaves):
        statistics = statistics_gradients(outer, tape)
    if not followed and not statistics:
        raise SweepError(
            "the outer objective does not depend on the trained weights, as the loop left them: it was computed "
            "under `no_grad`, from a copy of the model, or before the training. Compute it from the model after "
            "the loop, with grad enabled, or pass a function: `run.backward(lambda: loss(model(x), y))`."
        )
    _check_weights(loop)
    with _unhooked(outer, leaves):
        grads = torch.autograd.grad(outer, leaves, retain_graph=True, allow_unused=True)
    for leaf, grad in zip(leaves, grads, strict=True):
        if grad is None:
            continue
        binding = tape.find(leaf)
        if binding is not None:
            adjoint.add(binding.key, grad)
        elif tape.externals.is_led(leaf):
            raise led_error(leaf)
        else:
            adjoint.direct.append((leaf, grad))
    for key, grad in statistics.items():
        adjoint.add(key, grad)
    _say_what_is_constant(outer, loop, set(statistics))
    if tape.hooked_inside:
        warn(
            "the `forward` of a model sets hooks that change gradients (`h.register_hook`). Where it computed the "
            "outer objective, they change the objective's gradient too, and the hypergradient is wrong. Pass the "
            "objective as a function, `run.backward(lambda: loss(model(x), y))`, to have it exact.",
            MetaoptWarning,
        )


def _say_what_is_constant(outer: Tensor, loop: Loop, exact: set[int]) -> None:
    buffers = _written(outer, loop, exact)
    if buffers:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in buffers[:4])
        warn(
            f"the loop also wrote {len(buffers)} tensors that are not weights (buffers, averages; shapes "
            f"{shapes}{', …' if len(buffers) > 4 else ''}). An outer objective computed outside of the context "
            "holds them constant. If it reads them, pass it as a function, `run.backward(lambda: loss(model(x), "
            "y))`, to have it exact.",
            HeldConstantWarning,
        )


def _written(outer: Tensor, loop: Loop, exact: set[int]) -> list[Tensor]:
    """What the loop wrote that is no weight, and that the objective's graph may not show."""
    tape = loop.tape
    # Batch norm's statistics are found in the graph where they are read, unless a compiled function hides them.
    hidden = any("CompiledFunction" in node.name() for node in nodes_of(outer))
    known = set(tape.trained) | {id(t.grad) for t in tape.trained.values() if t.grad is not None}
    known |= {id(v) for state in loop.states() for v in state.values()}
    buffers = [
        tensor
        for binding in tape.bindings()
        if (tensor := binding.ref()) is not None
        and binding.buffer
        and (binding.buffer != 2 or hidden)
        and binding.key not in exact
        and id(tensor) not in known
        and not tensor.requires_grad
    ]
    # A buffer that `forward` replaces by a new tensor, in place of writing it.
    buffers += _holders(
        [
            tensor
            for binding in tape.bindings()
            if (tensor := binding.ref()) is not None
            and binding.key < 0
            and tensor.dim()
            and tensor.is_floating_point()
            and not tensor.requires_grad
            and id(tensor) not in known
        ]
    )
    return buffers


@contextmanager
def _unhooked(outer: Tensor, leaves: list[Tensor]) -> Iterator[None]:
    """While open, the user's gradient hooks on leaves and modules rest: they belong to the training, not to this."""
    # What comes out of a module's node is what went in, but for its hooks.
    nodes = [node for node in nodes_of(outer) if node.name() == "BackwardHookFunctionBackward"]
    handles = [node.register_hook(lambda _, given: given) for node in nodes]
    resting = [(hooks, dict(hooks)) for leaf in leaves if (hooks := leaf._backward_hooks)]
    for hooks, _ in resting:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in resting:
            hooks.update(entries)
        for handle in handles:
            handle.remove()


def _check_weights(loop: Loop) -> None:
    weight = loop.guard.changed_since()
    if weight is not None:
        raise StaleError(
            f"a weight of shape {tuple(weight.shape)} was changed after the context ended, so the outer objective "
            "does not look at the weights that the recorded training led to. Evaluate it, and call `backward`, "
            "before training goes on or `rewind` is called. If it is the objective that changes them (a model may "
            "rescale them to be evaluated), pass it as a function: `run.backward(lambda: loss(model(x), y))`."
        )


def _holders(tensors: list[Tensor]) -> list[Tensor]:
    """Those of the tensors that a module (or another dict of tensors) keeps by name, as it keeps its buffers."""
    held = []
    for holder in gc.get_referrers(*tensors) if tensors else ():
        if type(holder) is dict and all(isinstance(v, (Tensor, type(None))) for v in holder.values()):
            held += [tensor for tensor in tensors if any(value is tensor for value in holder.values())]
    return held
