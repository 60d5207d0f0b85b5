"""Rules for attention: the projections respond per example, and the attention itself carries tangents."""

from __future__ import annotations

__all__: list[str] = []

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from metaopt.stn.composites import inside, untouched, written_out
from metaopt.stn.layouts import Layout
from metaopt.stn.passes import Pass
from metaopt.stn.randomness import Rate
from metaopt.stn.rules import register
from metaopt.stn.spelt import spell_out


def _bias(mask: Tensor | None, like: Tensor) -> Any:
    """A mask as what is added to the scores: a boolean one excludes where it is true."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def _projections(
    p: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    separate: tuple[Tensor | None, ...],
    bias: Tensor | None,
) -> list[Tensor]:
    """The queries, keys and values."""
    width = query.shape[-1]
    parts: Any = separate
    biases = [_rows(p, bias, i, width) for i in range(3)]
    if weight is None:
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True)]
    if query is key and key is value:
        return list(F.linear(query, weight, bias).chunk(3, -1))
    return [
        F.linear(x, _rows(p, weight, i, width), b)
        for i, (x, b) in enumerate(zip((query, key, value), biases, strict=True))
    ]


def _rows(p: Pass, parameter: Tensor | None, index: int, width: int) -> Any:
    if parameter is None:
        return None
    start, stop = index * width, (index + 1) * width
    active = p.mark_of(parameter)
    if active is None:
        return parameter[start:stop]
    with torch._C.DisableTorchFunction():
        part = parameter[start:stop]
    return p.mark(part, active.rows(start, stop))


def _one(p: Pass, vector: Tensor, batch: int) -> Tensor:
    """A key or a value of no position, ``(1, B, E)``, which responds per example."""
    active = p.mark_of(vector)
    if active is None:
        return vector.expand(1, batch, -1)
    with torch._C.DisableTorchFunction():
        spread = vector.expand(1, batch, -1).clone()
    return p.join(spread, active.coefficients[0].reshape(spread.shape))


@register(F.multi_head_attention_forward)
def attention(
    p: Pass,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(Q Kᵀ / √d + mask) V`` between projections, over sequences ``(T, B, E)``."""
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    weights = [in_proj_weight, in_proj_bias, *separate, out_proj_weight, out_proj_bias, bias_k, bias_v]
    settings = (training, key_padding_mask, need_weights, attn_mask, use_separate_proj_weight, *separate)
    arguments = (
        *(query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v),
        *(add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, *settings, static_k, static_v),
        *(average_attn_weights, is_causal),
    )
    if static_k is not None or static_v is not None or query.ndim != 3:
        return untouched(p, func, arguments, "attention without a batch, or with static keys, has no rule")
    masked = bool(dropout_p) and training
    if not written_out(p, func, query, 1, weights, [key, value], dropout=masked):
        return func(*arguments)
    length, batch, width = query.shape
    head = width // num_heads
    with inside(p, 1):
        q, k, v = _projections(p, query, key, value, in_proj_weight, separate, in_proj_bias)
        if bias_k is not None and bias_v is not None:
            k, v = (torch.cat([x, _one(p, b, batch)]) for x, b in ((k, bias_k), (v, bias_v)))
        q, k, v = (x.reshape(x.shape[0], batch * num_heads, head).transpose(0, 1) for x in (q, k, v))
        if add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        # What is added is never masked.
        more = (0, k.shape[1] - key.shape[0])
        hidden, padded = (None if m is None else F.pad(m, more) for m in (attn_mask, key_padding_mask))
        bias = _mask(hidden, padded, q, batch, num_heads)
        probabilities = _probabilities(p, q, k, bias, num_heads, dropout_p if masked else 0.0)
        mixed = torch.matmul(probabilities, v).transpose(0, 1).reshape(length, batch, width)
        output = F.linear(mixed, out_proj_weight, out_proj_bias)
        if not need_weights:
            return output, None
        seen = probabilities.reshape(batch, num_heads, length, -1)
        return output, seen.mean(1) if average_attn_weights else seen


def _probabilities(p: Pass, q: Tensor, k: Tensor, bias: Tensor | None, heads: int, dropout: float) -> Tensor:
    scores = torch.matmul(q * math.sqrt(1 / q.shape[-1]), k.transpose(-2, -1))
    probabilities = torch.softmax(scores if bias is None else scores + bias, -1)
    if dropout:
        p.fixed = Layout(0, heads)
        probabilities = F.dropout(probabilities, dropout, True)
        p.fixed = Layout(1)
    return probabilities


def _mask(mask: Tensor | None, padding: Tensor | None, like: Tensor, batch: int, heads: int) -> Tensor | None:
    total = _bias(mask, like)
    if total is not None and total.ndim == 2:
        total = total.unsqueeze(0)
    padded = _bias(padding, like)
    if padded is not None:
        spread = padded.reshape(batch, 1, 1, -1).expand(-1, heads, -1, -1).reshape(batch * heads, 1, -1)
        total = spread if total is None else total + spread
    return total


@register(F.scaled_dot_product_attention, composed=True)
def scaled_dot_product_attention(
    p: Pass,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention called by the model itself; with tangents it is written out, since the fast kernels have none."""
    if any(p.depends(x) for x in (query, key, value, attn_mask)):
        # On parameters: what follows joins them to the examples, and a mask is drawn for all of these.
        with p:
            return _written_out(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    # A mask that a fast kernel draws can't be drawn again in another pass. Where it has a rate for each example, its
    # examples are looked for, too.
    moving = any(p.tangent(x) is not None or unpack_dual(x).tangent is not None for x in (query, key, value))
    bound = isinstance(dropout_p, Rate) and dropout_p.hyper is not None
    if not moving and (not dropout_p or (p.recording and not bound)):
        return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    with p:
        return _written_out(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


@spell_out(F.scaled_dot_product_attention)
def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = torch.matmul(query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale), key.transpose(-2, -1))
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril().logical_not()
        scores = scores + _bias(hidden, scores)
    if attn_mask is not None:
        # Here a boolean mask is true where attention is allowed.
        scores = scores + _bias(attn_mask if attn_mask.is_floating_point() else ~attn_mask, scores)
    return torch.matmul(F.dropout(torch.softmax(scores, -1), dropout_p, dropout_p > 0), value)
