"""Embeddings, whose options change the loop's gradient, or make it one that can't be differentiated."""

from __future__ import annotations

__all__ = ["BAGS", "TABLES", "bag", "table"]

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.capture import replacements, surrogates
from metaopt.errors import CaptureError

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_ATEN, _ATEN_BAG = torch.ops.aten.embedding, torch.ops.aten.embedding_bag
# Each function, and those behind it, which take the same in another order, and count the padding otherwise.
TABLES: tuple[Callable[..., Any], ...] = (F.embedding, torch.embedding, _ATEN, _ATEN.default)
BAGS: tuple[Callable[..., Any], ...] = (
    F.embedding_bag,
    torch.embedding_bag,
    _ATEN_BAG,
    _ATEN_BAG.default,
    _ATEN_BAG.padding_idx,
)
_TABLE = ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse")
_BAG = (
    *("weight", "input", "offsets", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights"),
    *("include_last_offset", "padding_idx"),
)
_MODES = ("sum", "mean", "max")
_signature = functools.cache(inspect.signature)


def table(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """A call of ``F.embedding``."""
    given = _arguments(func, _TABLE, args, kwargs)
    weight = given["weight"]
    if func is not F.embedding and given.get("padding_idx", -1) < 0:
        given["padding_idx"] = None  # the layer counts from the end, and this does not
    padding, by_frequency = given.get("padding_idx"), bool(given.get("scale_grad_by_freq"))
    if not _is_live(watcher, weight, given) or (padding is None and not by_frequency):
        return watcher.call(func, args, kwargs)
    result = func(*args, **kwargs)
    watcher.record(surrogates.embedding, (given["input"], weight, padding, by_frequency), {}, result, phased=True)
    return result


def bag(watcher: Watcher, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """A call of ``F.embedding_bag``, or of one behind it, which returns more, that has no derivative."""
    given = _arguments(func, _BAG, args, kwargs)
    by_frequency = _is_live(watcher, given["weight"], given) and bool(given.pop("scale_grad_by_freq", False))
    if func is F.embedding_bag and not by_frequency:
        return watcher.call(func, args, kwargs)
    if not any(isinstance(x, Tensor) and watcher.tape.is_live(x) for x in given.values()):
        return watcher.call(func, args, kwargs)
    result = func(*args, **kwargs)
    if isinstance(given.get("mode"), int):
        given["mode"] = _MODES[given["mode"]]
    elif func is not F.embedding_bag:
        given["mode"] = "sum"
    first = result if isinstance(result, Tensor) else result[0]
    if by_frequency:
        watcher.record(surrogates.embedding_bag, (_shares(given),), given, first, phased=True)
    else:
        watcher.record(replacements.embedding_bag, (), given, first)
    return result


def _shares(given: Kwargs) -> Tensor:
    """What torch multiplies each word's gradient with.

    It is asked, for on a CPU torch 2.13 divides by how often other words occur.
    """
    one = given["weight"].detach()[:, :1].clone().zero_().requires_grad_()
    options = {key: value for key, value in given.items() if key not in ("weight", "per_sample_weights")}
    options["mode"] = "sum"
    with torch.enable_grad():
        plain, scaled = (
            torch.autograd.grad(F.embedding_bag(weight=one, scale_grad_by_freq=scales, **options).sum(), one)[0]
            for scales in (False, True)
        )
    return torch.where(plain == 0, 1.0, scaled / plain)


def _arguments(func: Callable[..., Any], names: tuple[str, ...], args: Args, kwargs: Kwargs) -> Kwargs:
    """What an embedding is called with, by the names of ``torch.nn.functional``."""
    if func in (F.embedding, F.embedding_bag):
        return dict(_signature(func).bind(*args, **kwargs).arguments)
    given = dict(zip(names, args, strict=False)) | kwargs
    if "indices" in given:
        given["input"] = given.pop("indices")
    return given


def _is_live(watcher: Watcher, weight: Any, given: Kwargs) -> bool:
    """Whether the weights are followed.

    Raises:
        CaptureError: if they are, and an option forbids it.
    """
    if not (isinstance(weight, Tensor) and watcher.tape.is_live(weight)):
        return False
    if given.get("max_norm") is not None:
        raise CaptureError(
            "an embedding with `max_norm` rewrites its weights inside the forward pass, which can't be followed. "
            "Drop `max_norm` and renormalise the rows in the loop, under `torch.no_grad()`."
        )
    if given.get("sparse"):
        raise CaptureError(
            "an embedding with `sparse=True` gives sparse gradients, which have no second derivative. Use "
            "`sparse=False`."
        )
    return True
