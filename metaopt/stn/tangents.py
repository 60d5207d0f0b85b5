"""How tangents pass through torch's functions: one rule for each family, where forward-mode AD would be slow.

What is not here is differentiated by forward-mode AD, one function at a time: right, at the price of time.
"""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.stn.linearised import LinearisedPass, carry

_T: Any = torch.Tensor
_threshold_backward: Any = torch.ops.aten.threshold_backward.default


def _register(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(rule: Callable[..., Any]) -> Callable[..., Any]:
        LinearisedPass.tangent_rules.update(dict.fromkeys(functions, rule))
        return rule

    return add


# -- linear in one tensor ----------------------------------------------------------------------------------------------

VIEWS = [
    *(_T.view, _T.view_as, _T.reshape, _T.reshape_as, _T.flatten, _T.unflatten, _T.transpose, _T.permute, _T.t),
    *(_T.movedim, _T.swapaxes, _T.squeeze, _T.unsqueeze, _T.expand, _T.expand_as, _T.narrow, _T.select, _T.contiguous),
    *(_T.unbind, _T.chunk, _T.split, _T.__getitem__, _T.diagonal, _T.unfold, _T.T.__get__, _T.mT.__get__),
    *(torch.reshape, torch.flatten, torch.transpose, torch.permute, torch.t, torch.movedim, torch.swapaxes),
    *(torch.squeeze, torch.unsqueeze, torch.narrow, torch.select, torch.unbind, torch.chunk, torch.split),
    *(_T.to, _T.float, _T.double, _T.type_as, _T.tensor_split, torch.tensor_split),
]
LINEAR = [
    *(_T.sum, _T.mean, _T.neg, _T.__neg__, _T.clone, _T.roll, _T.flip, _T.cumsum, _T.repeat, _T.index_select),
    *(torch.sum, torch.mean, torch.neg, torch.clone, torch.roll, torch.flip, torch.cumsum, torch.index_select),
    *(_T.repeat_interleave, torch.repeat_interleave, _T.tril, _T.triu, torch.tril, torch.triu, torch.gather, _T.gather),
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(F.interpolate, F.unfold, F.fold, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle),
    *(torch.avg_pool1d, torch.adaptive_avg_pool1d),
]


def _linear(p: LinearisedPass, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    dx = p.tangent(x)
    if dx is None:
        # The tangent is in another argument: not the place where this function is linear.
        return p.by_forward_ad(func, (x, *args), kwargs)
    y, dy = func(x, *args, **kwargs), func(dx, *args, **kwargs)
    if isinstance(y, Tensor):
        return carry(p, y, dy) if y.is_floating_point() or y.is_complex() else y
    for value, tangent in zip(y, dy, strict=True):
        carry(p, value, tangent)
    return y


_register(*VIEWS, *LINEAR)(_linear)


@_register(F.pad)
def _pad(p: LinearisedPass, func: Any, x: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Tensor:
    dx = p.tangent(x)
    assert dx is not None
    y = func(x, pad, mode, value)
    # A constant that is padded has no tangent.
    return carry(p, y, func(dx, pad, mode, None if value is None else 0.0))


@_register(_T.detach, torch.detach)
def _detach(p: LinearisedPass, func: Any, x: Tensor) -> Tensor:
    return func(x)


# What a model asks to know whether there is a gradient, or puts a hook on: that of the tangent, which is the value's.
@_register(_T.requires_grad.__get__, _T.grad_fn.__get__)
def _of_tangent(p: LinearisedPass, func: Any, x: Tensor) -> Any:
    return func(x) or func(p.tangent(x))


# -- elementwise -------------------------------------------------------------------------------------------------------


def _elementwise(derivative: Callable[..., Tensor], *functions: Any) -> None:
    """Register ``dy = φ'(x, y) dx``; the options of the function go to the derivative too."""

    def rule(p: LinearisedPass, func: Any, x: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Tensor:
        dx = p.tangent(x)
        if dx is None:
            return p.by_forward_ad(func, (x, *args), {**kwargs, "inplace": inplace} if inplace else kwargs)
        y = func(x, *args, **kwargs)
        dy = dx * derivative(x, y, *args, **kwargs)
        return p.write(x.copy_(y), dy) if inplace else carry(p, y, dy)

    _register(*functions)(rule)


def _gelu(x: Tensor, _: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x**3)
        t = torch.tanh(inner)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    return 0.5 * (1 + torch.erf(x * 0.7071067811865476)) + x * torch.exp(-0.5 * x * x) * 0.3989422804014327


def _silu(x: Tensor, _: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _leaky(x: Tensor, _: Tensor, negative_slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, 1.0, negative_slope).to(x)


def _elu(x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x > 0, torch.ones_like(y), y + alpha)


_elementwise(lambda x, y: 1 - y * y, torch.tanh, _T.tanh, F.tanh)
_elementwise(lambda x, y: y * (1 - y), torch.sigmoid, _T.sigmoid, F.sigmoid)
_elementwise(lambda x, y: y, torch.exp, _T.exp)
_elementwise(lambda x, y: x.reciprocal(), torch.log, _T.log)
_elementwise(lambda x, y: 2 * x, torch.square, _T.square)
_elementwise(_gelu, F.gelu)
_elementwise(_silu, F.silu)
_elementwise(_leaky, F.leaky_relu)
_elementwise(_elu, F.elu)
_elementwise(lambda x, y: ((x > 0) & (x < 6)).to(y), F.relu6)
_elementwise(lambda x, y: ((y > 0) & (y < 1)).to(y) / 6, F.hardsigmoid)


@_register(F.relu, torch.relu, _T.relu)
def _relu(p: LinearisedPass, func: Any, x: Tensor, inplace: bool = False) -> Tensor:
    dx = p.tangent(x)
    assert dx is not None
    y = torch.relu(x)
    dy = _where_positive(dx, y)
    return p.write(x.copy_(y), dy) if inplace else carry(p, y, dy)


@_register(torch.relu_, _T.relu_)
def _relu_(p: LinearisedPass, func: Any, x: Tensor) -> Tensor:
    dx = p.tangent(x)
    assert dx is not None
    y = func(x)
    return p.write(y, _where_positive(dx, y))


def _where_positive(dx: Tensor, y: Tensor) -> Tensor:
    # The function by which torch's own derivative is spelt: a single pass over the numbers.
    return _threshold_backward(dx.expand_as(y), y.detach(), 0)


# -- of two tensors ----------------------------------------------------------------------------------------------------


def _sum_of(p: LinearisedPass, y: Tensor, da: Tensor | None, db: Tensor | None) -> Tensor:
    tangent = da if db is None else db if da is None else da + db
    return y if tangent is None else carry(p, y, tangent)


def _in_place(p: LinearisedPass, a: Tensor, da: Tensor | None, db: Tensor | None) -> Tensor:
    tangent = da if db is None else db if da is None else da + db
    return p.write(a, None if tangent is None else tangent.expand_as(a))


@_register(torch.add, _T.add, _T.__add__, _T.__radd__)
def _add(p: LinearisedPass, func: Any, a: Any, b: Any, *, alpha: float = 1) -> Tensor:
    db = p.tangent(b)
    return _sum_of(p, torch.add(a, b, alpha=alpha), p.tangent(a), None if db is None else alpha * db)


@_register(_T.add_, _T.__iadd__)
def _add_(p: LinearisedPass, func: Any, a: Tensor, b: Any, *, alpha: float = 1) -> Tensor:
    da, db = p.tangent(a), p.tangent(b)
    return _in_place(p, a.add_(b, alpha=alpha), da, None if db is None else alpha * db)


@_register(torch.sub, _T.sub, _T.__sub__)
def _sub(p: LinearisedPass, func: Any, a: Any, b: Any, *, alpha: float = 1) -> Tensor:
    db = p.tangent(b)
    return _sum_of(p, torch.sub(a, b, alpha=alpha), p.tangent(a), None if db is None else -alpha * db)


@_register(_T.__rsub__)
def _rsub(p: LinearisedPass, func: Any, a: Tensor, b: Any) -> Tensor:
    da = p.tangent(a)
    return _sum_of(p, b - a, None if da is None else -da, p.tangent(b))


@_register(torch.mul, _T.mul, _T.__mul__, _T.__rmul__)
def _mul(p: LinearisedPass, func: Any, a: Any, b: Any) -> Tensor:
    da, db = p.tangent(a), p.tangent(b)
    return _sum_of(p, a * b, None if da is None else da * b, None if db is None else a * db)


@_register(_T.mul_, _T.__imul__)
def _mul_(p: LinearisedPass, func: Any, a: Tensor, b: Any) -> Tensor:
    da, db = p.tangent(a), p.tangent(b)
    terms = (None if da is None else da * b, None if db is None else a.clone() * db)
    return _in_place(p, a.mul_(b), *terms)


@_register(torch.div, _T.div, _T.__truediv__, torch.true_divide)
def _div(p: LinearisedPass, func: Any, a: Any, b: Any, *, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode is not None:
        return p.by_forward_ad(func, (a, b), {"rounding_mode": rounding_mode})
    da, db, y = p.tangent(a), p.tangent(b), torch.div(a, b)
    return _sum_of(p, y, None if da is None else da / b, None if db is None else -y * db / b)


@_register(torch.matmul, _T.matmul, _T.__matmul__, torch.mm, _T.mm, torch.bmm, _T.bmm)
def _matmul(p: LinearisedPass, func: Any, a: Tensor, b: Tensor) -> Tensor:
    da, db = p.tangent(a), p.tangent(b)
    return _sum_of(
        p,
        torch.matmul(a, b),
        None if da is None else torch.matmul(da, b),
        None if db is None else torch.matmul(a, db),
    )


# -- of several tensors ------------------------------------------------------------------------------------------------


@_register(torch.cat, torch.concat, torch.stack, torch.hstack, torch.vstack)
def _cat(p: LinearisedPass, func: Any, tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
    tangents = [p.tangent(x) for x in tensors]
    filled = [torch.zeros_like(x) if t is None else t for x, t in zip(tensors, tangents, strict=True)]
    return carry(p, func(tensors, *args, **kwargs), func(filled, *args, **kwargs))


# -- probabilities and maxima ------------------------------------------------------------------------------------------


@_register(F.softmax, torch.softmax, _T.softmax)
def _softmax(p: LinearisedPass, func: Any, x: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    dx, dtype = p.tangent(x), kwargs.get("dtype")
    if dx is None or dim is None or args:
        return p.by_forward_ad(func, (x, dim, *args), kwargs)
    y = torch.softmax(x, dim, dtype=dtype)
    dx = dx if dtype is None else dx.to(dtype)
    return carry(p, y, y * (dx - (y * dx).sum(dim, keepdim=True)))


@_register(F.log_softmax, torch.log_softmax, _T.log_softmax)
def _log_softmax(p: LinearisedPass, func: Any, x: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    dx, dtype = p.tangent(x), kwargs.get("dtype")
    if dx is None or dim is None or args:
        return p.by_forward_ad(func, (x, dim, *args), kwargs)
    y = torch.log_softmax(x, dim, dtype=dtype)
    dx = dx if dtype is None else dx.to(dtype)
    return carry(p, y, dx - (y.exp() * dx).sum(dim, keepdim=True))


def _max_pool(dimensions: int) -> Callable[..., Tensor]:
    with_indices = (F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices)[dimensions - 1]

    def rule(p: LinearisedPass, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        dx = p.tangent(x)
        if dx is None or kwargs.get("return_indices") or x.ndim != dimensions + 2 or len(args) > 5:
            return p.by_forward_ad(func, (x, *args), kwargs)
        y, where = with_indices(x, *args, **{k: v for k, v in kwargs.items() if k != "return_indices"})
        dy = dx.flatten(2).gather(2, where.flatten(2)).reshape(y.shape)
        return carry(p, y, dy)

    return rule


_register(F.max_pool1d, torch.max_pool1d)(_max_pool(1))
_register(F.max_pool2d, torch.max_pool2d)(_max_pool(2))
_register(F.max_pool3d, torch.max_pool3d)(_max_pool(3))
