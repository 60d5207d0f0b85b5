"""Products of a long matrix with a narrow one: which way round, and by which library, was measured to be fastest.

One way round takes up to twice as long as the other. Values differ by rounding.
"""

from __future__ import annotations

__all__ = ["LONG", "MUCH", "least_seconds", "measurable", "turn_products", "value_of"]

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

_aten = torch.ops.aten

# A product is worth a look if its result is so much longer than wide, and it is so many multiplications.
LONG, MUCH = 16, 2**20
_WORTH_IT = 1.15


def value_of(node: Any) -> Tensor | None:
    """What a node of the graph gives, without its numbers."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def measurable(factor: Tensor) -> bool:
    """Whether products with a factor may go the way that is measured to be fastest."""
    return factor.device.type == "cpu" and not torch.are_deterministic_algorithms_enabled()


def turn_products(graph: fx.Graph) -> None:
    """Turn what is worth it; what follows then has another layout."""
    for node in list(graph.nodes):
        if node.target in (_aten.mm.default, _aten.addmm.default) and not node.kwargs:
            _turn_product(graph, node)


def _turn_product(graph: fx.Graph, node: fx.Node) -> None:
    """``A B`` as ``(Bᵀ Aᵀ)ᵀ``, or by another library, where that is faster."""
    *bias, a, b = node.args
    left, right, whole = value_of(a), value_of(b), value_of(node)
    if left is None or right is None or whole is None or not measurable(left):
        return
    (m, k), n = left.shape, right.shape[1]
    if max(m, n) < LONG * min(m, n) or m * k * n < MUCH:
        return
    way = _fastest(left.dtype, (m, k, n), left.stride(), right.stride(), torch.get_num_threads())
    if way == _DIRECT:
        return
    with graph.inserting_before(node):
        new = way.product(graph.call_function, cast("fx.Node", a), cast("fx.Node", b))
        if bias:
            new = graph.call_function(_aten.add.Tensor, (new, bias[0]))
    new.meta["val"] = whole
    node.replace_all_uses_with(new)


class _Way(NamedTuple):
    """A way to multiply: turned round or not, by oneDNN or by what torch has for products."""

    turned: bool
    linear: bool

    def product(self, call: Callable[[Any, tuple[Any, ...]], Any], a: Any, b: Any) -> Any:
        """``A B``, each function called by ``call``."""
        if self.turned:
            a, b = call(_aten.t.default, (b,)), call(_aten.t.default, (a,))
        if self.linear:
            product = call(torch.ops.metaopt.linear.default, (a, call(_aten.t.default, (b,))))
        else:
            product = call(_aten.mm.default, (a, b))
        return call(_aten.t.default, (product,)) if self.turned else product


_DIRECT = _Way(False, False)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


# An operator of our own: inductor would copy what is not contiguous for torch's.
_operators = torch.library.Library("metaopt", "DEF")
_exact = [tag] if (tag := getattr(torch.Tag, "needs_exact_strides", None)) is not None else []
_operators.define("linear(Tensor x, Tensor weight) -> Tensor", tags=_exact)
_operators.impl("linear", _onednn, "CPU")
torch.library.register_fake("metaopt::linear", lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))


def _fastest(
    dtype: torch.dtype, shape: tuple[int, int, int], left: tuple[int, ...], right: tuple[int, ...], threads: int
) -> _Way:
    """What takes clearly less time than ``A B`` here, if anything does."""
    times = _seconds(dtype, shape, left, right, threads)
    best = min(times, key=times.__getitem__)
    return best if times[_DIRECT] > _WORTH_IT * times[best] else _DIRECT


def least_seconds(
    dtype: torch.dtype, shape: tuple[int, int, int], left: tuple[int, ...], right: tuple[int, ...], threads: int
) -> float:
    """What a product takes the fastest way: of ``(m, k)`` and ``(k, n)``, for ``(m, k, n)`` and the two's strides."""
    return min(_seconds(dtype, shape, left, right, threads).values())


@lru_cache(256)
def _seconds(
    dtype: torch.dtype, shape: tuple[int, int, int], left: tuple[int, ...], right: tuple[int, ...], threads: int
) -> dict[_Way, float]:
    """What each way takes, measured once for a shape."""
    m, k, n = shape
    a = torch.empty_strided((m, k), left, dtype=dtype).fill_(1)
    b = torch.empty_strided((k, n), right, dtype=dtype).fill_(1)
    known = dtype is torch.float32 and torch.backends.mkldnn.is_available()
    known = known and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ways = [_Way(turned, linear) for linear in (False, True)[: 1 + known] for turned in (False, True)]

    def seconds(way: _Way) -> float:
        start = time.perf_counter()
        way.product(lambda function, arguments: function(*arguments), a, b)
        return time.perf_counter() - start

    with torch.no_grad():
        rounds = [[seconds(way) for way in ways] for _ in range(7)]
    return {way: min(found) for way, found in zip(ways, zip(*rounds, strict=True), strict=True)}
