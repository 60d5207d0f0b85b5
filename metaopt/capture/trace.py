"""One iteration of the loop as straight-line code over numbered values.

A trace is structure only: tensors that enter it are numbered, the numbers and objects among a call's arguments are kept
aside, so that two iterations that do the same have equal traces and share one program.
"""

from __future__ import annotations

__all__ = ["Group", "Instruction", "Num", "Obj", "Trace", "Val", "needed", "numbers_in", "values_in"]

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy
import torch
from torch import Tensor

_LITERALS = (str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(Ellipsis))


class Val:
    """A value of the trace, by its number. There is one object a number: traces are made of thousands."""

    __slots__ = ("index",)
    index: int
    _made: ClassVar[list[Val]] = []

    def __new__(cls, index: int) -> Val:
        made = cls._made
        while index >= len(made):
            value = super().__new__(cls)
            value.index = len(made)
            made.append(value)
        return made[index]

    def __repr__(self) -> str:
        return f"Val({self.index})"


class Num:
    """A Python number among a call's arguments, by its place in the iteration's list of numbers; one object a place."""

    __slots__ = ("index", "kind")
    index: int
    kind: type
    _made: ClassVar[dict[tuple[int, type], Num]] = {}

    def __new__(cls, index: int, kind: type) -> Num:
        value = cls._made.get((index, kind))
        if value is None:
            value = cls._made[index, kind] = super().__new__(cls)
            value.index, value.kind = index, kind
        return value

    def __repr__(self) -> str:
        return f"Num({self.index}: {self.kind.__name__})"


class Obj(NamedTuple):
    """An argument that can't be compared, by its place in the iteration's list of objects."""

    place: int
    tag: str = "object"


class Group(NamedTuple):
    """A list, dict or slice among the arguments; plain tuples stand for themselves."""

    kind: type
    items: tuple[Any, ...]


class Instruction(NamedTuple):
    """``outs = func(*args, **kwargs)``: arguments are nested tuples over `Val`, `Num` and literals.

    ``outs`` has one entry per tensor of the result (``many``: of the flattened result), None where nobody follows it.
    ``aliases`` says which values are the same tensors as earlier ones, seen after an in-place call. An ``effect``
    returns nothing and belongs to the value that it reads. ``seed`` is the place of the generators' states,
    ``autocast`` the settings in force.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    outs: tuple[int | None, ...] = ()
    aliases: tuple[tuple[int, int], ...] = ()
    many: bool = False
    phased: bool = False
    effect: bool = False
    native: bool = False
    seed: int | None = None
    autocast: tuple[Any, ...] = ()

    def defined(self) -> Iterator[int]:
        """The values that this instruction makes."""
        yield from (out for out in self.outs if out is not None)
        yield from (new for new, _ in self.aliases)

    def used(self) -> Iterator[int]:
        """The values that this instruction reads."""
        yield from values_in(self.args)
        yield from values_in(self.kwargs)
        yield from (old for _, old in self.aliases)


def values_in(spec: Any) -> Iterator[int]:
    """The numbers of the values in a nested argument."""
    kind = type(spec)
    if kind is Val:
        yield spec.index
    elif isinstance(spec, tuple):
        for entry in spec:
            yield from values_in(entry)


def numbers_in(spec: Any) -> Iterator[Num]:
    """The Python numbers in a nested argument."""
    if type(spec) is Num:
        yield spec
    elif isinstance(spec, tuple):
        for entry in spec:
            yield from numbers_in(entry)


@dataclass
class Trace:
    """The iteration that is being written.

    ``inputs``, ``externals`` and ``constants`` are the values that come from outside, by number: carried state,
    hyperparameters, and everything else.
    """

    code: list[Instruction] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    externals: list[int] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    seeds: list[Any] = field(default_factory=list)
    count: int = 0

    def new(self) -> int:
        """A number for a new value."""
        self.count += 1
        return self.count - 1

    def emit(self, func: Callable[..., Any], *args: Any, outs: int = 1, **options: Any) -> tuple[int, ...]:
        """Write one instruction with plain positional arguments; return the numbers of its results."""
        made = tuple(self.new() for _ in range(outs))
        self.code.append(Instruction(func, args, outs=made, many=outs > 1, **options))
        return made

    def behind(self, spec: Any) -> set[int]:
        """The values that a nested argument depends on, itself included."""
        found = set(values_in(spec))
        return found.union(*(self.code[index].used() for index in needed(self.code, found)))

    def number(self, value: float) -> Num:
        """Keep a Python number aside."""
        self.numbers.append(value)
        return Num(len(self.numbers) - 1, type(value))

    def specs(
        self, args: Iterable[Any], kwargs: Mapping[str, Any], read: Callable[[Tensor], Val]
    ) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
        """The arguments of a call as an `Instruction` has them."""
        spec = self.spec
        return tuple([spec(entry, read) for entry in args]), tuple([(key, spec(kwargs[key], read)) for key in kwargs])

    def spec(self, argument: Any, read: Callable[[Tensor], Val]) -> Any:
        """An argument as nested tuples over values, numbers and literals."""
        if isinstance(argument, Tensor):
            return read(argument)
        kind = type(argument)
        if kind is bool or isinstance(argument, _LITERALS):
            return argument
        if kind is int or kind is float or kind is complex:
            return self.number(argument)
        if kind is tuple or kind is torch.Size:
            return tuple([self.spec(entry, read) for entry in argument])
        if kind is list:
            return Group(list, tuple([self.spec(entry, read) for entry in argument]))
        if kind is slice:
            parts = (argument.start, argument.stop, argument.step)
            return Group(slice, tuple([self.spec(part, read) for part in parts]))
        if kind is dict:
            return Group(dict, tuple([(key, self.spec(entry, read)) for key, entry in argument.items()]))
        if isinstance(argument, tuple):  # a named tuple, as PackedSequence is
            return Group(kind, tuple([self.spec(entry, read) for entry in argument]))
        if isinstance(argument, (int, float)):  # numpy's scalars, enums
            return self.number(argument)
        # What is mutable is copied: the loop may change it before the sweep looks (an index that is shuffled in place).
        return self.object(argument.copy() if isinstance(argument, numpy.ndarray) else argument)

    def object(self, value: Any) -> Obj:
        """Keep aside what can't be compared."""
        self.objects.append(value)
        return Obj(len(self.objects) - 1)


def needed(code: Sequence[Instruction], wanted: set[int], given: set[int] | frozenset[int] = frozenset()) -> list[int]:
    """The indices of the instructions on which the wanted values depend, in order; those given need none."""
    wanted = wanted - given
    kept = []
    for index in range(len(code) - 1, -1, -1):
        instruction = code[index]
        if not instruction.effect and any(v in wanted for v in instruction.defined()):
            wanted.update(v for v in instruction.used() if v not in given)
            kept.append(index)
    # An effect (a gradient hook, say) belongs to a value, whoever uses that value and whenever.
    kept += [i for i, ins in enumerate(code) if ins.effect and all(v in wanted for v in ins.used())]
    return sorted(kept)
