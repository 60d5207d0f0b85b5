"""What Adam and its relatives share: the two moments, their bias correction, and their domain."""

from __future__ import annotations

__all__ = ["ADAM_DOMAIN", "ADAM_SETTINGS", "ADAM_STATE", "moments", "zeros"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.rules.rule import FRACTION, NONNEGATIVE, Setting, add_scaled, double, safe_sqrt

ADAM_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
ADAM_SETTINGS: Mapping[str, str | tuple[str, int]] = {
    "lr": "lr",
    "beta1": ("betas", 0),
    "beta2": ("betas", 1),
    "eps": "eps",
    "weight_decay": "weight_decay",
}
ADAM_DOMAIN = {
    "lr": NONNEGATIVE,
    "beta1": FRACTION,
    "beta2": FRACTION,
    "eps": NONNEGATIVE,
    "weight_decay": NONNEGATIVE,
}


def zeros(settings: Mapping[str, Any], differentiable: frozenset[str]) -> tuple[str, ...]:
    """The moments, and their largest with amsgrad."""
    return ADAM_STATE if settings["amsgrad"] else ADAM_STATE[:2]


def moments(
    w: Tensor,
    g: Tensor,
    state: Mapping[str, Tensor | None],
    step: int,
    *,
    lr: Setting,
    beta1: Setting,
    beta2: Setting,
    eps: Setting,
    amsgrad: bool,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The step that both share, from weights and a gradient that the decay has already been put into."""
    lr, beta1, beta2 = double(lr), double(beta1), double(beta2)
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m = torch.zeros_like(w) if m is None else m
    v = torch.zeros_like(w) if v is None else v
    weight = 1 - beta1
    m = torch.lerp(m, g, weight.to(m.dtype) if isinstance(weight, Tensor) else weight)
    v = add_scaled(beta2 * v, g * g, 1 - beta2)
    peak = state["max_exp_avg_sq"]
    if amsgrad:
        peak = v if peak is None else torch.maximum(peak, v)
    root = safe_sqrt(peak if amsgrad and peak is not None else v)
    denominator = root / (1 - beta2**step) ** 0.5 + eps
    w = add_scaled(w, m / denominator, -lr / (1 - beta1**step))
    return w, {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": peak}
