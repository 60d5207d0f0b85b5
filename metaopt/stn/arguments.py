"""What a function is given: which of some tensors, and whether it reads their values; and its name."""

from __future__ import annotations

__all__ = ["among", "function_name", "reads_no_values"]

from collections.abc import Mapping
from typing import Any

# Attributes of a tensor that are not tensors: reading them is no use of a weight.
PLAIN = {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_leaf", "grad_fn", "itemsize"}
PLAIN |= {"is_nested", "is_sparse", "is_sparse_csr", "is_quantized", "is_cpu", "is_meta", "is_mps", "is_xpu", "grad"}
PLAIN_METHODS = {"size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size", "ndimension"}
PLAIN_METHODS |= {"type", "get_device", "is_complex", "__len__", "__hash__", "__repr__", "data_ptr", "nelement"}
PLAIN_METHODS |= {"is_signed", "is_inference", "__format__"}

# Arguments that neither are tensors nor hold any; most are of these types.
_SINGLE = {bool, int, float, str, type(None)}


def among(known: Mapping[int, Any], args: Any, kwargs: Mapping[str, Any]) -> list[int]:
    """Which of some tensors are given to a function."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if value.__class__ in _SINGLE:
            continue
        if id(value) in known:
            found.append(id(value))
        elif isinstance(value, (list, tuple)):
            found += [id(v) for v in value if id(v) in known]
    return found


def reads_no_values(func: Any) -> bool:
    """Whether a function of a tensor does not depend on its entries."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in PLAIN
    return name in PLAIN_METHODS


def function_name(func: Any) -> str:
    """A function of torch, in words for an error."""
    if getattr(func, "__name__", "") == "__get__":
        return f"Tensor.{getattr(func.__self__, '__name__', '?')}"
    module = getattr(func, "__module__", None) or "Tensor"
    return f"{module.removeprefix('torch._C.').removeprefix('_')}.{getattr(func, '__name__', func)}"
