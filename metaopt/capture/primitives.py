"""What replayed programs are made of besides torch's own functions.

A program is called with a `Phase`, which tells the two kinds of differentiation apart: the *inner* one, which the loop
itself asked for with ``backward``, and the *outer* one, of the whole step. ``no_grad`` and ``detach`` stop the inner
one only: the weights' trajectory still depends on what was computed under them.
"""

from __future__ import annotations

__all__ = [
    "Phase",
    "assign",
    "flatten",
    "has_graph",
    "hooked",
    "inner_gradient",
    "leaf",
    "overwrite",
    "pick",
    "seeded",
    "stop",
    "total",
    "with_autocast",
    "with_native_kernels",
]

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

RNG = tuple[tuple[torch.Generator, Tensor], ...]


class Phase:
    """Whether a backward pass that runs now is the loop's own (`inner`) or the sweep's.

    ``graph`` says whether the loop's gradients shall have a graph, to be differentiated again.
    """

    __slots__ = ("graph", "inner", "modules")

    def __init__(self, *, graph: bool = True) -> None:
        self.inner = False
        self.graph = graph
        # What the gradient hooks of modules know of each other, by the call that they belong to.
        self.modules: dict[int, Any] = {}

    @contextmanager
    def loop(self):  # type: ignore[no-untyped-def]
        """The span of a backward pass of the loop."""
        before, self.inner = self.inner, True
        try:
            yield
        finally:
            self.inner = before


class _Stop(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, phase: Phase) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.phase = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (None if ctx.phase.inner else grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, true: Tensor, phase: Phase) -> Tensor:
        ctx.phase = phase
        return own.view_as(own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return (grad, None, None) if ctx.phase.inner else (None, grad, None)


def choose(phase: Phase, own: Tensor, true: Tensor) -> Tensor:
    """A value, through which the loop's own gradients go one way, and the sweep another."""
    return _Choose.apply(own, true, phase)


def stop(phase: Phase, x: Tensor) -> Tensor:
    """``x``, a constant for the loop's own gradients and a variable for the sweep.

    This is what ``detach`` and ``no_grad`` mean to the training dynamics.
    """
    if not (isinstance(x, Tensor) and x.requires_grad):
        return x
    # A custom function returns a view that refuses in-place writes; programs write only to clones.
    return _Stop.apply(x, phase)


def leaf(x: Tensor) -> Tensor:
    """``x`` as something that gradients can be taken with respect to."""
    # Not `detach`, which takes the tangent of forward mode away.
    return x if x.requires_grad else x.view_as(x).requires_grad_()


def inner_gradient(
    phase: Phase,
    outputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None] | None,
    inputs: Sequence[Tensor],
    is_grads_batched: bool = False,
) -> tuple[Tensor, ...]:
    """The gradient that the loop took, as a differentiable function of the weights and hyperparameters."""
    weights = [None] * len(outputs) if grad_outputs is None else grad_outputs
    kept = [(output, weight) for output, weight in zip(outputs, weights, strict=True) if output.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(inputs)
    if kept:
        with phase.loop():
            grads = torch.autograd.grad(
                [output for output, _ in kept],
                list(inputs),
                [weight for _, weight in kept],
                create_graph=phase.graph,
                allow_unused=True,
                is_grads_batched=is_grads_batched,
            )
    return tuple(torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True))


def pick(result: Any, place: int) -> Any:
    """One tensor of a nested result."""
    return flatten([result])[place]


def has_graph(arguments: Sequence[Any]) -> bool:
    """Whether the loop's own gradients pass a call with these arguments."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flatten(arguments))


def flatten(arguments: Iterable[Any], found: list[Tensor] | None = None) -> list[Tensor]:
    """All tensors among nested arguments, in order."""
    found = [] if found is None else found
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            flatten(argument, found)
        elif isinstance(argument, dict):
            flatten(argument.values(), found)
    return found


def total(*terms: Tensor) -> Tensor:
    """The sum of the gradients that one weight received."""
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return result


def overwrite(value: Tensor | float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What ``copy_``, ``fill_`` and ``zero_`` leave in a whole tensor: nothing of what it held before."""
    if not isinstance(value, Tensor):
        return torch.full(shape, value, dtype=dtype, device=device)
    return value.to(dtype=dtype, device=device).expand(shape).clone()


def assign(target: Tensor, value: Tensor) -> Tensor:
    """``target`` after ``target.copy_(value)``, where ``target`` may be written."""
    return target.copy_(value)


def seeded(states: RNG, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``func`` with the generators where they were when the loop called it; put them back afterwards.

    Where a step is traced, a stand-in for the states makes the call in its own way.
    """
    if callable(states):
        return states(func, args, kwargs)
    before = [(generator, generator.get_state()) for generator, _ in states]
    try:
        for generator, state in states:
            generator.set_state(state)
        return func(*args, **kwargs)
    finally:
        for generator, state in before:
            generator.set_state(state)


def with_autocast(
    settings: tuple[tuple[str, torch.dtype], ...], func: Callable[..., Any], *args: Any, **kw: Any
) -> Any:
    """Call ``func`` under the autocast settings of the loop."""
    with ExitStack() as stack:
        for device_type, dtype in settings:
            stack.enter_context(torch.autocast(device_type, dtype=dtype, cache_enabled=False))
        return func(*args, **kw)


def with_native_kernels(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``func`` with kernels that have second derivatives: math attention, native recurrent layers."""
    before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return func(*args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(before[0])
        torch._C._set_cudnn_enabled(before[1])


def hooked(phase: Phase, x: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    """Give ``x`` the user's gradient hook, which acts on the loop's own gradients and not on the sweep's."""
    if x.requires_grad:
        # A gradient that is asked for where there is none is nothing that the loop's hook saw.
        x.register_hook(lambda grad: hook(grad) if phase.inner and grad is not None else None)
