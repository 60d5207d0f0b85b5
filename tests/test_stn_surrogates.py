"""Backwards that are no derivative, and hooks on gradients: training goes by them, the hypergradient by values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from metaopt.errors import ResponseError
from metaopt.stn import Tuned, diagnose, train
from tests.test_stn_users import FIXED, problem, still, train_loss, valid_loss

METHODS = ("stn", "centered", "delta")


class Own(torch.autograd.Function):
    """The identity, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)


class Reversed(Own):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -0.7 * gradients[0]


class Clipped(Own):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp(-0.01, 0.01)


class Penalised(torch.autograd.Function):
    """A penalty whose gradient is added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] + 0.1 * ctx.saved_tensors[0].sign()


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Squared(torch.autograd.Function):
    """A function whose backward is its derivative, and can't be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0] * ctx.saved_tensors[0]


class Stepped(Rounded):
    """The same, and its backward can't be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 1 * gradients[0]


class Twice(torch.autograd.Function):
    """Of two values, with two results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, x - y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        a, b = gradients
        return 2 * (a + b), 3 * (a - b)


def twice(function: Any) -> Any:
    def call(x: Tensor) -> Tensor:
        a, b = function(x, torch.tanh(x))
        product: Tensor = a * b
        return product

    return call


def hooked(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda g: (2 * g).clamp(-0.01, 0.01))
    return x


class Hooked(nn.Module):
    """A module whose hook scales what it passes on."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = nn.Tanh()
        if kind == "full":
            self.inner.register_full_backward_hook(self.threefold)
        else:
            self.inner.register_full_backward_pre_hook(self.threefold)

    def threefold(self, _: nn.Module, gradients: Any, *__: Any) -> Any:
        return tuple(3 * g for g in gradients)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


# What is called, and what has the derivative of its values.
CASES: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Tensor]]] = {
    "reversed": (lambda: Reversed.apply, lambda x: x),
    "clipped": (lambda: Clipped.apply, lambda x: x),
    "penalised": (lambda: Penalised.apply, lambda x: x),
    "rounded": (lambda: Rounded.apply, lambda x: x + ((8 * x).round() / 8 - x).detach()),
    "squared": (lambda: Squared.apply, lambda x: x * x),
    "two": (lambda: twice(Twice.apply), twice(lambda x, y: (x + y, x - y))),
    "hook": (lambda: hooked, lambda x: x),
    "full": (lambda: Hooked("full"), torch.tanh),
    "pre": (lambda: Hooked("pre"), torch.tanh),
}


class Model(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.one, self.two, self.three = function, nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.three(torch.tanh(self.two(self.function(torch.tanh(self.one(x))))))
        return y


def changed(tuned: Tuned, model: nn.Module, x: Tensor, z: Tensor, still: bool = False) -> Tensor:
    """Each example at its own weights; or at w0, with the gradients of those."""
    rows = []
    for b in range(len(x)):
        changes = tuned.responses.changes(z[b])
        weights = {
            n: p.detach() + c - (c.detach() if still else 0)
            for (n, p), c in zip(
                model.named_parameters(), (changes[n] for n, _ in tuned.model.named_parameters()), strict=True
            )
        }
        rows.append(functional_call(model, weights, (x[b : b + 1],)))
    return torch.cat(rows)


def gradients(tuned: Tuned, smooth: nn.Module, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """Those of the response; ``smooth`` has the derivative of the values."""
    theta, parts = list(tuned.responses.parameters()), []
    if tuned.method != "delta":
        return torch.autograd.grad(changed(tuned, tuned.model, x, z).square().mean(), theta)
    smooth.load_state_dict(tuned.model.state_dict())
    weights = {n: p.detach() for n, p in smooth.named_parameters()}
    for b in range(len(x)):
        changes = {n: c.detach() for n, c in tuned.responses.changes(z[b]).items()}
        call = partial(functional_call, smooth, args=(x[b : b + 1],))
        parts.append(torch.add(*jvp(call, (weights,), (changes,))))
    output = torch.cat(parts).requires_grad_()
    cotangent = torch.autograd.grad(output.square().mean(), output)
    return torch.autograd.grad(changed(tuned, tuned.model, x, z, still=True), theta, cotangent)


@pytest.mark.filterwarnings("ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(CASES))
def test_the_response_is_trained_by_the_backward_and_tuned_by_the_values(name: str, method: str) -> None:
    build, true = CASES[name]
    tuned, x = problem(lambda: Model(build()), method), torch.randn(6, 4)
    with train(tuned, lambda m, b, v: valid_loss(m, b), valid_loss, optimizer=still, **FIXED) as tuner:
        drawn, perturb = [], tuner._perturb
        tuner._perturb = lambda *n: drawn.append(perturb(*n)) or drawn[-1]  # type: ignore[method-assign, func-returns-value]
        tuner.train_step(x)
        tuner.valid_step(x)
    z = (drawn[0][1] if method == "stn" else drawn[0][0] / tuned.reference).detach()
    theta, expected = list(tuned.responses.parameters()), gradients(tuned, Model(true), x, z)
    for found, right in zip(theta, expected, strict=True):
        torch.testing.assert_close(found.grad, right, rtol=1e-9, atol=1e-12)
    # λ descends the validation loss as it is, but for steps.
    smooth = Model(true)
    smooth.load_state_dict(tuned.model.state_dict())
    leaf = tuned.coordinates.leaf().detach().requires_grad_()
    point = (leaf if method == "stn" else (leaf - leaf.detach()) / tuned.reference).expand(len(x), -1)
    (right,) = torch.autograd.grad(changed(tuned, smooth, x, point).square().mean(), leaf)
    torch.testing.assert_close(
        torch.stack([v.grad for v in tuner.leaves if v.grad is not None]), right, rtol=1e-9, atol=1e-12
    )


@pytest.mark.filterwarnings("ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", ["changes", "looks", "after"])
def test_a_hook_that_changes_a_parameters_gradient_is_an_error(way: str, method: str) -> None:
    """The response does not go through it; one that logs gradients is no harm."""
    tuned, x, seen = problem(lambda: Model(torch.tanh), method), torch.randn(6, 4), []
    weight = tuned.model.get_parameter("one.weight")
    if way == "after":
        weight.register_post_accumulate_grad_hook(lambda p: None)
    else:
        weight.register_hook(lambda g: g.clamp(-1e9, 1e9) if way == "changes" else seen.append(g))
    with train(tuned, train_loss, valid_loss, hyper_optimizer=still) as tuner:
        if way == "looks":
            tuner.train_step(x)
            assert len(seen) == 1
            tuner.train_step(x)
            assert len(seen) == 2
        else:
            with pytest.raises(ResponseError, match=r"the parameter .* has a hook"):
                tuner.train_step(x)


@pytest.mark.filterwarnings("ignore::metaopt.UnusedHyperparameterWarning", "ignore::metaopt.FallbackWarning")
@pytest.mark.parametrize("engine", ["forward", "double"])
@pytest.mark.parametrize("name", ["reversed", "clipped", "penalised", "hook", "full", "pre"])
def test_engines_that_can_not_say_so(name: str, engine: str) -> None:
    tuned, x = problem(lambda: Model(CASES[name][0]()), engine=engine), torch.randn(6, 4)
    with (
        train(tuned, lambda m, b, v: valid_loss(m, b), valid_loss) as tuner,
        pytest.raises(ResponseError, match="auto"),
    ):
        tuner.train_step(x)


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning")
def test_steps_with_a_backward_that_can_not_be_differentiated_are_refused() -> None:
    tuned, x = problem(lambda: Model(Stepped.apply)), torch.randn(6, 4)
    with train(tuned, train_loss, valid_loss) as tuner, pytest.raises(ResponseError, match="the other engines were"):
        tuner.train_step(x)


class Words(nn.Module):
    """Words with padding, whose table may be that of a decoder too."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.decoder = nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 7, bias=False)
        if tied:
            self.decoder.weight = self.words.weight
        with torch.no_grad():
            self.words.weight[2] = 0.5

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(torch.tanh(self.words(x)).mean(1))
        return y


