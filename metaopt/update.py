"""The optimizer's half of ``Φ``: its rule, written down as one instruction for each param group."""

from __future__ import annotations

__all__ = ["RuledUpdate", "sparse"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from metaopt.capture.arrivals import read_gradient
from metaopt.capture.bindings import Binding
from metaopt.capture.tape import Tape
from metaopt.capture.trace import Group, Instruction, Val
from metaopt.errors import CaptureError, UnusedHyperparameterWarning, warn
from metaopt.followed import Followed, plainly, slopes_of
from metaopt.hyperparameters import name_of
from metaopt.links import label_of, mixed
from metaopt.rules import Rule, Update
from metaopt.wrapping import refuse_filled, refuse_old


class RuledUpdate:
    """Writes the update of an optimizer that has a rule, from what there is before and after its step."""

    def __init__(self, optimizer: Optimizer, rule: Rule, tape: Tape) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self.tape = tape
        self._blind: set[int] = set()
        self._pending: list[_Pending] = []
        # Whether the present step is the first one of some state, which is zero before it.
        self.begins = False
        self._lent: list[tuple[dict[str, Any], str, Any, Any]] = []
        # Torch's own steps only read what the groups say of their settings.
        self._lends = rule.optimizer.__module__.startswith("torch.optim.")
        self._quiet: Any = None

    # -- while it runs ------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the optimizer's step has begun, and not ended."""
        return self._quiet is not None

    def begin(self) -> None:
        """The step is about to run: note what it reads, and be quiet until it ends."""
        with torch._C.DisableTorchFunction():  # while a mode is open, each look at a tensor's attribute costs a call
            self.before()
        # The rule says what the update does: while it runs, not even the watcher's glance at each call is paid for.
        self.lend_numbers()
        self._quiet = torch._C.DisableTorchFunction()
        self._quiet.__enter__()

    def stop(self) -> None:
        """The step is over, or has failed."""
        if self._quiet is not None:
            self._quiet.__exit__(None, None, None)
            self._quiet = None
            self.take_numbers_back()

    # -- what is recorded ---------------------------------------------------------------------------------------------

    def before(self) -> None:
        """Note what the update reads, and save what it is about to overwrite."""
        self._pending = []
        self.begins = False
        for group in self.optimizer.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._pending.append(self._read_group(group, weights))
        for pending in self._pending:
            for weight, held in zip(pending.weights, pending.held, strict=True):
                self.tape.before_write(weight)
                for name in self.rule.state:
                    tensor = held.get(name)
                    if tensor is not None:
                        self.tape.before_write(tensor)

    def lend_numbers(self) -> None:
        """While the step runs, numbers that carry their derivative are plain ones, which compute faster."""
        for group in self.optimizer.param_groups if self._lends else ():
            for key, value in group.items():
                if key != "params" and slopes_of(value) is not None:
                    self._lent.append((group, key, value, plainly(value)))
        for group, key, _, plain in self._lent:
            group[key] = plain

    def take_numbers_back(self) -> None:
        """The step is over."""
        for group, key, value, plain in self._lent:
            if group[key] is plain:
                group[key] = value
        self._lent.clear()

    def _read_group(self, group: dict[str, Any], weights: list[Tensor]) -> _Pending:
        tape, rule = self.tape, self.rule
        read, number = tape.read_through, tape.trace.number
        state = self.optimizer.state
        held = [state.get(weight, {}) for weight in weights]
        grads = []
        for weight in weights:
            grad = weight.grad
            assert grad is not None
            if grad.is_sparse:
                raise sparse(weight)
            grads.append(read_gradient(tape, weight))
        update = Update(rule, tuple([(flag, group.get(flag, False)) for flag in rule.flags]))
        settings, zeros = self._settings(group)
        self.begins |= bool(zeros) and any(entries.get(name) is None for entries in held for name in zeros)
        begun: list[dict[str, Binding]] = [{} for _ in weights]
        states = [self._read_state(*each, zeros) for each in zip(weights, held, begun, strict=True)]
        arguments = {
            "weights": Group(list, tuple([read(weight) for weight in weights])),
            "grads": Group(list, tuple(grads)),
            "states": Group(list, tuple(states)),
            "steps": Group(list, tuple([number(int(entries.get("step", 0)) + 1) for entries in held])),
            "settings": settings,
        }
        if rule.blind:
            self._warn_blind(arguments)
        return _Pending(weights, held, begun, update, arguments)

    def _warn_blind(self, arguments: dict[str, Any]) -> None:
        # A hypergradient of exactly 0 through a sign is right, and of no use to anybody who does not know why.
        tape = self.tape
        through = tape.trace.behind(arguments["grads"])
        through -= tape.trace.behind((arguments["weights"], arguments["states"], arguments["settings"]))
        for external in tape.externals.values():
            if external.epoch != tape.epoch or external.value not in through or id(external.tensor) in self._blind:
                continue
            self._blind.add(id(external.tensor))
            name = name_of(external.tensor) or f"of shape {tuple(external.tensor.shape)}"
            warn(
                f"the hyperparameter {name} acts through the gradient, and {self.rule.optimizer.__name__} "
                f"{self.rule.blind}: its derivative through these steps is 0. Train with an optimizer that follows the "
                "gradient (SGD, AdamW, …), or make hyperparameters of the optimizer's own settings.",
                UnusedHyperparameterWarning,
            )

    def _read_state(
        self, weight: Tensor, entries: dict[str, Any], begun: dict[str, Binding], zeros: tuple[str, ...]
    ) -> tuple[Val | None, ...]:
        values: list[Val | None] = []
        for name in self.rule.state:
            tensor = entries.get(name)
            if tensor is None and name in zeros:
                begun[name] = self.tape.begin_with(torch.zeros_like(weight, memory_format=torch.preserve_format))
                values.append(Val(begun[name].value))
                continue
            if tensor is None:
                values.append(None)
                continue
            if self.tape.find(tensor) is None:
                self.tape.bind(tensor)
            values.append(self.tape.read_through(tensor))
        return tuple(values)

    def _settings(self, group: dict[str, Any]) -> tuple[tuple[tuple[str, Any], ...], tuple[str, ...]]:
        """Every continuous setting (a number, or its hyperparameter times the scheduler's factor); what begins as 0."""
        tape, rule = self.tape, self.rule
        linked = getattr(self.optimizer, "linked_settings", None)
        links: dict[str, tuple[Tensor, float, float]] = linked(group) if linked is not None else {}
        found = {name: rule.number(group, name) for name in rule.settings}
        numbers = {name: number for name, number in found.items() if number is not None}
        plain = {n: float(v.detach() if isinstance(v, Tensor) else v) for n, v in numbers.items()}
        for name, number in plain.items():
            rule.check(name, number)
            found = numbers[name]
            if name not in links and isinstance(found, Followed) and found.slope:
                raise mixed(name, found, label_of(self.optimizer) or self.rule.optimizer.__name__)
        differentiable = frozenset(links) | {
            name for name, number in numbers.items() if isinstance(number, Tensor) and self.tape.is_live(number)
        }
        for name in differentiable:
            rule.refuse_flat(name)
        if rule.refuse is not None:
            rule.refuse({**group, **plain}, differentiable)
        settings: list[tuple[str, Any]] = []
        for name, number in numbers.items():
            if name in links and not (isinstance(number, Tensor) and tape.is_live(number)):
                spec: Any = self._scheduled(*links[name], plain[name])
            elif isinstance(number, Tensor) and tape.is_live(number):
                refuse_filled(number)
                refuse_old(number)
                spec = tape.read_through(number)
            else:
                spec = tape.trace.number(plain[name])
            settings.append((name, spec))
        return tuple(settings), rule.zeros({**group, **plain}, differentiable)

    def _scheduled(self, value: Tensor, slope: float, rest: float, number: float) -> Any:
        """``slope · λ + rest``, what a scheduler made of a hyperparameter."""
        tape = self.tape
        if slope == 0.0:
            return tape.trace.number(number)
        spec: Any = tape.read(value)
        if slope != 1.0:
            spec = Val(tape.trace.emit(torch.mul, spec, tape.trace.number(slope))[0])
        if rest != 0.0:
            spec = Val(tape.trace.emit(torch.add, spec, tape.trace.number(rest))[0])
        return spec

    def after(self, *, last: bool = True) -> None:
        """Record the update, now that the optimizer has made its state.

        Args:
            last: whether the iteration ends here; if not, what follows may take gradients at the new weights.
        """
        tape, state = self.tape, self.optimizer.state
        for pending in self._pending:
            places: list[tuple[Tensor, int, bool]] = []
            for weight, begun in zip(pending.weights, pending.begun, strict=True):
                places.append((weight, tape.trace.new(), True))
                entries = state.get(weight, {})
                for name in self.rule.state:
                    tensor = entries.get(name)
                    if tensor is not None:
                        if name in begun:
                            tape.succeed(begun[name], tensor)
                        places.append((tensor, tape.trace.new(), False))
            given = pending.arguments
            args = (given["weights"], given["grads"], given["states"], given["steps"])
            outs = tuple([value for _, value, _ in places])
            tape.trace.code.append(Instruction(pending.update, args, given["settings"], outs, many=True))
            for tensor, value, is_weight in places:
                binding = tape.find(tensor)
                if is_weight and not last and tensor.requires_grad and binding is not None:
                    tape.rebind_leaf(binding, tape.iteration.stopped(value), tensor)
                else:
                    tape.define(tensor, value, inner=int(is_weight), leaf=is_weight).halted = not last
        self._pending = []


@dataclass(slots=True)
class _Pending:
    """What the update of a group reads: its weights with a gradient, what the optimizer holds of each, as arguments."""

    weights: list[Tensor]
    held: list[dict[str, Any]]
    begun: list[dict[str, Binding]]
    update: Update
    arguments: dict[str, Any]


def sparse(weight: Tensor) -> CaptureError:
    """The error for a sparse gradient."""
    return CaptureError(
        f"a weight of shape {tuple(weight.shape)} has a sparse gradient, which has no second derivative. Use dense "
        "gradients (`nn.Embedding(..., sparse=False)`)."
    )
