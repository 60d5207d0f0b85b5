"""Every optimizer, every continuous setting: the table that the tests walk through and that the documentation shows.

::

    python -m tests.optimizer_table                              print the page
    python -m tests.optimizer_table --write docs/optimizers.md   write it

A cell is a setting of an optimizer, given as a hyperparameter in one of four kinds. Each is either tested against the
bare loop, or an error that is tested; there is no third state.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import metaopt
from metaopt import published
from metaopt.rules import _RULES, Rule
from tests.strategies import ADAM_DECOUPLES

KINDS = {
    "scalar": "one for all weights",
    "group": "each param group its own",
    "step": "a vector with one entry per step",
    "parameter": "each weight its own, in a param group of its own",
}
PAGE = Path(__file__).resolve().parent.parent / "docs" / "optimizers.md"


def nothing(optimizer: Any) -> None:
    """The loop ends with its last step."""


@torch.no_grad()
def to_average(optimizer: Any) -> None:
    """Evaluate the average that ASGD keeps."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.copy_(optimizer.state[weight]["ax"])


def to_eval(optimizer: Any) -> None:
    """Evaluate the average that schedule-free optimizers keep."""
    optimizer.eval()


@dataclass(frozen=True)
class Row:
    """An optimizer in the table.

    Attributes:
        bare: the class that the bare loop uses.
        numbers: a value for every continuous setting at which it makes a difference, by the rule's names.
        variants: combinations of flags.
        implementations: what it has besides the plain for-loop.
        source: where the formula is from.
        finish: what the loop does after its last step, before the outer objective.
        steps: how many steps the test's loop has.
        remarks: what holds for a setting besides that it is tested.
        remark: what holds for the whole optimizer.
        matrices: whether all weights must be matrices.
        elementwise: whether each element goes its own way.
        gradient: whether the weights have a derivative in the gradient.
    """

    bare: type[torch.optim.Optimizer]
    numbers: Mapping[str, float]
    source: str
    variants: tuple[Mapping[str, Any], ...] = ({}, {"maximize": True})
    implementations: tuple[str, ...] = ("foreach",)
    finish: Callable[[Any], None] = nothing
    steps: int = 5
    remarks: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""
    matrices: bool = False
    elementwise: bool = True
    gradient: bool = True

    @property
    def name(self) -> str:
        """The class's name, in `metaopt.optim` too."""
        return self.bare.__name__

    @property
    def rule(self) -> Rule:
        """The optimizer's rule."""
        return _RULES[self.bare]

    @property
    def drop_in(self) -> Any:
        """The class in `metaopt.optim`."""
        return getattr(metaopt.optim, self.name)

    @property
    def linked(self) -> list[str]:
        """The settings that may be hyperparameters."""
        return [name for name in self.rule.settings if name not in self.rule.flat]

    @property
    def flat(self) -> dict[str, float]:
        """The numbers of the settings that may not."""
        return {name: self.numbers[name] for name in self.rule.flat}


