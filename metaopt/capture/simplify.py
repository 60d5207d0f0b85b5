"""A graph of aten calls, rewritten to one that computes the same with less.

What torch's own derivative formulas leave behind, and a compiler does not look for: sums with zeros; two products that
are added, where one would do; and products of a long matrix with a narrow one, which take up to twice as long one way
round as the other. Values differ by rounding.
"""

from __future__ import annotations

__all__ = ["simplify"]

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_ZEROS = (_aten.zeros_like.default, _aten.zeros.default, _aten.new_zeros.default)
_ALIKE = ("shape", "dtype", "device")
_BY_LAYOUT = (_aten.as_strided.default, _aten.as_strided_scatter.default, _aten.view.dtype)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)

# A product is worth a look if its result is so much longer than wide, and it is so many multiplications.
_LONG, _MUCH = 16, 2**20
_WORTH_IT = 1.25


def simplify(graph: fx.Graph) -> None:
    """Rewrite a graph of `make_fx` in place."""
    for node in list(graph.nodes):
        if node.target is _aten.add.Tensor and not node.kwargs:
            _drop_zeros(node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.target is _aten.add.Tensor and not node.kwargs:
            _join_products(graph, node)
    _turn_products(graph)
    graph.eliminate_dead_code()


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _drop_zeros(node: fx.Node) -> None:
    """``x + 0``, where torch had no gradient and made one of zeros."""
    whole = _value(node)
    for term, other in (node.args, node.args[::-1]):
        value = _value(term)
        if value is None or whole is None or getattr(other, "target", None) not in _ZEROS:
            continue
        # Of another layout, it may be one that what follows can't view.
        if all(getattr(value, name) == getattr(whole, name) for name in _ALIKE) and value.stride() == whole.stride():
            node.replace_all_uses_with(cast("fx.Node", term))
            return


def _join_products(graph: fx.Graph, node: fx.Node) -> None:
    """``A B + C D`` as ``[A C] [B; D]``: the result, larger than what is multiplied, is written once."""
    terms = [term for term in node.all_input_nodes if term.target is _aten.mm.default and len(term.users) == 1]
    if len(terms) != 2:
        return
    factors = [cast("list[fx.Node]", list(term.args)) for term in terms]
    values = [[value for x in pair if (value := _value(x)) is not None] for pair in factors]
    if any(len(pair) != 2 for pair in values):
        return
    ((m, n), dtype), other = [((left.shape[0], right.shape[1]), left.dtype) for left, right in values]
    if other != ((m, n), dtype) or sum(left.shape[1] for left, _ in values) > min(m, n):
        return
    with graph.inserting_before(node):
        left = graph.call_function(_aten.cat.default, ([a for a, _ in factors], 1))
        right = graph.call_function(_aten.cat.default, ([b for _, b in factors], 0))
        joined = graph.call_function(_aten.mm.default, (left, right))
    joined.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(joined)


def _turn_products(graph: fx.Graph) -> None:
    """Turn what is worth it; what follows then has another layout, of which not every view is one."""
    if any(node.target in _BY_LAYOUT for node in graph.nodes):
        return
    for node in list(graph.nodes):
        if node.target in (_aten.mm.default, _aten.addmm.default) and not node.kwargs:
            _turn_product(graph, node)
    for node in graph.nodes:
        if node.target in _VIEWS:
            node.target = _aten.reshape.default


def _turn_product(graph: fx.Graph, node: fx.Node) -> None:
    """``A B`` as ``(Bᵀ Aᵀ)ᵀ``, where that is faster."""
    *bias, a, b = node.args
    left, right, whole = _value(a), _value(b), _value(node)
    if left is None or right is None or whole is None or left.device.type != "cpu":
        return
    (m, k), n = left.shape, right.shape[1]
    if max(m, n) < _LONG * min(m, n) or m * k * n < _MUCH or torch.are_deterministic_algorithms_enabled():
        return
    if not _is_faster_turned(left.dtype, (m, k, n), left.stride(), right.stride(), torch.get_num_threads()):
        return
    with graph.inserting_before(node):
        factors = [graph.call_function(_aten.t.default, (x,)) for x in (b, a)]
        new = graph.call_function(_aten.mm.default, tuple(factors))
        new = graph.call_function(_aten.t.default, (new,))
        if bias:
            new = graph.call_function(_aten.add.Tensor, (new, bias[0]))
    new.meta["val"] = whole
    node.replace_all_uses_with(new)


@lru_cache(256)
def _is_faster_turned(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    left: tuple[int, ...],
    right: tuple[int, ...],
    threads: int,
) -> bool:
    """Whether ``(Bᵀ Aᵀ)ᵀ`` takes clearly less time than ``A B`` here, measured once for a shape."""
    m, k, n = shape
    a = torch.empty_strided((m, k), left, dtype=dtype).fill_(1)
    b = torch.empty_strided((k, n), right, dtype=dtype).fill_(1)

    def seconds(product: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        product()
        return time.perf_counter() - start

    with torch.no_grad():
        pairs = [(seconds(lambda: a @ b), seconds(lambda: b.t() @ a.t())) for _ in range(7)]
    direct, turned = (min(times) for times in zip(*pairs, strict=True))
    return direct > _WORTH_IT * turned
