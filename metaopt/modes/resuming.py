"""Stopping a training in real time and going on: ``Z`` by the names that tensors keep from one process to the next."""

from __future__ import annotations

__all__ = ["Saved", "load", "save"]

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from metaopt.errors import StaleError, SweepError
from metaopt.hyperparameters import name_of
from metaopt.modes.columns import Columns
from metaopt.modes.named import Named, tensors_of
from metaopt.step import Loop
from metaopt.wrapping import wrapped

Saved: TypeAlias = dict[str, Any]
_Place: TypeAlias = tuple[str | int, ...]


def save(loop: Loop, columns: Columns, tangents: Mapping[int, Tensor], modules: Sequence[nn.Module]) -> Saved:
    """The tangents of weights, of the optimizers' state, and of the modules' buffers."""
    found: dict[_Place, Tensor] = {}
    placed = set()
    for place, tensor in _places(loop, modules).items():
        binding = loop.tape.find(tensor)
        if binding is not None:
            placed.add(binding.key)
            if binding.key in tangents:
                found[place] = tangents[binding.key].detach().clone()
    lost = [b.ref() for b in loop.tape.bindings() if b.buffer and b.key in tangents and b.key not in placed]
    if lost:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in lost if tensor is not None)
        raise SweepError(
            f"the training writes tensors (shapes {shapes}) that are neither weights nor the optimizer's state, and "
            "their tangents have no name to be saved under. Pass the modules whose buffers they are, "
            "`run.state_dict(model)`."
        )
    return {
        "hyperparameters": _described(columns.leaves()),
        "named": _named(loop),
        "columns": columns.state(),
        "tangents": found,
    }


def _described(leaves: Iterable[Tensor]) -> list[tuple[str | None, tuple[int, ...]]]:
    return [(name_of(leaf), tuple(leaf.shape)) for leaf in leaves]


def _named(loop: Loop) -> list[tuple[str | None, tuple[int, ...]]] | None:
    """Which hyperparameters the user has named, where not all are asked for."""
    named = loop.tape.externals.named
    return None if named is None else sorted(_described(named.values()), key=str)


def load(
    loop: Loop, columns: Columns, state: Saved, hyperparameters: Named, modules: Sequence[nn.Module]
) -> dict[int, Tensor]:
    """The tangents that `save` kept, by key; their columns go to these hyperparameters."""
    if loop.steps:
        raise SweepError("load what was saved where the context begins, before its first step.")
    if state.get("named") != _named(loop):
        raise StaleError(
            f"what was saved has the tangents of {_said(state.get('named'))}, and this context asks for "
            f"{_said(_named(loop))}. Give `metaopt.stream(optimizer, hyper=...)` as it was."
        )
    given = tensors_of(hyperparameters, "hyperparameters")
    columns.restore(_matched(state["hyperparameters"], given), state["columns"])
    places = _places(loop, modules)
    missing = [place for place in state["tangents"] if place not in places]
    if missing:
        raise StaleError(
            f"what was saved has a tangent of {'.'.join(map(str, missing[0]))}, which is not there. Load the state of "
            "the optimizers before, and pass the same modules as to `state_dict`."
        )
    tangents = {}
    for place, tangent in state["tangents"].items():
        tensor = places[place]
        if tangent.shape[1:] != tensor.shape:
            raise StaleError(
                f"what was saved is the tangent of a tensor of shape {tuple(tangent.shape[1:])}, and the tensor's "
                f"shape is {tuple(tensor.shape)}. Load it beside the model and the optimizer that it was saved with."
            )
        binding = loop.tape.find(tensor)
        if binding is None:
            binding = loop.tape.bind(tensor)
            if place[0] == "buffer" or wrapped(loop.optimizers[int(place[1])]) is not None:
                binding.buffer = 1
                loop.tape.own_memory(tensor)
        tangents[binding.key] = tangent.detach().to(tensor.device, copy=True)
    return tangents


def _said(named: Sequence[tuple[str | None, tuple[int, ...]]] | None) -> str:
    if named is None:
        return "all hyperparameters that are found"
    return "those named: " + ", ".join(f"{name or 'a tensor'} of shape {tuple(shape)}" for name, shape in named)


def _places(loop: Loop, modules: Sequence[nn.Module]) -> dict[_Place, Tensor]:
    """The tensors that a process can find again."""
    found: dict[_Place, Tensor] = {}
    for first, optimizer in enumerate(loop.optimizers):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for second, weight in enumerate(weights):
            found["weight", first, second] = weight
            for name, value in optimizer.state.get(weight, {}).items():
                if isinstance(value, Tensor):
                    found["state", first, second, name] = value
    for first, module in enumerate(modules):
        for name, buffer in module.named_buffers():
            found["buffer", first, name] = buffer
    return found


def _matched(described: Sequence[tuple[str | None, tuple[int, ...]]], given: list[Tensor]) -> list[Tensor]:
    """The hyperparameters in the order in which they were saved: by name where they have one, else as they come."""
    named = {name_of(leaf): leaf for leaf in given}
    names = [name for name, _ in described]
    if None not in names and len(set(names)) == len(names) and set(names) <= set(named):
        leaves = [named[name] for name in names]
    else:
        leaves = given
    if [tuple(leaf.shape) for leaf in leaves] != [shape for _, shape in described]:
        raise StaleError(
            f"the hyperparameters that were saved are {described}, and those given have the shapes "
            f"{[tuple(leaf.shape) for leaf in leaves]}. Give them in the order of `run.hyperparameters`, as it "
            "was then."
        )
    return leaves
