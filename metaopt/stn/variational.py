"""Dropout with one mask for a whole sequence."""

from __future__ import annotations

__all__ = ["VariationalDropout"]

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.errors import ResponseError


class VariationalDropout(nn.Module):
    r"""Dropout of a sequence, with one mask for each example that all its time steps share.

    .. math:: y_{bt} = m_b \odot x_{bt} / (1 - p_b), \quad m_b \sim \mathrm{Bernoulli}(1 - p_b)

    A module as ``nn.Dropout`` is, to be placed before, between or behind recurrent layers. Bind it by name, and each
    sequence of a batch has a rate of its own.

    Args:
        p: the rate.
        batch_first: whether the input is ``(B, T, ...)``, and not ``(T, B, ...)``; as in ``nn.LSTM``.

    Shape:
        The output has the shape of the input.

    Raises:
        ResponseError: if the rate is not in [0, 1), or the input is not a tensor with axes of time and examples.

    References:
        Gal and Ghahramani, *A Theoretically Grounded Application of Dropout in Recurrent Neural Networks*, 2016;
        "locked" dropout in Merity et al., *Regularizing and Optimizing LSTM Language Models*, 2018, Sec. 4.2.
    """

    def __init__(self, p: float = 0.5, *, batch_first: bool = False) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ResponseError(f"a dropout rate is in [0, 1), got {p}: at 1 the mask divides by zero.")
        self.p, self.batch_first = p, batch_first

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Drop the same entries at every time step."""
        if not isinstance(input, Tensor) or input.ndim < 2:
            raise ResponseError(
                f"VariationalDropout takes a tensor with axes of time and examples, got {type(input).__name__}; "
                "of a packed sequence drop before packing, or after `pad_packed_sequence`."
            )
        if not self.training:
            return input
        # A mask is seen through ones, so that it is drawn by the function that bound rates are known to.
        return input * F.dropout(torch.ones_like(input.narrow(int(self.batch_first), 0, 1)), self.p, True)

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them."""
        return f"p={self.p}, batch_first={self.batch_first}"
