"""AdamW: Adam whose weight decay acts on the weights and not on the gradient.

``w ← (1 - lr · weight_decay) · w``, then Adam's step without decay.

Loshchilov & Hutter 2019, algorithm 2, as ``torch.optim.AdamW`` has it.
"""

from __future__ import annotations

__all__ = ["AdamW"]

from collections.abc import Mapping

import torch
from torch import Tensor

from metaopt.rules.moments import ADAM_DOMAIN, ADAM_SETTINGS, ADAM_STATE, moments, zeros
from metaopt.rules.rule import Rule, Setting, double


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
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of AdamW."""
    g = -g if maximize else g
    w = w * (1 - double(lr) * double(weight_decay))
    return moments(w, g, state, step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, amsgrad=amsgrad)


AdamW = Rule(
    torch.optim.AdamW,
    update,
    settings=ADAM_SETTINGS,
    flags=("amsgrad", "maximize"),
    state=ADAM_STATE,
    zeros=zeros,
    elementwise=True,
    domain=ADAM_DOMAIN,
)
