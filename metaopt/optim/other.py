"""Drop-ins for the rest of ``torch.optim``: averaged SGD, Rprop, and Muon where torch has it."""

from __future__ import annotations

__all__ = ["ASGD", "Rprop"]

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from metaopt.optim.drop_in import DifferentiableOptimizer, Setting


class ASGD(DifferentiableOptimizer, torch.optim.ASGD):
    """``torch.optim.ASGD``, whose ``lr``, ``lambd``, ``alpha``, ``t0`` and ``weight_decay`` may be hyperparameters.

    ``t0`` acts on the average alone (``optimizer.state[weight]["ax"]``).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1e-2,
        lambd: Setting = 1e-4,
        alpha: Setting = 0.75,
        t0: Setting = 1e6,
        weight_decay: Setting = 0,
        foreach: bool | None = None,
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=weight_decay)
        super().__init__(params, **settings, foreach=foreach, **flags)


class Rprop(DifferentiableOptimizer, torch.optim.Rprop):
    """``torch.optim.Rprop``, whose ``lr``, ``etas`` and ``step_sizes`` may be hyperparameters.

    ``lr`` is the first step size and has no effect later. The step takes only the gradient's sign, so that what acts
    through the gradient (a penalty, example weights) has derivative 0.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Setting = 1e-2,
        etas: tuple[Setting, Setting] = (0.5, 1.2),
        step_sizes: tuple[Setting, Setting] = (1e-6, 50),
        **flags: Any,
    ) -> None:
        settings = self._link(lr=lr, etas=etas, step_sizes=step_sizes)
        super().__init__(params, **settings, **flags)


if hasattr(torch.optim, "Muon"):  # since torch 2.9
    __all__ += ["Muon"]

    class Muon(DifferentiableOptimizer, torch.optim.Muon):
        """``torch.optim.Muon`` with all of its numbers as possible hyperparameters.

        These are ``lr``, ``weight_decay``, ``momentum``, ``ns_coefficients`` and ``eps``. torch orthogonalises in
        bfloat16; the derivative is that of the same iteration in the weights' precision.
        """

        def __init__(
            self,
            params: ParamsT,
            lr: Setting = 1e-3,
            weight_decay: Setting = 0.1,
            momentum: Setting = 0.95,
            nesterov: bool = True,
            ns_coefficients: tuple[Setting, Setting, Setting] = (3.4445, -4.7750, 2.0315),
            eps: Setting = 1e-7,
            **flags: Any,
        ) -> None:
            settings = self._link(
                lr=lr, weight_decay=weight_decay, momentum=momentum, ns_coefficients=ns_coefficients, eps=eps
            )
            super().__init__(params, **settings, nesterov=nesterov, **flags)
