"""The optimizers' half of ``Φ``: one optimizer a file, a pure formula with its citation."""

from __future__ import annotations

__all__ = ["Rule", "Update", "register", "rule_of", "safe_sqrt"]

import inspect

import torch

from metaopt.errors import RuleError
from metaopt.rules.adam import Adam
from metaopt.rules.adamw import AdamW
from metaopt.rules.rule import Rule, Update, safe_sqrt
from metaopt.rules.sgd import SGD

_RULES: dict[type[torch.optim.Optimizer], Rule] = {}


def register(rule: Rule) -> Rule:
    """Make a rule known, for its optimizer class and for subclasses that keep its ``step``.

    Returns:
        The rule, so that this can stand where the rule is defined.
    """
    _RULES[rule.optimizer] = rule
    return rule


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
        if inspect.unwrap(kind.step) is not inspect.unwrap(rule.optimizer.step):
            raise RuleError(
                f"{kind.__module__}.{kind.__qualname__} replaces the `step` of {base.__name__}, so the rule for "
                f"{base.__name__} does not describe it. Follow its step as it runs with `metaopt.wrap(optimizer)`, or "
                f"register a rule for {kind.__qualname__} with `metaopt.rules.register` (docs: extending)."
            )
        return rule
    known = ", ".join(sorted(rule.optimizer.__name__ for rule in _RULES.values()))
    raise RuleError(
        f"there is no rule for {kind.__module__}.{kind.__qualname__}, so its step can't be differentiated. Rules "
        f"exist for {known}. Use one of these; or `metaopt.wrap(optimizer)`, which follows any step as it runs; or "
        "write the update as a function and register it with `metaopt.rules.register` (docs: extending)."
    )


for _rule in (SGD, Adam, AdamW):
    register(_rule)
