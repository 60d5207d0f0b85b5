"""metaopt: the hypergradient of the training loop you already have."""

from __future__ import annotations

from metaopt import check, errors, optim, plotting, rules, stn
from metaopt.checkpoints import Memory
from metaopt.errors import (
    CaptureError,
    CheckError,
    DomainError,
    EagerWarning,
    FallbackWarning,
    HeldConstantWarning,
    InfeasibleWarning,
    MetaoptError,
    MetaoptWarning,
    MissingExtraError,
    ResponseError,
    RuleError,
    SaturatedWarning,
    SkippedStepWarning,
    StaleError,
    SweepError,
    UnusedHyperparameterWarning,
)
from metaopt.hyperparameters import (
    History,
    Hyperparameters,
    box,
    constrained,
    integer,
    interval,
    l1_box,
    nonnegative,
    positive,
    real,
    schedule,
    simplex,
)
from metaopt.modes import Implicit, Recording, Streaming, implicit, record, stream
from metaopt.wrapping import wrap

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckError",
    "DomainError",
    "EagerWarning",
    "FallbackWarning",
    "HeldConstantWarning",
    "History",
    "Hyperparameters",
    "Implicit",
    "InfeasibleWarning",
    "Memory",
    "MetaoptError",
    "MetaoptWarning",
    "MissingExtraError",
    "Recording",
    "ResponseError",
    "RuleError",
    "SaturatedWarning",
    "SkippedStepWarning",
    "StaleError",
    "Streaming",
    "SweepError",
    "UnusedHyperparameterWarning",
    "box",
    "check",
    "constrained",
    "errors",
    "implicit",
    "integer",
    "interval",
    "l1_box",
    "nonnegative",
    "optim",
    "plotting",
    "positive",
    "real",
    "record",
    "rules",
    "schedule",
    "simplex",
    "stn",
    "stream",
    "wrap",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