O = torch.optim  # noqa: E741
ADAM = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 0.01, "weight_decay": 0.1}
DECOUPLED: tuple[Mapping[str, Any], ...] = ({}, {"decoupled_weight_decay": True, "maximize": True})
absent: Any = None
DECOUPLED_ADAM = ({"decoupled_weight_decay": True},) if ADAM_DECOUPLES else ()
FOREACH, FUSED = ("foreach",), ("foreach", "fused")
FIRST_STEP = "acts at a weight's first step; of a schedule, that step's entry"
KINK = "0 while the other side of its bound is in force; no derivative where the sides change"
SIGN = "derivative 0 wherever there is one: a hyperparameter here is an error"
ROWS = {
    row.name: row
    for row in [
        Row(
            O.SGD,
            {"lr": 0.1, "momentum": 0.8, "dampening": 0.1, "weight_decay": 0.1},
            "Polyak 1964; Sutskever et al. 2013",
            variants=({}, {"maximize": True}),
            implementations=FUSED,
            remarks={"momentum": "at exactly 0: the derivative from the right; with dampening an error"},
        ),
        Row(
            O.Adam,
            ADAM,
            "Kingma & Ba 2015; Reddi et al. 2018 for amsgrad",
            variants=({}, {"amsgrad": True, "maximize": True}, *DECOUPLED_ADAM),
            implementations=FUSED,
        ),
        Row(
            O.AdamW,
            ADAM,
            "Loshchilov & Hutter 2019",
            variants=({}, {"amsgrad": True, "maximize": True}),
            implementations=FUSED,
        ),
        Row(O.Adamax, ADAM, "Kingma & Ba 2015"),
        Row(
            O.NAdam,
            ADAM | {"momentum_decay": 0.5},
            "Dozat 2016",
            variants=DECOUPLED,
            remarks={"momentum_decay": "the product of all momenta so far is part of the state"},
        ),
        Row(
            O.RAdam,
            ADAM | {"beta2": 0.95},
            "Liu et al. 2020",
            variants=DECOUPLED,
            steps=7,
            remarks={"beta2": "the training jumps at the values where one more step begins to adapt"},
        ),
        Row(
            O.RMSprop,
            {"lr": 0.05, "alpha": 0.8, "eps": 0.01, "weight_decay": 0.1, "momentum": 0.7},
            "Tieleman & Hinton 2012; Graves 2013 for centered",
            variants=({}, {"centered": True, "maximize": True}),
            remarks={"momentum": "at exactly 0: the derivative from the right"},
        ),
        Row(
            O.Adagrad,
            {"lr": 0.3, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 0.01},
            "Duchi, Hazan & Singer 2011",
            implementations=FUSED,
            remarks={
                "initial_accumulator_value": f"{FIRST_STEP}; torch ignores a group's own plain number, a "
                "hyperparameter's counts"
            },
        ),
        Row(O.Adadelta, {"lr": 1.0, "rho": 0.8, "eps": 0.01, "weight_decay": 0.1}, "Zeiler 2012"),
        Row(
            O.ASGD,
            {"lr": 0.1, "lambd": 0.2, "alpha": 0.6, "t0": 1.5, "weight_decay": 0.1},
            "Polyak & Juditsky 1992",
            finish=to_average,
            remarks={
                "t0": "acts on the average `ax` alone; at whole numbers an error, since its derivative jumps there"
            },
        ),
        Row(
            O.Rprop,
            {"lr": 0.1, "etaminus": 0.5, "etaplus": 1.2, "step_size_min": 0.057, "step_size_max": 0.13},
            "Riedmiller & Braun 1993",
            steps=6,
            remarks={"lr": FIRST_STEP, "step_size_min": KINK, "step_size_max": KINK},
            remark="Takes the gradient's sign: what acts through the gradient (a penalty, example weights) has "
            "derivative 0 between the signs' jumps, and a warning says so.",
            gradient=False,
        ),
        Row(
            O.Adafactor,
            {"lr": 0.46, "beta2_decay": -0.8, "eps1": 0.03, "eps2": 0.2, "d": 1.05, "weight_decay": 0.1},
            "Shazeer & Stern 2018",
            remarks={"lr": "through the decay alone while it is above `1/√t`", "eps1": KINK, "eps2": KINK, "d": KINK},
            elementwise=False,
        ),
        Row(
            getattr(O, "Muon", absent),
            {
                "lr": 0.05,
                "weight_decay": 0.1,
                "momentum": 0.8,
                "eps": 0.4,
                "ns_a": 3.4445,
                "ns_b": -4.775,
                "ns_c": 2.0315,
            },
            "Jordan et al. 2024; Liu et al. 2025",
            variants=({}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 2}),
            implementations=(),
            remarks={"eps": KINK},
            remark="torch iterates in bfloat16, whose value has no derivative. The replay has torch's value, and the "
            "derivative of the same iteration in the weights' precision; the tests compare with torch's step where "
            "that iterates in float64.",
            matrices=True,
            elementwise=False,
        ),
        Row(
            published.Lion,
            {"lr": 0.05, "beta1": 0.9, "beta2": 0.8, "weight_decay": 0.1},
            "Chen et al. 2023",
            implementations=(),
            remarks={"beta1": SIGN, "beta2": SIGN},
            remark="Takes a sign: what acts through the gradient (a penalty, example weights) has derivative 0 between "
            "its jumps, and a warning says so.",
            gradient=False,
        ),
        Row(
            published.LAMB,
            ADAM,
            "You et al. 2020",
            implementations=(),
            remark="The trust ratio is 1, and held there, where the weights or the direction are exactly 0.",
            elementwise=False,
        ),
        Row(
            published.LARS,
            {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.1, "trust_coefficient": 0.1},
            "You, Gitman & Ginsburg 2017",
            implementations=(),
            remark="The local rate is 1, and held there, where the weights are exactly 0.",
            elementwise=False,
        ),
        Row(
            published.ScheduleFreeSGD,
            {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1},
            "Defazio et al. 2024",
            variants=({}, {"maximize": True, "warmup_steps": 3}),
            implementations=(),
            finish=to_eval,
            remarks={"lr": "at exactly 0 an error"},
        ),
        Row(
            published.ScheduleFreeAdamW,
            ADAM,
            "Defazio et al. 2024",
            variants=({}, {"maximize": True, "warmup_steps": 3}),
            implementations=(),
            finish=to_eval,
            remarks={"lr": "at exactly 0 an error"},
        ),
    ]
    if row.bare is not absent
}
REFUSED: Mapping[type[torch.optim.Optimizer], str] = {
    O.SparseAdam: "no rule: sparse gradients have no second derivative in torch; Adam with dense ones takes the same "
    "step, but moves rows without a gradient too",
    O.LBFGS: "no rule: it chooses by Python numbers within a step; solve with it before the context, and take the last "
    "steps inside with SGD",
}


