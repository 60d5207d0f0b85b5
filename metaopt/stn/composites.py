"""Rules for functions that hide several layers: they are written out, so that each layer inside has its own rule."""

from __future__ import annotations

__all__ = ["inside", "untouched", "written_out"]

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaopt.errors import ResponseError
from metaopt.stn.layouts import Layout, NeedsGroups
from metaopt.stn.linearised import LinearisedPass
from metaopt.stn.passes import Pass
from metaopt.stn.randomness import Rate
from metaopt.stn.rules import register


def written_out(
    p: Pass,
    func: Any,
    x: Tensor,
    axis: int,
    weights: Sequence[Tensor | None],
    others: Sequence[Any] = (),
    *,
    dropout: bool = False,
) -> bool:
    """Whether a composite must be written out: some weight responds, or some value has a tangent.

    Args:
        p: the pass.
        func: the function.
        x: its input.
        axis: the axis of examples that the function defines.
        weights: all its weights.
        others: its other tensors.
        dropout: whether it draws a mask within: which must be the same in every pass, responding or not.

    Raises:
        NeedsGroups: if the examples are along another axis.
    """
    actives = [active for w in weights if (active := p.mark_of(w)) is not None]
    for active in actives:
        layout = p.layout(active, func, x)
        if layout is not None and layout != Layout(axis):
            raise NeedsGroups(active.entry.name, f"the examples are not along the batch axis of `{func.__name__}`")
    if p.recording:
        return False
    return bool(actives) or dropout or any(p.tangent(v) is not None for v in (x, *weights, *others))


@contextmanager
def inside(p: Pass, axis: int) -> Iterator[None]:
    """Let the pass see the functions called here, with the examples along a known axis."""
    before, p.fixed = p.fixed, Layout(axis)
    try:
        with p:
            yield
    finally:
        p.fixed = before


def untouched(p: Pass, func: Any, args: Sequence[Any], why: str) -> Any:
    """Call a composite as it is, if nothing in it responds; with tangents, by forward-mode AD.

    Raises:
        NeedsGroups: if a weight responds.
        Unsupported: if a value has a tangent, and the function no forward mode.
        ResponseError: if a dropout within is bound: torch draws its mask at one rate.
    """
    for value in args:
        if isinstance(value, Rate) and value.hyper is not None and not p.recording:
            raise ResponseError(
                f"the dropout of {value.module!r} is bound to {value.hyper!r}, and can't have that rate here: {why}. "
                "Bind a dropout module before or behind it."
            )
    tensors = [t for value in args for t in (value if isinstance(value, (list, tuple)) else (value,))]
    for tensor in tensors if not p.recording else ():
        active = p.mark_of(tensor)
        if active is not None:
            raise NeedsGroups(active.entry.name, why)
    if isinstance(p, LinearisedPass) and any(p.tangent(t) is not None for t in tensors):
        with sdpa_kernel(SDPBackend.MATH):
            return p.by_forward_ad(func, tuple(args), {})
    return func(*args)


# -- recurrent layers --------------------------------------------------------------------------------------------------


def _lstm(gates: Tensor, state: tuple[Tensor, ...], hidden: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (gates + hidden).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(gates: Tensor, state: tuple[Tensor, ...], hidden: Tensor) -> tuple[Tensor]:
    ir, iz, inn = gates.chunk(3, -1)
    hr, hz, hn = hidden.chunk(3, -1)
    z, new = torch.sigmoid(iz + hz), torch.tanh(inn + torch.sigmoid(ir + hr) * hn)
    return (new + z * (state[0] - new),)


def _tanh(gates: Tensor, state: tuple[Tensor, ...], hidden: Tensor) -> tuple[Tensor]:
    return (torch.tanh(gates + hidden),)


def _relu(gates: Tensor, state: tuple[Tensor, ...], hidden: Tensor) -> tuple[Tensor]:
    return (torch.relu(gates + hidden),)


CELLS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _tanh,
    "rnn_relu": _relu,
    "lstm_cell": _lstm,
    "gru_cell": _gru,
    "rnn_tanh_cell": _tanh,
    "rnn_relu_cell": _relu,
}


