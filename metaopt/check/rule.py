"""Is a rule the step that its optimizer takes, and is its derivative right?"""

from __future__ import annotations

__all__ = ["RuleReport", "rulecheck"]

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor

from metaopt.check.differences import difference
from metaopt.errors import CheckError, RuleError
from metaopt.rules import Rule, Update, rule_of

Make = Callable[..., torch.optim.Optimizer]
State = tuple[Tensor | None, ...]

_SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (3, 4))


@dataclass(frozen=True)
class RuleReport:
    """The result of `rulecheck`: what was looked at, and what is wrong; true if nothing is."""

    name: str
    checked: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not self.wrong

    def __str__(self) -> str:
        lines = [f"rulecheck of {self.name}: {len(self.checked)} checks, {len(self.wrong)} wrong"]
        return "\n".join([*lines, *(f"- {text}" for text in self.wrong)])

    __repr__ = __str__


@overload
def rulecheck(
    optimizer: Make, /, *, steps: int = ..., rtol: float = ..., raise_exception: Literal[True] = ..., **settings: Any
) -> Literal[True]: ...


@overload
def rulecheck(
    optimizer: Make, /, *, steps: int = ..., rtol: float = ..., raise_exception: Literal[False], **settings: Any
) -> RuleReport: ...


def rulecheck(
    optimizer: Make,
    /,
    *,
    steps: int = 4,
    rtol: float = 1e-9,
    raise_exception: bool = True,
    **settings: Any,
) -> bool | RuleReport:
    """Check the rule of an optimizer: parity with its step, derivative, purity, and what happens at zero gradients.

    A wrong rule is invisible where only gradients are compared, since forward and reverse mode share it; parity with
    the step that the optimizer really takes sees it. Parity can't see a wrong derivative; finite differences do. All
    in float64, on random weights and gradients of several shapes.

    Args:
        optimizer: the optimizer's class, or a function of the parameters and of ``settings`` that makes one.
        steps: how many steps to compare.
        rtol: how near the rule's weights and state must be to the optimizer's, relative to their norms.
        raise_exception: whether to raise if something is wrong, or to return the report.
        settings: the constructor's arguments, continuous settings and flags. Choose values that take part: a weight
            decay of 0 tests no weight decay.

    Returns:
        True; or with ``raise_exception=False`` a `RuleReport`.

    Raises:
        CheckError: if something is wrong; the text says what.
        RuleError: if there is no rule for the optimizer, or it is an object and no class.

    Example:
        >>> metaopt.check.rulecheck(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
        True
    """
    if not callable(optimizer):
        raise RuleError(
            f"rulecheck takes an optimizer's class, `rulecheck(torch.optim.SGD, lr=0.1)`, or a function that makes one "
            f"from its parameters, and this is {type(optimizer).__name__}, an object: it makes its own weights."
        )
    checked: list[str] = []
    wrong: list[str] = []
    name = ""
    shapes = [shape for shape in _SHAPES if _takes(optimizer, settings, shape)]
    for zeros in ("none", "first", "all"):
        for place, shape in enumerate(shapes):
            trial = _Trial(optimizer, settings, shape, zeros, steps, rtol, seed=place)
            name = trial.rule.optimizer.__name__
            for what, problem in trial.problems():
                checked.append(what)
                if problem is not None and not any(text.startswith(f"{what}: ") for text in wrong):
                    wrong.append(f"{what}: {problem}")
    report = RuleReport(name, checked, wrong)
    if raise_exception and not report:
        raise CheckError(str(report))
    return True if raise_exception else report


