"""The check of a rule: torch's rules pass, and a wrong one is told what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import metaopt
from metaopt.check import RuleReport, rulecheck


class Plain(torch.optim.Optimizer):
    """Momentum, with a root of the second moment below."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for w in group["params"]:
                v = self.state[w].setdefault("v", torch.zeros_like(w))
                v.mul_(group["beta"]).add_(w.grad.square())
                w.sub_(group["lr"] * w.grad / (v.sqrt() + 1e-3))


def registered(update: Any) -> RuleReport:
    metaopt.rules.register(metaopt.rules.Rule(Plain, update, settings={"lr": "lr", "beta": "beta"}, state=("v",)))
    found = rulecheck(Plain, lr=0.1, beta=0.8, raise_exception=False)
    assert isinstance(found, RuleReport)
    return found


def moment(g: Tensor, state: Mapping[str, Tensor | None], beta: Any) -> Tensor:
    v = state["v"]
    return g.square() if v is None else beta * v + g.square()


def test_a_right_rule() -> None:
    def update(w: Tensor, g: Tensor, state: Any, step: int, *, lr: Any, beta: Any) -> Any:
        v = moment(g, state, beta)
        return w - lr * g / (metaopt.rules.safe_sqrt(v) + 1e-3), {"v": v}

    assert registered(update)
    assert rulecheck(Plain, lr=0.3) is True


def test_a_wrong_formula() -> None:
    def update(w: Tensor, g: Tensor, state: Any, step: int, *, lr: Any, beta: Any) -> Any:
        v = moment(g, state, beta)
        return w - lr * g / (metaopt.rules.safe_sqrt(v) + 1e-2), {"v": v}

    found = registered(update)
    assert len(found.wrong) == 1
    assert found.wrong[0].startswith("parity: after step 1 the weight differs")
    with pytest.raises(metaopt.CheckError, match="rulecheck of Plain"):
        rulecheck(Plain)


def test_a_wrong_derivative() -> None:
    def update(w: Tensor, g: Tensor, state: Any, step: int, *, lr: Any, beta: Any) -> Any:
        v = moment(g, state, beta.detach() if isinstance(beta, Tensor) else beta)
        return w - lr * g / (metaopt.rules.safe_sqrt(v.detach()) + 1e-3), {"v": v}

    found = registered(update)
    assert {text.split(":")[0] for text in found.wrong} >= {"derivative by the gradient", "derivative by beta"}
    assert not any(text.startswith("parity") for text in found.wrong)


def test_a_root_at_zero() -> None:
    def update(w: Tensor, g: Tensor, state: Any, step: int, *, lr: Any, beta: Any) -> Any:
        v = moment(g, state, beta)
        return w - lr * g / (v.sqrt() + 1e-3), {"v": v}

    found = registered(update)
    assert found.wrong
    assert all("not finite where the gradients are zero" in text for text in found.wrong)


def test_a_rule_that_writes_in_place() -> None:
    def update(w: Tensor, g: Tensor, state: Any, step: int, *, lr: Any, beta: Any) -> Any:
        v = moment(g, state, beta)
        new = w.clone() - lr * g / (metaopt.rules.safe_sqrt(v) + 1e-3)
        g.mul_(1.0)
        return new, {"v": v}

    assert any(text.startswith("purity") for text in registered(update).wrong)


def test_state_that_is_forgotten() -> None:
    def update(w: Tensor, g: Tensor, state: Any, step: int, *, lr: Any, beta: Any) -> Any:
        v = moment(g, state, beta)
        return w - lr * g / (metaopt.rules.safe_sqrt(v) + 1e-3), {}

    assert any("the rule does not return it" in text for text in registered(update).wrong)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
        ("Adam", {"lr": 0.1, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.1, "amsgrad": True}),
        ("AdamW", {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}),
    ],
    ids=["sgd", "nesterov", "adam", "adamw"],
)
def test_torchs_rules(name: str, settings: dict[str, Any]) -> None:
    assert rulecheck(getattr(torch.optim, name), **settings)


def test_an_optimizer_without_a_rule() -> None:
    with pytest.raises(metaopt.RuleError):
        rulecheck(torch.optim.LBFGS)


@pytest.mark.parametrize("name", [name for name in metaopt.optim.__all__ if name != "DifferentiableOptimizer"])
def test_the_rules_of_the_library_pass_with_their_defaults(name: str) -> None:
    assert rulecheck(getattr(metaopt.optim, name))
