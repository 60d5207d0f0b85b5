"""Random numbers of a step, drawn outside of its compiled function and handed to it.

A compiled function can't set the generators to where the loop had them. What is drawn depends on shapes and numbers
only, so it can be drawn before.
"""

from __future__ import annotations

__all__ = ["Draw", "Drawing", "UntraceableError", "draw_all"]

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaopt.capture.primitives import RNG, seeded

_aten = torch.ops.aten
# Draws into a tensor, or beside one, of which only the shape counts …
_IN_PLACE = {
    _aten.bernoulli_.float,
    _aten.uniform_.default,
    _aten.normal_.default,
    _aten.exponential_.default,
    _aten.log_normal_.default,
    _aten.cauchy_.default,
    _aten.geometric_.default,
    _aten.random_.default,
    _aten.random_.to,
    getattr(_aten.random_, "from"),
}
_LIKE = {
    _aten.bernoulli.p,
    _aten.rand_like.default,
    _aten.randn_like.default,
    _aten.randint_like.default,
    _aten.randint_like.low_dtype,
}
# … and draws of their own shape.
_NEW = {
    _aten.rand.default,
    _aten.randn.default,
    _aten.randint.default,
    _aten.randint.low,
    _aten.randperm.default,
    _aten.normal.float_float,
}


class UntraceableError(Exception):
    """A step can't be written as a graph of fixed calls; the text says why."""


class Draw(NamedTuple):
    """One call that draws: by which of the loop's calls, how, and into what."""

    seed: int
    func: Callable[..., Any]
    like: tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device] | None
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self) -> Tensor:
        """Draw, with the generators as they stand."""
        given = []
        if self.like is not None:
            shape, stride, dtype, device = self.like
            given = [torch.empty_strided(shape, stride, dtype=dtype, device=device)]
        result: Tensor = self.func(*given, *self.args, **dict(self.kwargs))
        return result


class Drawing(TorchDispatchMode):
    """While open, notes what is drawn; or, given what was drawn, hands that out in place of drawing."""

    def __init__(self, supply: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self._supply = None if supply is None else list(supply)
        self._seed = -1

    def seeds(self, states: Sequence[RNG]) -> list[Any]:
        """Stand-ins for the generators' states, each of which has its calls drawn from here."""
        return [_Seed(self, place, state) for place, state in enumerate(states)]

    def call(self, seed: int, states: RNG, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a call of the loop that draws."""
        self._seed = seed
        with self:
            if self._supply is not None:
                return func(*args, **kwargs)
            return seeded(states, func, *args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if self._supply is None:
            self.draws.append(_described(self._seed, func, args, kwargs))
            return func(*args, **kwargs)
        value = self._supply.pop(0)
        return args[0].copy_(value) if func in _IN_PLACE else value.clone()


class _Seed:
    def __init__(self, drawing: Drawing, place: int, states: RNG) -> None:
        self.drawing, self.place, self.states = drawing, place, states

    def __call__(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return self.drawing.call(self.place, self.states, func, args, kwargs)


def _described(seed: int, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Draw:
    like = None
    rest = tuple(args)
    if func in _IN_PLACE or func in _LIKE:
        first, *others = args
        like = (tuple(first.shape), tuple(first.stride()), first.dtype, first.device)
        rest = tuple(others)
    elif func not in _NEW:
        raise UntraceableError(f"{func} draws random numbers in a way that depends on what the step computed")
    given = tuple((key, value) for key, value in kwargs.items() if value is not None)
    if any(isinstance(value, (Tensor, torch.Generator)) for value in (*rest, *(value for _, value in given))):
        raise UntraceableError(f"{func} draws random numbers from a generator or with tensors of its own")
    return Draw(seed, func, like, rest, given)


def draw_all(draws: Sequence[Draw], seeds: Sequence[RNG]) -> list[Tensor]:
    """What a step drew, drawn again: each call of the loop's from where the generators were."""
    found: list[Tensor] = []
    for place in dict.fromkeys(draw.seed for draw in draws):
        calls = [draw for draw in draws if draw.seed == place]
        found += seeded(seeds[place], lambda calls=calls: [draw() for draw in calls])
    return found
