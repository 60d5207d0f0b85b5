"""Adam.

``m' = β₁m + (1-β₁)g``;  ``v' = β₂v + (1-β₂)g²``;
``w' = w - lr · (m'/(1-β₁ᵗ)) / (√v'/√(1-β₂ᵗ) + eps)``, with ``g ← g + weight_decay · w`` before it.
With amsgrad, the largest ``v'`` so far in place of ``v'``.

Kingma & Ba 2015, algorithm 1; Reddi et al. 2018 for amsgrad; the order of operations is ``torch.optim.Adam``'s.
"""

from __future__ import annotations

__all__ = ["Adam"]

from collections.abc import Mapping

import torch
from torch import Tensor

from metaopt.rules.moments import ADAM_DOMAIN, ADAM_SETTINGS, ADAM_STATE, moments, zeros
from metaopt.rules.rule import Rule, Setting, add_scaled, double


def update(
    w: Tensor,
    g: Tensor,
    state: Mapping[str, Tensor | None],
    step: int,
    *,
    lr: Setting,
    beta1: Setting,
    beta2: Setting,
    eps: Setting,
    weight_decay: Setting,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool = False,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of Adam."""
    g = -g if maximize else g
    if decoupled_weight_decay:
        w = w * (1 - double(lr) * double(weight_decay))
    elif isinstance(weight_decay, Tensor) or weight_decay != 0:
        g = add_scaled(g, w, weight_decay)
    return moments(w, g, state, step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, amsgrad=amsgrad)


Adam = Rule(
    torch.optim.Adam,
    update,
    settings=ADAM_SETTINGS,
    flags=("amsgrad", "maximize", "decoupled_weight_decay"),
    state=ADAM_STATE,
    zeros=zeros,
    elementwise=True,
    domain=ADAM_DOMAIN,
)
