"""Optimizers without a rule: their steps are watched like the rest of the loop."""

from __future__ import annotations

__all__ = ["Wrapped", "refuse_filled", "refuse_old", "steps_on_stack", "wrap", "wrapped"]

import sys
import weakref
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from metaopt.errors import RuleError

Opt = TypeVar("Opt", bound=torch.optim.Optimizer)


@dataclass(frozen=True)
class Wrapped:
    """How an optimizer's step is watched.

    Attributes:
        hold_numbers: whether Python numbers that the step takes out of tensors are held constant, or refused.
    """

    hold_numbers: bool = False


_wrapped: weakref.WeakKeyDictionary[torch.optim.Optimizer, Wrapped] = weakref.WeakKeyDictionary()


def wrap(optimizer: Opt, *, hold_numbers: bool = False) -> Opt:
    """Let `metaopt.record` and `metaopt.stream` follow the step of any optimizer, without a rule.

    Inside a context the torch calls of its ``step()`` are captured like those of the loop, and replayed as a pure
    function of the weights, the gradients and the state that the optimizer keeps. Its settings are constants, but for
    tensors that require grad: give it ``lr=hyper.lr`` where its formula takes a tensor.

    A square root has an infinite derivative at 0, where Adam's second moment is while gradients are zero; in a watched
    step the derivative there is 0, as in metaopt's rules.

    Args:
        optimizer: any ``torch.optim.Optimizer``. It stays the object that it is, and gets a hook that renews settings
            such as ``hyper.lr`` before each step.
        hold_numbers: what to do where the step takes a Python number out of a tensor that depends on the weights
            (``.item()``, ``float(x)``), whose derivative is lost: False refuses with an error; True holds the number
            constant, which is right where it only decides a branch or is logged.

    Returns:
        The optimizer, so that ``optimizer = metaopt.wrap(Lion(model.parameters()))`` reads well.

    Raises:
        RuleError: if it is no ``torch.optim.Optimizer``, or one of `metaopt.optim` with hyperparameters, whose rule
            knows more than the step shows.

    Example:
        >>> optimizer = metaopt.wrap(Lion(model.parameters(), lr=1e-4))
        >>> with metaopt.record(optimizer) as run:
        ...     train(model, optimizer)
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RuleError(
            f"`metaopt.wrap` takes a torch.optim.Optimizer, not {type(optimizer).__name__}: the iterations are told "
            "apart by its `step`. Give your update a class with `param_groups` and `step` (docs: extending)."
        )
    if any(getattr(optimizer, "_links", {}).values()):
        raise RuleError(
            f"{type(optimizer).__name__} has hyperparameters among its settings, which its rule differentiates and a "
            "watched step would take for numbers. Use it as it is, without `metaopt.wrap`."
        )
    if optimizer not in _wrapped:
        optimizer.register_step_pre_hook(_follow)
    _wrapped[optimizer] = Wrapped(hold_numbers)
    return optimizer


def wrapped(optimizer: torch.optim.Optimizer) -> Wrapped | None:
    """How the optimizer's step is watched; None if a rule describes it."""
    return _wrapped.get(optimizer)


def steps_on_stack(optimizer: torch.optim.Optimizer) -> int:
    """How many calls of the optimizer's ``step`` are running: 2 where a class calls the one of its base."""
    # Asked of the stack, since a step that raises tells nobody that it has ended.
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None:
        code = frame.f_code
        if code.co_name == "wrapper" and code.co_filename.endswith("torch/optim/optimizer.py"):
            count += _self(frame) is optimizer
        frame = frame.f_back
    return count


def _self(frame: FrameType) -> Any:
    args = frame.f_locals.get("args", ())
    return args[0] if args else None


def _follow(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before each step, watched or not: the groups get the present values of constrained hyperparameters."""
    with torch._C.DisableTorchFunction():  # bookkeeping, and no part of the loop that a context may be watching
        for group in optimizer.param_groups:
            for key, value in group.items():
                if key == "params":
                    continue
                if isinstance(value, tuple):
                    group[key] = tuple(_present(entry) for entry in value)
                else:
                    group[key] = _present(value)


def _present(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    refuse_filled(value)
    source = getattr(value, "_metaopt_source", None)
    if source is None:
        return value
    present = source()
    # The same object for as long as it does not change.
    return value if torch.equal(present.detach(), value.detach()) else present


def refuse_filled(setting: Any) -> None:
    """Raise if a scheduler has written into a tensor that was computed from a hyperparameter, as torch's do."""
    if isinstance(setting, Tensor) and type(setting.grad_fn).__name__.startswith("FillBackward"):
        raise RuleError(
            "a scheduler wrote its number into a setting that is a hyperparameter, which cuts it off from the "
            "hyperparameter. Use a class of `metaopt.optim`, where schedulers and hyperparameters go together; or "
            "schedule a plain number, or compute the schedule with the tensor in the loop."
        )


def refuse_old(setting: Tensor) -> None:
    """Raise if a setting has the value that its hyperparameter had when the optimizer was made."""
    source = getattr(setting, "_metaopt_source", None)
    if source is not None and not torch.equal(source().detach(), setting.detach()):
        raise RuleError(
            f"a setting of an optimizer is {setting.detach().tolist()}, and the hyperparameter that it was made of has "
            "moved since: a plain optimizer does not follow. Use the class of `metaopt.optim` of the same name, which "
            "does, or `metaopt.wrap`; or write the present value into the group after each hyper-step."
        )
