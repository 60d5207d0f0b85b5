"""What is measured: the workloads and the systems. Nothing here imports torch, so that the parent process stays small."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Workload:
    """A training problem.

    Attributes:
        title: what it is, for the tables.
        steps: T of the measurement.
        check_steps: T of the comparison of hypergradients.
        hyper: the hyperparameters.
    """

    title: str
    steps: int
    check_steps: int
    hyper: tuple[str, ...]


@dataclass(frozen=True)
class System:
    """A way to train, and to differentiate the training.

    Attributes:
        title: what it is, for the tables.
        package: what has to be installed.
        hypergradient: whether it computes one.
        constant: the hyperparameters that its interface has no place for; they stay numbers.
        faults: what is known to be wrong with its hypergradient, by hyperparameter.
    """

    title: str
    package: str | None = None
    hypergradient: bool = True
    constant: frozenset[str] = frozenset()
    faults: Mapping[str, str] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        """Whether it can be measured here."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


WORKLOADS = {
    "W1": Workload(
        "softmax regression 784-10, full batch of 5000 weighted examples, gradient descent", 200, 10, ("lr", "weights")
    ),
    "W2": Workload("MLP 784-256-256-10, batch 128, SGD with momentum", 100, 8, ("lr", "momentum", "weights")),
    "W3": Workload("CNN on 28×28, batch 64, Adam", 20, 4, ("lr", "beta1", "beta2", "weights")),
}

PLAIN = "plain"  # what times are divided by
REFERENCE = "unrolled"  # what hypergradients are compared with, itself compared with finite differences

SYSTEMS = {
    PLAIN: System("plain training, no hypergradient", hypergradient=False),
    "watched": System("metaopt, watched loop without the sweep", hypergradient=False),
    "metaopt": System("metaopt, record and backward"),
    "higher": System(
        "higher",
        package="higher",
        faults={"beta2": "higher takes the root of the bias correction with `math.sqrt`, which cuts β₂'s graph"},
    ),
    "torchopt": System(
        "torchopt (MetaSGD, MetaAdam)",
        package="torchopt",
        constant=frozenset({"beta1", "beta2"}),  # given as tensors, they lose their graph in `add_(g, alpha=1 - decay)`
    ),
    REFERENCE: System("autograd, unrolled by hand"),
}

SCALING_WORKLOAD = "W2"
SCALING_STEPS = (10, 25, 50, 100)
