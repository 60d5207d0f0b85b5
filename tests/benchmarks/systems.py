"""The same training loop, differentiated by each system.

A system trains a problem for some steps and returns the hypergradients by name (nothing, if it computes none). Each is
written as its own documentation would have it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import metaopt
from tests.benchmarks.catalogue import SYSTEMS
from tests.benchmarks.workloads import Problem

Gradients = dict[str, Tensor]
Run = Callable[[Problem, int], Gradients]


def _settings(numbers: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's settings under torch's names."""
    settings = {name: value for name, value in numbers.items() if name not in ("weights", "beta1", "beta2")}
    if "beta1" in numbers:
        settings["betas"] = (numbers["beta1"], numbers["beta2"])
    return settings


def _train(problem: Problem, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss = problem.loss(problem.model, problem.batch(step))
        loss.backward()
        optimizer.step()


def _gradients(outer: Tensor, hyper: dict[str, Tensor]) -> Gradients:
    return dict(zip(hyper, torch.autograd.grad(outer, list(hyper.values())), strict=True))


# -- without a hypergradient ------------------------------------------------------------------------------------------


def plain(problem: Problem, steps: int) -> Gradients:
    """What everybody writes."""
    settings = _settings(problem.numbers())
    problem.hyper = {name: value.detach() for name, value in problem.hyper.items()}
    optimizer = getattr(torch.optim, problem.optimizer)(problem.model.parameters(), **settings)
    _train(problem, optimizer, steps)
    problem.outer(problem.model)
    return {}


def watched(problem: Problem, steps: int) -> Gradients:
    """The loop under metaopt's watch, and no sweep."""
    optimizer = getattr(metaopt.optim, problem.optimizer)(problem.model.parameters(), **_settings(problem.hyper))
    with metaopt.record(optimizer):
        _train(problem, optimizer, steps)
    problem.outer(problem.model)
    return {}


# -- with one ----------------------------------------------------------------------------------------------------------


def record(**options: Any) -> Run:
    """metaopt's reverse mode."""

    def run(problem: Problem, steps: int) -> Gradients:
        optimizer = getattr(metaopt.optim, problem.optimizer)(problem.model.parameters(), **_settings(problem.hyper))
        with metaopt.record(optimizer, **options) as recorded:
            _train(problem, optimizer, steps)
        recorded.backward(problem.outer(problem.model))
        return {name: value.grad for name, value in problem.hyper.items() if value.grad is not None}

    return run


def higher(problem: Problem, steps: int) -> Gradients:
    """higher: a patched model, and a differentiable optimizer whose settings are overridden with tensors."""
    import higher

    optimizer = getattr(torch.optim, problem.optimizer)(problem.model.parameters(), **_settings(problem.numbers()))
    override = {name: [value] for name, value in _settings(problem.hyper).items()}
    with higher.innerloop_ctx(problem.model, optimizer, override=override) as (model, differentiable):
        for step in range(steps):
            differentiable.step(problem.loss(model, problem.batch(step)))
        return _gradients(problem.outer(model), problem.hyper)


def torchopt(problem: Problem, steps: int) -> Gradients:
    """torchopt: a meta-optimizer that puts non-leaf tensors into the model."""
    import torchopt

    constant = SYSTEMS["torchopt"].constant
    mixed = {name: value.item() if name in constant else value for name, value in problem.hyper.items()}
    optimizer = getattr(torchopt, f"Meta{problem.optimizer}")(problem.model, **_settings(mixed))
    for step in range(steps):
        optimizer.step(problem.loss(problem.model, problem.batch(step)))
    wanted = {name: value for name, value in problem.hyper.items() if name not in constant}
    return _gradients(problem.outer(problem.model), wanted)


def hypertorch(problem: Problem, steps: int) -> Gradients:
    """hypertorch: its optimizers over lists of tensors, the iterates kept, each step computed again on the way back."""
    import hypergrad

    if problem.optimizer != "SGD":
        raise NotImplementedError("hypertorch has no Adam")
    names = list(problem.hyper)
    weights = [name for name, _ in problem.model.named_parameters()]
    loss, batch = problem.loss, problem.batch

    def forward(w: list[Tensor]) -> Any:
        return lambda x: torch.func.functional_call(problem.model, dict(zip(weights, w, strict=False)), x)

    def inner(step: int) -> Any:
        def value(w: list[Tensor], hyper: list[Tensor]) -> Tensor:
            problem.hyper = dict(zip(names, hyper, strict=True))
            return loss(forward(w), batch(step))

        rate = {"step_size": lambda hyper: hyper[names.index("lr")]}
        if "momentum" not in names:
            return hypergrad.GradientDescent(value, **rate)
        return hypergrad.Momentum(value, **rate, momentum=lambda hyper: hyper[names.index("momentum")])

    hyper = list(problem.hyper.values())
    updates = [inner(step) for step in range(steps)]
    state = updates[0].get_opt_params([w.detach().clone().requires_grad_() for w in problem.model.parameters()])
    history = [state]
    for update in updates:
        state = [s.detach().requires_grad_() for s in update(state, hyper, create_graph=False)]
        history.append(state)
    found = hypergrad.reverse(history, hyper, updates, lambda w, _: problem.outer(forward(w)), set_grad=False)
    return dict(zip(names, found, strict=True))


def unrolled(problem: Problem, steps: int) -> Gradients:
    """One long autograd graph: the model called on tensors, and the optimizer's formula written out."""
    names = [name for name, _ in problem.model.named_parameters()]
    weights = [weight.detach().requires_grad_() for weight in problem.model.parameters()]
    update = _ADAM if problem.optimizer == "Adam" else _SGD
    state: list[Any] = [None] * len(weights)

    def forward(x: Tensor) -> Tensor:
        return torch.func.functional_call(problem.model, dict(zip(names, weights, strict=True)), x)

    for step in range(1, steps + 1):
        grads = torch.autograd.grad(problem.loss(forward, problem.batch(step - 1)), weights, create_graph=True)
        for place, (w, g) in enumerate(zip(weights, grads, strict=True)):
            weights[place], state[place] = update(w, g, state[place], step, **problem.hyper)
    return _gradients(problem.outer(forward), problem.hyper)


def _SGD(
    w: Tensor, g: Tensor, v: Tensor | None, step: int, lr: Tensor, momentum: Tensor | None = None, **_: Tensor
) -> tuple[Tensor, Tensor | None]:
    if momentum is not None:
        v = g if v is None else momentum * v + g
        g = v
    return w - lr * g, v


def _ADAM(
    w: Tensor, g: Tensor, state: Any, step: int, lr: Tensor, beta1: Tensor, beta2: Tensor, **_: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    m, v = (torch.zeros_like(w), torch.zeros_like(w)) if state is None else state
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    corrected = v.sqrt() / (1 - beta2**step).sqrt() + 1e-8
    return w - lr / (1 - beta1**step) * m / corrected, (m, v)


def differences(problem: Problem, steps: int) -> Gradients:
    """A central difference of the bare training, for the learning rate alone."""
    lr = problem.hyper["lr"].detach()
    h = lr * torch.finfo(lr.dtype).eps ** (1 / 3)

    def trained(shift: Tensor) -> Tensor:
        moved = replace(problem, model=copy.deepcopy(problem.model), hyper={**problem.hyper, "lr": lr + shift})
        settings = _settings(moved.numbers())
        moved.hyper = {name: value.detach() for name, value in moved.hyper.items()}
        _train(moved, getattr(torch.optim, moved.optimizer)(moved.model.parameters(), **settings), steps)
        with torch.no_grad():
            return moved.outer(moved.model)

    return {"lr": (trained(h) - trained(-h)) / (2 * h)}


RUNS: dict[str, Run] = {
    "plain": plain,
    "watched": watched,
    "metaopt": record(),
    "compiled": record(compile=True),
    "graphs": record(keep="graphs", compile=True),
    "checkpoints": record(keep="checkpoints"),
    "higher": higher,
    "torchopt": torchopt,
    "hypertorch": hypertorch,
    "unrolled": unrolled,
    "differences": differences,
}
