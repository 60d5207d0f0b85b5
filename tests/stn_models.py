"""A zoo of models for the best response: each with a batch, and the axis of its examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from metaopt.stn import Tuned
from metaopt.stn.perturbations import Perturbation


class Tied(nn.Module):
    """A language model whose decoder is its table of words, on a flattened batch."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 5)
        self.lstm = nn.LSTM(5, 5, batch_first=True)
        self.decoder = nn.Linear(5, 7)
        self.decoder.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.words(x))
        scores: Tensor = self.decoder(hidden.reshape(-1, 5))
        return scores.unflatten(0, (len(x), -1))


class Reused(nn.Module):
    """One layer used three times, with a residual and an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + F.relu(self.layer(self.norm(x)), inplace=True)
        return x


class Bare(nn.Module):
    """Parameters that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.vector = nn.Parameter(torch.randn(4))
        self.scalar = nn.Parameter(torch.tensor(0.3))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.sin(x @ self.matrix.t() * self.vector) * self.scalar)
        return y


class Views(nn.Module):
    """Weights that are transposed and cut to pieces, as by those who write their own layers, and where widths vary."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.inner, self.bias = (nn.Parameter(torch.randn(shape)) for shape in ((5, 4), (12, 4), (12,)))
        self.conv, self.words = nn.Conv1d(1, 4, 3, bias=False), nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x @ self.tied.t()) @ self.tied
        q, k, v = self.inner.chunk(3)
        y = F.linear(y, q, self.bias[:4]) * F.linear(y, k, self.bias[4:8]) + y @ v.T
        a, b = torch.split(tensor=self.inner, split_size_or_sections=[5, 7])
        y = y + F.linear(y[:, 1:3], a[:4, 1:3]) + torch.mm(y, b.transpose(0, 1))[:, :4] + F.linear(y, self.inner[::3])
        y = F.conv1d(y.unsqueeze(1), self.conv.weight[:2], self.bias[10:]).flatten(1)
        word = F.embedding((x[:, :2] > 0).long(), self.words.weight[:3]).mean(1)
        return torch.einsum("bi,io->bo", y + word, self.words.weight.t()) + y @ self.words.weight.mT[:, :5]


class Kept(nn.Module):
    """As many entries of a parameter as are not zero: a number that could differ from example to example."""

    def __init__(self) -> None:
        super().__init__()
        self.vector, self.layer = nn.Parameter(torch.randn(4)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * self.vector[self.vector != 0]
        return torch.tanh(y)


class Functional(nn.Module):
    """A layer's function, called with a parameter of one's own, on more than one path."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.bilinear = nn.Bilinear(4, 4, 2)
        self.slope = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        a = self.slope(F.linear(x, self.layer.weight))
        b = torch.tanh(self.layer(x))
        y: Tensor = self.bilinear(a, torch.where(b > 0, b, 0.1 * b))
        return y


class Cells(nn.Module):
    """Recurrent cells, unrolled by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = (x.new_zeros(len(x), 4), x.new_zeros(len(x), 4))
        for now in x.unbind(1):
            state = self.lstm(now, state)
        y: Tensor = self.rnn(self.gru(state[0]))
        return y


class Cross(nn.Module):
    """Attention to another sequence, with weights of attention, and with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.MultiheadAttention(4, 2, batch_first=True)
        self.two = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = x[..., :3] * 2
        y, weights = self.one(x, x.flip(1), x.flip(1))
        z, _ = self.two(y, memory, memory, need_weights=False)
        return torch.cat([z, weights], -1)


class Residual(nn.Module):
    """A block of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        return F.adaptive_avg_pool2d(self.relu(self.norm2(self.conv2(y)) + x), 1).flatten(1)


class Packed(nn.Module):
    """A recurrent network on packed sequences; how long each is can be read from its first entry."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.network, self.output = kind(3, 4, 2, batch_first=True, bidirectional=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + (x[:, 0, 0] > 0).long() + 2 * (x[:, 0, 1] > 0).long()
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.network(packed)[0], batch_first=True, total_length=4)
        y: Tensor = self.output(states)
        return y


class Added(nn.Module):
    """Attention with keys and values that are added."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        padded = x[..., 0] > 1
        y: Tensor = self.attention(x, x, x, key_padding_mask=padded, attn_mask=hidden, need_weights=False)[0]
        return y


class Decoder(nn.Module):
    """A transformer's decoder, or all of it, with a causal mask."""

    def __init__(self, whole: bool, batch_first: bool) -> None:
        super().__init__()
        options: dict[str, Any] = {"dropout": 0.3, "batch_first": batch_first}
        self.net = nn.Transformer(4, 2, 1, 1, 8, **options) if whole else nn.TransformerDecoderLayer(4, 2, 8, **options)
        self.time = 1 if batch_first else 0

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[self.time]).to(x)
        memory = 2 * x.narrow(self.time, 0, 2)
        inputs = (memory, x) if isinstance(self.net, nn.Transformer) else (x, memory)
        y: Tensor = self.net(*inputs, tgt_mask=mask, tgt_is_causal=True)
        return y


