"""Independent ways to the same hypergradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tests.cases import Case, Hyper
from tests.strategies import SCHEDULERS, Loop


def value(case: Case, hyper: Hyper) -> float:
    """The outer objective of the bare loop: nothing of metaopt's capture is there."""
    outer = case.train(hyper, lambda optimizer: nullcontext()).outer
    return (outer() if callable(outer) else outer).item()


def finite_difference(case: Case, name: str, index: int) -> float:
    """The derivative of the bare loop in one entry, by two stencils of fourth order that have to agree."""

    def shifted(step: float) -> float:
        hyper = case.hyper()
        with torch.no_grad():
            hyper[name].view(-1)[index] += step
        return value(case, hyper)

    def stencil(h: float) -> float:
        if (
            name == "momentum" and float(case.hyper()[name].detach()) == 0
        ):  # the edge of the domain: from the right only
            f = [shifted(k * h) for k in range(5)]
            return (-25 * f[0] + 48 * f[1] - 36 * f[2] + 16 * f[3] - 3 * f[4]) / (12 * h)
        return (8 * (shifted(h) - shifted(-h)) - (shifted(2 * h) - shifted(-2 * h))) / (12 * h)

    first, second = stencil(1e-4), stencil(3e-4)
    assert abs(first - second) <= 1e-6 * max(1.0, abs(first)), f"the stencils disagree: {first} and {second}"
    return first


def entries(tensor: Tensor) -> list[int]:
    """Some entries of a hyperparameter to look at: the first, one in the middle, the last."""
    return sorted({0, tensor.numel() // 2, tensor.numel() - 1})


# -- naively unrolled autograd -----------------------------------------------------------------------------------------


@dataclass
class Unrolled:
    """A loop as one long autograd graph: its outer objective, and the leaves besides the hyperparameters.

    ``weights`` are the initial ones in the order of ``model.parameters()``, those that are trained; ``states`` the
    optimizer's before the loop, by weight.
    """

    outer: Tensor
    second: Tensor
    weights: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]

    def gradients(self, wanted: Sequence[Tensor], outer: Tensor | None = None) -> list[Tensor]:
        """The derivative of the outer objective, zeros where there is none."""
        outer = self.outer if outer is None else outer
        if not outer.requires_grad:
            return [torch.zeros_like(x) for x in wanted]
        grads = torch.autograd.grad(outer, wanted, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]


def unrolled(loop: Loop, hyper: Mapping[str, Tensor], *, last: int | None = None) -> Unrolled:
    """Run a loop on tensors that require grad and keep the whole graph; nothing of metaopt is called.

    Args:
        loop: the loop; only its data, its model and its inner objective are used.
        hyper: the hyperparameters.
        last: detach what the steps before the last so many leave behind, if there are any.
    """
    model = loop.model(plain=True) if loop.network == "normalised" else loop.model()
    named = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    trained = {name: w.detach().clone().requires_grad_() for name, w in named.items() if w.requires_grad}
    frozen = {name: w for name, w in named.items() if not w.requires_grad}
    weights: dict[str, Tensor] = dict(trained)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in trained}
    grads: dict[str, Tensor | None] = dict.fromkeys(trained)
    counts = dict.fromkeys(trained, 0)
    for place, name in enumerate(named):
        if loop.loaded and name in trained:
            states[name] = {key: x.requires_grad_() for key, x in loop.state(place, named[name]).items()}
            grads[name], counts[name] = loop.grad(place, named[name]), 3
    initial = {name: dict(state) for name, state in states.items()}
    group_of = {name: place for place, group in enumerate(loop.split(list(named))) for name in group}

    factors = _factors(loop)
    torch.manual_seed(loop.seed)
    if "scale" in hyper:
        first = next(iter(named))
        weights[first] = weights[first] * hyper["scale"]
    x, y, _, _ = loop.data()
    for t in range(loop.steps):
        if last is not None and t and t == loop.steps - last:
            weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
            buffers = {name: b.detach() for name, b in buffers.items()}
            grads = {name: None if g is None else g.detach() for name, g in grads.items()}
            states = {name: {key: s.detach() for key, s in state.items()} for name, state in states.items()}
        if loop.zero != "never":
            gone = loop.zero == "none"
            grads = {name: None if gone or g is None else torch.zeros_like(g) for name, g in grads.items()}
        for batch in range(loop.batches):
            part = slice(batch, None, loop.batches)
            everything = {**weights, **frozen, **buffers}
            out = functional_call(model.train(), everything, (x[part], t))
            buffers = {name: everything[name] for name in buffers}
            loss = loop.loss(hyper, out, y, part, iter(weights.values()))
            new = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
            for name, part_of_it in zip(weights, new, strict=True):
                old = grads[name]
                if part_of_it is not None:
                    grads[name] = part_of_it if old is None else old + part_of_it
        for name, g in grads.items():
            if g is None:
                continue
            counts[name] += 1
            numbers = _numbers(loop, hyper, group_of[name], t, factors[t][group_of[name]])
            update = _sgd if loop.settings.name == "SGD" else _adam
            weights[name], states[name] = update(loop, numbers, weights[name], g, states[name], counts[name])
    if last == 0 and loop.steps:
        weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
        buffers = {name: b.detach() for name, b in buffers.items()}
    _, _, x, y = loop.data()
    everything = {**weights, **frozen, **buffers}
    out = functional_call(model.eval(), everything, (x, 0))
    return Unrolled(((out - y) ** 2).mean(), (out - 4 - y).abs().mean(), trained, initial)


