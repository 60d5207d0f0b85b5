"""Values that a model leaves beside its output, in an attribute or a hook, which a linearised pass does not join."""

from __future__ import annotations

__all__ = ["Aside"]

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metaopt.errors import ResponseError
from metaopt.stn.arguments import reads_no_values
from metaopt.stn.linearised import kept_tangent
from metaopt.stn.perturbations import Perturbation
from metaopt.stn.trees import leaves

# What makes a constant of a tensor, as for a log.
STOPPING = {"detach", "item", "tolist", "numpy", "__format__", "__repr__"}


class Aside(TorchFunctionMode):
    """A watch over a loss function: it must use the model's output, and no value that was kept while that was computed.

    Args:
        at: the point of the step.
    """

    def __init__(self, at: Perturbation) -> None:
        super().__init__()
        self.at = at

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = not self.at.running and torch.is_grad_enabled() and not reads_no_values(func)
        if used and getattr(func, "__name__", "") not in STOPPING and not _is_data(func):
            for value in leaves((args, kwargs)):
                if isinstance(value, Tensor) and kept_tangent(value):
                    raise ResponseError(
                        f"the loss uses a value of shape {tuple(value.shape)} that the model kept beside its output, "
                        "as an attribute or by a hook. The network is linearised in its output, and this value would "
                        'not respond: let `forward` return it too, or use `method="centered"`.'
                    )
        return func(*args, **kwargs)


def _is_data(func: Any) -> bool:
    return getattr(getattr(func, "__self__", None), "__name__", "") == "data"
