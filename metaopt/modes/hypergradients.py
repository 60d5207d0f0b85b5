"""What a sweep leaves for the hyperparameters: in their ``.grad``, or as ``torch.autograd.grad`` would return it."""

from __future__ import annotations

__all__ = ["accumulate", "collect", "leaves_behind", "made_inside"]

from collections.abc import Iterable

import torch
from torch import Tensor

from metaopt.capture.bindings import leaves_of
from metaopt.errors import InfeasibleWarning, SweepError, UnusedHyperparameterWarning, warn
from metaopt.hyperparameters import name_of, owner_of, strayed
from metaopt.modes.adjoint import Adjoint
from metaopt.modes.passes import reverse_pass
from metaopt.step import Loop


def gradients_of(adjoint: Adjoint) -> list[tuple[Tensor, Tensor]]:
    """The hypergradient of every leaf that took part, in the order in which they were found."""
    totals: dict[int, tuple[Tensor, Tensor]] = {}

    def add(leaf: Tensor, grad: Tensor) -> None:
        if not adjoint.loop.tape.externals.is_named(leaf):
            return  # the rest of it was not carried along
        known = totals.get(id(leaf))
        totals[id(leaf)] = (leaf, grad if known is None else known[1] + grad)

    for external in adjoint.loop.tape.externals.values():
        grad = adjoint.external.get(id(external.tensor))
        if grad is None or adjoint.loop.tape.find(external.tensor) is not None:
            continue
        if external.tensor.grad_fn is None:
            add(external.tensor, grad)
            continue
        leaves = leaves_of(external.tensor)
        # Without a batch it is a batch of one.
        rows = grad if adjoint.batch is not None else grad.unsqueeze(0)
        parts = reverse_pass([external.tensor], leaves, [rows])
        for leaf, part in zip(leaves, parts, strict=True):
            if part is not None:
                add(leaf, part if adjoint.batch is not None else part[0])
    for leaf, grad in adjoint.direct:
        add(leaf, grad)
    return list(totals.values())


def leaves_behind(loop: Loop) -> list[Tensor]:
    """The leaves behind everything that the loop was found to depend on."""
    externals = loop.tape.externals
    found = [leaf for external in externals.values() for leaf in leaves_of(external.tensor)]
    return list({id(leaf): leaf for leaf in found if externals.is_named(leaf)}.values())


def accumulate(adjoint: Adjoint) -> None:
    """Add the hypergradients to the leaves' ``.grad``."""
    gradients = gradients_of(adjoint)
    if not gradients:
        raise _nothing(adjoint.loop)
    _warn_unused(adjoint, {id(leaf) for leaf, _ in gradients})
    _warn_strayed(leaf for leaf, _ in gradients)
    for leaf in adjoint.loop.tape.kept_leaves():
        warn(
            f"a leaf of shape {tuple(leaf.shape)} that was made inside the context (`requires_grad=True`), and is used "
            "by later iterations as it was, gets no hypergradient: it is taken for one of the loop's own, and its "
            "`.grad` is the training's. If it is a hyperparameter, make it before the `with` block; if not, "
            "`requires_grad_(False)` says so.",
            UnusedHyperparameterWarning,
        )
    for leaf in adjoint.loop.tape.externals.projected.values():
        warn(
            f"a leaf of shape {tuple(leaf.shape)} was written inside the context with what depends on nothing but "
            "itself (a projection of a hyperparameter, say), so that it is state from there on, and gets no "
            "hypergradient from `run.backward`. Write it after the `with` block; or ask for "
            "`run.hypergradient(E, leaf)`, the derivative by the value that it had before.",
            UnusedHyperparameterWarning,
        )
    adjoint.loop.give(leaf for leaf, _ in gradients)
    for leaf, grad in gradients:
        grad = grad.detach().to(leaf.dtype)
        # As `backward` lays it out: torch's fused optimizers on a CPU go through both as they lie in memory.
        own = torch.empty_like(leaf).copy_(grad) if grad.layout is torch.strided else grad.clone()
        leaf.grad = own if leaf.grad is None else leaf.grad + own


