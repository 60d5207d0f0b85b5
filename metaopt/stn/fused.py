"""Gradient descent whose step is one call of torch's fused kernel, and no more where no more is asked for."""

from __future__ import annotations

__all__ = ["FusedSGD"]

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


class FusedSGD(SGD):
    r"""``torch.optim.SGD(fused=True)`` at less cost: the same steps and states.

    .. math:: m \leftarrow \mu m + \nabla + \delta w, \quad w \leftarrow w - \eta m

    Torch's own step sorts parameters by type and device, opens a label for profilers and looks for hooks, each time;
    for a small model that takes longer than the rest of it. Here what is to be moved is given to the kernel at once.
    Where there is a hook, a closure or a profiler, or a group that the kernel can't take, torch's own step runs. It
    does so without the kernel where parameters, gradients and momenta do not lie in memory alike, as after
    ``model.to(memory_format=torch.channels_last)``: the kernel would take one entry for another.

    Args:
        params: on a device for which torch has the kernel, of one floating-point type.
        lr: η.
        momentum: μ.
        weight_decay: δ.
        nesterov: whether the step is along ``∇ + μ m``.
        maximize: whether to ascend.

    Raises:
        RuntimeError: by torch, where it has no fused kernel for the parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        *,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        settings: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, **settings, maximize=maximize, fused=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Move more parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Where it is dampened, the first one is no step from zero.
        for p in group["params"] if group["momentum"] and not group["dampening"] else ():
            # Torch's step fails where some have a momentum and others, which no batch had used so far, have none.
            # One that comes from another group keeps its own.
            if self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move the parameters that have a gradient.

        Args:
            closure: computes the loss anew, and its gradients.
        """
        found = [] if closure is not None or self._looked_at() else [self._moved(group) for group in self.param_groups]
        if not found or None in found:
            return self._by_torch(closure)
        with torch.no_grad():
            for group, moved in zip(self.param_groups, found, strict=True):
                if moved is not None and moved[0]:
                    torch._fused_sgd_(
                        *moved,
                        lr=group["lr"],
                        momentum=group["momentum"],
                        dampening=group["dampening"],
                        weight_decay=group["weight_decay"],
                        nesterov=group["nesterov"],
                        maximize=group["maximize"],
                        is_first_step=False,
                    )
        return None

    # As torch marks a step that it has wrapped, with the label and the hooks.
    step.hooked = True  # type: ignore[attr-defined]

    def _by_torch(self, closure: Callable[[], float] | None) -> float | None:
        """Torch's own step: without the kernel for a group in which it would take one entry for another."""
        apart = [group for group in self.param_groups if group["fused"] and not self._lies_alike(group)]
        for group in apart:
            group["fused"] = False
        try:
            result: float | None = _torchs_step()(self, *(() if closure is None else (closure,)))
            return result
        finally:
            for group in apart:
                group["fused"] = True

    def _lies_alike(self, group: dict[str, Any]) -> bool:
        """Whether gradients and momenta lie in memory as their parameters do."""
        return all(
            other is None or other.layout is not torch.strided or _alike(p, other)
            for p in group["params"]
            for other in (p.grad, self.state.get(p, {}).get("momentum_buffer"))
        )

    def _looked_at(self) -> bool:
        """Whether a hook, a profiler or a scaler of gradients has to see the step."""
        own, post = self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks
        shared = bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks)
        scaled = "found_inf" in self.__dict__ or "grad_scale" in self.__dict__
        return bool(own or post) or shared or scaled or _profiler_enabled()

    def _moved(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]] | None:
        """Parameters, gradients and momenta, or None where torch has to look at them."""
        if not group["fused"] or group["differentiable"] or isinstance(group["lr"], Tensor):
            return None
        with_momentum = group["momentum"] != 0
        parameters, gradients, momenta = [], [], []
        for p in group["params"]:
            gradient = p.grad
            if gradient is None:
                continue
            momentum = self.state[p].get("momentum_buffer") if with_momentum else None
            if gradient.layout is not torch.strided or (momentum is None) is with_momentum:
                return None
            parameters.append(p)
            gradients.append(gradient)
            if momentum is not None:
                momenta.append(momentum)
        kinds = {(t.dtype, t.device) for t in chain(parameters, momenta)}
        # Asked first, as it is nearly always so and at once.
        plain = all(map(Tensor.is_contiguous, chain(parameters, gradients, momenta)))
        alike = plain or (all(map(_alike, parameters, gradients)) and all(map(_alike, parameters, momenta)))
        return (parameters, gradients, momenta) if alike and len(kinds) < 2 else None


def _alike(a: Tensor, b: Tensor) -> bool:
    # Of an axis of one, how far apart its entries are says nothing.
    apart = [one != other and n > 1 for n, one, other in zip(a.shape, a.stride(), b.stride(), strict=False)]
    return a.shape == b.shape and not any(apart)


def _torchs_step() -> Callable[..., Any]:
    """The step of `torch.optim.SGD` with hooks, which torch wraps when the first of that class is made."""
    return SGD.step if getattr(SGD.step, "hooked", False) else Optimizer.profile_hook_step(SGD.step)
