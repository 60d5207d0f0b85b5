"""Schedule-free stochastic gradient descent: averaging in place of a schedule.

``z' = z - lrₜ(g + weight_decay · y)``;  ``x' = x + cₜ(z' - x)`` with ``cₜ = lrₜ²/Σ lrᵢ²``;  ``y' = z' + momentum · (x'
- z')``, where the weights hold ``y`` and ``lrₜ = lr · min(1, t/warmup_steps)``.

Defazio et al. 2024, eq. 1-3, with the weights of algorithm 1.
"""

from __future__ import annotations

__all__ = ["ScheduleFreeSGD"]

from torch import Tensor

from metaopt.published.schedule_free import ScheduleFreeSGD as Optimizer
from metaopt.rules.averaging import averaged, refuse
from metaopt.rules.rule import FRACTION, NONNEGATIVE, Rule, Setting, State, decayed


def update(
    w: Tensor,
    g: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    momentum: Setting,
    weight_decay: Setting,
    warmup_steps: int,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of schedule-free SGD."""
    g = decayed(w, g, weight_decay, maximize)
    return averaged(w, g, state, step, lr=lr, interpolation=momentum, warmup_steps=warmup_steps)


ScheduleFreeSGD = Rule(
    Optimizer,
    update,
    settings={name: name for name in ("lr", "momentum", "weight_decay")},
    flags=("warmup_steps", "maximize"),
    state=("z", "x", "weight_sum"),
    scalars=("weight_sum",),
    domain={"lr": NONNEGATIVE, "momentum": FRACTION, "weight_decay": NONNEGATIVE},
    refuse=refuse,
)
