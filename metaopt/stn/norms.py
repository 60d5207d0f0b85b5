"""Rules for normalisations: scale and shift respond per example; statistics don't move in a response pass."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.stn.layouts import NeedsGroups
from metaopt.stn.passes import Pass
from metaopt.stn.rules import plus, register


def _finish(
    p: Pass,
    func: Any,
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalised: Callable[[], Tensor],
    derivative: Callable[[Tensor, Tensor], Tensor],
    shape: Callable[[Tensor], Tensor],
) -> Tensor:
    """Add to ``y = w ⊙ x̂ + b`` the responses of ``w`` and ``b``, and the tangent by ``x``.

    Args:
        p: the pass.
        func: the function, which names the site.
        y: its result.
        x: its input.
        weight: the scale.
        bias: the shift.
        normalised: gives ``x̂``.
        derivative: gives ``dx̂`` from ``dx`` and ``x̂``.
        shape: brings a vector of features to the shape that multiplies ``x``.
    """
    dx, marks = p.tangent(x), (p.mark_of(weight), p.mark_of(bias))
    tangents = (p.tangent(weight), p.tangent(bias))
    if dx is None and all(m is None for m in (*marks, *tangents)):
        return y
    xhat = normalised()
    terms: list[Tensor | None] = []
    if dx is not None:
        dxhat = derivative(dx, xhat)
        terms.append(dxhat if weight is None else dxhat * shape(weight))
    for factor, tangent, active in zip((xhat, None), tangents, marks, strict=True):
        if tangent is not None:
            term = shape(tangent)
            terms.append(term if factor is None else factor * term)
        if active is None:
            continue
        layout = p.layout(active, func, x)
        if layout is not None:
            if active.bases != (None,):
                raise NeedsGroups(active.entry.name, f"`{func.__name__}` has no rule for rows along one axis")
            term = _spread(active.coefficients[0], layout, x, shape)
            terms.append(term.expand_as(x) if factor is None else factor * term)
    return p.join(y, plus(*terms))


def _spread(coefficients: Tensor, layout: Any, x: Tensor, shape: Callable[[Tensor], Tensor]) -> Tensor:
    """Coefficients ``(B, features)`` where the features may be several axes of ``x``, or its second."""
    if layout.repeat > 1:
        first = [layout.repeat, 1]
        coefficients = coefficients.repeat_interleave(layout.repeat, 0) if layout.outer else coefficients.repeat(first)
    one = shape(coefficients[0])
    features = one.shape if one.ndim == x.ndim else (1,) * (x.ndim - one.ndim) + tuple(one.shape)
    grown = coefficients.reshape(-1, *features)
    # The batch leads; it belongs in the place of the axis of size one that the layout names.
    return grown.transpose(0, layout.axis + 1).squeeze(0)


def _moments(x: Tensor, dims: Sequence[int], eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``dx̂ = r (dx - mean(dx) - x̂ mean(x̂ dx))`` with ``r = 1 / √(var + ε)``, over some axes."""
    axes = list(dims)

    def derivative(dx: Tensor, xhat: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.var(axes, unbiased=False, keepdim=True) + eps)
        return rstd * (dx - dx.mean(axes, keepdim=True) - xhat * (xhat * dx).mean(axes, keepdim=True))

    return derivative


def _channel(x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: v.reshape([-1 if d == 1 else 1 for d in range(x.ndim)])


@register(F.batch_norm)
def batch_norm(
    p: Pass,
    func: Any,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """BatchNorm: in training mode through the batch's statistics, in evaluation through the running ones."""
    # Without the running statistics torch takes the batch's, and has nothing to update: that is left to one pass.
    stats = (None, None) if training and not p.moves_statistics else (running_mean, running_var)
    y = func(input, *stats, weight, bias, training, momentum, eps)
    dims = [d for d in range(input.ndim) if d != 1]

    def in_evaluation(dx: Tensor, _: Tensor) -> Tensor:
        assert running_var is not None
        return dx * _channel(input)(torch.rsqrt(running_var + eps))

    derivative = _moments(input, dims, eps) if training else in_evaluation
    return _finish(
        p,
        func,
        y,
        input,
        weight,
        bias,
        lambda: func(input, *((None, None) if training else stats), None, None, training, momentum, eps),
        derivative,
        _channel(input),
    )


@register(F.instance_norm)
def instance_norm(
    p: Pass,
    func: Any,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """InstanceNorm: each example by its own statistics, or by running ones in evaluation."""
    if not use_input_stats:
        return batch_norm(p, func, input, running_mean, running_var, weight, bias, False, momentum, eps)
    stats = (running_mean, running_var) if p.moves_statistics else (None, None)
    y = func(input, *stats, weight, bias, True, momentum, eps)
    return _finish(
        p,
        func,
        y,
        input,
        weight,
        bias,
        lambda: func(input, None, None, None, None, True, momentum, eps),
        _moments(input, range(2, input.ndim), eps),
        _channel(input),
    )


@register(F.group_norm)
def group_norm(
    p: Pass,
    func: Any,
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """GroupNorm: each example and group of channels by its own statistics."""

    def split(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], num_groups, -1)

    def derivative(dx: Tensor, xhat: Tensor) -> Tensor:
        return _moments(split(input), [2], eps)(split(dx), split(xhat)).reshape(input.shape)

    return _finish(
        p,
        func,
        func(input, num_groups, weight, bias, eps),
        input,
        weight,
        bias,
        lambda: func(input, num_groups, None, None, eps),
        derivative,
        _channel(input),
    )


@register(F.layer_norm)
def layer_norm(
    p: Pass,
    func: Any,
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm: over the last axes."""
    dims, shape = range(-len(normalized_shape), 0), tuple(normalized_shape)
    return _finish(
        p,
        func,
        func(input, normalized_shape, weight, bias, eps),
        input,
        weight,
        bias,
        lambda: func(input, normalized_shape, None, None, eps),
        _moments(input, dims, eps),
        lambda v: v.reshape(shape),
    )


@register(F.rms_norm)
def rms_norm(
    p: Pass,
    func: Any,
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """RMSNorm: ``x̂ = x / √(mean(x²) + ε)`` over the last axes."""
    dims, shape = list(range(-len(normalized_shape), 0)), tuple(normalized_shape)
    floor = torch.finfo(input.dtype).eps if eps is None else eps

    def derivative(dx: Tensor, xhat: Tensor) -> Tensor:
        scale = torch.rsqrt(input.square().mean(dims, keepdim=True) + floor)
        return scale * (dx - xhat * (xhat * dx).mean(dims, keepdim=True))

    return _finish(
        p,
        func,
        func(input, normalized_shape, weight, eps),
        input,
        weight,
        None,
        lambda: func(input, normalized_shape, None, eps),
        derivative,
        lambda v: v.reshape(shape),
    )
