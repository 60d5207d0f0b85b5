"""A graph of aten calls, rewritten to one that computes the same with less.

What torch's own derivative formulas leave behind, and a compiler does not look for: sums with zeros; two products that
are added, or share a factor (see `sharing`), where one would do; and products that take longer than they need (see
`products`). Values differ by rounding.
"""

from __future__ import annotations

__all__ = ["simplify"]

from typing import cast

import torch
from torch import fx

from metaopt.capture.products import turn_products, value_of
from metaopt.capture.sharing import join_sharing

_aten = torch.ops.aten
_ZEROS = (_aten.zeros_like.default, _aten.zeros.default, _aten.new_zeros.default)
_ALIKE = ("shape", "dtype", "device")
_BY_LAYOUT = (_aten.as_strided.default, _aten.as_strided_scatter.default, _aten.view.dtype)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)


def simplify(graph: fx.Graph) -> None:
    """Rewrite a graph of `make_fx` in place."""
    for node in list(graph.nodes):
        if node.target is _aten.add.Tensor and not node.kwargs:
            _drop_zeros(node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.target is _aten.add.Tensor and not node.kwargs:
            _join_products(graph, node)
    # What follows these has another layout, of which not every view is one.
    if not any(node.target in _BY_LAYOUT for node in graph.nodes):
        join_sharing(graph)
        turn_products(graph)
        for node in graph.nodes:
            if node.target in _VIEWS:
                node.target = _aten.reshape.default
    graph.eliminate_dead_code()


def _drop_zeros(node: fx.Node) -> None:
    """``x + 0``, where torch had no gradient and made one of zeros."""
    whole = value_of(node)
    for term, other in (node.args, node.args[::-1]):
        value = value_of(term)
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
    values = [[value for x in pair if (value := value_of(x)) is not None] for pair in factors]
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
