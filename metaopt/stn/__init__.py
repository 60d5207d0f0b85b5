"""Self-tuning networks: a best response that is learnt along with the weights, for any ``torch.nn`` module.

`transform` attaches the response to a model, and `train` gives the steps of the training algorithm.
"""

from __future__ import annotations

__all__ = [
    "Diagnosis",
    "FusedSGD",
    "Structure",
    "Tuned",
    "Tuner",
    "Values",
    "VariationalDropout",
    "activation_penalty",
    "along",
    "augment",
    "dense",
    "diagnose",
    "l2",
    "structures",
    "temporal_activation_penalty",
    "train",
    "transform",
]

from metaopt.stn import augment
from metaopt.stn.coordinates import Values
from metaopt.stn.diagnosis import Diagnosis, diagnose
from metaopt.stn.fused import FusedSGD
from metaopt.stn.penalties import activation_penalty, l2, temporal_activation_penalty
from metaopt.stn.session import train
from metaopt.stn.structures import Structure, along, dense, structures
from metaopt.stn.training import Tuner
from metaopt.stn.transform import transform
from metaopt.stn.tuned import Tuned
from metaopt.stn.variational import VariationalDropout


def __dir__() -> list[str]:
    return __all__
