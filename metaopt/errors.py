"""The error tree: every failure that metaopt names, and the warnings for what it does not follow.

::

    MetaoptError
    ├── CaptureError (RuntimeError)        the loop did something that can't be replayed
    ├── SweepError (RuntimeError)          the hypergradient can't be computed from what was recorded
    │   └── StaleError                     a value changed, or was freed, after it was recorded
    ├── RuleError (TypeError)              an optimizer without a rule, or a rule that does not fit
    ├── DomainError (ValueError)           a setting outside the domain of its formula
    ├── CheckError (AssertionError)        a check found a derivative that is wrong, or could not be made
    ├── ResponseError (RuntimeError)       a model, a loss or a batch that a best response can't be learnt from
    └── MissingExtraError (ImportError)    an optional package that is not installed

    MetaoptWarning (UserWarning)
    ├── HeldConstantWarning                something that depends on the weights is held constant
    ├── UnusedHyperparameterWarning        a hyperparameter that took no part in the loop or the objective
    ├── EagerWarning                       a compiled model runs eagerly inside a context
    ├── FallbackWarning                    a slower way is taken for a model that forbids the faster one
    ├── InfeasibleWarning                  a hyperparameter left the set in which projection should keep it
    ├── SaturatedWarning                   a hyperparameter reached a bound of its domain
    └── SkippedStepWarning                 a hyper-step was left out, since its gradient was not finite

An error's text says what was seen, why it matters, and what to do.
"""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "CheckError",
    "DomainError",
    "EagerWarning",
    "FallbackWarning",
    "HeldConstantWarning",
    "InfeasibleWarning",
    "MetaoptError",
    "MetaoptWarning",
    "MissingExtraError",
    "ResponseError",
    "RuleError",
    "SaturatedWarning",
    "SkippedStepWarning",
    "StaleError",
    "SweepError",
    "UnusedHyperparameterWarning",
    "require",
    "user_frame",
    "warn",
    "whole",
]

import importlib
import operator
import sys
import warnings
from types import ModuleType
from typing import Any


class MetaoptError(Exception):
    """The root of everything that metaopt raises on purpose."""


class CaptureError(MetaoptError, RuntimeError):
    """The watched loop did something that can't be replayed as a pure function."""


class SweepError(MetaoptError, RuntimeError):
    """The hypergradient can't be computed from what the context recorded."""


class StaleError(SweepError):
    """A value that the sweep needs was changed or freed after it was recorded."""


class RuleError(MetaoptError, TypeError):
    """An optimizer has no rule, or its rule does not cover the setting in use."""


class DomainError(MetaoptError, ValueError):
    """A setting lies outside the domain in which its formula is defined."""


class CheckError(MetaoptError, AssertionError):
    """A check found derivatives that disagree, or could not be made; the text is its report."""


class ResponseError(MetaoptError, RuntimeError):
    """A best response can't be learnt from this model, loss or batch."""


class MissingExtraError(MetaoptError, ImportError):
    """An optional package is needed and not installed."""


class MetaoptWarning(UserWarning):
    """The root of metaopt's warnings."""


class HeldConstantWarning(MetaoptWarning):
    """A value that depends on the weights left the tensor world and is held constant."""


class UnusedHyperparameterWarning(MetaoptWarning):
    """A hyperparameter took no part in the loop or in the outer objective, or one that has no derivative."""


class EagerWarning(MetaoptWarning):
    """A compiled model or function runs eagerly inside a context."""


class FallbackWarning(MetaoptWarning):
    """A slower way is taken for a model that forbids the faster one."""


class InfeasibleWarning(MetaoptWarning):
    """A hyperparameter lies outside of the set in which projection should keep it."""


class SaturatedWarning(MetaoptWarning):
    """A hyperparameter reached a bound of its domain, or the end of what its leaf can represent."""


class SkippedStepWarning(MetaoptWarning):
    """A hyper-step was left out, since its loss or gradient was not finite."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        module: the package's import name.
        extra: the extra of this distribution that installs it.
        purpose: what it is needed for, to finish the sentence "… is needed for".

    Returns:
        The imported module.

    Raises:
        MissingExtraError: if the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is needed for {purpose} and is not installed; run `pip install {module}`, or install this "
            f"package with the extra that brings it, `metaopt-torch[{extra}]`."
        ) from error


def user_frame() -> int:
    """How many frames above the caller the nearest one outside of torch and this package is."""
    frame, level = sys._getframe(1), 0
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("metaopt.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line of the user's from which this was reached, however deep in this package it was found out."""
    warnings.warn(message, category, stacklevel=user_frame() + 1)


def whole(name: str, number: Any, least: int, error: type[Exception] = ValueError) -> int:
    """The value of an argument that is a whole number.

    Args:
        name: the argument's name.
        number: what was given.
        least: the smallest that may be.
        error: what is raised if it is something else.
    """
    try:
        found = least - 1 if isinstance(number, bool) else operator.index(number)
    except TypeError:
        found = least - 1
    if found < least:
        raise error(f"{name} must be a whole number of at least {least}, not {number!r}.")
    return found
