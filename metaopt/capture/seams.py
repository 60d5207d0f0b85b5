"""Attributes of torch's classes and modules that are others while a context is open, such as what no mode shows."""

from __future__ import annotations

__all__ = ["Seam", "see_variables"]

import threading
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.autograd.variable import VariableMeta

_NOTHING = object()


class Seam:
    """An attribute that is another, or is there at all, while at least one context is open.

    Args:
        owner: the class or module.
        name: the attribute's name.
        value: the attribute.
    """

    def __init__(self, owner: type | ModuleType, name: str, value: Any) -> None:
        self._owner, self._name, self._value = owner, name, value
        self._lock = threading.Lock()
        self._users = 0
        self._before: Any = _NOTHING

    def open(self) -> Seam:
        """The span of a context, for ``with``."""
        return self

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = vars(self._owner).get(self._name, _NOTHING)
                setattr(self._owner, self._name, self._value)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            if self._before is _NOTHING:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, self._before)


def _variable(cls: type, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], Tensor) and len(args) < 3 and kwargs.keys() <= {"requires_grad"}:
        given = dict(zip(("requires_grad",), args[1:], strict=False)) | kwargs
        # It is the same to torch, but for this: these two are shown.
        return args[0].detach().requires_grad_(bool(given.get("requires_grad", False)))
    return type.__call__(cls, *args, **kwargs)


# ``torch.autograd.Variable(x, requires_grad=True)``, as old code makes leaves to take gradients at.
see_variables = Seam(VariableMeta, "__call__", _variable).open
