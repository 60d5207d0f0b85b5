"""What each function of torch adds when its weights respond, per example and without building weights per example.

For a function ``y = op(x, W) + b`` that is linear in its weights, a response ``ΔW_b = Σ_k diag(s_bk) V_k`` adds
``Σ_k s_bk ⊙ op(x_b, V_k)``: one more call for each bank. Where the pass is linearised, the same terms are part of the
tangent, with the derivative by ``x`` and by weights that carry a tangent of their own.

References:
    MacKay et al. 2019, Eq. 12-13; Bae and Grosse 2020, Sec. 3.3 and App. C.
"""

from __future__ import annotations

__all__ = ["affine", "plus", "register"]

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from metaopt.stn.layouts import NeedsGroups
from metaopt.stn.passes import Pass
from metaopt.stn.responses import Active

Operation = Callable[[Tensor, Tensor], Tensor]


def register(*functions: Any, composed: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a rule ``rule(pass, function, *args, **kwargs)`` stand for functions of torch, in every pass.

    Args:
        functions: the functions.
        composed: whether it also takes what was computed from parameters, and calls other functions with it.
    """

    def add(rule: Callable[..., Any]) -> Callable[..., Any]:
        Pass.rules.update(dict.fromkeys(functions, rule))
        Pass.composed.update(functions if composed else ())
        return rule

    return add


def plus(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are there."""
    total: Tensor | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def affine(
    p: Pass,
    func: Any,
    op: Operation,
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    feature: int,
    rows: int | None,
    dy: Tensor | None = None,
    still: Tensor | None = None,
) -> Tensor:
    """Add the responses of ``weight`` and ``bias`` to ``y = op(x, weight) + bias``.

    Args:
        p: the pass.
        func: the function, which names the site.
        op: it without bias, linear in the weight.
        y: its result.
        x: its input, with the examples along the axis that they have in ``y``.
        weight: the weight, if any.
        bias: the bias, if any.
        feature: the axis of output features in ``y``.
        rows: the axis of the weight whose rows are output features; None where each entry is.
        dy: the tangent by ``x``, in a linearised pass.
        still: where the gradient by the weight is no gradient of ``y``.
    """
    if not p.marks and not p.linearised:
        return y
    change, linearised = dy, p.linearised
    if weight is not None:
        tangent = p.tangent(weight) if linearised else None
        if tangent is not None:
            change = plus(change, op(x, tangent))
        active = p.mark_of(weight)
        if active is not None:
            found = _weight(p, func, op, x, active, y, feature % y.ndim, rows, change)
            if still is not None and active.constant is not None and found is not None:
                fixed = _weight(p, func, op, x, active.constant(), y, feature % y.ndim, rows, change)
                found = found if fixed is None else torch.where(still, fixed, found)
            change = found
    if bias is not None:
        tangent = p.tangent(bias) if linearised else None
        if tangent is not None:
            change = plus(change, _along(tangent, y.ndim, feature))
        active = p.mark_of(bias)
        layout = None if active is None else p.layout(active, func, x)
        if active is not None and layout is not None:
            response = layout.spread(active.coefficients[0], y.ndim, feature)
            change = response if change is None else change + response
    return y if change is None else p.join(y, change)


def _weight(
    p: Pass,
    func: Any,
    op: Operation,
    x: Tensor,
    active: Active,
    y: Tensor,
    feature: int,
    rows: int | None,
    change: Tensor | None,
) -> Tensor | None:
    """The change with what a weight's response adds to it."""
    ndim, layout = y.ndim, p.layout(active, func, x)
    if layout is None:
        return change
    axis = active.entry.structure.axis
    for coefficients, base, mixer in active.terms():
        if base is None:
            if active.entry.structure.rows != y.shape[feature]:
                raise NeedsGroups(active.entry.name, f"`{func.__name__}` has no rule for a weight that is a vector")
            # A vector: every entry is a row, and `op` with ones is the function of x alone.
            ones = coefficients.new_ones(active.entry.structure.view)
            change = _plus_product(change, layout.spread(coefficients, ndim, feature), op(x, ones))
        elif axis == rows and mixer is None:
            change = _plus_product(change, layout.spread(coefficients, ndim, feature), op(x, base))
        elif axis == rows and mixer is not None:
            scaled = layout.spread(coefficients, ndim, feature) * op(x, base)
            change = plus(change, F.linear(scaled.movedim(feature, -1), mixer).movedim(-1, feature))
        elif rows is not None and axis == 1 - rows and base.ndim == 2 and func is not F.embedding:
            # Rows along the input axis: a decoder that is tied to a table of words, a matrix behind `@`.
            columns = x if mixer is None else x @ mixer
            change = plus(change, op(columns * layout.spread(coefficients, x.ndim, -1), base))
        else:
            raise NeedsGroups(active.entry.name, f"`{func.__name__}` has no rule for rows along its axis {axis}")
    return change


def _plus_product(change: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """A change and a product, in one pass over the numbers where they are of one type."""
    if change is None:
        return a * b
    return torch.addcmul(change, a, b) if change.dtype == a.dtype == b.dtype else change + a * b


def _along(vector: Tensor, ndim: int, feature: int) -> Tensor:
    return vector.reshape([-1 if d == feature % ndim else 1 for d in range(ndim)])


@register(F.linear)
def linear(p: Pass, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """``y = x Wᵀ + b``."""
    y = F.linear(input, weight, bias)
    if not p.marks and not p.linearised:
        return y
    active = p.mark_of(weight) if weight.ndim < 2 and not p.recording else None
    if active is not None:
        raise NeedsGroups(active.entry.name, "`linear` has no rule for a weight that is a vector")
    dx = p.tangent(input)
    dy = None if dx is None else F.linear(dx, weight)
    return affine(p, func, F.linear, y, input, weight, bias, feature=-1, rows=0, dy=dy)


@register(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def matmul(p: Pass, func: Any, input: Tensor, other: Tensor) -> Tensor:  # noqa: A002
    """``y = x W``, with a matrix behind."""
    active = p.mark_of(other) if other.ndim == 2 else None
    if active is None:
        p.refuse_marked(func, (input, other), {})
        result: Tensor = p.plain(func, (input, other), {})
        return result
    y = torch.matmul(input, other)
    dx = p.tangent(input)
    dy = None if dx is None else torch.matmul(dx, other)
    return affine(p, func, torch.matmul, y, input, other, None, feature=-1, rows=1, dy=dy)


def _convolution(p: Pass, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Convolutions, transposed or not, of any dimension and number of groups."""
    x, weight, bias, settings = _unpack(*args, **kwargs)

    def op(z: Tensor, w: Tensor) -> Tensor:
        return func(z, w, None, *settings[0], **settings[1])

    y = func(x, weight, bias, *settings[0], **settings[1])
    dx = p.tangent(x)
    dy = None if dx is None else op(dx, weight)
    rows = 1 if "transpose" in func.__name__ else 0
    return affine(p, func, op, y, x, weight, bias, feature=1, rows=rows, dy=dy)


def _unpack(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[tuple[Any, ...], dict[str, Any]]]:
    return input, weight, bias, (args, kwargs)


for _name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
    register(getattr(torch, _name), getattr(F, _name))(_convolution)


@register(F.bilinear, torch.bilinear)
def bilinear(p: Pass, func: Any, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y_o = x₁ᵀ W_o x₂ + b_o``."""
    y = func(input1, input2, weight, bias)
    d1, d2 = p.tangent(input1), p.tangent(input2)
    dy = plus(
        None if d1 is None else func(d1, input2, weight, None), None if d2 is None else func(input1, d2, weight, None)
    )

    def op(x1: Tensor, w: Tensor) -> Tensor:
        return func(x1, input2, w, None)

    return affine(p, func, op, y, input1, weight, bias, feature=-1, rows=0, dy=dy)


@register(F.embedding)
def embedding(
    p: Pass,
    func: Any,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """A look-up of rows; the response scales the columns. Padding has no gradient there."""
    # What stands in for a table is a view of it, which torch can't give a sparse gradient.
    active, options = p.mark_of(weight), (norm_type, scale_grad_by_freq, sparse and isinstance(weight, Parameter))
    if active is not None and max_norm is not None:
        raise NeedsGroups(active.entry.name, "`embedding` with max_norm writes on its table")
    if active is not None and scale_grad_by_freq:
        raise NeedsGroups(active.entry.name, "`embedding` with scale_grad_by_freq has another gradient")

    def op(index: Tensor, w: Tensor) -> Tensor:
        return func(index, w, padding_idx, None, *options)

    y = func(input, weight, padding_idx, max_norm, *options)
    if padding_idx is None:
        return affine(p, func, op, y, input, weight, None, feature=-1, rows=1)
    padded = (input == padding_idx % len(weight)).unsqueeze(-1)
    return affine(p, func, op, y, input, weight, None, feature=-1, rows=1, still=padded)


@register(torch.prelu, F.prelu)
def prelu(p: Pass, func: Any, input: Tensor, weight: Tensor) -> Tensor:  # noqa: A002
    """``y = max(x, 0) + w min(x, 0)``, one slope or one for each channel."""
    y = func(input, weight)
    dx = p.tangent(input)
    channels = _along(weight, input.ndim, 1) if weight.numel() > 1 else weight
    dy = None if dx is None else dx * torch.where(input > 0, torch.ones_like(input), channels)

    def op(x: Tensor, w: Tensor) -> Tensor:
        return x.clamp(max=0) * (_along(w, x.ndim, 1) if w.numel() > 1 else w)

    # A single slope is a feature of any axis of size one; one is added at the end.
    active = p.mark_of(weight)
    if active is not None and weight.numel() == 1:
        layout = p.layout(active, func, input)
        change = None if layout is None else layout.spread(active.coefficients[0][:, 0], input.ndim)
        return p.join(y, plus(dy, None if change is None else change * input.clamp(max=0)))
    return affine(p, func, op, y, input, weight, None, feature=1, rows=0, dy=dy)


@register(Tensor.register_hook)
def register_hook(p: Pass, func: Any, x: Tensor, hook: Any) -> Any:
    """A hook on a gradient."""
    return p.hook(x, hook)


@register(Tensor.retain_grad)
def retain_grad(p: Pass, func: Any, x: Tensor) -> None:
    """A gradient that is looked at after a backward pass; there is none where the value has no gradient."""
    if x.requires_grad:
        func(x)