def collect(adjoint: Adjoint, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    """The hypergradients with respect to these tensors."""
    gradients = {id(leaf): grad for leaf, grad in gradients_of(adjoint)}
    if not adjoint.loop.steps and not gradients and all(adjoint.loop.tape.find(tensor) is None for tensor in wanted):
        raise _nothing(adjoint.loop)
    _warn_strayed(wanted)
    results = []
    adjoint.loop.give(wanted)
    for tensor in wanted:
        binding = adjoint.loop.tape.find(tensor)
        if binding is not None:
            # A leaf that the loop came to write was a hyperparameter to the steps before.
            parts = [adjoint.carried.get(binding.key), adjoint.external.get(id(tensor))]
            there = [part for part in parts if part is not None]
            grad = sum(there[1:], there[0]) if there else None
            if grad is None and binding.key < 0:
                raise made_inside()
        elif tensor.grad_fn is None:
            grad = gradients.get(id(tensor))
            if grad is None:
                _warn_one(tensor, adjoint.loop)
        else:
            grad = _of_value(tensor, gradients)
        shape = tensor.shape if adjoint.batch is None else (adjoint.batch, *tensor.shape)
        results.append(tensor.new_zeros(shape) if grad is None else grad.detach())
    return tuple(results)


def made_inside() -> SweepError:
    """The error for a tensor that an iteration made, and that had no value before it."""
    return SweepError(
        "`wrt` has a tensor that was made inside the context, and was taken for one of the loop's own (a leaf to take "
        "gradients at), so its hypergradient is not known. Make hyperparameters before the `with` block."
    )


def _nothing(loop: Loop) -> SweepError:
    if not loop.steps:
        return SweepError(
            "the context saw no `optimizer.step()`, and the outer objective does not depend on a hyperparameter "
            "directly, so there is no hypergradient. Put the training loop inside the `with` block, with the "
            "optimizer that it was given."
        )
    if loop.tape.externals.named is not None:
        return SweepError(
            "none of the hyperparameters that `hyper=` names took part in the watched steps or in the outer objective, "
            "so there is no hypergradient. Name those that the loop uses (the same objects, no copies of them), or "
            "leave `hyper=` out, and they are found."
        )
    return SweepError(
        "nothing that requires grad, besides the trained weights, took part in the recorded steps or in the "
        "outer objective, so there is no hypergradient. Give a drop-in optimizer (`metaopt.optim`) a tensor that "
        "requires grad, or use one in the loss; a plain number, or the value of a tensor taken with `.item()`, "
        "can't be followed."
    )


def _warn_one(tensor: Tensor, loop: Loop) -> None:
    name = name_of(tensor) or f"a tensor of shape {tuple(tensor.shape)}"
    if any(tensor is leaf for leaf in leaves_behind(loop)):
        _warn_read(f"the hyperparameter {name} was read")
        return
    warn(
        f"the hyperparameter {name} took no part in the recorded steps nor in the outer objective; its "
        "hypergradient is zero. Was it replaced by a copy, or turned into a Python number?",
        UnusedHyperparameterWarning,
    )


def _warn_unused(adjoint: Adjoint, used: set[int]) -> None:
    behind = leaves_behind(adjoint.loop)
    owners = {id(o): o for leaf in behind if (o := owner_of(leaf)) is not None}
    unused = [p for o in owners.values() for p in o.parameters() if p.requires_grad and id(p) not in used]
    unused = [leaf for leaf in unused if adjoint.loop.tape.externals.is_named(leaf)]
    read = [str(name_of(leaf)) for leaf in unused if any(leaf is other for other in behind)]
    names = [name for leaf in unused if (name := str(name_of(leaf))) not in read]
    if read:
        _warn_read(f"the hyperparameters {', '.join(read)} were read")
    if names:
        warn(
            f"the hyperparameters {', '.join(names)} took no part in the recorded steps nor in the outer "
            "objective, and get no hypergradient. Were they replaced by copies, or turned into Python numbers?",
            UnusedHyperparameterWarning,
        )


def _warn_read(whose: str) -> None:
    warn(
        f"{whose} in the recorded steps or in the outer objective, but what these lead to has no derivative by "
        "it: the hypergradient is zero. A value that only decides (a threshold, a comparison, a rounding), acts where "
        "it is clipped, or was turned into a Python number has none; decide smoothly (`torch.sigmoid`) to tune it.",
        UnusedHyperparameterWarning,
    )


def _warn_strayed(leaves: Iterable[Tensor]) -> None:
    for leaf in leaves:
        which = strayed(leaf)
        if which is not None:
            warn(
                f"the hyperparameter {which} is outside of its set: a hyper-step moved it, and nothing projected it "
                "back. Call `hyper.attach(hyper_optimizer)` once, or `hyper.project_()` after each hyper-step; "
                "`positive` and `interval` stay inside by themselves.",
                InfeasibleWarning,
            )


def _of_value(tensor: Tensor, gradients: dict[int, Tensor]) -> Tensor | None:
    """The hypergradient with respect to a constrained value, from that of the leaf behind it.

    The transform is elementwise, so ``dE/dvalue = dE/dleaf / (dvalue/dleaf)``.
    """
    leaves = leaves_of(tensor)
    if len(leaves) != 1 or leaves[0].shape != tensor.shape or getattr(tensor, "_metaopt_source", None) is None:
        raise SweepError(
            "`wrt` contains a tensor that was computed from hyperparameters, and not a hyperparameter itself. Ask "
            "for its leaves (`hyper.parameters()`), and use `torch.autograd.grad` from there."
        )
    grad = gradients.get(id(leaves[0]))
    if grad is None:
        return None
    probe = torch.ones_like(tensor)
    (slope,) = torch.autograd.grad(tensor, leaves[0], probe, retain_graph=True)
    skewed = probe.clone().reshape(-1)
    skewed[::2] *= 2
    (other,) = torch.autograd.grad(tensor, leaves[0], skewed.view_as(probe), retain_graph=True)
    if not torch.allclose(other, slope * skewed.view_as(probe)):
        raise SweepError(
            "`wrt` contains a constrained value whose entries depend on each other (a simplex, say), so it has no "
            "derivative of its own. Ask for its leaf (`hyper.parameters()`)."
        )
    return grad / slope
