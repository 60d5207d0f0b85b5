"""The optimizers' half of ``Φ``: one optimizer a file, a pure formula with its citation."""

from __future__ import annotations

__all__ = ["Rule", "Update", "register", "rule_of", "safe_sqrt"]

import inspect
from functools import lru_cache

import torch

from metaopt.errors import RuleError
from metaopt.rules.adadelta import Adadelta
from metaopt.rules.adafactor import Adafactor
from metaopt.rules.adagrad import Adagrad
from metaopt.rules.adam import Adam
from metaopt.rules.adamax import Adamax
from metaopt.rules.adamw import AdamW
from metaopt.rules.asgd import ASGD
from metaopt.rules.lamb import LAMB
from metaopt.rules.lars import LARS
from metaopt.rules.lion import Lion
from metaopt.rules.nadam import NAdam
from metaopt.rules.radam import RAdam
from metaopt.rules.rmsprop import RMSprop
from metaopt.rules.rprop import Rprop
from metaopt.rules.rule import Rule, safe_sqrt
from metaopt.rules.schedule_free_adamw import ScheduleFreeAdamW
from metaopt.rules.schedule_free_sgd import ScheduleFreeSGD
from metaopt.rules.sgd import SGD
from metaopt.rules.update import Update

_RULES: dict[type[torch.optim.Optimizer], Rule] = {}

# Optimizers of torch that can't have a rule: why, and what to use.
_WITHOUT_RULE: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.SparseAdam: (
        "SparseAdam steps from sparse gradients, which have no second derivative in torch, so its step can't be "
        "differentiated. Use `metaopt.optim.Adam` with dense gradients (`nn.Embedding(..., sparse=False)`): the same "
        "step, except that rows without a gradient move on by their momentum."
    ),
    torch.optim.LBFGS: (
        "LBFGS evaluates the loss many times within one step, so its step is no formula of the gradient. Follow it as "
        "it runs, `metaopt.wrap(optimizer, hold_numbers=True)` (its Python numbers decide when to stop; without a line "
        "search that is all they do); or solve the inner problem with it before the context, and take the last steps "
        "inside with `metaopt.optim.SGD`: near the solution their hypergradient tends to the solution's."
    ),
}


def register(rule: Rule) -> Rule:
    """Make a rule known, for its optimizer class and for subclasses that keep its ``step``.

    Returns:
        The rule, so that this can stand where the rule is defined.
    """
    _RULES[rule.optimizer] = rule
    return rule


def why_without_rule(name: str) -> str | None:
    """Why the optimizer of torch with this name can't have a rule, and what to use; None if it is none of these."""
    return next((why for kind, why in _WITHOUT_RULE.items() if kind.__name__ == name), None)


def rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    """The rule that describes an optimizer's step.

    Raises:
        RuleError: if no rule is registered for it, or if its class replaces the ``step`` that the rule describes.
    """
    kind = type(optimizer)
    for base in kind.__mro__:
        rule = _RULES.get(base)
        if rule is None:
            continue
        if _unwrapped(kind.step) is not _unwrapped(rule.optimizer.step):
            drop_in = any(parent.__module__.startswith("metaopt.") for parent in kind.__mro__)
            derive = f"Derive it from torch.optim.{base.__name__}, and follow" if drop_in else "Follow"
            raise RuleError(
                f"{kind.__module__}.{kind.__qualname__} replaces the `step` of {base.__name__}, so the rule for "
                f"{base.__name__} does not describe it. {derive} its step as it runs with `metaopt.wrap(optimizer)`; "
                "or do in the loop what it adds to the step; or register a rule for it with `metaopt.rules.register` "
                "(docs: extending)."
            )
        return rule
    for base in kind.__mro__:
        if base in _WITHOUT_RULE:
            raise RuleError(_WITHOUT_RULE[base])
    known = ", ".join(sorted(rule.optimizer.__name__ for rule in _RULES.values()))
    raise RuleError(
        f"there is no rule for {kind.__module__}.{kind.__qualname__}, so its step can't be differentiated. Rules "
        f"exist for {known}. Use one of these; or `metaopt.wrap(optimizer)`, which follows any step as it runs; or "
        "write the update as a function and register it with `metaopt.rules.register` (docs: extending)."
    )


_unwrapped = lru_cache(256)(inspect.unwrap)  # asked for in every step


_ALL = (SGD, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Adagrad, Adadelta, ASGD, Rprop, Adafactor)
for _rule in (*_ALL, Lion, LAMB, LARS, ScheduleFreeSGD, ScheduleFreeAdamW):
    register(_rule)

if hasattr(torch.optim, "Muon"):  # since torch 2.9
    from metaopt.rules.muon import Muon

    register(Muon)


def __dir__() -> list[str]:
    return __all__
