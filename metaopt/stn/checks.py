"""What a step needs of a loss function and of a batch, said before anything is learnt from them."""

from __future__ import annotations

__all__ = [
    "adds_up",
    "check_curvature",
    "check_first",
    "check_trained",
    "check_validation",
    "groups_of",
    "made",
    "repeat",
    "require_scalar",
    "takes_values",
]

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import LBFGS, Optimizer

from metaopt.errors import FallbackWarning, ResponseError, UnusedHyperparameterWarning, warn
from metaopt.stn.perturbations import Perturbation
from metaopt.stn.substitution import ANOTHER, modules_of
from metaopt.stn.tuned import GROUPS, Tuned


def takes_values(train_loss: Callable[..., Any], valid_loss: Callable[..., Any]) -> bool:
    """Whether a validation loss is given the hyperparameters' values: if it can't be called without a third argument.

    Raises:
        ResponseError: if a loss function can't be called with what it is given.
    """
    if not _callable_with(train_loss, 3):
        raise ResponseError(
            "the training loss is called as `train_loss(model, batch, values)`, and takes other arguments; give it "
            "these three, where `values` holds the hyperparameters."
        )
    if _callable_with(valid_loss, 2):
        return False
    if not _callable_with(valid_loss, 3):
        raise ResponseError(
            "the validation loss is called as `valid_loss(model, batch)`, or with `values` as a third argument, and "
            "takes other arguments; give it these."
        )
    return True


def _callable_with(function: Callable[..., Any], number: int) -> bool:
    try:
        inspect.signature(function).bind(*range(number))
    except TypeError:
        return False
    except ValueError:  # it has no signature to look at
        return number < 3 or not callable(function)
    return True


def made(factory: Callable[..., Any], parameters: list[Any], what: str) -> Optimizer:
    """The optimizer that a user's function makes of some parameters.

    Raises:
        ResponseError: if it is none, has other parameters, or takes steps that evaluate the loss anew.
    """
    optimizer = factory(parameters)
    if not isinstance(optimizer, Optimizer):
        raise ResponseError(
            f"the function that makes the optimizer of the {what} returned {type(optimizer).__name__}; let it return "
            "a torch optimizer, as `lambda p: torch.optim.Adam(p, lr=1e-3)` does."
        )
    known = {id(p) for p in parameters}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise ResponseError(
            f"the optimizer of the {what} was made of other parameters than its function was given, so those would not "
            "be trained; use the function's argument, as in `lambda p: torch.optim.Adam(p, lr=1e-3)`."
        )
    if isinstance(optimizer, LBFGS):
        raise ResponseError(
            f"LBFGS evaluates the loss several times in a step, and a step of the {what} has one draw of perturbations "
            "and masks; use an optimizer that takes one gradient, such as Adam or SGD."
        )
    return optimizer


def require_scalar(loss: Any) -> None:
    """Refuse what is no scalar that depends on the model."""
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ResponseError(f"a loss function returns a scalar tensor, got {what}; take the mean over the batch.")
    if not loss.requires_grad:
        raise ResponseError(
            "the loss does not depend on the model that the loss function was given; compute it from `model(x)`, where "
            "`model` is the function's first argument, without `no_grad`."
        )


