"""Drop-ins for Adam and its kin."""

from __future__ import annotations

__all__ = ["Adam", "AdamW", "Adamax", "NAdam", "RAdam"]

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from metaopt.optim.drop_in import DifferentiableOptimizer, Setting


class Adam(DifferentiableOptimizer, torch.optim.Adam):
    """``torch.optim.Adam`` whose ``lr``, ``betas``, ``eps`` and ``weight_decay`` may be hyperparameters.

    Each may be a number, a tensor that requires grad (a scalar, or a vector with one entry per step), or an entry of
    `metaopt.Hyperparameters`; either of the betas too; param groups may have their own.

    Raises:
        DomainError: if a setting lies outside its domain, at the start or when its hyperparameter has moved.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1e-3,
        betas: tuple[Setting, Setting] = (0.9, 0.999),
        eps: Setting = 1e-8,
        weight_decay: Setting = 0,
        amsgrad: bool = False,
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, **settings, amsgrad=amsgrad, **flags)


class AdamW(DifferentiableOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW``, whose ``lr``, ``betas``, ``eps`` and ``weight_decay`` may be hyperparameters."""

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1e-3,
        betas: tuple[Setting, Setting] = (0.9, 0.999),
        eps: Setting = 1e-8,
        weight_decay: Setting = 1e-2,
        amsgrad: bool = False,
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, **settings, amsgrad=amsgrad, **flags)


class Adamax(DifferentiableOptimizer, torch.optim.Adamax):
    """``torch.optim.Adamax``, whose ``lr``, ``betas``, ``eps`` and ``weight_decay`` may be hyperparameters."""

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 2e-3,
        betas: tuple[Setting, Setting] = (0.9, 0.999),
        eps: Setting = 1e-8,
        weight_decay: Setting = 0,
        foreach: bool | None = None,
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, **settings, foreach=foreach, **flags)


class NAdam(DifferentiableOptimizer, torch.optim.NAdam):
    """``torch.optim.NAdam``, whose numbers, ``momentum_decay`` among them, may be hyperparameters.

    The product of all momenta so far is part of the state, and carries the derivative of every step's settings.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 2e-3,
        betas: tuple[Setting, Setting] = (0.9, 0.999),
        eps: Setting = 1e-8,
        weight_decay: Setting = 0,
        momentum_decay: Setting = 4e-3,
        decoupled_weight_decay: bool = False,
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum_decay=momentum_decay)
        super().__init__(params, **settings, decoupled_weight_decay=decoupled_weight_decay, **flags)


class RAdam(DifferentiableOptimizer, torch.optim.RAdam):
    """``torch.optim.RAdam``, whose ``lr``, ``betas``, ``eps`` and ``weight_decay`` may be hyperparameters.

    The second beta decides from which step on the rate adapts; at the values where that step changes, the training
    jumps.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1e-3,
        betas: tuple[Setting, Setting] = (0.9, 0.999),
        eps: Setting = 1e-8,
        weight_decay: Setting = 0,
        decoupled_weight_decay: bool = False,
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, **settings, decoupled_weight_decay=decoupled_weight_decay, **flags)
