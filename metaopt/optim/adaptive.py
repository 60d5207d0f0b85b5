"""Drop-ins that divide by a memory of squared gradients and have no first moment."""

from __future__ import annotations

__all__ = ["Adadelta", "Adafactor", "Adagrad"]

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from metaopt.optim.drop_in import DifferentiableOptimizer, Setting


class Adagrad(DifferentiableOptimizer, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` with all of its numbers as possible hyperparameters.

    These are ``lr``, ``lr_decay``, ``weight_decay``, ``initial_accumulator_value`` and ``eps``. A linked
    ``initial_accumulator_value`` is where a weight's sum begins, at its first step; after that it has no effect.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1e-2,
        lr_decay: Setting = 0,
        weight_decay: Setting = 0,
        initial_accumulator_value: Setting = 0,
        eps: Setting = 1e-10,
        foreach: bool | None = None,
        **flags: Any,
    ) -> None:
        settings = self._link(
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
        )
        super().__init__(params, **settings, foreach=foreach, **flags)

    def _before_step(self) -> None:
        # torch fills the sums when it is built, with the constructor's number; the hyperparameter may have moved since,
        # and a group may have its own.
        for group in self._linked("initial_accumulator_value"):
            for weight in group["params"]:
                state = self.state[weight]
                if weight.grad is None or int(state.get("step", 0)) != 0:
                    continue
                if not state:
                    fused = bool(group["fused"])
                    wide = torch.get_default_dtype() == torch.float64 and not fused
                    device = weight.device if fused else torch.device("cpu")
                    state["step"] = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)
                state["sum"] = torch.full_like(weight, group["initial_accumulator_value"], requires_grad=False)


class Adadelta(DifferentiableOptimizer, torch.optim.Adadelta):
    """``torch.optim.Adadelta``, whose ``lr``, ``rho``, ``eps`` and ``weight_decay`` may be hyperparameters."""

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1.0,
        rho: Setting = 0.9,
        eps: Setting = 1e-6,
        weight_decay: Setting = 0,
        foreach: bool | None = None,
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, rho=rho, eps=eps, weight_decay=weight_decay)
        super().__init__(params, **settings, foreach=foreach, **flags)


class Adafactor(DifferentiableOptimizer, torch.optim.Adafactor):
    """``torch.optim.Adafactor``, whose numbers, either ``eps`` among them, may be hyperparameters.

    The rate is the smaller of ``lr`` and ``1/√t``, and each of the others acts through a bound too; while the other
    side of a bound is in force, the derivative is 0.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1e-2,
        beta2_decay: Setting = -0.8,
        eps: tuple[Setting | None, Setting] = (None, 1e-3),
        d: Setting = 1.0,
        weight_decay: Setting = 0.0,
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay)
        super().__init__(params, **settings, **flags)
