"""Dropout of every kind, with a rate for each example, and with one mask for primal and tangent."""

from __future__ import annotations

__all__ = ["DROPOUTS", "Rate"]

from functools import partialmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.errors import ResponseError
from metaopt.stn.passes import Pass
from metaopt.stn.rules import register
from metaopt.stn.variational import VariationalDropout

DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    VariationalDropout,
)

# The value to which SELU saturates: -scale · alpha.
SATURATION = -1.7580993408473766


class Rate(float):
    """A module's dropout rate that knows its module, and the hyperparameter it is bound to.

    It stands in for ``module.p`` during a pass: torch hands it on to the function untouched.

    Args:
        value: the rate, used where nothing is bound.
        module: the module's name.
        hyper: the hyperparameter, or None.
    """

    module: str
    hyper: str | None

    def __new__(cls, value: float, module: str, hyper: str | None) -> Rate:
        rate = super().__new__(cls, value)
        rate.module, rate.hyper = module, hyper
        return rate

    def __mul__(self, other: Any) -> Any:
        """``p * self.training`` is the rate, or none."""
        if type(other) in (bool, int) and other in (0, 1):
            return self if other else 0.0
        return _computed("__mul__", self, other)

    __rmul__ = __mul__

    def __getnewargs__(self) -> tuple[float, str, str | None]:  # type: ignore[override]
        """What a copy is made from."""
        return float(self), self.module, self.hyper


def _computed(name: str, rate: Rate, *others: Any) -> Any:
    """What is computed from a rate: a plain number.

    Raises:
        ResponseError: if it is bound: the number would be that of the module, for every example and for ever.
    """
    if rate.hyper is not None:
        raise ResponseError(
            f"the model computes with the rate of {rate.module!r}, which is bound to {rate.hyper!r} and differs from "
            "example to example; a number that is computed from it would not follow. Call the dropout, or hand its "
            "rate on as it is, `F.dropout(x, self.drop.p, self.training)`; for another rate bind a dropout of its own."
        )
    return getattr(float, name)(rate, *others)


for _name in ("add", "radd", "sub", "rsub", "truediv", "rtruediv", "pow", "rpow", "neg"):
    setattr(
        Rate, f"__{_name}__", partialmethod(lambda rate, name, *others: _computed(name, rate, *others), f"__{_name}__")
    )


def _rates(run: Pass, func: Any, x: Tensor, rate: float) -> Tensor | float | None:
    """The rate of each example in a shape that broadcasts with ``x``; one number where all are equal."""
    if not isinstance(rate, Rate):
        # The forward calls a functional dropout, which no name binds.
        run.functional_dropout = True
        return None
    if rate.hyper is None or rate.hyper not in run.rates:
        return None
    run.hyper_used.add(rate.hyper)
    run.called.add(rate.module)
    values = run.rates[rate.hyper]
    if isinstance(values, float):
        return values
    if values.dtype != x.dtype:
        values = values.to(x.dtype)
    if values.ndim == 0:
        return values
    layout = run.fixed or run.locate((f"dropout {rate.module}", func.__name__), x, values.shape[0])
    return values[0] if layout is None else layout.spread(values, x.ndim)


def _shape(func: Any, x: Tensor) -> torch.Size:
    """What has a mask of its own: every entry, or a whole channel."""
    if func is F.dropout or func is F.alpha_dropout:
        return x.shape
    # The first two axes are examples and channels, whatever torch's `dropout2d` is given, such as (N, C, L); the others
    # take what has other axes than a batch for a single example.
    batched = x.ndim == {F.dropout1d: 3, F.dropout3d: 5}.get(func, x.ndim)
    kept = 2 if batched else 1
    return torch.Size([n if d < kept else 1 for d, n in enumerate(x.shape)])


def _kept(noise: Tensor, rates: Tensor | float) -> Tensor:
    """1 where an entry is kept, and 0."""
    # Numbers at once: booleans that become numbers take several times longer.
    return torch.ge(noise, rates, out=torch.empty_like(noise))


def _apply(run: Pass, x: Tensor, factor: Tensor, shift: Tensor | None, inplace: bool) -> Tensor:
    dx = run.tangent(x) if run.linearised else None
    y = x * factor if shift is None else x * factor + shift
    change = None if dx is None else dx * factor
    if inplace:
        return run.overwrite(x, y, change)
    return y if change is None else run.join(y, change)


@register(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def dropout(
    run: Pass,
    func: Any,
    input: Tensor,  # noqa: A002
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    """``y = x m / (1 - p_b)`` with ``m ~ Bernoulli(1 - p_b)``, for entries or whole channels."""
    # In evaluation an order of examples can be read from the values; in training they are random.
    rates = _rates(run, func, input, p) if training or run.recording else None
    rates = rates if training else None
    if rates is None:
        if not training or run.tangent(input) is None:
            return func(input, p, training, inplace) if training else input
        # The same draw as torch's own, seen through ones.
        return _apply(run, input, func(torch.ones_like(input), p, training), None, inplace)
    noise = run.noise.uniform(input.shape if func is F.dropout else _shape(func, input), input)
    factor = _kept(noise, rates).div_(1 - rates if isinstance(rates, float) else torch.rsub(rates, 1))
    return _apply(run, input, factor, None, inplace)


@register(F.alpha_dropout, F.feature_alpha_dropout)
def alpha_dropout(
    run: Pass,
    func: Any,
    input: Tensor,  # noqa: A002
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Dropout that keeps mean and variance: dropped entries take SELU's saturation, then an affine map."""
    rates = _rates(run, func, input, p) if training else None
    if not training:
        return input
    # Never torch's own: its draw could not be seen from outside, and must be the same in every pass.
    rate = torch.as_tensor(float(p) if rates is None else rates, dtype=input.dtype, device=input.device)
    kept = _kept(run.noise.uniform(_shape(func, input), input), rate)
    scale = 1 / torch.sqrt((1 - rate) * (1 + rate * SATURATION**2))
    return _apply(run, input, kept * scale, scale * SATURATION * (1 - kept) - scale * SATURATION * rate, inplace)
