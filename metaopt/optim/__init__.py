"""Drop-in optimizers: ``torch.optim`` classes whose settings may be hyperparameters.

Every number of an optimizer may be a tensor that requires grad: a scalar, or a vector with one entry per step; param
groups may have their own. docs/optimizers.md is the table of what is differentiated, made of the tests' own.
"""

from __future__ import annotations

__all__ = [
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "DifferentiableOptimizer",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
]

import torch

from metaopt.optim.adam import Adam, Adamax, AdamW, NAdam, RAdam
from metaopt.optim.adaptive import Adadelta, Adafactor, Adagrad
from metaopt.optim.drop_in import DifferentiableOptimizer
from metaopt.optim.momentum import SGD, RMSprop
from metaopt.optim.other import ASGD, Rprop
from metaopt.optim.published import LAMB, LARS, Lion, ScheduleFreeAdamW, ScheduleFreeSGD

if hasattr(torch.optim, "Muon"):
    from metaopt.optim.other import Muon

    __all__ += ["Muon"]


def __dir__() -> list[str]:
    return __all__