class Vision(nn.Module):
    """A class token, positions and a layer scale, as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 4, 4))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions[:, : x.shape[1] + 1]
        return x + self.encoder(x) * self.scale


class Queries(nn.Module):
    """Learned queries, of which each example gets a copy, with the time first."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, 4))
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(self.queries.unsqueeze(1).repeat(1, x.shape[1], 1), x, x)[0]
        return y


class Language(nn.Module):
    """A small GPT: tied words, a table of positions, and a bias of attention by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(7, 4), nn.Embedding(6, 4)
        self.inner, self.distance = nn.Linear(4, 12), nn.Parameter(torch.randn(11, 2))
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        time = torch.arange(x.shape[1], device=x.device)
        hidden = self.words(x) + self.positions(time)
        q, k, v = self.inner(hidden).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        bias = self.distance[(time - time[:, None]) + 5].permute(2, 0, 1)
        rate = self.drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate).transpose(1, 2).flatten(2)
        return F.linear(hidden + mixed, self.words.weight)


class Written(nn.Module):
    """Parameters that are written into the batch, and added to it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.masked, self.added = (nn.Parameter(torch.randn(3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0] = self.first
        y[x[..., 0] > 0.5] = self.masked
        y += self.added
        return torch.tanh(y)


class Weights(nn.Module):
    """Weights that are computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        self.conv = nn.Conv1d(1, 2, 3)
        self.left, self.right = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 4))
        self.mix = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        weight = (weight - weight.mean((1, 2), keepdim=True)) / weight.std((1, 2), keepdim=True)
        y = F.conv1d(self.normed(x).unsqueeze(1), weight, self.conv.bias).flatten(1)
        share = torch.softmax(self.mix, 0)
        return share[0] * y + (y @ (self.right.t() @ self.left).t()) * share[1]


class Functions(nn.Module):
    """Functions of layers, called with bare parameters of many shapes."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(4, 3), (4,), (1, 4), (4, 5), (2, 4, 3), (5, 2, 2), (4, 5)]
        self.all = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, row, matrix, heads, kernel, centres = self.all
        y = F.linear(x, weight, bias)
        a, b = F.linear(y, row) + y @ bias.unsqueeze(1), torch.tanh(y) @ matrix
        c = F.conv_transpose1d(torch.einsum("bi,hij->bhj", y, heads), heads.mean((1, 2))[:, None, None])
        d = F.conv1d(b.unsqueeze(-1).expand(-1, -1, 2), kernel.repeat(1, 5, 1)[:, :5]).flatten(1)
        e = torch.exp(-(y.unsqueeze(1) - centres.t()).square().sum(-1))
        return torch.cat([a, b, c.flatten(1), d, e], 1)


class Segments(nn.Module):
    """A loss of each pixel within the model, of scores that have the channels last; softmax in a type of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.layer(x).permute(0, 3, 1, 2).softmax(1, dtype=x.dtype)
        loss = F.cross_entropy(scores, x.argmax(-1), reduction="none")
        kept, each = torch.where(x[..., 0] > 0, x.argmin(-1), 3), torch.tensor([1.0, 2.0, 0.5, 3.0]).to(x)
        loss = loss + F.nll_loss(F.log_softmax(scores, 1, dtype=x.dtype), kept, each, ignore_index=3, reduction="none")
        return loss / (1 + F.cross_entropy(scores[:, :, :, :1], kept[:, :, :1] * 0, each, reduction="none"))


class Gaps(nn.Module):
    """Functions whose derivatives torch has in part."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate, self.centres = nn.Linear(3, 8), nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.layer(x), -1)
        y = y * F.hardsigmoid(self.gate(y))
        scores = F.softmin(torch.cdist(y, self.centres), dim=-1)
        loss = F.cross_entropy(scores, scores.detach().argmax(-1), reduction="none")
        return torch.cat([y, scores.logsumexp(-1, keepdim=True), loss.unsqueeze(-1)], -1)


class Spectral(nn.Module):
    """A long convolution by FFT, and a complex pole."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.decay, self.turn = (nn.Parameter(torch.randn(n)) for n in (4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.irfft(torch.fft.rfft(x, n=8) * torch.fft.rfft(self.kernel, n=8), n=8)[..., : x.shape[-1]]
        pole = torch.exp(torch.complex(-self.decay.abs(), self.turn) * torch.arange(x.shape[-1], device=x.device))
        return torch.cat([y, (y * pole).sum(-1, keepdim=True).real], -1)


class Windows(nn.Module):
    """Attention within windows and over all, by the same layers; its dropout has no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.none = nn.Linear(4, 12), nn.Dropout(0.3), nn.Parameter(torch.randn(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixed(x.unflatten(1, (2, 2)).flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1, 2)
        return self.mixed(torch.cat([self.none.expand(len(x), 0, -1), y], 1))

    def mixed(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        rate = self.drop.p if self.training else 0.0
        return self.drop(F.scaled_dot_product_attention(q, k, v, dropout_p=rate).transpose(1, 2).flatten(2))


class InPlace(nn.Module):
    """Values that are written in place, of which no other part of the model has a view."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.one(x), x.new_zeros(len(x), 4)
        z[:, ::2] = 2 * y[:, ::2]
        z[x[:, 0] > 0.3, 1] = 0.5
        y -= F.hardswish(self.one(2 * x), inplace=True)
        y = torch.logaddexp(y, z)
        y.clamp_(-0.3).sub_(z).masked_fill_(z > 2, 0.0)
        return self.two(y).pow_(2).mul_(z) + torch.zeros_like(y).copy_(y[:, :1])


class Standardised(nn.Module):
    """A kernel that is standardised by the function of batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(2, 3, 2), nn.Parameter(torch.randn(3, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat, gain = self.conv.weight.reshape(1, 3, -1), (0.5 * self.gain).view(-1)
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0).reshape_as(self.conv.weight)
        return F.conv2d(x, weight, self.conv.bias)


class Computed(nn.Module):
    """A bias that is computed from parameters alone, with functions that write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Sequential(nn.Linear(2, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))
        self.places = nn.Buffer(torch.randn(6, 2))
        self.table, self.layer = nn.Parameter(torch.randn(6, 4)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias(self.places)
        bias.mul_(bias.exp()).add_(torch.tanh_(self.table.clone()))
        return torch.tanh(self.layer(x) + bias.mean(0))


class Paths(nn.Module):
    """Training and evaluation go other ways to the same, as with and without a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        if self.training:
            return h * self.scale.sin()
        return (h.t() * self.scale.sin().double()[:, None]).t()


@dataclass(frozen=True)
class Case:
    """A model, an input, and how they are used.

    Args:
        build: the model.
        shape: of the input.
        classes: the number of words, where the input is indices.
        batch_dim: the axis of examples.
        grouped: whether some parameters take one perturbation for each group.
        exact: whether zero perturbation is the original bit for bit.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int = 0
    batch_dim: int = 0
    grouped: bool = False
    exact: bool = True

    def input(self) -> Tensor:
        return torch.randint(self.classes, self.shape) if self.classes else torch.randn(self.shape)


S = nn.Sequential
B = 5
CASES: dict[str, Case] = {
    "mlp": Case(lambda: S(nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2), nn.LogSoftmax(-1)), (B, 3)),
    "activations": Case(
        lambda: S(nn.Linear(3, 4), nn.GELU(), nn.SiLU(), nn.ELU(), nn.Softplus(), nn.LeakyReLU(), nn.Softmax(-1)),
        (B, 3),
    ),
    "conv1d": Case(lambda: S(nn.Conv1d(4, 6, 3, groups=2, dilation=2), nn.AvgPool1d(2), nn.MaxPool1d(2)), (B, 4, 12)),
    "conv2d": Case(
        lambda: S(nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), nn.MaxPool2d(2), nn.Flatten()),
        (B, 3, 6, 6),
    ),
    "conv3d": Case(lambda: S(nn.Conv3d(2, 3, 2, stride=2), nn.AvgPool3d(2), nn.Dropout3d(0.3)), (B, 2, 4, 4, 4)),
    "transposed1d": Case(lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2, output_padding=1), (B, 4, 5)),
    "transposed2d": Case(lambda: nn.ConvTranspose2d(2, 3, 3, bias=False), (B, 2, 4, 4)),
    "transposed3d": Case(lambda: nn.ConvTranspose3d(2, 2, 2, groups=2), (B, 2, 2, 2, 2)),
    "batchnorm": Case(lambda: S(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), (B, 3)),
    "residual": Case(Residual, (B, 3, 4, 4)),
    "instancenorm": Case(
        lambda: S(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True, track_running_stats=True)), (B, 2, 5, 5)
    ),
    "groupnorm": Case(lambda: S(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.PReLU(4)), (B, 2, 6)),
    "layernorm": Case(lambda: S(nn.Linear(4, 4), nn.LayerNorm((3, 4)), nn.RMSNorm(4), nn.Dropout1d(0.2)), (B, 3, 4)),
    "functional": Case(Functional, (B, 3)),
    "bag": Case(lambda: S(nn.EmbeddingBag(7, 4, mode="mean"), nn.Linear(4, 2)), (B, 3), classes=7, exact=False),
    "padded bag": Case(
        lambda: S(nn.EmbeddingBag(4, 4, mode="mean", padding_idx=0), nn.Tanh()), (B, 3), classes=4, exact=False
    ),
    "tied": Case(Tied, (B, 4), classes=7, exact=False),
    "reused": Case(Reused, (B, 4)),
    "views": Case(Views, (B, 4), exact=False),
    "computed": Case(Computed, (B, 3)),
    "paths": Case(Paths, (B, 3)),
    "bare": Case(Bare, (B, 3), exact=False),  # a product of batches rounds as the processor likes
    "kept": Case(Kept, (B, 3), grouped=True),
    "cells": Case(Cells, (B, 3, 3), exact=False),
    "attention": Case(Cross, (B, 3, 4), exact=False),
    "encoder": Case(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3), 2, enable_nested_tensor=False),
        (3, B, 4),
        batch_dim=1,
        exact=False,
    ),
    "alpha": Case(lambda: S(nn.Linear(3, 4), nn.SELU(), nn.AlphaDropout(0.3), nn.Linear(4, 2)), (B, 3)),
}


class First(nn.Module):
    """A recurrent network that returns its outputs alone."""

    def __init__(self, network: nn.RNNBase) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


CASES |= {
    "lstm": Case(lambda: First(nn.LSTM(3, 4, 2, dropout=0.3, bidirectional=True)), (4, B, 3), batch_dim=1, exact=False),
    "projected": Case(lambda: First(nn.LSTM(3, 4, proj_size=2, batch_first=True)), (B, 4, 3), exact=False),
    "gru": Case(lambda: First(nn.GRU(3, 4, bias=False, batch_first=True)), (B, 4, 3), exact=False),
    "rnn": Case(lambda: First(nn.RNN(3, 4, nonlinearity="relu", batch_first=True)), (B, 4, 3), exact=False),
}

CASES |= {
    "packed lstm": Case(lambda: Packed(nn.LSTM), (B, 4, 3), grouped=True, exact=False),
    "packed gru": Case(lambda: Packed(nn.GRU), (B, 4, 3), grouped=True, exact=False),
    "packed rnn": Case(lambda: Packed(nn.RNN), (B, 4, 3), grouped=True, exact=False),
    "added keys": Case(lambda: Added(add_bias_kv=True), (B, 3, 4), exact=False),
    "added zeros": Case(lambda: Added(add_zero_attn=True, dropout=0.3), (B, 3, 4), exact=False),
    "decoder": Case(lambda: Decoder(False, True), (B, 3, 4), exact=False),
    "transformer": Case(lambda: Decoder(True, True), (B, 3, 4), exact=False),
    "sequence first": Case(lambda: Decoder(False, False), (3, B, 4), batch_dim=1, exact=False),
}


CASES |= {
    "vision": Case(Vision, (B, 3, 4), exact=False),
    "queries": Case(Queries, (3, B, 4), batch_dim=1, exact=False),
    "language": Case(Language, (B, 4), classes=7, exact=False),
    "written": Case(Written, (B, 4, 3)),
    "weights": Case(Weights, (B, 3), exact=False),
    "functions": Case(Functions, (B, 3), exact=False),
    "gaps": Case(Gaps, (B, 3), exact=False),
    "spectral": Case(Spectral, (B, 4)),
    "segments": Case(Segments, (B, 2, 2, 3), exact=False),
    "windows": Case(Windows, (B, 4, 4), exact=False),
    "in place": Case(InPlace, (B, 3)),
    "standardised": Case(Standardised, (B, 2, 3, 3), exact=False),
}


def hyperparameters() -> metaopt.Hyperparameters:
    return metaopt.Hyperparameters(a=metaopt.interval(0.3, 0, 0.9), b=metaopt.positive([1.0, 2.0]))


def responding(case: Case, *, training: bool = False, **options: Any) -> tuple[Tuned, Tensor]:
    """A transformed model with a response that is not zero, and its input."""
    model = case.build()
    model.train(training)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.1 * torch.rand_like(buffer))
    options = {"batch_dim": case.batch_dim, **({"groups": 2} if case.grouped else {}), **options}
    tuned = metaopt.stn.transform(model, hyperparameters(), **options)
    with torch.no_grad():
        tuned.responses.weight.normal_()
    return tuned, case.input()


def at(tuned: Tuned, z: Tensor, *, groups: int | None = None, **kind: Any) -> Perturbation:
    return Perturbation(z, tuned.coordinates.values(z), groups, **kind)


def output(tuned: Tuned, x: Tensor, point: Perturbation) -> Tensor:
    with tuned.perturbed(point):
        y: Tensor = tuned(x)
    return y


__all__ = ["CASES", "Case", "at", "hyperparameters", "output", "responding"]
