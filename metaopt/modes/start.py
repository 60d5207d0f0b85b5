"""Where a context began: what it takes to go back there."""

from __future__ import annotations

__all__ = ["Start", "random_states", "set_random_states"]

import copy
import random
import weakref
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.optim import Optimizer


class Start:
    """The state of training when a context was entered.

    Tensors are copied when they are first written, so that a context which is not rewound pays for little.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._saved: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._order: list[int] = []
        self._open = True
        self._optimizers = [_Kept(optimizer) for optimizer in optimizers]
        self._random = random_states()

    def remember(self, tensor: Tensor) -> None:
        """Copy a tensor that is about to be written for the first time."""
        known = self._saved.get(id(tensor))
        if not self._open or (known is not None and known[0]() is tensor):
            return
        self._saved[id(tensor)] = (weakref.ref(tensor), tensor.detach().clone())
        self._order.append(id(tensor))
        if len(self._order) > 4096:
            self._forget_the_dead()

    def _forget_the_dead(self) -> None:
        self._saved = {key: entry for key, entry in self._saved.items() if entry[0]() is not None}
        self._order = [key for key in dict.fromkeys(self._order) if key in self._saved]

    def close(self) -> None:
        """The context has ended: what is written from now on is not its business."""
        self._open = False
        self._forget_the_dead()

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            # Last saved first: a view that was saved before its base is right where the base's copy is not.
            for key in reversed(self._order):
                reference, value = self._saved[key]
                tensor = reference()
                if tensor is not None:
                    tensor.copy_(value)
        for kept in self._optimizers:
            kept.restore()
        set_random_states(self._random)


class _Kept:
    """An optimizer's settings, its gradients and what it holds of its weights, as they were."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._groups = [{k: _copied(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._grads = [(weight, weight.grad) for group in optimizer.param_groups for weight in group["params"]]
        self._state = {weight: _shallow(state) for weight, state in optimizer.state.items()}
        bookmark = getattr(optimizer, "bookmark", None)
        self._bookmark = None if bookmark is None else bookmark()

    def restore(self) -> None:
        del self.optimizer.param_groups[len(self._groups) :]
        for group, numbers in zip(self.optimizer.param_groups, self._groups, strict=True):
            for name in [name for name in group if name != "params" and name not in numbers]:
                del group[name]
            group.update({key: _copied(value) for key, value in numbers.items()})
        for weight, grad in self._grads:
            weight.grad = grad
        self.optimizer.state.clear()
        for weight, state in self._state.items():
            self.optimizer.state[weight] = _shallow(state)
        if self._bookmark is not None:
            self.optimizer.go_back(self._bookmark)  # type: ignore[attr-defined]


def _copied(setting: Any) -> Any:
    # A tensor among the settings is a hyperparameter, and stays the object that it is.
    return setting if isinstance(setting, Tensor) else copy.copy(setting)


def _shallow(state: Any) -> Any:
    # Small tensors (step counters) are copied, since the optimizer writes them out of sight; large ones are kept by
    # reference, and copied when the tape announces a write. Some optimizers keep numbers beside what they know of
    # weights.
    if isinstance(state, dict):
        return {key: _shallow(value) for key, value in state.items()}
    if isinstance(state, Tensor):
        return state.clone() if state.numel() == 1 else state
    return copy.copy(state)


def random_states() -> dict[str, Any]:
    """Where the random generators of torch, Python and numpy stand."""
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put the random generators back."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
