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

from typing import NoReturn

import torch

from metaopt.optim.adam import Adam, Adamax, AdamW, NAdam, RAdam
from metaopt.optim.adaptive import Adadelta, Adafactor, Adagrad
from metaopt.optim.drop_in import DifferentiableOptimizer
from metaopt.optim.momentum import SGD, RMSprop
from metaopt.optim.other import ASGD, Rprop
from metaopt.optim.published import LAMB, LARS, Lion, ScheduleFreeAdamW, ScheduleFreeSGD
from metaopt.rules import why_without_rule

if hasattr(torch.optim, "Muon"):
    from metaopt.optim.other import Muon

    __all__ += ["Muon"]


def __getattr__(name: str) -> NoReturn:
    why = why_without_rule(name)
    if why is None and isinstance(getattr(torch.optim, name, None), type):
        why = f"Follow `torch.optim.{name}` as it runs, `metaopt.wrap(optimizer)`."
    elif name == "Muon":
        why = f"It is torch's, which has it in a later version than this, {torch.__version__}."
    elif why is None and name[:1].isupper():
        why = "An optimizer of another package, or your own, is followed as it runs, `metaopt.wrap(optimizer)`."
    raise AttributeError(f"module 'metaopt.optim' has no attribute '{name}'." + (f" {why}" if why else ""))


def __dir__() -> list[str]:
    return __all__
