"""Straight-line code, written as a ``torch.fx`` graph and compiled to Python."""

from __future__ import annotations

__all__ = ["Function", "lower"]

import operator
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from metaopt.capture import primitives
from metaopt.capture.primitives import Phase, inner_gradient, pick, seeded, with_autocast, with_native_kernels
from metaopt.capture.trace import Group, Instruction, Num, Obj, Val, needed

if TYPE_CHECKING:
    from metaopt.capture.program import Program
    from metaopt.capture.segment import Segment


@dataclass
class Function:
    """A program cut down to some outputs, compiled to Python; the places of what it is called with."""

    module: fx.GraphModule
    inputs: list[int]
    externals: list[int]
    constants: list[int]

    def __call__(
        self,
        phase: Phase,
        inputs: Sequence[Tensor],
        externals: Sequence[Tensor],
        constants: Sequence[Tensor],
        segment: Segment,
        given: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        # Not `module(…)`, which prints the traceback of an error that another way round is taken from.
        return self.module.forward(
            phase, segment.numbers, segment.objects, segment.seeds, *inputs, *externals, *constants, *given
        )


def lower(program: Program, wanted: Sequence[int], given: Sequence[int] = (), *, leaves: bool = False) -> Function:
    """Write the part of a program that computes some values.

    Args:
        program: the program.
        wanted: the values that it returns.
        given: values that it is called with.
        leaves: whether the caller takes the loop's gradients of what it returns, so that it needs the leaves of these.
    """
    code = [program.code[index] for index in needed(program.code, set(wanted), set(given))]
    used = {value for instruction in code for value in instruction.used()} | set(wanted)
    places = [
        [place for place, value in enumerate(values) if value in used]
        for values in (program.inputs, program.externals, program.constants)
    ]
    writer = _Writer(code, leaves=leaves)
    for names, values, chosen in zip(
        ("state", "hyper", "constant"), (program.inputs, program.externals, program.constants), places, strict=True
    ):
        for place in chosen:
            writer.place(values[place], f"{names}_{place}")
    for place, value in enumerate(given):
        writer.place(value, f"given_{place}")
    for instruction in code:
        writer.write(instruction)
    return Function(writer.finish(wanted, "Step"), *places)


class _Writer:
    """Writes instructions as nodes of a ``torch.fx`` graph."""

    def __init__(self, code: list[Instruction], *, leaves: bool) -> None:
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.phase = self.graph.placeholder("phase")
        self.numbers = self.graph.placeholder("numbers")
        self.objects = self.graph.placeholder("objects")
        self.seeds = self.graph.placeholder("seeds")
        gradients = [index for index, ins in enumerate(code) if ins.func is inner_gradient]
        self._gradients_left = len(gradients) + leaves

    def place(self, value: int, name: str) -> None:
        self.nodes[value] = self.graph.placeholder(name)

    def write(self, instruction: Instruction) -> None:
        func = instruction.func
        if func is inner_gradient:
            self._gradients_left -= 1
        if func in (primitives.stop, primitives.leaf) and not self._gradients_left:
            # No gradient of the loop follows that could pass through here, or be taken here.
            (out,) = instruction.outs
            assert out is not None
            self.nodes[out] = self.nodes[instruction.args[0].index]
            return
        args = tuple(self._argument(a) for a in instruction.args)
        kwargs = {key: self._argument(a) for key, a in instruction.kwargs}
        if instruction.phased:
            args = (self.phase, *args)
        node = self._call(instruction, args, kwargs)
        for new, old in instruction.aliases:
            self.nodes[new] = self.nodes[old]
        self._results(instruction, node)

    def _call(self, instruction: Instruction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        func = instruction.func
        if instruction.native or instruction.autocast or instruction.seed is not None:
            wrapped = _Wrapped(func, instruction.native, instruction.autocast, instruction.seed is not None)
            if instruction.seed is not None:
                args = (self._item(self.seeds, instruction.seed), *args)
            return self.graph.call_function(wrapped, args, kwargs)
        method = _method_name(func)
        if method is not None:
            return self.graph.call_method(method, args, kwargs)
        getter = _getter_name(func)
        if getter is not None:
            return self.graph.call_function(getattr, (args[0], getter))
        return self.graph.call_function(_nameable(func), args, kwargs)

    def _results(self, instruction: Instruction, node: fx.Node) -> None:
        for place, out in enumerate(instruction.outs):
            if out is not None:
                picked = self.graph.call_function(pick, (node, place)) if instruction.many else node
                self.nodes[out] = picked

    def _argument(self, spec: Any) -> Any:
        kind = type(spec)
        if kind is Val:
            return self.nodes[spec.index]
        if kind is Num:
            return self._item(self.numbers, spec.index)
        if kind is Obj:
            return self._item(self.objects, spec.place)
        if kind is Group:
            items = [self._argument(item) for item in spec.items]
            if spec.kind is dict:
                return {key: self._argument(value) for key, value in spec.items}
            if spec.kind is slice:
                return slice(*items)
            return items if spec.kind is list else spec.kind(*items)
        if kind is tuple:
            return tuple(self._argument(item) for item in spec)
        return spec

    def _item(self, holder: fx.Node, place: int) -> fx.Node:
        return self.graph.call_function(operator.getitem, (holder, place))

    def finish(self, wanted: Sequence[int], name: str) -> fx.GraphModule:
        self.graph.output([self.nodes[value] for value in wanted])
        return fx.GraphModule(torch.nn.Module(), self.graph, class_name=name)


def _method_name(func: Callable[..., Any]) -> str | None:
    name = getattr(func, "__name__", "")
    return name if name and getattr(torch.Tensor, name, None) is func else None


def _getter_name(func: Callable[..., Any]) -> str | None:
    owner = getattr(func, "__self__", None)
    return owner.__name__ if isinstance(owner, types.GetSetDescriptorType) else None


class _Named:
    """A callable that ``torch.fx`` can name."""

    def __init__(self, func: Callable[..., Any], suffix: str = "") -> None:
        self.func = func
        self.__name__ = getattr(func, "__name__", type(func).__name__).strip("<>") + suffix
        self.__module__ = "metaopt.capture.lowering"
        self.__qualname__ = self.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.func(*args, **kwargs)


class _Wrapped(_Named):
    """A call under the kernels, the precision and the random numbers that it needs."""

    def __init__(self, func: Callable[..., Any], native: bool, autocast: tuple[Any, ...], random: bool) -> None:
        super().__init__(func, "_native" * native + "_autocast" * bool(autocast) + "_seeded" * random)
        self.native = native
        self.autocast = autocast
        self.random = random

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.func
        if self.native:
            call = partial(with_native_kernels, call)
        if self.autocast:
            call = partial(with_autocast, self.autocast, call)
        if self.random:
            states, *args = args  # type: ignore[assignment]
            call = partial(seeded, states, call)
        return call(*args, **kwargs)


def _nameable(func: Callable[..., Any]) -> Callable[..., Any]:
    home = sys.modules.get(getattr(func, "__module__", None) or "")
    found = getattr(home, getattr(func, "__name__", ""), None)
    return func if isinstance(func, types.FunctionType) and found is func else _Named(func)
