"""How torch's functions that are written in Python are handed to a pass.

`torch.overrides.handle_torch_function` asks the types of all arguments and opens two contexts, which takes longer than
many a small layer. A pass does not ask for types; it is given the function at once, and any other mode as ever.
"""

from __future__ import annotations

__all__ = ["Handed"]

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._C import _is_torch_function_mode_enabled, _pop_torch_function_stack, _push_on_torch_function_stack
from torch.overrides import TorchFunctionMode

from metaopt.capture.seams import Seam

_handle = torch.overrides.handle_torch_function


def _hand(function: Callable[..., Any], relevant: Any, /, *args: Any, **kwargs: Any) -> Any:
    if _is_torch_function_mode_enabled():
        # Off the stack while it looks: what it calls is not shown to it.
        mode = _pop_torch_function_stack()
        try:
            if isinstance(mode, Handed):
                return mode.__torch_function__(function, (), args, kwargs)
        finally:
            _push_on_torch_function_stack(mode)
    return _handle(function, relevant, *args, **kwargs)


_SEAM = Seam(F, "handle_torch_function", _hand)


class Handed(TorchFunctionMode):
    """A mode that does not ask for the arguments' types, and has a result for every function."""

    def __enter__(self) -> Any:
        _SEAM.__enter__()
        try:
            return super().__enter__()
        except BaseException:
            _SEAM.__exit__()
            raise

    def __exit__(self, *error: Any) -> None:
        _SEAM.__exit__()
        super().__exit__(*error)
