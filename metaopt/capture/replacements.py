"""Functions of torch whose higher derivatives are wrong or fail, and what the replay calls in their place.

``torch._weight_norm`` (behind ``nn.utils.weight_norm`` and its parametrization): its backward treats the norms that
the forward saved as constants, so its second derivative lacks a term (torch 2.13, seen against finite differences).

``torch._amp_foreach_non_finite_check_and_unscale_`` (in ``GradScaler``) has no derivative, and autograd takes it for
the identity.

``torch._foreach_copy_`` has no derivative either, and says so; nor have ``torch._foreach_maximum_`` and its opposite.

``torch._foreach_addcdiv``: its derivative takes one tensor's numbers for another's (torch 2.13: "index out of range").

``torch.normal``, behind the samples of ``torch.distributions.Normal`` and its kin: its derivative by the mean and the
standard deviation is 0, though the sample moves with them.

``torch.binomial`` has no derivative, and says so; what it draws is a count, which has derivative 0.

``F.embedding_bag`` and ``torch.segment_reduce`` have no second derivative, and say so.

The assignment of torchdiffeq's adaptive solvers, an ``autograd.Function`` that writes its argument out of sight of the
version counters, and whose backward leaves in the gradient of what is overwritten.

``Tensor.view`` needs the memory that the loop's kernels laid out; those of the replay (attention with a second
derivative) may lay it out otherwise.

Norms and distances: see `norms`; powers, roots and deviations: see `powers`; losses: see `losses`; others: `curved`.
"""

from __future__ import annotations

__all__ = [
    "FUNCTIONS",
    "REPLACEMENTS",
    "assigned",
    "binomial",
    "embedding_bag",
    "foreach_copy_",
    "normal",
    "rejection_sampler",
    "segment_reduce",
    "unscale_",
    "view",
    "view_as",
    "weight_norm",
]

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.capture.curved import CURVED
from metaopt.capture.losses import LOSSES
from metaopt.capture.norms import NORMS
from metaopt.capture.powers import POWERS
from metaopt.capture.steps import FOREACH
from metaopt.errors import CaptureError


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g · v / ‖v‖``, with the norm over every axis but ``dim``, or with -1 over all."""
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


def embedding_bag(
    input: Tensor,  # noqa: A002 (torch's name for it)
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``F.embedding_bag``: rows of the weight, reduced over the entries of each bag that are no padding.

    ``scale_grad_by_freq`` is for `metaopt.capture.surrogates` to heed, where the weight has a gradient.
    """
    if max_norm is not None or sparse:
        options = (max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights)
        return F.embedding_bag(input, weight, offsets, *options, include_last_offset, padding_idx)
    words = input.reshape(-1)
    places = torch.arange(len(words), device=input.device)
    if offsets is None:
        count, bags = len(input), places // max(input.shape[1], 1)
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        count, bags = len(starts), torch.bucketize(places, starts, right=True) - 1
    kept = torch.ones_like(words, dtype=torch.bool) if padding_idx is None else words != padding_idx % len(weight)
    rows = weight[words]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    zeros = rows.new_zeros(count, rows.shape[1])
    if mode == "max":
        rows, bags = rows[kept], bags[kept]
        return zeros.scatter_reduce(0, bags.unsqueeze(1).expand_as(rows), rows, "amax", include_self=False)
    total = zeros.index_add(0, bags, torch.where(kept.unsqueeze(1), rows, 0.0))
    if mode == "sum":
        return total
    return total / zeros[:, :1].index_add(0, bags, kept.to(rows.dtype).unsqueeze(1)).clamp(min=1.0)


