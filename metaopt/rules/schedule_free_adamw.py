"""Schedule-free AdamW: averaging in place of a schedule and of the first moment.

``v' = β₂v + (1-β₂)g²``;  ``z' = z - lrₜ(g/(√(v'/(1-β₂ᵗ)) + eps) + weight_decay · y)``;  ``x' = x + cₜ(z' - x)`` with
``cₜ = lrₜ²/Σ lrᵢ²``;  ``y' = z' + β₁(x' - z')``, where the weights hold ``y`` and ``lrₜ = lr · min(1,
t/warmup_steps)``.

Defazio et al. 2024, algorithm 1.
"""

from __future__ import annotations

__all__ = ["ScheduleFreeAdamW"]

import torch
from torch import Tensor

from metaopt.published.schedule_free import ScheduleFreeAdamW as Optimizer
from metaopt.rules.averaging import averaged, refuse
from metaopt.rules.moments import ADAM_DOMAIN, ADAM_SETTINGS
from metaopt.rules.rule import Rule, Setting, State, add_scaled, double, safe_sqrt


def update(
    w: Tensor,
    g: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    beta1: Setting,
    beta2: Setting,
    eps: Setting,
    weight_decay: Setting,
    warmup_steps: int,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of schedule-free AdamW."""
    g = -g if maximize else g
    beta2, v = double(beta2), state["exp_avg_sq"]
    v = add_scaled(beta2 * (torch.zeros_like(w) if v is None else v), g * g, 1 - beta2)
    direction = add_scaled(g / (safe_sqrt(v / (1 - beta2**step)) + eps), w, weight_decay)
    new, after = averaged(w, direction, state, step, lr=lr, interpolation=beta1, warmup_steps=warmup_steps)
    return new, {**after, "exp_avg_sq": v}


ScheduleFreeAdamW = Rule(
    Optimizer,
    update,
    settings=ADAM_SETTINGS,
    flags=("warmup_steps", "maximize"),
    state=("z", "x", "weight_sum", "exp_avg_sq"),
    scalars=("weight_sum",),
    domain=ADAM_DOMAIN,
    refuse=refuse,
)
