"""A function of tensors as a graph of aten calls, with what is known already cut out of it."""

from __future__ import annotations

__all__ = ["Graph", "trace"]

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from metaopt.capture.draws import UntraceableError
from metaopt.capture.simplify import simplify

# What `detach` is written as; since torch 2.15 the second.
_SAME_VALUE = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_EMPTY = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


@dataclass
class Graph:
    """Straight-line aten code.

    Attributes:
        scalars: computes what numbers follow from numbers alone.
        module: computes the rest, from these and the arguments.
        reads: which of the arguments each of the two reads.
        results: which of the results there are.
    """

    scalars: fx.GraphModule
    module: fx.GraphModule
    reads: tuple[list[int], list[int]]
    results: list[bool]

    def __call__(self, arguments: Sequence[Tensor], call: Callable[..., Any] | None = None) -> list[Tensor | None]:
        """The results, with None where there is none; ``call`` may be the module, compiled."""
        with torch.no_grad():
            found = iter((call or self.module)(*self.inputs(arguments)))
        return [next(found) if there else None for there in self.results]

    def inputs(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """What the module is called with."""
        scalars, rest = self.reads
        return [*self.scalars(*[arguments[place] for place in scalars]), *[arguments[place] for place in rest]]


def trace(
    function: Callable[[Sequence[Tensor]], tuple[Sequence[Tensor | None], Sequence[Tensor]]],
    arguments: Sequence[Tensor],
    known: Sequence[Tensor] = (),
) -> Graph:
    """Write a function as a graph.

    Args:
        function: gives results, and values that it computes on the way.
        arguments: what it is called with.
        known: those values, which the graph's callers have: they become further arguments of it, and what was only
            needed to compute them is left out.

    Raises:
        UntraceableError: if the calls depend on what the tensors hold.
    """
    there: list[bool] = []

    def flat(*given: Tensor) -> list[Tensor]:
        results, values = function(given)
        there[:] = [result is not None for result in results]
        return [*(result for result in results if result is not None), *values]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = make_fx(flat)(*arguments)
        _refuse(module)
        if any(_mutates(node) for node in module.graph.nodes):
            with torch.no_grad():
                module = make_fx(torch.func.functionalize(module, remove="mutations"))(*arguments)
            _fill(module.graph)
    _cut(module.graph, sum(there), known)
    module.graph.eliminate_dead_code()
    simplify(module.graph)
    return _split(module, there)


def _fill(graph: fx.Graph) -> None:
    """Let memory begin with zeros, and not with whatever lay there.

    It is written before it is read; but a write through an expanded view of ``x`` was made ``x + (new - x)``.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _EMPTY:
            with graph.inserting_after(node):
                zeros = graph.call_function(torch.ops.aten.zeros_like.default, (node,))
            zeros.meta["val"] = node.meta.get("val")
            node.replace_all_uses_with(zeros, lambda user, zeros=zeros: user is not zeros)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _refuse(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "get_attr" and getattr(module, node.target).numel() > 1:
            raise UntraceableError("it uses a tensor that is neither its argument nor computed from one")
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise UntraceableError(f"{node.target} draws random numbers where the loop was not seen to")
        by_data = torch.Tag.dynamic_output_shape in node.target.tags and not _indexes(node)
        if by_data or (_indexes(node) and _picks_by_mask(node)):
            raise UntraceableError(f"the shape of what {node.target} returns depends on what the tensors hold")


def _indexes(node: fx.Node) -> bool:
    return str(node.target).startswith(("aten.index.", "aten.index_put", "aten._unsafe_index"))


def _picks_by_mask(node: fx.Node) -> bool:
    places: Any = node.args[1]
    return any(place is not None and place.meta["val"].dtype in (torch.bool, torch.uint8) for place in places)


def _cut(graph: fx.Graph, results: int, known: Sequence[Tensor]) -> None:
    """Replace the known values, which stand behind the results, by arguments."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    returned: list[Any] = list(output.args[0])
    (last, *_) = [node for node in reversed(graph.nodes) if node.op == "placeholder"] or [None]
    replaced: dict[fx.Node, fx.Node] = {}
    for place, (node, _) in enumerate(zip(returned[results:], known, strict=True)):
        with graph.inserting_before(next(iter(graph.nodes)) if last is None else last.next):
            new = last = graph.placeholder(f"known_{place}")
        while node.target in _SAME_VALUE:
            (node,) = node.args
        if node.op == "call_function":
            replaced.setdefault(node, new)
    output.args = (returned[:results],)
    for node, new in replaced.items():
        node.replace_all_uses_with(new)


def _split(module: fx.GraphModule, there: list[bool]) -> Graph:
    """Cut off what is computed from numbers alone, which a compiler would compute again for every element."""
    graph = module.graph
    graph.eliminate_dead_code()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    places = {node: place for place, node in enumerate(placeholders)}
    scalar = {node for node in placeholders if _is_scalar(node)}
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "call_function" and _is_scalar(node) and sources and all(source in scalar for source in sources):
            scalar.add(node)
    first = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in scalar:
            copies[node] = first.node_copy(node, lambda source: copies[source])
    last = [node for node in scalar if node.op != "placeholder" and any(user not in scalar for user in node.users)]
    first.output([copies[node] for node in last])
    with graph.inserting_before(next(iter(graph.nodes))):
        for number, node in enumerate(last):
            new = graph.placeholder(f"scalar_{number}")
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in scalar)
    graph.eliminate_dead_code()
    reads = []
    for part, of in (
        (first, {copies[node]: place for node, place in places.items() if node in copies}),
        (graph, places),
    ):
        used = [node for node in part.nodes if node in of and node.users]
        for node in [node for node in part.nodes if node in of and not node.users]:
            part.erase_node(node)
        reads.append([of[node] for node in used])
    module.recompile()
    return Graph(fx.GraphModule(module, first), module, (reads[0], reads[1]), there)


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0 and value.dtype.is_floating_point
