"""Plain values in Python that a custom function looks at besides its arguments: flags of its class, settings.

They decide what it computes, and may be others at the next call, or where the call is replayed. What can be seen of
them is what its code names: attributes of its own class, globals, and attributes of classes, modules and objects there.
"""

from __future__ import annotations

__all__ = ["Flags", "flags_of", "held"]

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias

_PLAIN = (bool, int, float, str, type(None))
_FOREIGN = ("torch", "numpy", "math", "builtins", "typing")
# How deep the functions are looked into that a function calls.
_DEPTH = 3

_NONE = object()

# Each value with its owner and its name.
Flags: TypeAlias = tuple[tuple[Any, str, Any], ...]

_places: weakref.WeakKeyDictionary[type, list[tuple[Any, str]]] = weakref.WeakKeyDictionary()


def flags_of(cls: type) -> Flags:
    """The plain values that a custom function's code names, as they are now."""
    places = _places.get(cls)
    if places is None:
        places = _places[cls] = list({(id(o), n): (o, n) for o, n in _named_by(cls)}.values())
    values = ((owner, name, _value(owner, name)) for owner, name in places)
    return tuple((owner, name, value) for owner, name, value in values if isinstance(value, _PLAIN))


@contextmanager
def held(flags: Flags) -> Iterator[None]:
    """While open, these values are what they were."""
    changed = [(owner, name, value) for owner, name, value in flags if not _is(_value(owner, name), value)]
    before = [(owner, name, _inside(owner).get(name, _NONE)) for owner, name, _ in changed]
    try:
        for owner, name, value in changed:
            _set(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            _set(owner, name, value)


def _inside(owner: Any) -> Any:
    return owner if isinstance(owner, dict) else vars(owner)


def _value(owner: Any, name: str) -> Any:
    return owner.get(name, _NONE) if isinstance(owner, dict) else getattr(owner, name, _NONE)


def _is(now: Any, value: Any) -> bool:
    return type(now) is type(value) and now == value


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    elif value is _NONE:
        delattr(owner, name)  # it has it from its class
    else:
        setattr(owner, name, value)


def _named_by(cls: type) -> Iterator[tuple[Any, str]]:
    """The places of plain values that the function's methods name."""
    own = [base for base in cls.__mro__ if not _foreign(base)]
    functions = [getattr(member, "__func__", member) for base in own for member in vars(base).values()]
    seen: set[int] = set()
    yield from _attributes(cls)
    for function in functions:
        if isinstance(function, FunctionType):
            yield from _named_in(function, _DEPTH, seen)


def _named_in(function: FunctionType, depth: int, seen: set[int]) -> Iterator[tuple[Any, str]]:
    function = getattr(function, "__wrapped__", function)
    if id(function) in seen or not depth or not isinstance(function, FunctionType) or _foreign(function):
        return
    seen.add(id(function))
    names = set(_names(function.__code__))
    known = function.__globals__
    found = {name: known[name] for name in names & known.keys()}
    for name, thing in found.items():
        if isinstance(thing, _PLAIN):
            yield known, name
    # Of a module that it names, what it names there.
    things = list(found.values())
    for module in [thing for thing in things if isinstance(thing, ModuleType) and not _foreign(thing)]:
        inside = vars(module)
        yield from ((module, name) for name in names & inside.keys() if isinstance(inside[name], _PLAIN))
        things += [inside[name] for name in names & inside.keys()]
    for thing in things:
        if isinstance(thing, FunctionType):
            yield from _named_in(thing, depth - 1, seen)
        elif not isinstance(thing, (*_PLAIN, ModuleType)) and not _foreign(thing):
            yield from _attributes(thing)


def _names(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _attributes(thing: Any) -> Iterator[tuple[Any, str]]:
    """The plain attributes of a class (and of those nested in it) or of an object."""
    holders = [base for base in thing.__mro__ if not _foreign(base)] if isinstance(thing, type) else [thing]
    inside = {name: value for holder in reversed(holders) for name, value in getattr(holder, "__dict__", {}).items()}
    for name, value in inside.items():
        if name.startswith("__"):
            continue
        if isinstance(value, _PLAIN):
            yield thing, name
        elif isinstance(value, type) and isinstance(thing, type) and value is not thing and not _foreign(value):
            yield from _attributes(value)


def _foreign(thing: Any) -> bool:
    """Whether something belongs to torch or Python, which keep no flags of the user's."""
    module = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None) or ""
    return str(module).partition(".")[0] in _FOREIGN
