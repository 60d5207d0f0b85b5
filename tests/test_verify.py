"""What the comparison of a replay with the loop lets pass, and what it does not."""

from __future__ import annotations

import pytest
import torch

from metaopt.capture.verify import _difference


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_is_relative_whatever_the_size(size: float, dtype: torch.dtype) -> None:
    """It was not: of large tensors in single precision, a percent passed for rounding."""
    tensor = size * torch.randn(100, dtype=dtype)
    assert _difference(1.01 * tensor, tensor) == pytest.approx(0.01, rel=0.02)
    assert _difference(tensor * (1 + torch.finfo(dtype).eps), tensor) == 0.0


def test_what_is_not_finite_agrees_with_itself_alone() -> None:
    tensor = torch.tensor([1.0, torch.inf, torch.nan])
    assert _difference(tensor.clone(), tensor) == 0.0
    assert _difference(torch.tensor([2.0, torch.inf, torch.nan]), tensor) == pytest.approx(0.5)  # an infinity hid it
    assert _difference(torch.ones(2), tensor) == float("inf")