def _direction(
    p: Pass, cell: Any, x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor | None], reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction, over a sequence ``(T, B, ·)``."""
    w_ih, w_hh, b_ih, b_hh = weights[:4]
    projection = weights[4] if len(weights) > 4 else None
    assert w_ih is not None
    assert w_hh is not None
    with inside(p, 1):
        gates = F.linear(x, w_ih, b_ih).unbind(0)
    outputs = []
    with inside(p, 0):
        for now in reversed(gates) if reverse else gates:
            state = cell(now, state, F.linear(state[0], w_hh, b_hh))
            if projection is not None:
                state = (F.linear(state[0], projection), *state[1:])
            outputs.append(state[0])
        if reverse:
            outputs.reverse()
        return torch.stack(outputs), state


def _sequence(p: Pass, func: Any, *args: Any) -> Any:
    """``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, written out over time."""
    if not isinstance(args[3], bool) or args[0].ndim != 3:
        why = "a sequence that is packed, or has no batch, has no axis of examples; pass padded sequences"
        return untouched(p, func, args, why)
    x, hx, weights, biases, layers, rate, training, bidirectional, batch_first = args
    states = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
    masked = bool(rate) and training and layers > 1
    if not written_out(p, func, x, 0 if batch_first else 1, weights, states, dropout=masked):
        return func(*args)
    cell, directions = CELLS[func.__name__], 2 if bidirectional else 1
    size = len(weights) // (layers * directions)
    ends: list[tuple[Tensor, ...]] = []
    with p:
        x = x.transpose(0, 1) if batch_first else x
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            group = list(weights[index * size : (index + 1) * size])
            if not biases:
                group[2:2] = [None, None]
            with p:
                start = tuple(s[index] for s in states)
            output, end = _direction(p, cell, x, start, group, reverse=direction == 1)
            outputs.append(output)
            ends.append(end)
        with p:
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            if masked and layer < layers - 1:
                with inside(p, 1):
                    x = F.dropout(x, rate, True)
    with p:
        x = x.transpose(0, 1) if batch_first else x
        return (x, *(torch.stack(parts) for parts in zip(*ends, strict=True)))


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    register(getattr(torch, _name))(_sequence)


@register(torch._pack_padded_sequence)
def _pack(p: Pass, func: Any, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:  # noqa: A002
    """Packing moves entries; torch's own has no forward mode."""
    p.refuse_marked(func, (input,), {})
    dx = p.tangent(input)
    data, sizes = func(input, lengths, batch_first)
    return p.join(data, None if dx is None else func(dx, lengths, batch_first)[0]), sizes


def _cell(
    p: Pass,
    func: Any,
    input: Tensor,  # noqa: A002
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell``."""
    states = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
    if not written_out(p, func, input, 0, [w_ih, w_hh, b_ih, b_hh], states):
        return func(input, hx, w_ih, w_hh, b_ih, b_hh)
    with inside(p, 0):
        state = CELLS[func.__name__](F.linear(input, w_ih, b_ih), states, F.linear(states[0], w_hh, b_hh))
    return state if len(state) > 1 else state[0]


for _name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
    register(getattr(torch, _name))(_cell)


# -- bags of words -----------------------------------------------------------------------------------------------------


@register(F.embedding_bag)
def _bag(
    p: Pass,
    func: Any,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """A look-up and a sum: torch's own has no forward mode and no second derivative."""
    sparse = sparse and isinstance(weight, Parameter)  # as for a table of words
    settings = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights)
    arguments = (input, weight, *settings, include_last_offset, padding_idx)
    if offsets is not None or max_norm is not None or scale_grad_by_freq or mode == "max" or input.ndim != 2:
        return untouched(p, func, arguments, "`embedding_bag` with offsets, frequencies or a maximum has no rule")
    if not written_out(p, func, input, 0, [weight], [per_sample_weights]):
        return func(*arguments)
    with inside(p, 0):
        words = F.embedding(input, weight)
        if per_sample_weights is not None:
            words = words * per_sample_weights.unsqueeze(-1)
        if padding_idx is None:
            return words.sum(1) if mode == "sum" else words.mean(1)
        kept = (input != padding_idx % len(weight)).to(words.dtype)
        total = (words * kept.unsqueeze(-1)).sum(1)
        return total if mode == "sum" else total / kept.sum(1, keepdim=True).clamp(min=1)
