"""Why a hypergradient and finite differences of the loop may disagree."""

from __future__ import annotations

__all__ = ["causes"]

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from metaopt.check.differences import Difference
from metaopt.check.report import Cause, Row
from metaopt.check.training import Training

Bare = Sequence[tuple[float, list[Tensor], list[Tensor]]]


def causes(
    training: Training,
    rows: Sequence[Row],
    bare: Bare,
    differences: Mapping[tuple[str, str], Difference],
    named: Mapping[str, Tensor],
) -> list[Cause]:
    """The likely causes, the surest first.

    Args:
        training: what ran, and what was seen meanwhile.
        rows: the derivatives.
        bare: the objective, the first and the last weights of two bare runs.
        differences: the finite differences behind the rows, by name and place.
        named: the hyperparameters.
    """
    found = list(_repetition(bare))
    if found:
        return found
    found = list(_unused(rows, differences, named))
    wrong = [row for row in rows if not row.ok]
    silent = {cause.text for cause in found}
    wrong = [row for row in wrong if not any(text.startswith(f"{row.name} ") for text in silent)]
    if not wrong:
        return found
    found += _precision(training.dtypes | {leaf.dtype for leaf in named.values()})
    found += _kinks(wrong, differences)
    found += _numbers(training, wrong)
    if any(row.verdict == "forward is not reverse" for row in wrong):
        found.append(
            Cause(
                "modes",
                "forward and reverse mode give different numbers for the same steps. Unless the loop draws random "
                "numbers of its own, this is a fault of metaopt: please report the loop.",
            )
        )
    return found or [_unknown()]


def _repetition(bare: Bare) -> Iterator[Cause]:
    (one, start, _), (two, other_start, _) = bare
    if one == two or abs(one - two) <= 1e-11 * max(abs(one), 1e-6):
        return
    if len(start) != len(other_start) or any(not torch.equal(a, b) for a, b in zip(start, other_start, strict=True)):
        yield Cause(
            "beginning",
            f"two bare runs gave {one:.12g} and {two:.12g}: the training does not start where it started before. Build "
            "the model, the optimizer and the schedulers inside `train`, from a seed (`torch.manual_seed`), or pass "
            "`optimizer=` to have them put back.",
        )
        return
    yield Cause(
        "random",
        f"two bare runs from the same weights gave {one:.12g} and {two:.12g}: the training is not deterministic, so it "
        "has no derivative that could be checked. Seed every generator inside `train` (a data loader's, one of your "
        "own), make what remembers (iterators, counters, buffers) anew in it, and see "
        "`torch.use_deterministic_algorithms`.",
    )


def _unused(
    rows: Sequence[Row], differences: Mapping[tuple[str, str], Difference], named: Mapping[str, Tensor]
) -> Iterator[Cause]:
    for name in named:
        mine = [row for row in rows if row.name == name]
        still = all(differences[name, row.place].still for row in mine if (name, row.place) in differences)
        if not mine or (not still and any(row.reverse for row in mine)):
            continue
        if still and any(row.reverse for row in mine):
            yield Cause(
                "stale",
                f"{name} moves nothing, though there is a hypergradient: what was computed from it before `train` "
                "began keeps its old value (an optimizer or a model that is made once, outside). Make that inside "
                "`train`; in the training, make it anew after each hyper-step.",
            )
        elif still:
            yield Cause(
                "unused",
                f"{name} moves nothing: with it the objective stays the same to the last digit. Is it used at all, "
                "or was its value taken before `train` began (in an optimizer or a model that is made once, outside)?",
            )
        elif any(row.expected and row.verdict == "differs" for row in mine):
            yield Cause(
                "number",
                f"{name} moves the objective, but metaopt saw no tensor depend on it. It became a Python number "
                "(`float(x)`, `x.item()`) or a copy (`x.data`, `torch.tensor(x)`) before the loop used it. Pass the "
                "tensor itself.",
            )


def _precision(dtypes: set[torch.dtype]) -> Iterator[Cause]:
    low = sorted(str(dtype) for dtype in dtypes if dtype.is_floating_point and dtype != torch.float64)
    if low:
        yield Cause(
            "precision",
            f"the weights or hyperparameters are of {', '.join(low)}, in which finite differences drown in rounding. "
            "Check in float64: `torch.set_default_dtype(torch.float64)` before the model, the data and the "
            "hyperparameters are made.",
        )


def _kinks(wrong: Sequence[Row], differences: Mapping[tuple[str, str], Difference]) -> Iterator[Cause]:
    rough = [row for row in wrong if row.verdict == "not smooth there"]
    if not rough:
        return
    row = max(rough, key=lambda r: abs(r.expected))
    found = differences.get((row.name, row.place))
    where = f"at {row.name}{row.place}"
    if found is not None and abs(found.jump) > 100 * found.spread:  # at a kink the stencils agree
        yield Cause(
            "kink",
            f"the loop isn't smooth {where}: the slope to the right is {found.value + found.jump / 2:.6g} and to the "
            f"left {found.value - found.jump / 2:.6g} (per unit of the entry), a kink exactly there (a ReLU, a "
            "maximum or a clip at its corner). A hypergradient is one of many subgradients then; move the "
            "hyperparameter a little, and check again.",
        )
        return
    yield Cause(
        "rough",
        f"the loop isn't smooth {where}: two stencils disagree, so differences can't tell. A branch, a ReLU or a clip "
        "changes sides near there, the training is chaotic, or rounding is coarse. Check fewer steps, another "
        "`step=`, or a smooth activation in place of ReLU.",
    )


def _numbers(training: Training, wrong: Sequence[Row]) -> Iterator[Cause]:
    if training.constants and any(row.verdict == "differs" for row in wrong):
        yield Cause(
            "constant",
            "the loop takes Python numbers out of tensors that depend on the weights or hyperparameters, at "
            f"{', '.join(training.constants[:4])}; metaopt holds them constant, and the bare loop does not. Where such "
            "a number goes back into the training, keep it a tensor (`x.detach()`).",
        )


def _unknown() -> Cause:
    return Cause(
        "unknown",
        "an operation of the loop or a rule has a wrong derivative (a custom `autograd.Function`, a rule of your own, "
        'with `verify="never"`); or something that metaopt does not see carries values from one step to the next '
        "(numpy, a file, a Python number). Take the loop apart: one step, then without the suspect.",
    )
