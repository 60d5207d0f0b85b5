"""A network so small that its response Jacobians can be written out: the oracle of what a response should learn."""

from __future__ import annotations

__all__ = ["SmallNetwork", "minimise", "relative"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn import Parameter


def hessian(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By two reverse passes: torch's own takes forward mode, whose first use imports parts that warn."""
    derivative: Callable[..., Tensor] = jacrev(grad(function))
    return derivative


class SmallNetwork:
    """A d-8-1 tanh network, trained to the end on ``½ mean (f - y)² + ½ Σ_k e^{λ_k} ‖w_k‖²``.

    Args:
        x: inputs.
        y: targets.
        groups: the parameters' names, those of each ``w_k`` together.
        point: ``λ``.
    """

    def __init__(self, x: Tensor, y: Tensor, groups: Sequence[Sequence[str]], point: float, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.x, self.y, self.groups = x, y, groups
        self.module = nn.Sequential(nn.Linear(x.shape[1], 8), nn.Tanh(), nn.Linear(8, 1))
        self.shapes = {name: p.shape for name, p in self.module.named_parameters()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.point = torch.full((len(groups),), point)
        self.weights = self.retrained(self.point, torch.cat([p.detach().reshape(-1) for p in self.module.parameters()]))
        torch.nn.utils.vector_to_parameters(self.weights, self.module.parameters())

    def outputs(self, weights: Tensor, x: Tensor) -> Tensor:
        """``f(x, w)``."""
        pieces = zip(self.shapes.items(), weights.split(self.sizes), strict=True)
        y: Tensor = functional_call(self.module, {name: w.reshape(shape) for (name, shape), w in pieces}, (x,))
        return y.squeeze(-1)

    def penalties(self, weights: Tensor) -> Tensor:
        """``½ ‖w_k‖²``."""
        named = dict(zip(self.shapes, weights.split(self.sizes), strict=True))
        return torch.stack([sum((0.5 * named[n].square().sum() for n in g), torch.zeros(())) for g in self.groups])

    def loss(self, weights: Tensor, point: Tensor) -> Tensor:
        """The training loss."""
        fit = 0.5 * (self.outputs(weights, self.x) - self.y).square().mean()
        return fit + (point.exp() * self.penalties(weights)).sum()

    def retrained(self, point: Tensor, start: Tensor) -> Tensor:
        """Where training from some weights ends: by LBFGS, then by Newton's method to rounding.

        Raises:
            ArithmeticError: if that is no minimum.
        """
        leaf = Parameter(start.clone())
        minimise(lambda: self.loss(leaf, point), [leaf])
        weights = leaf.detach()
        for _ in range(3):
            curvature = hessian(self.loss)(weights, point)
            if not torch.linalg.eigvalsh(curvature)[0] > 0:
                raise ArithmeticError("training ended in no minimum.")
            weights = weights - torch.linalg.solve(curvature, grad(self.loss)(weights, point))
        return weights

    @property
    def curvature(self) -> Tensor:
        """The Gauss-Newton matrix ``Jᵀ J / n + ∇²R``."""
        jacobian = jacrev(self.outputs)(self.weights, self.x)
        penalty = hessian(lambda w: (self.point.exp() * self.penalties(w)).sum())(self.weights)
        return jacobian.T @ jacobian / len(self.x) + penalty

    def response(self, *, gauss_newton: bool) -> Tensor:
        """``∂w*/∂λ = -(∇²L)⁻¹ ∇²_wλ L``, shape (H, P), with the Hessian or with the Gauss-Newton matrix."""
        matrix = self.curvature if gauss_newton else hessian(self.loss)(self.weights, self.point)
        mixed = self.point.exp()[:, None] * jacrev(self.penalties)(self.weights)
        return -torch.linalg.solve(matrix, mixed.T).T


def minimise(loss: Callable[[], Tensor], parameters: list[Parameter], steps: int = 500) -> None:
    """LBFGS to the end."""
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
        history_size=60,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def relative(found: Tensor, expected: Tensor, metric: Tensor | None = None) -> float:
    """``‖found - expected‖ / ‖expected‖``, of rows, in a metric."""
    root = None if metric is None else torch.linalg.cholesky(metric)
    gap, size = found - expected, expected
    return float((gap if root is None else gap @ root).norm() / (size if root is None else size @ root).norm())