def group_arguments(rule: Rule, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer's constructor or a param group takes, from values by the rule's names."""
    result: dict[str, Any] = {}
    for name, value in numbers.items():
        where = rule.settings[name]
        if isinstance(where, str):
            result[where] = value
        else:
            key, place = where
            result.setdefault(key, {})[place] = value
    return {
        key: tuple(value[i] for i in sorted(value)) if isinstance(value, dict) else value
        for key, value in result.items()
    }


def page() -> str:
    """The table as a page."""
    cells = sum(len(row.linked) for row in ROWS.values()) * len(KINDS)
    lines = [
        "# Optimizers",
        "",
        "<!-- written by `python -m tests.optimizer_table --write docs/optimizers.md`; a test compares the two -->",
        "",
        "Each drop-in in `metaopt.optim` is torch's own class, or for those that torch does not have a "
        "`torch.optim.Optimizer` as published. Every continuous setting below may be a hyperparameter:",
        "",
        *(f"- **{kind}**: {words}" for kind, words in KINDS.items()),
        "",
        f"Each ✓ is a test, {cells} in all. In each, the training is the bare optimizer's bit for bit, reverse mode's "
        "derivative is that of finite differences of the bare loop (two stencils that agree, to 1e-5), forward mode's "
        "is reverse mode's (to 1e-9), and with gradients that are exactly zero everything is finite. `foreach`, "
        "`fused`, `maximize`, `amsgrad` and the other flags are tested where the optimizer has them; they are not "
        "continuous and can't be hyperparameters.",
        "",
        "| optimizer | setting | scalar | group | step | parameter | what holds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS.values():
        shown = f"`{row.name}`"
        for name in row.rule.settings:
            marks = ["error" if name in row.rule.flat else "✓"] * len(KINDS)
            where = row.rule.settings[name]
            setting = f"`{name}`" if isinstance(where, str) else f"`{name}` (`{where[0]}[{where[1]}]`)"
            lines.append(f"| {shown} | {setting} | {' | '.join(marks)} | {row.remarks.get(name, '')} |")
            shown = ""
    for kind, words in REFUSED.items():
        lines.append(f"| `{kind.__name__}` | all | error | error | error | error | {words} |")
    lines += ["", "## Sources, flags and implementations", ""]
    for row in ROWS.values():
        flags = sorted({flag for variant in row.variants for flag in variant})
        parts = [f"**{row.name}**: {row.source}."]
        parts += [f"Tested with {', '.join(f'`{flag}`' for flag in (*flags, *row.implementations))}."]
        parts += [row.remark] if row.remark else []
        lines.append(f"- {' '.join(parts)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.write is None:
        print(page())
    else:
        options.write.write_text(page())


if __name__ == "__main__":
    main()
