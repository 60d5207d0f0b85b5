"""Penalties of weights that respond, and of activations: exact for every example, without weights per example."""

from __future__ import annotations

__all__ = ["activation_penalty", "l2", "temporal_activation_penalty"]

from collections.abc import Collection

import torch
from torch import Tensor

from metaopt.errors import ResponseError
from metaopt.stn.responses import Active, unrounded
from metaopt.stn.tuned import Tuned


def l2(model: Tuned, coefficient: Tensor | float, names: Collection[str] | None = None) -> Tensor:
    r"""Weight decay with a coefficient for each example, at the weights that respond to its perturbation.

    .. math:: \frac{1}{B} \sum_b c_b \|w_b\|^2, \quad
        \|w_b\|^2 = \sum_r \|W_r\|^2 + 2 s_{br} \langle W_r, V_r \rangle + s_{br}^2 \|V_r\|^2

    The sums over a row are computed once, so the cost is that of the coefficients, O(B · rows). The penalty is exact
    where the network is linearised: it is convex, and its Hessian is what makes the response well posed. A penalty
    written with ``model.parameters()`` would not see the perturbed weights, and is refused.

    Args:
        model: what the loss function was given.
        coefficient: ``c``, a number or of shape ``(B,)``, such as ``values.l2``.
        names: the parameters' names; by default all that respond.

    Returns:
        A scalar.

    Raises:
        ResponseError: outside a step, if a name is not that of a responding parameter, or if there is not one
            coefficient for each example.

    References:
        Bae and Grosse 2020, App. (L2 on UCI regression); the rows are ours.
    """
    if not isinstance(model, Tuned):
        raise ResponseError(
            f"l2 is of the weights that respond: give it the model that the loss function was given, and not "
            f"{type(model).__name__}."
        )
    at = model.at
    names = [names] if isinstance(names, str) else names
    entries = {alias: entry.name for entry in model.responses.entries for alias in entry.aliases}
    for name in names or ():
        if name not in entries:
            raise ResponseError(f"no responding parameter {name!r}; there are: {', '.join(entries)}.")
    chosen = set(entries.values()) if names is None else {entries[name] for name in names}
    if not chosen:
        raise ResponseError("l2 of no parameters; name at least one, or leave `names` out.")
    if at.z is None:
        present = coefficient.mean() if isinstance(coefficient, Tensor) else coefficient
        squares = [model.slots.parameter(name).square().sum() for name in chosen]
        return present * torch.stack(squares).sum()
    total: Tensor | None = None
    with unrounded(at.z):
        for active in model.responses.active(at.z, frozen=not at.response):
            if active.entry.name in chosen:
                parameter = model.slots.parameter(active.entry.name)
                norm = _squared_norm(at.alias(parameter), active)
                total = norm if total is None else total + norm
    assert total is not None
    return (_each(coefficient, total, "examples") * total).mean()


def activation_penalty(hidden: Tensor, coefficient: Tensor | float, *, batch_dim: int = 0) -> Tensor:
    r"""The mean square of activations, with a coefficient for each example (AR).

    .. math:: \frac{1}{B} \sum_b \alpha_b \, \mathrm{mean}(h_b^2)

    Let the model return its hidden states, as dropped, beside its output; the response then acts on both.

    Args:
        hidden: the activations, ``(B, ...)``, or with the examples along ``batch_dim``.
        coefficient: ``α``, a number or of shape ``(B,)``, such as ``values.activation``.
        batch_dim: the axis of examples; 1 for ``(T, B, ...)``.

    Returns:
        A scalar.

    Raises:
        ResponseError: if there is not one coefficient for each example.

    References:
        Merity et al., *Revisiting Activation Regularization for Language RNNs*, 2017, Sec. 2.
    """
    squares = hidden.movedim(batch_dim, 0).flatten(1).square().mean(1)
    weight = torch.as_tensor(coefficient, dtype=squares.dtype, device=squares.device)
    return (_each(weight, squares, f"examples along axis {batch_dim} (`batch_dim`)") * squares).mean()


def temporal_activation_penalty(
    hidden: Tensor, coefficient: Tensor | float, *, batch_dim: int = 0, time_dim: int = 1
) -> Tensor:
    r"""The mean square of activations' changes over time, with a coefficient for each example (TAR).

    .. math:: \frac{1}{B} \sum_b \beta_b \, \mathrm{mean}_t((h_{bt} - h_{b,t-1})^2)

    Args:
        hidden: the activations, ``(B, T, ...)``.
        coefficient: ``β``, a number or of shape ``(B,)``.
        batch_dim: the axis of examples.
        time_dim: the axis of time; of ``(T, B, ...)`` the axes are ``batch_dim=1, time_dim=0``.

    Returns:
        A scalar; 0 for sequences of one step.

    Raises:
        ResponseError: if there is not one coefficient for each example.

    References:
        Merity et al. 2017, Sec. 2; after Krueger and Memisevic, *Regularizing RNNs by Stabilizing Activations*, 2016.
    """
    if hidden.shape[time_dim] < 2:
        return 0 * activation_penalty(hidden, coefficient, batch_dim=batch_dim)
    return activation_penalty(hidden.diff(dim=time_dim), coefficient, batch_dim=batch_dim)


def _each(coefficient: Tensor | float, values: Tensor, what: str) -> Tensor | float:
    """A coefficient for each value, or one for all."""
    if isinstance(coefficient, Tensor) and coefficient.ndim and coefficient.shape != values.shape:
        raise ResponseError(
            f"there are coefficients of shape {tuple(coefficient.shape)} for {len(values)} {what}; give a number, or a "
            "vector with one entry for each."
        )
    return coefficient


def _squared_norm(parameter: Tensor, active: Active) -> Tensor:
    """``‖P + ΔP_b‖²`` of each example, shape ``(B,)``."""
    structure = active.entry.structure
    if active.mixers:
        return _squared_norm_of_low_rank(parameter, active, structure.axis or 0)
    weight = parameter.reshape(structure.view)
    kept = [
        d for d, n in enumerate(structure.broadcast) if n == structure.view[d] and (n > 1 or structure.axis is None)
    ]
    rest = [d for d in range(len(structure.view)) if d not in kept]

    def rows(x: Tensor) -> Tensor:
        return (x.sum(rest) if rest else x).reshape(-1)

    total = weight.square().sum()
    bases = [None if v is None else v.reshape(structure.view) for v in active.bases]
    for i, (s, v) in enumerate(zip(active.coefficients, bases, strict=True)):
        total = total + 2 * (s @ rows(weight if v is None else weight * v))
        for s2, v2 in zip(active.coefficients[: i + 1], bases[: i + 1], strict=True):
            products = (s * s2) if v is None or v2 is None else (s * s2) * rows(v * v2)
            total = total + (1 if s2 is s else 2) * products.sum(-1)
    return total


def _squared_norm_of_low_rank(parameter: Tensor, active: Active, axis: int) -> Tensor:
    """``‖P + A diag(s_b) C‖²``: with all banks side by side it takes two Gram matrices, of A and of C."""
    s, a = torch.cat(active.coefficients, 1), torch.cat(active.mixers, 1)
    c = torch.cat([base for base in active.bases if base is not None], axis).movedim(axis, 0).flatten(1)
    inner = ((a.t() @ parameter.movedim(axis, 0).flatten(1)) * c).sum(1)
    gram = (a.t() @ a) * (c @ c.t())
    return parameter.square().sum() + 2 * (s @ inner) + ((s @ gram) * s).sum(-1)