def repeat(batches: Iterable[Any]) -> Iterator[Any]:
    """Pass over the batches again and again; a loader shuffles anew each time, so nothing is kept."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ResponseError(
                "there are no (more) batches to repeat; pass a loader or a list, which can be gone through many times, "
                "and not an iterator."
            )


def groups_of(tuned: Tuned, examples: int) -> int | None:
    """How many different perturbations a batch may have; None where each example has its own."""
    if not tuned.fallback:
        return None
    new = sorted(tuned.fallback.keys() - tuned.warned)
    if new:
        tuned.warned.update(new)
        why = "; ".join(dict.fromkeys(tuned.fallback[name] for name in new))
        warn(
            f"parameters that can't respond per example ({why}): {', '.join(new)}. "
            + (
                "A batch has one perturbation, which makes the response noisier: the model's output depends on other "
                "examples, or has no axis of examples, as a loss has (let the model return its output, and compute the "
                "loss from that)."
                if tuned.mixes
                else "Each group of examples has one perturbation and is run by itself, which takes longer and makes "
                "the response noisier. `groups` in `transform` says how many there are."
            ),
            FallbackWarning,
        )
    coupled = any(isinstance(m, _BatchNorm) and m.training for m in tuned.model.modules())
    if tuned.groups is None:
        return 1 if coupled or tuned.mixes else min(GROUPS, examples)
    if tuned.groups > examples:
        raise ResponseError(
            f"a batch of {examples} examples can't be split into {tuned.groups} groups of perturbations; use larger "
            "batches (`drop_last=True` leaves out a short last one), or fewer `groups` in `transform`."
        )
    if coupled and tuned.groups > 1:
        raise ResponseError(
            "BatchNorm takes its statistics from the whole batch, which groups of examples would change; set "
            "`groups=1` in `transform`, so that the batch has one perturbation."
        )
    if tuned.mixes and tuned.groups > 1:
        raise ResponseError(
            "the model's output for an example depends on the others of the batch, or the model keeps statistics of "
            "them, which groups of examples would change; set `groups=1` in `transform`, so that the batch has one "
            "perturbation."
        )
    return tuned.groups


def check_first(loss: Tensor, at: Perturbation, weights: Iterable[Tensor], bound: Iterable[str]) -> None:
    """What can be seen of a wrong loss function, or of dropouts that are bound in vain, after the first step."""
    if _uses_directly(loss, weights, at.aliases):
        raise ResponseError(
            "the training loss uses the model's parameters directly, not through `model(x)`: that part would not see "
            "the perturbed weights. For weight decay use `metaopt.stn.l2(model, values.NAME)`, and call the model that "
            "is the loss function's first argument."
        )
    unused = set(at.values) - at.values.read - at.uses
    idle = sorted(set(bound) - at.called) if at.functional_dropout else []
    if idle and not unused:
        warn(
            f"dropouts that are bound, and that the model did not call: {', '.join(idle)}. It calls a functional "
            "dropout with another rate: call the module, `self.drop(x)`, or hand on its rate, as "
            "`dropout_p=self.drop.p if self.training else 0.0`.",
            UnusedHyperparameterWarning,
        )
    if not unused:
        return
    functional = (
        " Its forward calls a functional dropout: make it a module, `self.drop = nn.Dropout()`, and bind that by "
        "`bind={'NAME': 'drop'}` in `transform`."
    )
    warn(
        f"hyperparameters that neither the model nor the training loss uses: {', '.join(sorted(unused))}. Read them "
        "from the loss function's third argument, or bind them to a dropout module by name."
        + (functional if at.functional_dropout else ""),
        UnusedHyperparameterWarning,
    )


def adds_up(loss: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Whether a loss may be linear in what the model returned: its second derivative by that is zero, or unknown."""
    given = list(outputs)
    gradients = torch.autograd.grad(loss, given, create_graph=True, allow_unused=True)
    found = [g for g in gradients if g is not None]
    live = [g for g in found if g.requires_grad]
    if not live:
        return bool(found)
    try:
        pattern = [torch.cos(torch.arange(g.numel(), device=g.device)).to(g.dtype).reshape(g.shape) for g in live]
        second = torch.autograd.grad(live, given, pattern, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return True
    return not any(bool(s.any()) for s in second if s is not None)


def check_curvature(outputs: Sequence[Tensor], loss: Tensor, moved: Iterable[tuple[Sequence[Tensor], Tensor]]) -> None:
    """Refuse a loss that is linear in the linearised output: nothing would hold the response.

    Args:
        outputs: what the model returned.
        loss: the loss of that.
        moved: the same of outputs that were moved: a hinge or an absolute value has its kink far away, it may be.
    """
    here = torch.autograd.grad(loss, list(outputs), retain_graph=True, allow_unused=True)
    try:
        for others, other in moved:
            there = torch.autograd.grad(other, list(others), allow_unused=True)
            if len(here) != len(there) or not all(map(_same, here, there)):
                return
    except (RuntimeError, ValueError, AssertionError):
        return  # it takes numbers of some range only, as no linear function does
    raise ResponseError(
        "the model returns its loss, a likelihood or log-probabilities: the training loss is linear in its output. "
        '`method="delta"` linearises the output, and a linearised loss has no minimum for the response to '
        "settle in. Compute the loss from what the model predicts (`F.cross_entropy(model(x).logits, y)` and not "
        "`model(x, labels=y).loss`; logits, and not `F.nll_loss` of what `log_softmax` made of them), or use "
        '`method="centered"`.'
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def check_trained(model: nn.Module, weights: Iterable[Tensor]) -> None:
    """Refuse a model that got other parameters to train, which no optimizer of the tuner has."""
    known = {id(weight) for weight in weights}
    found = [p for module in modules_of(model) for p in module._parameters.values() if p is not None]
    if any(p.requires_grad and id(p) not in known for p in found):
        new = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
        names = ", ".join(new)
        raise ResponseError(f"parameters that were frozen, or not there, when training began: {names}; {ANOTHER}.")


def check_validation(loss: Tensor, weights: Iterable[Tensor]) -> None:
    """Refuse a validation loss of the plain weights, which no hyperparameter moves."""
    if _uses_directly(loss, weights):
        raise ResponseError(
            "the validation loss uses the model's parameters directly: that part does not depend on the "
            "hyperparameters. Call the model that is the loss function's first argument, not the one that was given to "
            "`transform`."
        )


def _uses_directly(loss: Tensor, leaves: Iterable[Tensor], aliases: Iterable[Tensor] = ()) -> bool:
    """Whether any of some leaves is in the graph of a loss, other than through its aliases."""
    wanted = {id(leaf) for leaf in leaves}
    seen, queue = {alias.grad_fn for alias in aliases}, [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        queue += [child for child, _ in node.next_functions]
    return False
