"""Is the response right? Its hypergradient beside the implicit one, on networks small enough for it."""

from __future__ import annotations

__all__ = ["Diagnosis", "diagnose"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaopt.capture.applied import see_functions
from metaopt.capture.custom import Surrogate
from metaopt.capture.stand_ins import stand_in
from metaopt.errors import CaptureError, ResponseError
from metaopt.stn.batches import size_of
from metaopt.stn.coordinates import Values
from metaopt.stn.generators import same_randomness
from metaopt.stn.modes import evaluation
from metaopt.stn.perturbations import Perturbation
from metaopt.stn.training import Tuner


@dataclass(frozen=True)
class Diagnosis:
    """Two hypergradients by the unconstrained hyperparameters that act smoothly.

    Args:
        names: those hyperparameters.
        response: ``(∂w/∂λ)ᵀ ∇L_V`` with the learnt response, shape ``(H',)``.
        implicit: the same with ``∂w/∂λ = -(∇²_ww L_T + δ)⁻¹ ∇²_wλ L_T``.
        residual: the relative residual at which conjugate gradients stopped; the implicit one is as good as that.
    """

    names: tuple[str, ...]
    response: Tensor
    implicit: Tensor
    residual: float

    @property
    def cosine(self) -> float:
        """The cosine between them: 1 for the same direction, below 0 where the response leads uphill."""
        return float(torch.nn.functional.cosine_similarity(self.response, self.implicit, dim=0))


def diagnose(
    tuner: Tuner,
    train_batch: Any,
    valid_batch: Any,
    *,
    damping: float = 1e-4,
    steps: int = 100,
    tolerance: float = 1e-8,
) -> Diagnosis:
    r"""Compare the response's hypergradient with the one of the implicit function theorem.

    .. math:: g = -\nabla^2_{\lambda w} L_T \, (\nabla^2_{ww} L_T + \delta I)^{-1} \nabla_w L_V

    The solve is by conjugate gradients on Hessian-vector products, so the training loss should be convex around the
    weights, or ``damping`` large. Only hyperparameters that the training loss depends on smoothly are compared, such as
    a weight decay; a dropout rate acts through its masks and has no implicit hypergradient. The model is in evaluation
    mode for both losses. Nothing is changed.

    Args:
        tuner: the tuner, with a centred response.
        train_batch: as for ``train_step``; preferably all the training data.
        valid_batch: as for ``valid_step``.
        damping: δ.
        steps: of conjugate gradients, at most.
        tolerance: the relative residual at which they stop.

    Raises:
        ResponseError: if the response is uncentred, no hyperparameter acts smoothly, or the model's gradients are not
            those of a loss: it has custom functions or hooks that change them.

    References:
        Lorraine et al., *Optimizing Millions of Hyperparameters by Implicit Differentiation*, 2020. A linearised
        response tends to the Gauss-Newton one, and may differ from this where residuals are large.
    """
    if not isinstance(tuner, Tuner):
        raise ResponseError(
            f"diagnose takes the tuner, `with metaopt.stn.train(...) as tuner`, and not {type(tuner).__name__}."
        )
    tuned = tuner.tuned
    if tuned.method == "stn":
        raise ResponseError("the weights of an uncentred response are no minimiser at λ0; use a centred method.")
    coordinates = tuned.coordinates
    parameters = [tuned.slots.parameter(entry.name) for entry in tuned.responses.entries]
    jacobian = tuned.responses.jacobian(tuned.reference)
    if any(m._backward_hooks or m._backward_pre_hooks for m in tuned.slots.modules):
        raise ResponseError(_NO_LOSS.format("a module of it has a hook on gradients"))
    with same_randomness(tuned.device), sdpa_kernel(SDPBackend.MATH), see_functions(_Proper()):
        loss = _loss(tuner, train_batch, smooth=True)
        leaves = [tuned.hyper.get_leaf(name) for name in coordinates.slices]
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        flat = _flat(gradient, parameters)
        outer = _flat(torch.autograd.grad(_loss(tuner, valid_batch), parameters, allow_unused=True), parameters)

        def product(v: Tensor) -> Tensor:
            pulled = torch.autograd.grad(flat @ v, parameters, retain_graph=True, allow_unused=True)
            return _flat(pulled, parameters) + damping * v

        solution, residual = _solve(product, outer, steps, tolerance)
        mixed = torch.autograd.grad(flat @ solution, leaves, allow_unused=True)
    kept = [name for name, m in zip(coordinates.slices, mixed, strict=True) if m is not None]
    if not kept:
        raise ResponseError(
            "no hyperparameter acts on the training loss smoothly, so there is no implicit hypergradient to "
            "compare with; look at the validation loss along the run instead."
        )
    implicit = torch.cat([-m.reshape(-1) for m in mixed if m is not None])
    columns = torch.stack(
        [jacobian[entry.name].flatten(1) @ g.flatten() for entry, g in _pairs(tuned, outer, parameters)]
    )
    total = columns.sum(0).detach()
    response = torch.cat([total[coordinates.slices[name]] for name in kept])
    return Diagnosis(tuple(kept), response, implicit.detach(), residual)


_NO_LOSS = (
    "the implicit hypergradient is that of a loss whose gradients the training takes, and this model's may be others: "
    "{}. Leave it out for the diagnosis, or look at the validation loss along the run instead."
)


class _Proper:
    """Refuses custom functions whose backward is not the derivative of their forward, twice."""

    within = False

    def apply(self, cls: type, original: Any, args: Any, kwargs: Any) -> Any:
        if self.within:
            return original(*args, **kwargs)
        self.within = True
        try:
            found = stand_in(cls, args, kwargs)
        except CaptureError as error:
            raise ResponseError(_NO_LOSS.format(str(error))) from error
        finally:
            self.within = False
        if found is Surrogate:
            raise ResponseError(_NO_LOSS.format(f"`{cls.__name__}` has a backward that is not its derivative"))
        return original(*args, **kwargs) if found is None else found(cls)(*args, **kwargs)


def _loss(tuner: Tuner, batch: Any, *, smooth: bool = False) -> Tensor:
    tuned, examples = tuner.tuned, size_of(batch, tuner.tuned.batch_dim)
    values = tuned.coordinates.present(examples)
    if smooth:
        given = {name: tuned.hyper[name] for name in values}
        values = Values({name: value.expand(examples, *value.shape) for name, value in given.items()})
    at = Perturbation(None, values, weights=True)
    with evaluation(tuned.model), tuned.perturbed(at):
        if smooth:
            return tuner.train_loss(tuned, batch, values)
        return tuner.valid_loss(tuned, batch, values) if tuner._accepts_values else tuner.valid_loss(tuned, batch)


def _solve(product: Any, right: Tensor, steps: int, tolerance: float) -> tuple[Tensor, float]:
    """Conjugate gradients."""
    x = torch.zeros_like(right)
    residual = direction = right.detach()
    norm = square = residual @ residual
    for _ in range(steps):
        if float(square) <= tolerance**2 * float(norm):
            break
        image = product(direction)
        curvature = direction @ image
        if float(curvature) <= 0:
            raise ResponseError(
                "the training loss is not convex around the weights, so conjugate gradients can't solve for the "
                "implicit hypergradient; raise `damping`, or train further."
            )
        rate = square / curvature
        x = x + rate * direction
        residual = residual - rate * image
        square, before = residual @ residual, square
        direction = residual + square / before * direction
    return x, float((square / norm.clamp(min=1e-300)).sqrt())


def _flat(gradients: Any, parameters: list[Tensor]) -> Tensor:
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([g.reshape(-1) for g in filled])


def _pairs(tuned: Any, flat: Tensor, parameters: list[Tensor]) -> Any:
    return zip(tuned.responses.entries, flat.split([p.numel() for p in parameters]), strict=True)
