"""Hyperparameters: constrained tensors with a leaf that a ``torch.optim`` optimizer can move.

A hyperparameter is either *transformed*, a smooth function of an unconstrained leaf (``positive``,
``interval``, ``simplex``, ``constrained``), or *direct*, its own leaf (``real``, and the projected ``box``,
``nonnegative`` and ``l1_box``, which are put back into their set after each hyper-step).
"""

from __future__ import annotations

__all__ = [
    "Constrained",
    "Domain",
    "History",
    "Hyperparameters",
    "Value",
    "box",
    "constrained",
    "integer",
    "interval",
    "l1_box",
    "name_of",
    "nonnegative",
    "owner_of",
    "positive",
    "project_box",
    "project_l1_box",
    "real",
    "schedule",
    "simplex",
    "strayed",
]

from metaopt.hyperparameters.domains import Domain, Value
from metaopt.hyperparameters.factories import (
    Constrained,
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
from metaopt.hyperparameters.history import History
from metaopt.hyperparameters.module import Hyperparameters
from metaopt.hyperparameters.projections import project_box, project_l1_box
from metaopt.hyperparameters.registry import name_of, owner_of, strayed
from metaopt.hyperparameters.schedules import schedule
