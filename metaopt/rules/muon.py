"""Muon: momentum whose matrix is made orthogonal before it is taken as a step.

``b' = b + (1-momentum)(g - b)``;  ``u = b'``, or with nesterov ``g + momentum · (b' - g)``;
``X₀ = u/max(‖u‖, eps)``, ``Xₖ₊₁ = aXₖ + (bA + cA²)Xₖ`` with ``A = XₖXₖᵀ``;
``w' = (1 - lr · weight_decay)w - lr · r · X_ns_steps``, where ``r`` depends on the shape alone.

Jordan et al. 2024; Liu et al. 2025 for the other ``r``, as ``torch.optim.Muon`` has them. torch iterates in bfloat16,
which has no derivative: the value here is torch's own, and the derivative is that of the same iteration in the weights'
precision.
"""

from __future__ import annotations

__all__ = ["Muon"]

import torch
from torch import Tensor

from metaopt.rules.rule import NONNEGATIVE, Rule, Setting, State, always, double, lerp, norm

LOOP_PRECISION = torch.bfloat16


def update(
    w: Tensor,
    g: Tensor,
    state: State,
    step: int,
    *,
    lr: Setting,
    weight_decay: Setting,
    momentum: Setting,
    eps: Setting,
    ns_a: Setting,
    ns_b: Setting,
    ns_c: Setting,
    nesterov: bool,
    ns_steps: int,
    adjust_lr_fn: str | None,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One step of Muon."""
    momentum, b = double(momentum), state["momentum_buffer"]
    b = lerp(torch.zeros_like(g) if b is None else b, g, 1 - momentum)
    u = lerp(g, b, momentum) if nesterov else b
    x = orthogonal(u, (ns_a, ns_b, ns_c), ns_steps, eps)
    rounded = _in_loop_precision(u, (ns_a, ns_b, ns_c), ns_steps, eps)
    x = x + (rounded - x).detach()
    lr = double(lr)
    return w * (1 - lr * double(weight_decay)) - lr * _ratio(w.shape, adjust_lr_fn) * x, {"momentum_buffer": b}


def orthogonal(u: Tensor, coefficients: tuple[Setting, Setting, Setting], steps: int, eps: Setting) -> Tensor:
    """The Newton-Schulz iteration of fifth order."""
    a, b, c = coefficients
    tall = u.size(0) > u.size(1)
    x = u.T if tall else u
    x = x / norm(x).clamp(min=eps.to(x) if isinstance(eps, Tensor) else eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x


def _in_loop_precision(u: Tensor, coefficients: tuple[Setting, Setting, Setting], steps: int, eps: Setting) -> Tensor:
    """The same in the precision and the operations of torch's step, as a constant."""
    a, b, c = (float(s.detach()) if isinstance(s, Tensor) else s for s in coefficients)
    tall = u.size(0) > u.size(1)
    x = u.detach().to(LOOP_PRECISION)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=float(eps.detach()) if isinstance(eps, Tensor) else eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(u.dtype)


def _ratio(shape: torch.Size, adjust_lr_fn: str | None) -> float:
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5


Muon = Rule(
    torch.optim.Muon,
    update,
    settings={
        "lr": "lr",
        "weight_decay": "weight_decay",
        "momentum": "momentum",
        "eps": "eps",
        "ns_a": ("ns_coefficients", 0),
        "ns_b": ("ns_coefficients", 1),
        "ns_c": ("ns_coefficients", 2),
    },
    flags=("nesterov", "ns_steps", "adjust_lr_fn"),
    state=("momentum_buffer",),
    zeros=always("momentum_buffer"),
    domain=dict.fromkeys(("lr", "weight_decay", "momentum", "eps"), NONNEGATIVE),
    surrogate=True,
)