def _takes(make: Make, settings: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
    """Whether an optimizer takes weights of a shape; Muon takes matrices alone. The last shape must do."""
    try:
        make([torch.nn.Parameter(torch.zeros(shape))], **settings)
    except ValueError:
        if shape == _SHAPES[-1]:
            raise
        return False
    return True


class _Trial:
    """One weight, some gradients, the optimizer and its rule side by side."""

    def __init__(
        self,
        make: Make,
        settings: Mapping[str, Any],
        shape: tuple[int, ...],
        zeros: str,
        steps: int,
        rtol: float,
        *,
        seed: int,
    ) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)

        def random() -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")

        self.zeros = zeros
        self.rtol = rtol
        self.weight = torch.nn.Parameter(random())
        self.optimizer = make([self.weight], **settings)
        self.rule: Rule = rule_of(self.optimizer)
        zero = {"none": 0, "first": 1, "all": steps}[zeros]
        self.grads = [random() if step >= zero else torch.zeros_like(self.weight.detach()) for step in range(steps)]
        (group,) = self.optimizer.param_groups
        found = {key: self.rule.number(group, key) for key in self.rule.settings}
        self.numbers = {key: float(number) for key, number in found.items() if number is not None}
        self.update = Update(self.rule, tuple((flag, group.get(flag, False)) for flag in self.rule.flags))

    def problems(self) -> Iterator[tuple[str, str | None]]:
        """What was checked, and what is wrong with it."""
        for step, grad in enumerate(self.grads, start=1):
            w, state = self.weight.detach().clone(), self._state()
            versions = [t._version for t in (w, grad, *state) if t is not None]
            new = self._apply(w, grad, state, step, self.numbers)
            pure = versions == [t._version for t in (w, grad, *state) if t is not None]
            yield "purity", None if pure else "the rule writes its arguments in place; let it return new tensors."
            self.weight.grad = grad.clone()
            self.optimizer.step()
            yield "parity", self._difference(new, step)
            yield from self._derivatives(w, grad, state, step)

    def _state(self) -> State:
        kept = self.optimizer.state.get(self.weight, {})
        values = (kept.get(name) for name in self.rule.state)
        return tuple(None if value is None else value.detach().clone() for value in values)

    def _apply(self, w: Tensor, g: Tensor, state: State, step: int, numbers: Mapping[str, Any]) -> dict[str, Tensor]:
        flags = dict(self.update.flags)
        named = dict(zip(self.rule.state, state, strict=True))
        new, after = self.rule.update(w, g, named, step, **numbers, **flags)
        return {"the weight": new, **{f"state {key!r}": value for key, value in after.items() if value is not None}}

    def _difference(self, new: Mapping[str, Tensor], step: int) -> str | None:
        kept = self.optimizer.state.get(self.weight, {})
        actual = {f"state {key!r}": kept[key] for key in self.rule.state if kept.get(key) is not None}
        actual["the weight"] = self.weight.detach()
        for name, value in actual.items():
            if name not in new:
                return f"after step {step} the optimizer has {name}, and the rule does not return it."
            error = float((new[name].detach() - value).norm())
            if not error <= self.rtol * max(float(value.norm()), 1e-6):
                return (
                    f"after step {step} {name} differs from the optimizer's by {error:.3g} (norm "
                    f"{float(value.norm()):.3g}; settings {self.numbers})."
                )
        return None

    def _derivatives(self, w: Tensor, g: Tensor, state: State, step: int) -> Iterator[tuple[str, str | None]]:
        """By each argument of the rule, along a random direction."""
        if self.rule.surrogate:
            return  # its value is rounded on purpose, and its derivative is not that of the rounding
        present = {f"state {key!r}": value for key, value in zip(self.rule.state, state, strict=True)}
        point = {"the weight": w, "the gradient": g} | {k: v for k, v in present.items() if v is not None}
        point |= {key: torch.tensor(value, dtype=torch.float64) for key, value in self.numbers.items()}
        leaves = {key: value.clone().requires_grad_() for key, value in point.items()}
        try:
            value = self._projected(leaves, step)
        except (TypeError, RuntimeError) as error:
            yield "derivative", f"the rule can't be computed with tensors for its settings: {error}"
            return
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True) if value.requires_grad else []
        for (key, leaf), grad in zip(leaves.items(), grads, strict=False):
            grad = torch.zeros_like(leaf) if grad is None else grad
            what = f"derivative by {key}"
            if not bool(torch.isfinite(grad).all()):
                where = "where the gradients are zero" if self.zeros != "none" else ""
                yield what, f"not finite {where} (a root or a quotient at 0: `metaopt.rules.safe_sqrt`), step {step}."
            elif self.zeros == "none" or key in self.numbers:
                # At a zero gradient a rule may have a kink; what counts there is to be finite.
                yield what, self._by_differences(leaves, key, grad, step, float(value.detach()))

    def _projected(self, point: Mapping[str, Tensor], step: int) -> Tensor:
        """The new weight and state, as one number by fixed weights."""
        state = tuple(point.get(f"state {key!r}") for key in self.rule.state)
        numbers = {key: point[key] for key in self.numbers}
        new = self._apply(point["the weight"], point["the gradient"], state, step, numbers)
        generator = torch.Generator("cpu").manual_seed(7)
        parts = [
            (torch.randn(v.shape, dtype=torch.float64, generator=generator, device="cpu") * v).sum()
            for v in new.values()
        ]
        return torch.stack(parts).sum()

    def _by_differences(
        self, leaves: Mapping[str, Tensor], key: str, grad: Tensor, step: int, here: float
    ) -> str | None:
        leaf = leaves[key].detach()
        sizes = torch.where(leaf == 0, 1.0, leaf.abs())
        direction = (
            sizes
            * torch.randn(
                leaf.shape, dtype=leaf.dtype, generator=torch.Generator("cpu").manual_seed(3), device="cpu"
            ).sign()
        )

        def moved(h: float) -> float:
            point = {name: value.detach() for name, value in leaves.items()}
            value = leaf + h * direction
            if key in self.numbers:
                self.rule.check(key, float(value))
            return float(self._projected({**point, key: value}, step))

        found = difference(moved, here, 1e-4)
        expected, given = found.value, float((grad * direction).sum())
        near = 1e-6 * max(abs(expected), abs(given)) + 1e-9 * max(abs(here), 1e-3)
        if found.spread > near or abs(found.jump) > 2 * near or abs(expected - given) <= near:
            return None  # not smooth there: nothing can be said
        if abs(expected) < 1e-2 * abs(given):
            # Steep within an eps: what is larger than that does not see it.
            closer = difference(moved, here, 1e-7 * max(abs(expected / given), 1e-9))
            if closer.spread > 1e-3 * abs(given) or abs(closer.value - given) <= 1e-3 * abs(given):
                return None
        return f"{given:.9g} by autograd, {expected:.9g} by finite differences, along a random direction, step {step}."
