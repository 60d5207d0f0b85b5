"""Optimizers that torch does not have, as published: plain ``torch.optim.Optimizer`` classes.

`metaopt.optim` has the drop-ins whose settings may be hyperparameters.
"""

from __future__ import annotations

__all__ = ["LAMB", "LARS", "Lion", "ScheduleFreeAdamW", "ScheduleFreeSGD"]

from metaopt.published.lamb import LAMB
from metaopt.published.lars import LARS
from metaopt.published.lion import Lion
from metaopt.published.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
