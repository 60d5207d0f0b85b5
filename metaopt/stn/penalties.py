"""Penalties of weights that respond: exact for every example, without weights per example."""

from __future__ import annotations

__all__ = ["l2"]

from collections.abc import Collection

from torch import Tensor

from metaopt.errors import ResponseError
from metaopt.stn.responses import Active
from metaopt.stn.tuned import Tuned


def l2(model: Tuned, coefficient: Tensor, names: Collection[str] | None = None) -> Tensor:
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
        ResponseError: outside a step, or if a name is not that of a responding parameter.

    References:
        Bae and Grosse 2020, App. (L2 on UCI regression); the rows are ours.
    """
    at = model.at
    entries = {alias: entry.name for entry in model.responses.entries for alias in entry.aliases}
    for name in names or ():
        if name not in entries:
            raise ResponseError(f"no responding parameter {name!r}; there are: {', '.join(entries)}.")
    chosen = set(entries.values()) if names is None else {entries[name] for name in names}
    if at.z is None:
        return coefficient.mean() * sum(model.slots.parameter(name).square().sum() for name in chosen)
    total: Tensor | None = None
    for active in model.responses.active(at.z, frozen=not at.response):
        if active.entry.name in chosen:
            parameter = model.slots.parameter(active.entry.name)
            norm = _squared_norm(parameter if at.weights else parameter.detach(), active)
            total = norm if total is None else total + norm
    if total is None:
        raise ResponseError("l2 of no parameters; name at least one, or leave `names` out.")
    return (coefficient * total).mean()


def _squared_norm(parameter: Tensor, active: Active) -> Tensor:
    """``‖P + ΔP_b‖²`` of each example, shape ``(B,)``."""
    structure = active.entry.structure
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
