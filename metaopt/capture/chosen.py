"""Which form of a custom function the replay calls, chosen anew where its flags or its plain arguments are others."""

from __future__ import annotations

__all__ = ["chosen"]

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from metaopt.capture.custom import Flagged, Plain, Surrogate
from metaopt.capture.flags import Flags, flags_of
from metaopt.capture.stand_ins import stand_in
from metaopt.errors import CaptureError

# A number that is another at each call (a schedule, a counter) is no reason to look at each call.
_CHECKED_AT_MOST = 32
_FLAGGED_AT_MOST = 16
_PLAIN = (bool, int, float, str, type(None))

_Form = type[Plain | Surrogate] | None


class _Known:
    """What is known of a function: its forms, by what they may depend on, and what the replay calls."""

    def __init__(self) -> None:
        self.forms: dict[Any, _Form] = {}
        self.calls: dict[Any, Flagged | Plain | Surrogate] = {}
        self.flags: set[Any] = set()


_known: weakref.WeakKeyDictionary[type, _Known] = weakref.WeakKeyDictionary()


def chosen(
    cls: Any, args: Sequence[Any], kwargs: dict[str, Any], *, inner: bool, check: bool = True
) -> Callable[..., Any]:
    """What the replay calls for a call of a custom function.

    Args:
        cls: the function.
        args: its arguments.
        kwargs: likewise.
        inner: whether the loop's own gradients pass through it.
        check: whether to look at its backward, the first time that it is called like this.

    Raises:
        CaptureError: if it can't be differentiated in any form.
    """
    known = _known.setdefault(cls, _Known())
    flags = flags_of(cls)
    key = _key(flags)
    form = _form(known, cls, args, kwargs, key, inner=inner) if check else None
    if key not in known.flags and len(known.flags) >= _FLAGGED_AT_MOST:
        key, flags = (), ()
    known.flags.add(key)
    if form is None and not flags:
        return cls.apply
    if (form, key) not in known.calls:
        known.calls[form, key] = (form or Flagged)(cls, flags)
    return known.calls[form, key]


def _form(known: _Known, cls: type, args: Sequence[Any], kwargs: dict[str, Any], flags: Any, *, inner: bool) -> _Form:
    key = flags, tuple((place, type(a), a) for place, a in enumerate(args) if isinstance(a, _PLAIN))
    for seen in ((True, key), (inner, key)):  # where the loop's gradients have met it, more is known
        if seen in known.forms:
            return known.forms[seen]
    if len(known.forms) >= _CHECKED_AT_MOST:
        return next((form for form in (Surrogate, Plain) if form in known.forms.values()), None)
    try:
        form = stand_in(cls, args, kwargs)
    except CaptureError:
        if inner:
            raise
        form = None  # the sweep needs the first derivative only, which it may have
    known.forms[inner, key] = form
    return form


def _key(flags: Flags) -> Any:
    return tuple((id(owner), name, type(value), value) for owner, name, value in flags)
