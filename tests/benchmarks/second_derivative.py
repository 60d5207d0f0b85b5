"""``python -m tests.benchmarks.second_derivative``: three ways to a step's second derivative, beside its gradient.

The sweep needs ``vᵀ ∂g/∂(w, λ)`` of the loss's gradient ``g``. It can be had by a second backward pass through the
first; by a backward pass through the loss's derivative along ``v``; or by the derivative of the backward pass along
``v``. Which is the cheapest decides what a sweep compiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, _inductor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from tests.benchmarks.workloads import make

Derivative = Callable[[Sequence[Tensor], Tensor, Sequence[Tensor]], Sequence[Tensor]]


def derivatives(workload: str) -> tuple[dict[str, Derivative], list[Tensor]]:
    """The gradient and three ways, as functions of weights, examples' weights and ``v``; and arguments for them."""
    problem = make(workload)
    names = [name for name, _ in problem.model.named_parameters()]
    w = [x.detach() for x in problem.model.parameters()]
    _, x, y = problem.batch(0)

    def loss(w: Sequence[Tensor], hyper: Tensor) -> Tensor:
        z = functional_call(problem.model, dict(zip(names, w, strict=True)), (x,))
        # Torch's log_softmax can't be differentiated backwards along a direction: it writes on what it saved.
        z = z - z.detach().amax(1, keepdim=True)
        each = z.exp().sum(1).log() - z.gather(1, y[:, None])[:, 0]
        return (hyper * each).mean()

    def leaves(w: Sequence[Tensor], hyper: Tensor) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in (*w, hyper)]

    def gradient(w: Sequence[Tensor], hyper: Tensor, v: Sequence[Tensor]) -> Sequence[Tensor]:
        *p, h = leaves(w, hyper)
        return torch.autograd.grad(loss(p, h), p)

    def double_backward(w: Sequence[Tensor], hyper: Tensor, v: Sequence[Tensor]) -> Sequence[Tensor]:
        *p, h = leaves(w, hyper)
        return torch.autograd.grad(torch.autograd.grad(loss(p, h), p, create_graph=True), [*p, h], v)

    def reverse_over_forward(w: Sequence[Tensor], hyper: Tensor, v: Sequence[Tensor]) -> Sequence[Tensor]:
        *p, h = leaves(w, hyper)
        with forward_mode.dual_level():
            moving = [forward_mode.make_dual(a, b) for a, b in zip(p, v, strict=True)]
            slope = forward_mode.unpack_dual(loss(moving, h)).tangent
        return torch.autograd.grad(slope, [*p, h])

    def forward_over_reverse(w: Sequence[Tensor], hyper: Tensor, v: Sequence[Tensor]) -> Sequence[Tensor]:
        *p, h = leaves(w, hyper)
        with forward_mode.dual_level():
            moving = [forward_mode.make_dual(a, b) for a, b in zip(p, v, strict=True)]
            grads = torch.autograd.grad(loss(moving, h), [*moving, h], create_graph=True)
            return [forward_mode.unpack_dual(g).tangent.detach() for g in grads]

    ways = (gradient, double_backward, reverse_over_forward, forward_over_reverse)
    arguments = [*w, torch.rand(len(x)), *(0.01 * torch.randn_like(t) for t in w)]
    return {way.__name__.replace("_", " "): way for way in ways}, arguments


def compiled(way: Derivative, arguments: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """A way as a sweep would compile it, called with all tensors in a row."""
    count = len(arguments) // 2

    def flat(*given: Tensor) -> Sequence[Tensor]:
        return way(given[:count], given[count], given[count + 1 :])

    graph = make_fx(flat)(*arguments)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _inductor.compile(graph, list(arguments))


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The median of its processor time."""
    times = []
    for turn in range(repeats + 3):
        start = time.process_time()
        function()
        if turn >= 3:
            times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.second_derivative", description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2", "W3"])
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| | way | call by call | compiled |\n|---|---|---|---|")
    for workload in options.workloads:
        torch.manual_seed(0)
        ways, arguments = derivatives(workload)
        count = len(arguments) // 2
        given = arguments[:count], arguments[count], arguments[count + 1 :]
        base = seconds(lambda: ways["gradient"](*given), options.repeats)  # noqa: B023
        reference = ways["double backward"](*given)
        for name, way in list(ways.items())[1:]:
            code = compiled(way, arguments)
            with torch.no_grad():
                found = code(*arguments)
                fast = seconds(lambda: code(*arguments), options.repeats) / base  # noqa: B023
            for a, b in zip(found, reference, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
            slow = seconds(lambda: way(*given), options.repeats) / base  # noqa: B023
            print(f"| {workload} | {name} | {slow:.2f} | {fast:.2f} |", flush=True)


if __name__ == "__main__":
    main()
