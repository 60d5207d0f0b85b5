"""Layers with running statistics: the buffers that they write are state of the training dynamics.

torch writes them inside the kernel, where autograd does not look. The replay normalises with the batch's statistics,
and moves the running ones by a formula of their own.
"""

from __future__ import annotations

__all__ = ["NORMS", "native", "norm", "normalize", "running_mean", "running_var"]

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.capture.primitives import Phase, stop

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher

_BATCH, _INSTANCE = ("training", "momentum", "eps"), ("use_input_stats", "momentum", "eps")
_LAYER = ("input", "running_mean", "running_var", "weight", "bias")
_RAW = ("input", "weight", "bias", "running_mean", "running_var")


def _overloads(name: str) -> tuple[Callable[..., Any], ...]:
    packet = getattr(torch.ops.aten, name)
    return packet, packet.default


# Each such function, and those behind it, which take the same in another order: what it does, and its arguments.
NORMS: dict[Callable[..., Any], tuple[Callable[..., Any], tuple[str, ...]]] = {
    F.batch_norm: (F.batch_norm, (*_LAYER, *_BATCH)),
    F.instance_norm: (F.instance_norm, (*_LAYER, *_INSTANCE)),
    torch.batch_norm: (F.batch_norm, (*_RAW, *_BATCH)),
    torch.instance_norm: (F.instance_norm, (*_RAW, *_INSTANCE)),
    **dict.fromkeys(
        (torch.native_batch_norm, *_overloads("native_batch_norm"), *_overloads("batch_norm")),
        (F.batch_norm, (*_RAW, *_BATCH)),
    ),
    **dict.fromkeys(_overloads("instance_norm"), (F.instance_norm, (*_RAW, *_INSTANCE))),
}
_DEFAULTS = {
    "running_mean": None,
    "running_var": None,
    "weight": None,
    "bias": None,
    "training": False,
    "use_input_stats": True,
    "momentum": 0.1,
    "eps": 1e-5,
}


def running_mean(old: Tensor, x: Tensor, momentum: float, per_instance: bool) -> Tensor:
    """``(1 - momentum) · old + momentum · mean``, over everything but the channels."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    new = x.mean(axes)
    return (1 - momentum) * old + momentum * new.to(old.dtype)


def running_var(old: Tensor, x: Tensor, momentum: float, per_instance: bool) -> Tensor:
    """``(1 - momentum) · old + momentum · var``, with the unbiased variance."""
    if per_instance:
        new = x.flatten(2).var(2, unbiased=True).mean(0)
    else:
        new = x.transpose(0, 1).flatten(1).var(1, unbiased=True)
    return (1 - momentum) * old + momentum * new.to(old.dtype)


def normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Batch norm with given statistics, differentiable in them too."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = (x - mean.view(shape)) * (var.view(shape) + eps).rsqrt()
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype)


def native(phase: Phase, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """What ``torch.native_batch_norm`` returns: the batch's statistics too, which the loop's gradients don't pass."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var, mean = torch.var_mean(stop(phase, x), axes, correction=0)
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps), mean, (var + eps).rsqrt()


def norm(watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A batch or instance norm: its running statistics are written in training and read in evaluation."""
    tape = watcher.tape
    function, names = NORMS[func]
    given: dict[str, Any] = _DEFAULTS | dict(zip(names, args, strict=False)) | kwargs
    flag, per_instance = names[5], function is F.instance_norm
    x, mean, var = given["input"], given["running_mean"], given["running_var"]
    if mean is None or var is None:
        return watcher.call(func, args, kwargs)
    if not given[flag]:
        if tape.find(mean) is None and tape.find(var) is None:
            return watcher.call(func, args, kwargs)
        result = func(*args, **kwargs)
        spec = (x, mean, var, given["weight"], given["bias"], given["eps"])
        watcher.record(normalize, spec, {}, result if isinstance(result, Tensor) else result[0])
        return result
    live = any(tape.is_live(t) for t in (x, mean, var, given["weight"], given["bias"]) if t is not None)
    values = [tape.read_stopped(t) for t in (mean, var, x)] if live else []
    for buffer in (mean, var):
        tape.before_write(buffer)
    if not live:
        return func(*args, **kwargs)
    result = func(*args, **kwargs)
    rest = {name: given[name] for name in ("weight", "bias", "momentum", "eps")}
    if isinstance(result, Tensor):
        watcher.record(function, (x,), {"running_mean": None, "running_var": None, flag: True, **rest}, result)
    else:
        watcher.record(native, (x, given["weight"], given["bias"], given["eps"]), {}, result, phased=True)
    momentum = tape.trace.number(float(given["momentum"]))
    for buffer, value, formula in ((mean, values[0], running_mean), (var, values[1], running_var)):
        if tape.is_live(x) or tape.find(buffer) is not None:
            (number,) = tape.trace.emit(formula, value, values[2], momentum, per_instance)
            if tape.find(buffer) is None:
                tape.bind(buffer)
            tape.define(buffer, number).buffer = 1 if per_instance else 2
    return result
