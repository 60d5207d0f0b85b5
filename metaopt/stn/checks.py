"""What a graph says about a loss function."""

from __future__ import annotations

__all__ = ["uses_directly"]

from collections.abc import Iterable

from torch import Tensor


def uses_directly(loss: Tensor, leaves: Iterable[Tensor]) -> bool:
    """Whether any of some leaves is in the graph of a loss."""
    wanted = {id(leaf) for leaf in leaves}
    seen, queue = set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        queue += [child for child, _ in node.next_functions]
    return False
