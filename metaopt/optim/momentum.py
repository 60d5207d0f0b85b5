"""Drop-ins that keep a momentum buffer only while the momentum is not 0."""

from __future__ import annotations

__all__ = ["SGD", "RMSprop"]

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from metaopt.optim.drop_in import DifferentiableOptimizer, Setting
from metaopt.rules import rule_of


class _Momentum(DifferentiableOptimizer):
    """Keeps the buffers of a linked momentum that is exactly 0.

    torch has none then. A momentum that may leave 0, or whose derivative is asked for at 0, needs the one that torch
    would have kept in the limit, which is what the rule gives for a momentum that is a tensor.
    """

    _buffers: list[tuple[Tensor, Tensor]]

    def _before_step(self) -> None:
        rule = rule_of(self)
        self._buffers = []
        for group in self._linked("momentum"):
            if group["momentum"] != 0:
                continue
            numbers = {name: rule.number(group, name) for name in rule.settings}
            numbers["momentum"] = torch.zeros((), dtype=torch.float64, device="cpu")
            flags = {flag: group.get(flag, False) for flag in rule.flags}
            for weight in group["params"]:
                if weight.grad is not None:
                    held = self.state.get(weight, {})
                    state = {name: held.get(name) for name in rule.state}
                    state["momentum_buffer"] = None
                    _, after = rule.update(weight.detach(), weight.grad.detach(), state, 1, **numbers, **flags)
                    buffer = after["momentum_buffer"]
                    assert buffer is not None
                    self._buffers.append((weight, buffer.clone()))  # it may be the gradient itself

    def _after_step(self) -> None:
        for weight, buffer in self._buffers:
            self.state[weight]["momentum_buffer"] = buffer
        self._buffers = []


class SGD(_Momentum, torch.optim.SGD):
    """``torch.optim.SGD`` whose ``lr``, ``momentum``, ``dampening`` and ``weight_decay`` may be hyperparameters.

    Each may be a number, a tensor that requires grad (a scalar, or a vector with one entry per step), or an entry of
    `metaopt.Hyperparameters`; param groups may have their own. A linked momentum that is exactly 0 keeps its buffers,
    so that it has a derivative there and can leave 0.

    Raises:
        DomainError: if a setting lies outside its domain, at the start or when its hyperparameter has moved.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1e-3,
        momentum: Setting = 0,
        dampening: Setting = 0,
        weight_decay: Setting = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        settings = self._link(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
        flags: dict[str, Any] = {
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, **settings, nesterov=nesterov, **flags)


class RMSprop(_Momentum, torch.optim.RMSprop):
    """``torch.optim.RMSprop``, whose numbers, ``alpha`` and ``momentum`` among them, may be hyperparameters.

    A linked momentum that is exactly 0 keeps its buffers, so that it has a derivative there and can leave 0.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1e-2,
        alpha: Setting = 0.99,
        eps: Setting = 1e-8,
        weight_decay: Setting = 0,
        momentum: Setting = 0,
        centered: bool = False,
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
        super().__init__(params, **settings, centered=centered, **flags)