def segment_reduce(
    data: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    initial: float | None = None,
    **options: Any,
) -> Tensor:
    """``torch.segment_reduce`` along the first axis, by ``scatter_reduce``."""
    if axis != 0 or initial is not None or (lengths is None and offsets is None) or options.get("indices") is not None:
        return torch.segment_reduce(
            data, reduce, lengths=lengths, offsets=offsets, axis=axis, initial=initial, **options
        )
    bounds = offsets if offsets is not None else F.pad(torch.as_tensor(lengths).cumsum(0), (1, 0))
    # What lies before the first bound or after the last one is in a segment of its own, which is left out.
    places = torch.bucketize(torch.arange(len(data), device=data.device), bounds, right=True)
    start, how = {
        "sum": (0.0, "sum"),
        "mean": (0.0, "sum"),
        "prod": (1.0, "prod"),
        "max": (float("-inf"), "amax"),
        "min": (float("inf"), "amin"),
    }[reduce]
    beside = [-1] + [1] * (data.dim() - 1)
    result = data.new_full((len(bounds) + 1, *data.shape[1:]), start)
    result = result.scatter_reduce(0, places.reshape(beside).expand_as(data), data, how)[1:-1]
    return result / bounds.diff().reshape(beside) if reduce == "mean" else result


def unscale_(grads: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """What ``GradScaler`` does to gradients, without the look for infinities: ``grad *= inv_scale``."""
    for grad in grads:
        grad.mul_(inv_scale.to(device=grad.device, dtype=grad.dtype))


def normal(mean: Tensor | float, std: Tensor | float = 1.0, *args: Any, **kwargs: Any) -> Tensor:
    """``mean + std · noise``, with the noise that ``torch.normal`` draws."""
    known = [x for x in (mean, std) if isinstance(x, Tensor)]
    if not known:
        return torch.normal(mean, std, *args, **kwargs)
    shape = torch.broadcast_shapes(*(x.shape for x in known))
    unit = 1.0 if isinstance(std, Tensor) else std
    noise = torch.empty(shape, dtype=known[0].dtype, device=known[0].device)
    noise.normal_(0.0, unit, generator=kwargs.get("generator"))
    return mean + (std * noise if isinstance(std, Tensor) else noise)


def binomial(count: Tensor, prob: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``torch.binomial`` of what it is given, as constants."""
    return torch.binomial(count.detach(), prob.detach(), generator)


def foreach_copy_(targets: list[Tensor], sources: list[Tensor], non_blocking: bool = False) -> None:
    """``target.copy_(source)``, pair by pair."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=non_blocking)


def assigned(scratch: Tensor, value: Tensor, index: Any) -> Tensor:
    """``scratch`` after ``scratch[index] = value``, in memory of its own."""
    result = scratch.clone()
    result[index] = value
    return result


def view(x: Tensor, *shape: Any) -> Tensor:
    """``x.view(shape)``, or a copy of that shape where the memory does not allow it."""
    try:
        return x.view(*shape)
    except RuntimeError:
        return x.reshape(*shape)


def view_as(x: Tensor, other: Tensor) -> Tensor:
    """``x.view_as(other)``, likewise."""
    return view(x, other.shape)


def rejection_sampler() -> CaptureError:
    """The error for a sample of which torch has another derivative, and nothing takes its place."""
    return CaptureError(
        "a sample of a gamma distribution, or of one made of it (Beta, Chi2, Dirichlet, StudentT), was drawn with "
        "parameters that depend on the weights or hyperparameters. It is drawn by rejection, and torch's derivative of "
        "it is not that of what the loop draws. Draw from a distribution whose samples are a function of noise "
        "(normal, Kumaraswamy, …), or with constant parameters."
    )


# What the replay calls in place of other packages' ``autograd.Function``s, by module and name.
FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torchdiffeq._impl.rk_common", "_UncheckedAssign"): assigned,
}

REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: weight_norm,
    torch.normal: normal,
    torch.binomial: binomial,
    torch.segment_reduce: segment_reduce,
    F.embedding_bag: embedding_bag,
    torch._amp_foreach_non_finite_check_and_unscale_: unscale_,
    torch._foreach_copy_: foreach_copy_,
    **{func: FOREACH[func] for func in (torch._foreach_addcdiv, torch._foreach_maximum_, torch._foreach_minimum_)},
    Tensor.view: view,
    Tensor.view_as: view_as,
    **NORMS,
    **POWERS,
    **LOSSES,
    **CURVED,
}
