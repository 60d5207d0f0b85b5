"""Layers of torch's own that a pass calls without the way round through torch's function modes.

A mode is found anew for each function, which takes longer than a small layer's activation does. While a pass runs, the
simplest of torch's modules hand it the very call that their ``forward`` makes. Where anything is not as usual (a
subclass, a ``forward`` of the instance's own, another mode on top, tensors of another class) they go the way round.
"""

from __future__ import annotations

__all__ = ["Direct"]

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _len_torch_function_stack, _pop_torch_function_stack, _push_on_torch_function_stack

if TYPE_CHECKING:
    from metaopt.stn.passes import Pass

# By the type of a module: the function that its ``forward`` calls, and what it is given beside the input.
_Given = tuple[tuple[Any, ...], dict[str, Any]]


def _linear(m: Any) -> _Given:
    own = m._parameters
    # An attribute of a module is looked up in several places.
    return (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (m.weight, m.bias), {}


def _inplace(m: Any) -> _Given:
    return (), {"inplace": m.inplace}


def _dropout(m: Any) -> _Given:
    return (), {"p": m.p, "training": m.training, "inplace": m.inplace}


_KNOWN: dict[Any, tuple[Any, Callable[[Any], _Given]]] = {
    nn.Linear: (F.linear, _linear),
    nn.ReLU: (F.relu, _inplace),
    nn.Dropout: (F.dropout, _dropout),
    nn.Dropout1d: (F.dropout1d, _dropout),
    nn.Dropout2d: (F.dropout2d, _dropout),
    nn.Dropout3d: (F.dropout3d, _dropout),
}
# As torch has them, and not as somebody has changed them since.
_FORWARD = {kind: kind.forward for kind in _KNOWN}


class _Open:
    """The pass that runs, if one does, and how many modes there are then."""

    run: Pass | None = None
    modes = 0


class _Call:
    """Stands in for the ``forward`` of one module."""

    def __init__(self, module: nn.Module, opened: _Open) -> None:
        self._module, self._open = module, opened
        self._function, self._given = _KNOWN[type(module)]
        self.kind: Any = type(module)
        self.forward: Any = _FORWARD[self.kind]

    def __call__(self, input: Tensor) -> Any:  # noqa: A002
        run, module = self._open.run, self._module
        if run is None or type(input) is not Tensor or _len_torch_function_stack() != self._open.modes:
            return type(module).forward(module, input)
        args, kwargs = self._given(module)
        mode = _pop_torch_function_stack()
        try:
            return run.__torch_function__(self._function, (), (input, *args), kwargs)
        finally:
            _push_on_torch_function_stack(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Of a module that is copied while a pass runs: the copy's own.
        copied = memo[id(self._module)]
        return type(copied).forward.__get__(copied)


class Direct:
    """The modules of a model that hand a pass their call.

    Args:
        modules: all of the model's.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._open = _Open()
        self._calls = [(m, _Call(m, self._open)) for m in modules if type(m) in _KNOWN]
        self._put: list[dict[str, Any]] = []

    def to(self, run: Pass) -> Direct:
        """Let them call a pass, within ``with``; it is the mode on top there."""
        self._open.run = run
        return self

    def __enter__(self) -> None:
        self._open.modes = _len_torch_function_stack()
        usual = [(m.__dict__, c) for m, c in self._calls if "forward" not in m.__dict__ and c.kind.forward is c.forward]
        self._put = [store for store, _ in usual]
        for store, call in usual:
            store["forward"] = call

    def __exit__(self, *_: object) -> None:
        for store in self._put:
            if "forward" in store:
                del store["forward"]
        self._put, self._open.run = [], None

    def __deepcopy__(self, memo: dict[int, Any]) -> Direct:
        return Direct([copy.deepcopy(module, memo) for module, _ in self._calls])