def _numbers(
    loop: Loop, hyper: Mapping[str, Tensor], group: int, t: int, factors: Mapping[str, float]
) -> dict[str, Tensor | float]:
    """The settings of a group at step ``t`` (from 0)."""
    numbers: dict[str, Tensor | float] = {}
    for name, number in loop.settings.numbers.items():
        value = hyper.get(f"{name}.{group}" if group else name, hyper.get(name))
        numbers[name] = number if value is None else value[t] if value.dim() else value
    return {name: number * factors[name] if name in factors else number for name, number in numbers.items()}


def _factors(loop: Loop) -> list[list[dict[str, float]]]:
    """What a scheduler makes of plain numbers in torch's own optimizer: the factors by step, group and setting."""
    if not loop.scheduler:
        return [[{}, {}]] * loop.steps
    groups: list[dict[str, Any]] = [{"params": [torch.nn.Parameter(torch.zeros(()))]} for _ in range(loop.groups)]
    if loop.groups == 2:
        own = {name.removesuffix(".1"): leaf.item() for name, leaf in loop.leaves().items() if name.endswith(".1")}
        groups[1] |= loop.settings.arguments(own)
    optimizer = getattr(torch.optim, loop.settings.name)(groups, **loop.settings.arguments())
    before = [_scheduled(group) for group in optimizer.param_groups]
    scheduler = SCHEDULERS[loop.scheduler](optimizer)
    factors = []
    for _ in range(loop.steps):
        after = [_scheduled(group) for group in optimizer.param_groups]
        factors.append([{k: n / b[k] for k, n in a.items() if n != b[k]} for a, b in zip(after, before, strict=True)])
        optimizer.step()
        scheduler.step()
    return factors


def _scheduled(group: Mapping[str, Any]) -> dict[str, float]:
    """The settings that torch's schedulers set."""
    others = {"momentum": group["momentum"]} if "momentum" in group else {"beta1": group["betas"][0]}
    return {"lr": group["lr"], **others}


State = dict[str, Tensor]


def _sgd(loop: Loop, numbers: dict[str, Any], w: Tensor, g: Tensor, state: State, count: int) -> tuple[Tensor, State]:
    """The pseudo-code of torch.optim.SGD's documentation; a momentum that is a plain 0 is no momentum."""
    momentum, dampening = numbers["momentum"], numbers["dampening"]
    g = -g if loop.settings.flags["maximize"] else g
    g = g + numbers["weight_decay"] * w
    if isinstance(momentum, Tensor) or momentum:
        old = state.get("momentum_buffer")
        b = g if old is None else momentum * old + (1 - dampening) * g
        state = {"momentum_buffer": b}
        g = g + momentum * b if loop.settings.flags["nesterov"] else b
    return w - numbers["lr"] * g, state


def _adam(loop: Loop, numbers: dict[str, Any], w: Tensor, g: Tensor, state: State, count: int) -> tuple[Tensor, State]:
    """The pseudo-code of torch.optim.Adam's and AdamW's documentation."""
    lr, decay, beta1, beta2 = numbers["lr"], numbers["weight_decay"], numbers["beta1"], numbers["beta2"]
    g = -g if loop.settings.flags["maximize"] else g
    if loop.settings.name == "AdamW" or loop.settings.flags.get("decoupled_weight_decay"):
        w = w - lr * decay * w
    else:
        g = g + decay * w
    zero = torch.zeros_like(w)
    m = beta1 * state.get("exp_avg", zero) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * g**2
    after = {"exp_avg": m, "exp_avg_sq": v}
    first, second = m / (1 - beta1**count), v / (1 - beta2**count)
    if loop.settings.flags["amsgrad"]:
        # torch keeps the largest v, and corrects its bias with the present factor.
        old = state.get("max_exp_avg_sq", zero)
        after["max_exp_avg_sq"] = torch.maximum(old, v)  # at a tie, half of the derivative goes to each
        second = after["max_exp_avg_sq"] / (1 - beta2**count)
    # The root of an exact 0 has no derivative, but m is 0 there too, and of the first order.
    positive = second > 0
    root = torch.where(positive, second, 1.0) ** 0.5 * positive
    return w - lr * first / (root + numbers["eps"]), after
