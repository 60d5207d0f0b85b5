"""Custom ``autograd.Function``s in the model: their own derivative counts, not that of what their forward calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from metaopt.errors import FallbackWarning, ResponseError
from metaopt.stn import train
from tests.test_stn_users import FIXED, problem, still, train_loss, valid_loss


class Layer(torch.autograd.Function):
    """A linear layer, as in torch's tutorial."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradients[0] @ weight, gradients[0].t() @ x


class Product(Layer):
    """The same by other functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.mm(weight.t())


class Forward(Layer):
    """The same with a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        x, weight = ctx.saved_tensors
        dx, dweight = (torch.zeros_like(v) if t is None else t for v, t in zip((x, weight), tangents, strict=True))
        return F.linear(dx, weight) + F.linear(x, dweight)


class Once(Layer):
    """The same, with a backward that can't be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return Layer.backward(ctx, *gradients)


class Numpy(Once):
    """The same, with a forward that torch can't differentiate either."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T)


class Scale(torch.autograd.Function):
    """Of a value and a factor that is no parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


class Model(nn.Module):
    """A function of a weight, alone or beside the layer that it belongs to, and one of values."""

    def __init__(self, function: Any, beside: bool = False) -> None:
        super().__init__()
        self.function, self.beside = function, beside
        self.one, self.drop, self.two = nn.Linear(4, 5, bias=False), nn.Dropout(0.2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.function.apply(x, self.one.weight)
        hidden = hidden + self.one(x) if self.beside else hidden
        y: Tensor = self.two(self.drop(Scale.apply(torch.tanh(hidden))))
        return y


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning")
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("function", [Layer, Product, Forward, Once])
def test_weights_of_custom_functions_have_a_response_and_a_hypergradient(
    function: Any, beside: bool, method: str
) -> None:
    """The response was seen by the functions within, whose gradient is none: it was not trained, and did not tune."""
    torch.manual_seed(0)
    tuned, x = problem(lambda: Model(function, beside), method), torch.randn(6, 4)
    with train(tuned, train_loss, valid_loss, optimizer=still, **FIXED) as tuner:
        tuner.train_step(x)
        assert tuned.responses.weight.grad is not None
        assert int((tuned.responses.weight.grad == 0).sum()) == 0
        tuner.valid_step(x)
    model, h = tuned.model.eval(), 1e-5
    for i, leaf in enumerate(tuner.leaves):
        losses = []
        for sign in (h, -h):
            point = sign * torch.eye(2)[i]
            changes = tuned.responses.changes(tuned.coordinates.leaf() + point if method == "stn" else point / 0.5)
            weights = {name: p + changes[name] for name, p in model.named_parameters()}
            losses.append(functional_call(model, weights, (x,)).square().mean())
        torch.testing.assert_close(leaf.grad, (losses[0] - losses[1]) / (2 * h), rtol=1e-6, atol=1e-9)


def test_a_function_that_can_not_be_linearised_says_what_to_do() -> None:
    tuned, x = problem(lambda: Model(Numpy)), torch.randn(6, 4)
    with (
        train(tuned, train_loss, valid_loss) as tuner,
        pytest.warns(FallbackWarning),
        pytest.raises(ResponseError, match=r'Use `method="centered"`, .*; the other engines were tried'),
    ):
        tuner.train_step(x)


class Within(nn.Module):
    """A function that uses a value which it is given only where that requires a gradient, as integrals of flows do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.drop = nn.Linear(4, 4), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        factor = torch.tanh(self.one(x))

        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, *given: Tensor) -> Tensor:
                ctx.save_for_backward(x, *given)
                return x * factor

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
                x, *given = ctx.saved_tensors
                return (gradients[0] * factor, *(gradients[0] * x for _ in given))

        function: Any = Product
        return self.drop(function.apply(x, *([factor] if factor.requires_grad else [])))


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning")
def test_a_value_that_a_function_uses_and_is_not_given_is_noticed() -> None:
    tuned, x = problem(Within), torch.randn(6, 4)
    with train(tuned, train_loss, valid_loss) as tuner, pytest.raises(ResponseError, match="other engines were tried"):
        tuner.train_step(x)
    tuned = problem(Within, "centered")
    with train(tuned, train_loss, valid_loss) as tuner:
        tuner.train_step(x)
