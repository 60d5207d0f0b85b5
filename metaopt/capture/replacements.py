"""Functions of torch whose higher derivatives are wrong or fail, and what the replay calls in their place.

``torch._weight_norm`` (behind ``nn.utils.weight_norm`` and its parametrization): its backward treats the norms that
the forward saved as constants, so its second derivative lacks a term (torch 2.13, seen against finite differences).

``torch._amp_foreach_non_finite_check_and_unscale_`` (in ``GradScaler``) has no derivative, and autograd takes it for
the identity.

``torch._foreach_copy_`` has no derivative either, and says so.

``F.cross_entropy`` and ``F.nll_loss`` with more than two dimensions: the kernel behind them refuses gradients that
are not contiguous, which the transposed pass of forward mode has (torch 2.13: "grad_input must be contiguous").

``torch.normal``, behind the samples of ``torch.distributions.Normal`` and its kin: its derivative by the mean and the
standard deviation is 0, though the sample moves with them.

``torch.binomial`` has no derivative, and says so; what it draws is a count, which has derivative 0.

``torch.fake_quantize_per_tensor_affine`` and its kin: their backward takes rounding for the identity on purpose.

``F.embedding_bag`` has no second derivative, and says so.

``Tensor.view`` needs the memory that the loop's kernels laid out; those of the replay (attention with a second
derivative) may lay it out otherwise.

Norms and distances: see `norms`.

``F.embedding`` with a ``padding_idx``: its backward leaves that row out on purpose, though the forward reads it.
"""

from __future__ import annotations

__all__ = [
    "REPLACEMENTS",
    "binomial",
    "cross_entropy",
    "embedding_bag",
    "fake_quantize",
    "foreach_copy_",
    "hard_gumbel_softmax",
    "nll_loss",
    "normal",
    "padded_embedding",
    "rejection_sampler",
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

from metaopt.capture.norms import NORMS
from metaopt.capture.primitives import Phase, choose, stop
from metaopt.errors import CaptureError


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g · v / ‖v‖``, with the norm over every axis but ``dim``."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def nll_loss(
    input: Tensor,  # noqa: A002 (torch's name for it)
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``F.nll_loss`` by ``gather``: ``-weight[target] · input[target]``, over axis 1."""
    if input.dim() <= 2 or size_average is not None or reduce is not None:
        return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    factor = kept.to(input.dtype) if weight is None else torch.where(kept, weight[index], 0.0)
    loss = -factor * input.gather(1, index.unsqueeze(1)).squeeze(1)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / factor.sum()


def cross_entropy(
    input: Tensor,  # noqa: A002 (torch's name for it)
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy``; with class indices and without smoothing, `nll_loss` of the log-softmax."""
    if input.dim() <= 2 or target.is_floating_point() or label_smoothing != 0.0:
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing=label_smoothing
        )
    return nll_loss(F.log_softmax(input, 1), target, weight, size_average, ignore_index, reduce, reduction)


def hard_gumbel_softmax(phase: Phase, logits: Tensor, tau: float = 1, dim: int = -1) -> Tensor:
    """``F.gumbel_softmax(hard=True)``, whose ``detach`` stops the loop's gradient and not the sweep's."""
    noise = -torch.empty_like(logits, memory_format=torch.legacy_contiguous_format).exponential_().log()
    soft = ((logits + noise) / tau).softmax(dim)
    index = soft.max(dim, keepdim=True)[1]
    hard = torch.zeros_like(logits, memory_format=torch.legacy_contiguous_format).scatter_(dim, index, 1.0)
    return hard - stop(phase, soft) + soft


def fake_quantize(
    phase: Phase, func: Callable[..., Tensor], x: Tensor, scale: Tensor | float, zero_point: Any, *rest: int
) -> Tensor:
    """A fake quantisation, which passes the loop's gradient straight through: the sweep sees steps, and their scale."""
    # In the loop the scale is none that requires grad, which torch refuses.
    own = func(x, scale.detach() if isinstance(scale, Tensor) else scale, zero_point, *rest)
    # A scale for each channel lies along an axis, which comes before the bounds.
    step = scale.reshape(-1, *[1] * (x.dim() - 1 - rest[0])) if isinstance(scale, Tensor) and len(rest) > 2 else scale
    with torch.no_grad():
        level = (own / step).round()
    return choose(phase, own, level * step)


def padded_embedding(
    phase: Phase,
    input: Tensor,  # noqa: A002 (torch's name for it)
    weight: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """``F.embedding``, whose ``padding_idx`` keeps the loop's gradient from that row, and not the sweep's."""
    row = padding_idx % len(weight)
    words = F.embedding(input, weight, scale_grad_by_freq=scale_grad_by_freq)
    return torch.where((input == row).unsqueeze(-1), stop(phase, weight[row]), words)


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
    """``F.embedding_bag``: rows of the weight, reduced over the entries of each bag that are no padding."""
    if max_norm is not None or scale_grad_by_freq or sparse:
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


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: weight_norm,
    torch.normal: normal,
    torch.binomial: binomial,
    F.cross_entropy: cross_entropy,
    F.embedding_bag: embedding_bag,
    F.nll_loss: nll_loss,
    torch._amp_foreach_non_finite_check_and_unscale_: unscale_,
    torch._foreach_copy_: foreach_copy_,
    Tensor.view: view,
    Tensor.view_as: view_as,
    **NORMS,
}
