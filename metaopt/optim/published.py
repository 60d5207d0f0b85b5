"""Drop-ins for optimizers that torch does not have."""

from __future__ import annotations

__all__ = ["LAMB", "LARS", "Lion", "ScheduleFreeAdamW", "ScheduleFreeSGD"]

from typing import Any

from torch.optim.optimizer import ParamsT

from metaopt import published
from metaopt.optim.drop_in import DifferentiableOptimizer, Setting


class Lion(DifferentiableOptimizer, published.Lion):
    """Lion (Chen et al. 2023), whose ``lr`` and ``weight_decay`` may be hyperparameters.

    Its betas can't: the weights depend on them through a sign. What acts through the gradient (a penalty, example
    weights) has derivative 0 for the same reason.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: Setting = 0.0,
        **flags: Any,
    ) -> None:
        super().__init__(params, **self._link(lr=lr, betas=betas, weight_decay=weight_decay), **flags)


class LAMB(DifferentiableOptimizer, published.LAMB):
    """LAMB (You et al. 2020), whose ``lr``, ``betas``, ``eps`` and ``weight_decay`` may be hyperparameters."""

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1e-3,
        betas: tuple[Setting, Setting] = (0.9, 0.999),
        eps: Setting = 1e-6,
        weight_decay: Setting = 0.0,
        **flags: Any,
    ) -> None:
        super().__init__(params, **self._link(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), **flags)


class LARS(DifferentiableOptimizer, published.LARS):
    """LARS (You et al. 2017), whose numbers, ``trust_coefficient`` among them, may be hyperparameters."""

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 0.1,
        momentum: Setting = 0.9,
        weight_decay: Setting = 0.0,
        trust_coefficient: Setting = 1e-3,
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient)
        super().__init__(params, **settings, **flags)


class ScheduleFreeSGD(DifferentiableOptimizer, published.ScheduleFreeSGD):
    """Schedule-free SGD (Defazio et al. 2024), whose ``lr``, ``momentum`` and ``weight_decay`` may be hyperparameters.

    To differentiate an objective of the average, call ``optimizer.eval()`` at the end, inside of the context.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1.0,
        momentum: Setting = 0.9,
        weight_decay: Setting = 0.0,
        warmup_steps: int = 0,
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, **settings, warmup_steps=warmup_steps, **flags)


class ScheduleFreeAdamW(DifferentiableOptimizer, published.ScheduleFreeAdamW):
    """Schedule-free AdamW (Defazio et al. 2024), whose numbers may be hyperparameters.

    To differentiate an objective of the average, call ``optimizer.eval()`` at the end, inside of the context.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 2.5e-3,
        betas: tuple[Setting, Setting] = (0.9, 0.999),
        eps: Setting = 1e-8,
        weight_decay: Setting = 0.0,
        warmup_steps: int = 0,
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, **settings, warmup_steps=warmup_steps, **flags)
