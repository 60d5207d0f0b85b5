"""Which rows of a layer's parameters respond together: one rule a layer type, by ``functools.singledispatch``.

A response moves a parameter ``P`` of example ``b`` by ``ΔP_b = Σ_k diag(U_k ε_b) V_k``: each *row* of ``V``, a slice
along the output axis, is multiplied by a scalar that is linear in the perturbation ``ε_b``. A `Structure` says what the
rows of one parameter are.

References:
    MacKay et al., *Self-Tuning Networks*, 2019, Sec. 3.3; Bae and Grosse, *Delta-STN*, 2020, Sec. 3.
"""

from __future__ import annotations

__all__ = ["Structure", "along", "dense", "structures"]

import functools
import math
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Structure:
    """The rows of one parameter.

    Args:
        rows: how many there are, ``o``.
        view: the shape in which the parameter is seen.
        broadcast: the shape in which a row's scalars multiply that view.
        axis: the axis of the rows, or None where every entry is a row of its own (then ``V`` is 1 and drops out).
        mixable: whether rows may be sums of other rows, as in a response of low rank; not where groups of rows see
            different inputs.
    """

    rows: int
    view: tuple[int, ...]
    broadcast: tuple[int, ...]
    axis: int | None
    mixable: bool = True

    def scale(self, coefficients: Tensor, base: Tensor | None) -> Tensor:
        """``diag(s_b) V``: the changes of the parameter from the scalars of each example, shape ``(B, o)``."""
        examples = len(coefficients)  # by number: -1 can't be told of a parameter without entries
        scalars = coefficients.reshape(examples, *self.broadcast)
        if base is None:
            return scalars.reshape(examples, *self.view)
        return (scalars * base.reshape(self.view)).reshape(examples, *base.shape)


def along(parameter: Tensor, axis: int) -> Structure:
    """Rows along one axis of a matrix or a kernel; a vector has a row for each entry."""
    if parameter.ndim <= 1:
        return dense(parameter)
    shape = tuple(parameter.shape)
    return Structure(shape[axis], shape, tuple(n if d == axis else 1 for d, n in enumerate(shape)), axis)


def dense(parameter: Tensor) -> Structure:
    """Each entry a row of its own: the response of a vector is then any linear map of ε, nothing is imposed."""
    shape = tuple(parameter.shape)
    return Structure(math.prod(shape), shape, shape, None)


@functools.singledispatch
def structures(module: nn.Module) -> dict[str, Structure]:
    """The structures of the parameters that a layer holds itself, by name.

    To let the parameters of a layer of your own respond along other rows, register a function for its type. A parameter
    that is not named here responds along its first axis that is longer than one.

    Args:
        module: a layer; parameters of its children are theirs.

    Returns:
        Structures by parameter name, without those the layer does not have.
    """
    return {}


def _of(module: nn.Module, axis: int, *names: str) -> dict[str, Structure]:
    parameters = {name: module._parameters.get(name) for name in names}
    return {name: along(p, axis) for name, p in parameters.items() if p is not None}


@structures.register
def _conv(module: _ConvNd) -> dict[str, Structure]:
    found = _of(module, 0, "weight", "bias")
    return {name: replace(structure, mixable=module.groups == 1) for name, structure in found.items()}


@structures.register(nn.Linear)
@structures.register(nn.Bilinear)
def _rows(module: nn.Module) -> dict[str, Structure]:
    return _of(module, 0, "weight", "bias")


@structures.register
def _conv_transpose(module: _ConvTransposeNd) -> dict[str, Structure]:
    # The kernel is (in, out / groups, …): the output channel of an entry depends on its group, which is a share of
    # the first axis.
    found = _of(module, 1, "weight", "bias")
    weight, groups = module.weight, module.groups
    inner, outer, kernel = weight.shape[0] // groups, weight.shape[1], tuple(weight.shape[2:])
    view = (groups, inner, outer, *kernel)
    broadcast = (groups, 1, outer, *(1 for _ in kernel))
    found["weight"] = Structure(groups * outer, view, broadcast, 1, mixable=groups == 1)
    return found


@structures.register(_NormBase)
@structures.register(nn.LayerNorm)
@structures.register(nn.GroupNorm)
@structures.register(nn.RMSNorm)
@structures.register(nn.PReLU)
def _vectors(module: nn.Module) -> dict[str, Structure]:
    # A LayerNorm over several axes has affine parameters of as many: every entry is a row.
    return {name: dense(p) for name in ("weight", "bias") if (p := module._parameters.get(name)) is not None}


@structures.register(nn.Embedding)
@structures.register(nn.EmbeddingBag)
def _embedding(module: nn.Module) -> dict[str, Structure]:
    # The columns, not the words: a decoder that is tied to the table then shares its response.
    return _of(module, 1, "weight")


@structures.register(nn.RNNBase)
@structures.register(nn.RNNCellBase)
def _recurrent(module: nn.Module) -> dict[str, Structure]:
    return _of(module, 0, *module._parameters)


@structures.register
def _attention(module: nn.MultiheadAttention) -> dict[str, Structure]:
    found = _of(module, 0, "in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    added = {name: module._parameters.get(name) for name in ("bias_k", "bias_v")}
    return found | {name: dense(p) for name, p in added.items() if p is not None}
