"""Schedule-free SGD and AdamW (Defazio et al. 2024): averaging in place of a schedule."""

from __future__ import annotations

__all__ = ["ScheduleFreeAdamW", "ScheduleFreeSGD"]

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from metaopt.published.settings import PublishedOptimizer, check_fractions, check_nonnegative


class _ScheduleFree(PublishedOptimizer):
    """The weights hold ``y``, where gradients are taken; the state holds ``z``, which steps, and ``x``, its average."""

    def eval(self) -> None:
        """Put the average ``x`` into the weights, to evaluate or to save them; does nothing if it is there."""
        self._swap(to_average=True)

    def train(self) -> None:
        """Put ``y`` back into the weights, to go on training; does nothing if it is there."""
        self._swap(to_average=False)

    @torch.no_grad()
    def _swap(self, *, to_average: bool) -> None:
        # The two change places, so that nothing is computed and no hyperparameter enters here.
        for group in self.param_groups:
            if group["averaged"] == to_average:
                continue
            for weight in group["params"]:
                if "x" in self.state[weight]:
                    held = weight.clone()
                    weight.copy_(self.state[weight]["x"])
                    self.state[weight]["x"].copy_(held)
            group["averaged"] = to_average

    def _update(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if group["averaged"]:
            raise RuntimeError(
                f"{type(self).__name__} steps while the weights hold the average. Call `optimizer.train()` after "
                "`optimizer.eval()`, before training goes on."
            )
        if "z" not in state:
            state["step"] = torch.tensor(0.0, device="cpu")
            state["z"], state["x"] = weight.clone(), weight.clone()
            state["weight_sum"] = torch.tensor(0.0, device="cpu")
        state["step"] += 1
        step = state["step"].item()
        rate = group["lr"] * min(1.0, step / max(group["warmup_steps"], 1))
        state["weight_sum"] += rate**2
        share = rate**2 / state["weight_sum"].item() if rate else 0.0
        z, x = state["z"], state["x"]
        z.sub_(self._direction(weight, grad, state, group, step), alpha=rate)
        x.lerp_(z, share)
        weight.copy_(torch.lerp(z, x, self._interpolation(group)))

    def _direction(
        self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], step: float
    ) -> Tensor:
        raise NotImplementedError

    def _interpolation(self, group: dict[str, Any]) -> float:
        raise NotImplementedError


class ScheduleFreeSGD(_ScheduleFree):
    """Schedule-free stochastic gradient descent.

    ``z ← z - lrₜ(∇f(y) + weight_decay · y)``, ``x ← x + cₜ(z - x)`` with ``cₜ = lrₜ²/Σ lrᵢ²``, ``y = z + momentum · (x
    - z)``. The average ``x`` is what is evaluated: call `eval` before, and `train` after.

    Args:
        params: weights or param groups.
        lr: the learning rate, after the warm-up.
        momentum: how far ``y`` lies from ``z`` towards ``x``; β in the paper.
        weight_decay: at ``y``.
        warmup_steps: the steps in which lr grows linearly.
        maximize: ascend instead.

    Source:
        Defazio et al. 2024, "The Road Less Scheduled", eq. 1-3, with the weights of algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        *,
        maximize: bool = False,
    ) -> None:
        check_nonnegative(lr=lr, weight_decay=weight_decay)
        check_fractions(momentum)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "maximize": maximize,
            "averaged": False,
        }
        super().__init__(params, defaults)

    def _direction(
        self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], step: float
    ) -> Tensor:
        return grad.add(weight, alpha=group["weight_decay"])

    def _interpolation(self, group: dict[str, Any]) -> float:
        return group["momentum"]


class ScheduleFreeAdamW(_ScheduleFree):
    """Schedule-free AdamW.

    As `ScheduleFreeSGD`, where ``z ← z - lrₜ(∇f(y)/(√v̂ + eps) + weight_decay · y)`` with Adam's second moment ``v̂``.

    Args:
        params: weights or param groups.
        lr: the learning rate, after the warm-up.
        betas: how far ``y`` lies from ``z`` towards ``x``, and the decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: at ``y``.
        warmup_steps: the steps in which lr grows linearly.
        maximize: ascend instead.

    Source:
        Defazio et al. 2024, "The Road Less Scheduled", algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        *,
        maximize: bool = False,
    ) -> None:
        check_nonnegative(lr=lr, eps=eps, weight_decay=weight_decay)
        check_fractions(*betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "maximize": maximize,
            "averaged": False,
        }
        super().__init__(params, defaults)

    def _direction(
        self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], step: float
    ) -> Tensor:
        beta2 = group["betas"][1]
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(weight)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        return (grad / (second / (1 - beta2**step)).sqrt_().add_(group["eps"])).add_(
            weight, alpha=group["weight_decay"]
        )

    def _interpolation(self, group: dict[str, Any]) -> float:
        return group["betas"][0]
