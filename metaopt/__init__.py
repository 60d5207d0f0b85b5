"""metaopt: the hypergradient of the training loop you already have."""

from __future__ import annotations

from metaopt import errors, optim, rules, stn
from metaopt.errors import (
    CaptureError,
    DomainError,
    EagerWarning,
    FallbackWarning,
    HeldConstantWarning,
    MetaoptError,
    MetaoptWarning,
    MissingExtraError,
    ResponseError,
    RuleError,
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
    simplex,
)
from metaopt.modes import Recording, Streaming, record, stream

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "DomainError",
    "EagerWarning",
    "FallbackWarning",
    "HeldConstantWarning",
    "History",
    "Hyperparameters",
    "MetaoptError",
    "MetaoptWarning",
    "MissingExtraError",
    "Recording",
    "ResponseError",
    "RuleError",
    "SkippedStepWarning",
    "StaleError",
    "Streaming",
    "SweepError",
    "UnusedHyperparameterWarning",
    "box",
    "constrained",
    "errors",
    "integer",
    "interval",
    "l1_box",
    "nonnegative",
    "optim",
    "positive",
    "real",
    "record",
    "rules",
    "simplex",
    "stn",
    "stream",
]
