"""What is measured: the workloads and the systems.

Nothing here imports torch, so that the parent process stays small.
"""

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
        constant: the hyperparameters that it gives no hypergradient of; they stay numbers.
        why: why it gives none of these.
        faults: what is known to be wrong with its hypergradient, by hyperparameter.
    """

    title: str
    package: str | None = None
    hypergradient: bool = True
    constant: frozenset[str] = frozenset()
    why: str = "plain numbers in its interface, so no hypergradient of them"
    faults: Mapping[str, str] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        """Whether it can be measured here."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


WORKLOADS = {
    "W1": Workload(
        "softmax regression 784-10, full batch of 5000 weighted examples, gradient descent", 200, 12, ("lr", "weights")
    ),
    "W2": Workload("MLP 784-256-256-10, batch 128, SGD with momentum", 100, 12, ("lr", "momentum", "weights")),
    "W3": Workload("CNN on 28×28, batch 64, Adam", 20, 12, ("lr", "beta1", "beta2", "weights")),
}

# The same network at four sizes.
WORKLOADS |= {
    f"N{power}": Workload(
        f"the same, h = {width} in place of 256: about 10^{power} weights", 20, 12, ("lr", "momentum", "weights")
    )
    for power, width in ((4, 13), (5, 115), (6, 690), (7, 2800))
}

PLAIN = "plain"  # what times are divided by
WATCHED = "watched"
CHECKPOINTS = "checkpoints"
REFERENCE = "unrolled"  # what hypergradients are compared with, itself compared with finite differences

_OLD_ADAM = "its Adam adds eps before the bias correction of the root, as torch's once did: another formula"
_FLOAT32 = (
    "its Adam computes the bias correction in float32 whatever the dtype (`pow(decay, count)` of an int64 tensor)"
)

SYSTEMS = {
    PLAIN: System("plain training, no hypergradient", hypergradient=False),
    WATCHED: System("metaopt, watched loop without the sweep", hypergradient=False),
    "metaopt": System("metaopt, record"),
    "compiled": System("metaopt, record(compile=True)"),
    "graphs": System('metaopt, record(keep="graphs", compile=True)'),
    CHECKPOINTS: System('metaopt, record(keep="checkpoints")'),
    "higher": System(
        "higher",
        package="higher",
        faults={
            "lr": _OLD_ADAM,
            "beta1": _OLD_ADAM,
            "beta2": "the root of the bias correction is taken by `math.sqrt`, which cuts the graph",
            "weights": _OLD_ADAM,
        },
    ),
    "torchopt": System(
        "torchopt",
        package="torchopt",
        constant=frozenset({"beta1", "beta2"}),  # tensors are refused: `add_(g, alpha=1 - decay)` wants numbers
        faults={"lr": _FLOAT32, "weights": _FLOAT32},
    ),
    "hypertorch": System(
        "hypertorch, reverse",
        package="hypergrad",  # from source: https://github.com/prolearner/hypertorch
    ),
    REFERENCE: System("autograd, unrolled by hand"),
    "differences": System(
        "finite differences, of the learning rate alone",
        constant=frozenset({"momentum", "beta1", "beta2", "weights"}),
        why="two trainings for each number, so the learning rate alone is measured",
        faults={"lr": "the training crosses kinks of the activations, where it jumps; with smooth ones it agrees"},
    ),
}

SCALING_WORKLOAD = "W2"
SCALING_STEPS = (10, 100, 1000)
# Beyond, most systems would need more memory than there is.
LONG_STEPS = 10_000
LONG_SYSTEMS = (PLAIN, CHECKPOINTS)
SIZES = ("N4", "N5", "N6", "N7")  # 10⁴ … 10⁷ weights
