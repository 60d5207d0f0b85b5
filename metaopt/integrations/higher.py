"""higher: its differentiable optimizers and patched modules, as the ``Φ`` of a watched loop.

higher replaces the weights by computed tensors and keeps one graph of the whole training. Here the patched module gets
weights of its own, the differentiable optimizer's update is written into them, and `metaopt.record` or
`metaopt.stream` differentiate the loop.
"""

from __future__ import annotations

__all__ = ["HigherOptimizer", "optimizer"]

from typing import Any

from torch import Tensor

from metaopt.errors import RuleError, require
from metaopt.integrations.functional import FunctionalOptimizer
from metaopt.wrapping import wrap

_higher: Any = require("higher", "higher", "metaopt.integrations.higher")


def optimizer(diffopt: Any) -> HigherOptimizer:
    """A ``torch.optim.Optimizer`` whose step is that of a differentiable optimizer of higher.

    Args:
        diffopt: what ``higher.innerloop_ctx(model, opt)`` gives besides the patched module, or
            ``higher.get_diff_optim(..., fmodel=fmodel)``. Overrides that require grad are hyperparameters. The patched
            module computes with weights of its own from here on, which start where its fast weights are; their own
            hypergradient is that of the initial weights: ``run.hypergradient(outer, wrt=list(fmodel.parameters()))``.

    Returns:
        The optimizer, for `metaopt.record` and `metaopt.stream`. Its ``step`` also takes the loss, as
        ``diffopt.step`` does.

    Raises:
        RuleError: if it is no differentiable optimizer, or has no patched module.

    Example:
        >>> with higher.innerloop_ctx(model, opt, override={"lr": [lr]}) as (fmodel, diffopt):
        ...     optimizer = metaopt.integrations.higher.optimizer(diffopt)
        ...     with metaopt.record(optimizer) as run:
        ...         for x, y in loader:
        ...             optimizer.step(loss(fmodel(x), y))
        ...     run.backward(validation_loss(fmodel))
    """
    if not isinstance(diffopt, _higher.optim.DifferentiableOptimizer):
        raise RuleError(
            f"{type(diffopt).__name__} is no differentiable optimizer of higher; pass what `higher.innerloop_ctx` or "
            "`higher.get_diff_optim` returns."
        )
    if diffopt._fmodel is None or diffopt._fmodel.fast_params is None:
        raise RuleError(
            "this differentiable optimizer has no patched module, so its weights are nowhere to be found. Make it with "
            "`higher.innerloop_ctx(model, opt)`, or pass `fmodel=` to `higher.get_diff_optim`."
        )
    return wrap(HigherOptimizer(diffopt))


class HigherOptimizer(FunctionalOptimizer):
    """Applies the update of a ``higher`` differentiable optimizer; made by `optimizer`."""

    def __init__(self, diffopt: Any) -> None:
        self.diffopt = diffopt
        fmodel = diffopt._fmodel
        fast = [weight.detach().clone().requires_grad_(weight.requires_grad) for weight in fmodel.fast_params]
        fmodel.update_params(fast)
        self._order = {id(weight): place for place, weight in enumerate(fast)}
        super().__init__([{"params": [fast[i] for i in mapping]} for mapping in diffopt._group_to_param_list], {})
        for group, states in zip(self.param_groups, diffopt.state, strict=True):
            for place, weight in enumerate(group["params"]):
                if place in states:
                    self.state[weight] = states[place]

    def _updated(self, place: int, weights: list[Tensor]) -> list[Tensor]:
        if place:  # the update is of all groups at once
            return [new for _, new in self._new[place]]
        diffopt = self.diffopt
        grads = self._gradients()
        for group, theirs, states in zip(self.param_groups, diffopt.param_groups, diffopt.state, strict=True):
            theirs["params"] = list(group["params"])
            for i, weight in enumerate(group["params"]):
                states[i] = dict(self.state.get(weight, {}))
        diffopt._update(grads)
        self._new = []
        for group, theirs, states in zip(self.param_groups, diffopt.param_groups, diffopt.state, strict=True):
            self._new.append(list(zip(group["params"], theirs["params"], strict=True)))
            theirs["params"] = [None] * len(theirs["params"])
            for i, weight in enumerate(group["params"]):
                if states[i]:
                    self.state[weight] = states[i]
        return [new for _, new in self._new[0]]

    _new: list[list[tuple[Tensor, Tensor]]]

    def _gradients(self) -> list[list[Tensor | None]]:
        """The gradients by group, after the callback, which gets them in the order of the module's weights."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        known = {id(weight): weight.grad for weight in weights}
        ordered: Any = [known.get(key) for key in self._order]
        if self.diffopt._grad_callback is not None:
            ordered = self.diffopt._grad_callback(ordered)
        return [[ordered[self._order[id(weight)]] for weight in group["params"]] for group in self.param_groups]
