"""The CTC loss, whose kernel in torch has no second derivative, in operations that have every one.

The forward recursion of Graves et al., *Connectionist Temporal Classification*, 2006, over the labels with a blank
before, between and after them, ``l'``:

``α_t(s) = log p_t(l'_s) + log(e^{α_{t-1}(s)} + e^{α_{t-1}(s-1)} + e^{α_{t-1}(s-2)})``, the last of these only from one
label to another one.

Torch's backward takes the probabilities for normalised: it adds ``p_t`` to the derivative by ``log p_t``, which
``log_softmax`` takes away again. What else the loop makes of that gradient it makes here too; the sweep differentiates
the loss.
"""

from __future__ import annotations

__all__ = ["LOSSES", "ctc", "ctc_loss"]

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.capture.primitives import Phase, stop

if TYPE_CHECKING:
    from metaopt.capture.watcher import Watcher

_ATEN = torch.ops.aten.ctc_loss
LOSSES: tuple[Callable[..., Any], ...] = (F.ctc_loss, torch.ctc_loss, _ATEN, _ATEN.Tensor, _ATEN.IntList)

_NAMES = ("log_probs", "targets", "input_lengths", "target_lengths", "blank", "reduction", "zero_infinity")
_REDUCTIONS = ("none", "mean", "sum")
# The logarithm of no probability. With an infinite one, the derivatives of what can't be reached would be NaN.
_NEVER = -1e30


def ctc(watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of the loss, which the replay computes by `ctc_loss`."""
    given = dict(zip(_NAMES, args, strict=False)) | kwargs
    log_probs, reduction = given["log_probs"], given.get("reduction", "mean")
    if not watcher.tape.is_live(log_probs):
        return watcher.call(func, args, kwargs)
    result = func(*args, **kwargs)
    count = 1 if log_probs.dim() == 2 else log_probs.shape[1]
    lengths = [_lengths(given[name], log_probs.device) for name in _NAMES[2:4]]
    spec = (
        log_probs,
        _padded(given["targets"].to(log_probs.device), lengths[1], count),
        *lengths,
        given.get("blank", 0),
        reduction if isinstance(reduction, str) else _REDUCTIONS[reduction],
        given.get("zero_infinity", False),
    )
    watcher.record(ctc_loss, spec, {}, result, phased=True)
    return result


def _lengths(given: Tensor | Sequence[int], device: torch.device) -> Tensor:
    return torch.as_tensor(given, dtype=torch.long, device=device).reshape(-1)


def _padded(targets: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The labels as a table of a row for each example."""
    if targets.dim() > 1 or count == 1:
        return targets.detach().long().reshape(count, -1)
    return torch.nn.utils.rnn.pad_sequence(targets.detach().long().split(lengths.tolist()), batch_first=True)


def ctc_loss(
    phase: Phase,
    log_probs: Tensor,
    labels: Tensor,
    input_lengths: Tensor,
    label_lengths: Tensor,
    blank: int,
    reduction: str,
    zero_infinity: bool,
) -> Tensor:
    """The negative logarithm of the probability of all alignments of the labels with the time steps.

    Args:
        phase: of the program.
        log_probs: of shape (times, examples, classes), or (times, classes).
        labels: of shape (examples, labels); what is beyond an example's length is not read.
        input_lengths: how many time steps each example has.
        label_lengths: how many labels.
        blank: the class that stands for no label.
        reduction: "none", "mean" or "sum", as for ``F.ctc_loss``.
        zero_infinity: whether the loss of labels that don't fit into the time steps is 0, not infinite.
    """
    if log_probs.dtype in (torch.float16, torch.bfloat16):
        log_probs = log_probs.float()  # as autocast does
    table = log_probs.unsqueeze(1) if log_probs.dim() == 2 else log_probs
    times = torch.arange(len(table), device=table.device)
    table = torch.where((times.unsqueeze(1) < input_lengths).unsqueeze(2), table, 0.0)
    reached = _forward(table, labels, label_lengths, blank)
    ends = reached[input_lengths, torch.arange(len(labels), device=table.device)]
    states = torch.arange(ends.shape[1], device=table.device)
    last = 2 * label_lengths.unsqueeze(1)
    log_likelihood = torch.where((states == last) | (states == last - 1), ends, _NEVER).logsumexp(1)
    impossible = log_likelihood < _NEVER / 2
    loss = torch.where(impossible, 0.0 if zero_infinity else torch.inf, -log_likelihood)
    loss = loss + _surplus(phase, table, times, input_lengths, impossible, zero_infinity)
    if log_probs.dim() == 2 and reduction == "none":
        return loss.squeeze(0)
    if reduction == "mean":
        return (loss / label_lengths.clamp(min=1)).mean()
    return loss.sum() if reduction == "sum" else loss


def _forward(table: Tensor, labels: Tensor, label_lengths: Tensor, blank: int) -> Tensor:
    """``α`` before the first time step and after each, of shape (times + 1, examples, states)."""
    places = torch.arange(labels.shape[1], device=table.device)
    labels = torch.where(places < label_lengths.unsqueeze(1), labels, blank)
    classes = F.pad(torch.stack([torch.full_like(labels, blank), labels], 2).flatten(1), (0, 1), value=blank)
    emitted = table.gather(2, classes.expand(len(table), *classes.shape))
    skips = (classes != blank) & (classes != F.pad(classes, (2, 0), value=blank)[:, :-2])
    never = torch.where(skips, 0.0, _NEVER).to(emitted.dtype)
    ways = F.pad(never.unsqueeze(2), (0, 2))  # from s - 2, s - 1 and s
    alpha = F.pad(torch.zeros_like(never[:, :1]), (0, never.shape[1] - 1), value=_NEVER)
    found = [alpha]
    for step in emitted.unbind():
        total = (F.pad(alpha, (2, 0), value=_NEVER).unfold(1, 3, 1) + ways).logsumexp(2) + step
        # What can't be reached has no derivative: between equal ways that lead nowhere it would grow with every step.
        alpha = torch.where(total > _NEVER / 2, total, _NEVER)
        found.append(alpha)
    return torch.stack(found)


def _surplus(
    phase: Phase, table: Tensor, times: Tensor, input_lengths: Tensor, impossible: Tensor, zero_infinity: bool
) -> Tensor:
    """Nothing, with the gradient that torch's backward adds to the loss's derivative."""
    total = torch.where((times.unsqueeze(1) < input_lengths).unsqueeze(2), table.exp(), 0.0).sum((0, 2))
    nothing = total - stop(phase, total)
    if zero_infinity:
        return torch.where(impossible, 0.0, nothing)
    # The gradient of an infinite loss is NaN, which is what the square root's is at 0 where it counts for nothing.
    return torch.where(impossible, 0.0 * torch.where(impossible, nothing, 1.0).sqrt(), nothing)
