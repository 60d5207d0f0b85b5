"""Products that share a long factor, as one product that reads it once.

A step's derivative multiplies its batch by the weights and by their adjoint, later by two residuals. Where the other
factors are narrow, to read the batch takes most of the time: ``L A`` and ``L B`` are ``L [A B]``, where that was
measured to be faster. Values differ by rounding.
"""

from __future__ import annotations

__all__ = ["join_sharing"]

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from metaopt.capture.products import LONG, MUCH, least_seconds, measurable, value_of

_aten = torch.ops.aten
_WORTH_IT = 1.1


@dataclass(frozen=True)
class _Product:
    """``L N`` with a long factor and a narrow one, or its transpose.

    Attributes:
        node: gives it.
        long: gives ``L``, or ``Lᵀ`` if ``turned``.
        narrow: gives ``Nᵀ``, or ``N`` if ``upright``.
    """

    node: fx.Node
    long: fx.Node
    turned: bool
    narrow: fx.Node
    upright: bool
    transposed: bool

    @classmethod
    def of(cls, node: fx.Node) -> _Product | None:
        """A call of the graph as such a product."""
        if node.target not in (_aten.mm.default, _aten.addmm.default) or node.kwargs:
            return None
        a, b = cast("list[fx.Node]", node.args[-2:])
        left, right = value_of(a), value_of(b)
        if left is None or right is None or value_of(node) is None or not measurable(left):
            return None
        (m, k), n = left.shape, right.shape[1]
        if max(m, n) < LONG * min(m, n) or m * k * n < MUCH:
            return None
        # Nᵀ has a row for each column of the product: aᵀ lies as N does where the long factor is the right one.
        (long, turned), (narrow, upright) = (_root(a), _root(b)) if m > n else (_root(b), _root(a))
        if m > n:
            return cls(node, long, turned, narrow, not upright, False)
        return cls(node, long, not turned, narrow, upright, True)

    @property
    def width(self) -> int:
        """The columns of ``N``."""
        shape = cast("torch.Tensor", value_of(self.node)).shape
        return shape[0] if self.transposed else shape[1]


def join_sharing(graph: fx.Graph) -> None:
    """Join what is worth it; the joined products' parts are views of the whole."""
    groups: dict[tuple[fx.Node, bool], list[_Product]] = {}
    for node in graph.nodes:
        product = _Product.of(node)
        if product is not None:
            groups.setdefault((product.long, product.turned), []).append(product)
    for products in groups.values():
        while products:
            first, *products = products
            together = [first]
            for product in list(products):
                if _pays([*together, product]) and _is_apart(together, product):
                    together.append(product)
                    products.remove(product)
            if len(together) > 1:
                _join(graph, together)


def _root(node: fx.Node) -> tuple[fx.Node, bool]:
    """What a node is the transpose of, and whether it is one."""
    turned = False
    while node.target is _aten.t.default:
        node, turned = cast("fx.Node", node.args[0]), not turned
    return node, turned


def _pays(products: list[_Product]) -> bool:
    """Whether a product of all of them takes clearly less time than all but the last joined, and the last."""
    *others, last = products
    values = [cast("torch.Tensor", value_of(product.long)) for product in products]
    long = values[0].t() if last.turned else values[0]
    if any(value_of(product.narrow).dtype != long.dtype for product in products):  # type: ignore[union-attr]
        return False
    rows, inner = long.shape
    before = sum(product.width for product in others)
    if rows < LONG * (before + last.width):
        return False

    def seconds(width: int) -> float:
        return least_seconds(long.dtype, (rows, inner, width), long.stride(), (1, inner), torch.get_num_threads())

    return seconds(before) + seconds(last.width) > _WORTH_IT * seconds(before + last.width)


def _is_apart(products: list[_Product], last: _Product) -> bool:
    """Whether none needs another's result."""
    others = {product.node for product in products}
    if others & _ancestors(last.node):
        return False
    return all(last.node not in _ancestors(product.node) for product in products)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _blank(node: fx.Node) -> torch.Tensor:
    value = cast("torch.Tensor", value_of(node))
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _join(graph: fx.Graph, products: list[_Product]) -> None:
    def call(function: Any, *arguments: Any) -> fx.Node:
        node = graph.call_function(function, arguments)
        with FakeTensorMode():
            node.meta["val"] = function(*fx.map_arg(arguments, _blank))
        return node

    (output,) = (node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        rows = [call(_aten.t.default, p.narrow) if p.upright else p.narrow for p in products]
        narrow = call(_aten.t.default, call(_aten.cat.default, rows))
        first = products[0]
        long = call(_aten.t.default, first.long) if first.turned else first.long
        whole = call(_aten.mm.default, long, narrow)
        start = 0
        for product in products:
            part = call(_aten.slice.Tensor, whole, 1, start, start + product.width)
            start += product.width
            if product.transposed:
                part = call(_aten.t.default, part)
            if product.node.target is _aten.addmm.default:
                part = call(_aten.add.Tensor, part, product.node.args[0])
            product.node.replace_all_uses_with(part)
            graph.erase_node(product.node)
    _sort(output, _sources_first(graph.nodes))


def _sources_first(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes in their order, but for those that have to wait for what they read."""
    found: dict[fx.Node, None] = {}
    begun: set[fx.Node] = set()
    for node in nodes:
        waiting = [node]
        while waiting:
            last = waiting[-1]
            missing = [] if last in found else [source for source in last.all_input_nodes if source not in found]
            if not missing:
                found[waiting.pop()] = None
                continue
            assert last not in begun, "a call needs its own result"
            begun.add(last)
            waiting += missing
    return list(found)


def _sort(output: fx.Node, order: list[fx.Node]) -> None:
    for node in order:
        if node is not output:
            output.prepend(node)
