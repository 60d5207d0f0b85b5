"""What a step needs of a loss function and of a batch, said before anything is learnt from them."""

from __future__ import annotations

__all__ = ["check_first", "evaluation", "groups_of", "repeat", "require_scalar"]

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from metaopt.errors import FallbackWarning, ResponseError, UnusedHyperparameterWarning, warn
from metaopt.stn.perturbations import Perturbation
from metaopt.stn.tuned import GROUPS, Tuned


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
            f"parameters that can't respond per example ({why}): {', '.join(new)}. Each group of examples has one "
            "perturbation and is run by itself, which takes longer and makes the response noisier. `groups` in "
            "`transform` says how many there are.",
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
            "the model's output for an example depends on the others of the batch, which groups of examples would "
            "change; set `groups=1` in `transform`, so that the batch has one perturbation."
        )
    return tuned.groups


def check_first(loss: Tensor, at: Perturbation, weights: Iterable[Tensor]) -> None:
    """What can be seen of a wrong loss function after the first step."""
    if not at.weights and uses_directly(loss, weights):
        raise ResponseError(
            "the training loss uses the model's parameters directly, not through `model(x)`: that part would not see "
            "the perturbed weights. For weight decay use `metaopt.stn.l2(model, values.NAME)`."
        )
    unused = set(at.values) - at.values.read - at.uses
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


def uses_directly(loss: Tensor, leaves: Iterable[Tensor]) -> bool:
    """Whether any of some leaves is in the graph of a loss."""
    wanted = {id(leaf) for leaf in leaves}
    seen, queue = set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        queue += [child for child, _ in node.next_functions]
    return False


@contextmanager
def evaluation(tuned: Tuned) -> Iterator[None]:
    """Evaluation mode, and back to the mode of each module."""
    modes = [(module, module.training) for module in tuned.model.modules()]
    tuned.model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