@pytest.mark.filterwarnings("ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("method", ["stn", "centered", "manual", "forward", "double"])
def test_padding_has_no_response_but_that_of_a_tied_decoder(method: str, rank: int | None, tied: bool) -> None:
    """A look-up does not train it; it responded by what the table's other words had learnt."""
    engine = {"engine": method} if method in ("manual", "forward", "double") else {}
    tuned = problem(lambda: Words(tied), "delta" if engine else method, rank=rank, banks=2, **engine)
    x = torch.randint(7, (5, 3))
    x[1] = 2
    with train(tuned, lambda m, b, v: valid_loss(m, b), valid_loss, **FIXED) as tuner:
        for _ in range(2):
            tuner.train_step(x)
        drawn, perturb = [], tuner._perturb
        tuner._perturb = lambda *n: drawn.append(perturb(*n)) or drawn[-1]  # type: ignore[method-assign, func-returns-value]
        tuner.optimizer.param_groups[0]["lr"] = tuner.response_optimizer.param_groups[0]["lr"] = 0.0
        tuner.train_step(x)
    z = (drawn[0][1] if method == "stn" else drawn[0][0] / tuned.reference).detach()
    padding = tuned.responses.changes(z[0])["words.weight"][2]
    assert bool(padding.any()) == tied
    theta = list(tuned.responses.parameters())
    for found, right in zip(theta, gradients(tuned, Words(tied), x, z), strict=True):
        torch.testing.assert_close(found.grad, right, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("name", [name for name in CASES if name != "hook"])
def test_gradients_of_no_loss_have_no_implicit_hypergradient(name: str) -> None:
    tuned, x = problem(lambda: Model(CASES[name][0]())), torch.randn(6, 4)
    with train(tuned, train_loss, valid_loss) as tuner:
        tuner.train_step(x)
        if name == "squared":
            found = diagnose(tuner, x, x, damping=10.0).implicit
            tuned.model.function = lambda x: x * x  # type: ignore[assignment]
            torch.testing.assert_close(found, diagnose(tuner, x, x, damping=10.0).implicit)
            return
        with pytest.raises(ResponseError, match=r"has a backward that is not its|has a hook on gradients"):
            diagnose(tuner, x, x)
