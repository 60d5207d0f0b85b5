"""What the replay calls instead of torch's functions gives what they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from metaopt.capture import replacements
from metaopt.capture.primitives import Phase


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 5), (2, 4, 3, 2)], ids=str)
def test_cross_entropy(shape: tuple[int, ...], smoothing: float, weighted: bool, reduction: str) -> None:
    x = torch.randn(shape)
    y = torch.randint(0, 4, (shape[0], *shape[2:]))
    y.view(-1)[1] = -100
    weight = torch.rand(4) if weighted else None
    expected = F.cross_entropy(x, y, weight, reduction=reduction, label_smoothing=smoothing)
    found = replacements.cross_entropy(x, y, weight, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("padding", [0, 2, -1])
@pytest.mark.parametrize("scale", [False, True])
def test_embedding_with_padding(padding: int, scale: bool) -> None:
    x, weight = torch.randint(0, 4, (3, 5)), torch.randn(4, 2, requires_grad=True)
    cotangent = torch.randn(3, 5, 2)
    expected = F.embedding(x, weight, padding, scale_grad_by_freq=scale)
    phase = Phase()
    with phase.loop():
        found = replacements.padded_embedding(phase, x, weight, padding, scale)
        gradients = [torch.autograd.grad(y, weight, cotangent)[0] for y in (found, expected)]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("padding", [None, 0, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
@pytest.mark.parametrize("bags", ["table", "offsets", "last"])
def test_embedding_bag(bags: str, mode: str, padding: int | None) -> None:
    x, weight = torch.randint(0, 6, (3, 4)), torch.randn(6, 2, requires_grad=True)
    options: dict[str, Any] = {"mode": "sum" if mode == "weighted" else mode, "padding_idx": padding}
    given = [weight]
    if mode == "weighted":
        options["per_sample_weights"] = torch.rand(x.shape if bags == "table" else 12, requires_grad=True)
        given.append(options["per_sample_weights"])
    if bags != "table":
        x = x.reshape(-1)
        options["offsets"] = torch.tensor([0, 3, 3, 8, 12] if bags == "last" else [0, 3, 3, 8])
        options["include_last_offset"] = bags == "last"
    found, expected = (function(x, weight, **options) for function in (replacements.embedding_bag, F.embedding_bag))
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(y, given, cotangent) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm(dim: int) -> None:
    v = torch.randn(4, 5, requires_grad=True)
    g = torch.rand((4, 1) if dim == 0 else (1, 5), requires_grad=True)
    torch.testing.assert_close(replacements.weight_norm(v, g, dim), torch._weight_norm(v, g, dim))
    assert torch.autograd.gradgradcheck(lambda v, g: replacements.weight_norm(v, g, dim), (v, g))


def test_torchs_weight_norm_still_has_a_wrong_second_derivative() -> None:
    # When this fails torch was mended, and the replacement can go.
    v, g = torch.randn(4, 5, requires_grad=True), torch.rand(4, 1, requires_grad=True)
    assert not torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0), (v, g), raise_exception=False)


@pytest.mark.parametrize(
    "mean", [0.3, torch.linspace(0, 1, 5), torch.linspace(0, 1, 3)[:, None]], ids=["number", "row", "column"]
)
@pytest.mark.parametrize("std", [0.5, torch.linspace(1, 2, 5), torch.ones(4, 3, 1)], ids=["number", "row", "batch"])
def test_normal(mean: Any, std: Any) -> None:
    if isinstance(mean, float) and isinstance(std, float):
        return
    functions = (replacements.normal, torch.normal)
    found, expected = (function(mean, std, generator=torch.Generator().manual_seed(1)) for function in functions)
    torch.testing.assert_close(found, expected)
