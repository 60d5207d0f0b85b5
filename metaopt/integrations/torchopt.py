"""torchopt: its gradient transformations, and its optimizer objects, as the ``Φ`` of a watched loop.

A transformation is a pure function already, so a step is that function, followed as it runs. torchopt itself keeps one
graph of the whole training; here the training is plain, and `metaopt.record` or `metaopt.stream` differentiate it.
"""

from __future__ import annotations

__all__ = ["TorchoptOptimizer", "optimizer"]

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from metaopt.errors import RuleError, require
from metaopt.integrations.functional import FunctionalOptimizer
from metaopt.wrapping import wrap

_torchopt: Any = require("torchopt", "torchopt", "metaopt.integrations.torchopt")


def optimizer(target: Any, transformation: Any = None) -> TorchoptOptimizer:
    """A ``torch.optim.Optimizer`` whose step is a transformation of torchopt.

    Args:
        target: the weights (as for any optimizer: tensors, or groups); or, without ``transformation``, an optimizer
            object of torchopt that has not stepped yet: ``torchopt.MetaAdam(model, lr=...)``, ``torchopt.Adam(...)``.
        transformation: a transformation such as ``torchopt.adam(lr=0.1)``, or a chain of them. Tensors that require
            grad among its settings are hyperparameters; torchopt computes with their values once (``-lr``), so make it
            anew when they have moved.

    Returns:
        The optimizer, for `metaopt.record` and `metaopt.stream`. Its ``step`` also takes the loss, as that of a
        ``MetaOptimizer`` does. Weights that are tied stay tied.

    Raises:
        RuleError: if the target is neither, or if a ``MetaOptimizer`` has put computed tensors in the weights' place.

    Example:
        >>> optimizer = metaopt.integrations.torchopt.optimizer(
        ...     model.parameters(), torchopt.chain(torchopt.clip.clip_grad_norm(1.0), torchopt.adam(lr=lr))
        ... )
        >>> with metaopt.record(optimizer) as run:
        ...     for x, y in loader:
        ...         optimizer.step(loss(model(x), y))
        >>> run.backward(validation_loss(model))
    """
    if transformation is not None:
        return wrap(TorchoptOptimizer(target, transformation))
    groups, states = _groups(target)
    made = TorchoptOptimizer(groups, target.impl)
    for group, state in zip(made.param_groups, states, strict=True):
        if not isinstance(state, _torchopt.base.UninitializedState):
            made.state[group["params"][0]]["torchopt"] = state
    return wrap(made)


def _groups(target: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    if isinstance(target, _torchopt.MetaOptimizer):
        parts: list[Iterable[Tensor]] = [
            [weight for container in containers for weight in container.values()]
            for containers in target.param_containers_groups
        ]
    elif isinstance(target, _torchopt.Optimizer):
        parts = list(target.param_groups)
    else:
        raise RuleError(
            f"{type(target).__name__} is no optimizer of torchopt. Pass `torchopt.MetaAdam(model, ...)` or one of its "
            "kin, or the weights and a transformation, `optimizer(model.parameters(), torchopt.adam(...))`."
        )
    groups = []
    for part in parts:
        weights = list({id(weight): weight for weight in part if weight is not None}.values())
        if any(not weight.is_leaf for weight in weights):
            raise RuleError(
                f"{type(target).__name__} has stepped, and put computed tensors in the place of the model's "
                "parameters. Give it to metaopt before its first step, and step the optimizer that this returns."
            )
        groups.append({"params": [weight for weight in weights if weight.requires_grad]})
    return groups, target.state_groups


class TorchoptOptimizer(FunctionalOptimizer):
    """Applies a ``torchopt`` gradient transformation; made by `optimizer`."""

    def __init__(self, params: Any, transformation: Any) -> None:
        if not isinstance(transformation, _torchopt.base.GradientTransformation):
            raise RuleError(
                f"{type(transformation).__name__} is no gradient transformation of torchopt; pass what "
                "`torchopt.adam(...)` or `torchopt.chain(...)` returns."
            )
        super().__init__(params, {})
        self.impl = transformation

    def _updated(self, place: int, weights: list[Tensor]) -> list[Tensor]:
        params = tuple(weights)
        kept = self.state[weights[0]]
        if "torchopt" not in kept:
            kept["torchopt"] = self.impl.init(params)
        grads = tuple(weight.grad for weight in weights)
        updates, kept["torchopt"] = self.impl.update(grads, kept["torchopt"], params=params, inplace=False)
        return [w if u is None else w + u for w, u in zip(weights, updates, strict=True)]
