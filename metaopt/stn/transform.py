"""``transform``: attach a best response to any model."""

from __future__ import annotations

__all__ = ["transform"]

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from metaopt.errors import ResponseError, whole
from metaopt.hyperparameters import Hyperparameters
from metaopt.stn import attention, composites, norms, tangents, viewing  # noqa: F401 -- they register their rules
from metaopt.stn.binding import bound
from metaopt.stn.engines import ENGINES
from metaopt.stn.tuned import Tuned

METHODS = ("stn", "centered", "delta")


def transform(
    model: nn.Module,
    hyper: Hyperparameters,
    method: str = "delta",
    *,
    bind: Mapping[str, str | Sequence[str]] | None = None,
    per_batch: Sequence[str] = (),
    banks: int = 1,
    rank: int | None = None,
    standardize: bool = True,
    groups: int | None = None,
    batch_dim: int = 0,
    engine: str = "auto",
    verify: bool = True,
) -> Tuned:
    r"""Let the weights of a model respond to hyperparameters, example by example.

    .. math:: w(\lambda) = \Phi \lambda + \varphi_0 \;\text{or}\; w(\lambda) = w_0 + \Theta (\lambda - \lambda_0)

    The model is not changed: no class and no method is replaced. At zero perturbation it computes what it did.

    Args:
        model: any module. Frozen parameters (``requires_grad=False``) don't respond; a parameter that is used in
            several places has one response.
        hyper: the hyperparameters; their ``scale`` is the initial σ.
        method: ``"stn"``, the uncentred response; ``"centered"``; or ``"delta"``, centred, with the network's
            output linearised in the weights' change.
        bind: for a hyperparameter, the name or names of what it is the dropout rate of: an ``nn.Dropout`` of any
            kind or a `VariationalDropout`; ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and ``nn.MultiheadAttention``, for
            the dropout within; an ``nn.Embedding``, whose words are then dropped; a weight such as
            ``"lstm.weight_hh_l0"``, whose connections are. A hyperparameter whose name is that of a dropout module,
            with ``_`` for ``.``, is bound to it by itself.
        per_batch: names of hyperparameters that have one perturbation for a minibatch; those bound to words or
            weights have, since one mask serves the whole batch.
        banks: the terms of each response matrix; 1 is the papers' form.
        rank: the rank of each term, for a response of less memory: ``ΔP_b = A diag(U ε_b) C``. By default a term
            has a scalar for each row, and a ``V`` as large as the weights.
        standardize: whether a centred response is fed ε/σ, so that it learns at any σ.
        groups: into how many groups a batch is split, each with one perturbation, where a parameter can't respond
            per example. By default 8, and 1 for models with BatchNorm.
        batch_dim: the axis of examples in the model's arguments.
        engine: how the output is linearised: ``"manual"``, ``"forward"``, ``"double"``, or ``"auto"``, the first
            of them that can.
        verify: whether the first pass is checked: responses against changed weights, and hand-written tangents
            against forward-mode AD.

    Returns:
        The model with its response, to be trained by `train`.

    Raises:
        ResponseError: if a name is bound to nothing, an option is unknown, or nothing in the model is trained.
        DomainError: if a hyperparameter is kept in its domain by projection.

    References:
        MacKay et al., *Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response
        Functions*, ICLR 2019. Bae and Grosse, *Delta-STN: Efficient Bilevel Optimization for Neural Networks using
        Structured Response Jacobians*, NeurIPS 2020, Sec. 3 and Alg. 1.
    """
    if not (isinstance(model, nn.Module) and isinstance(hyper, Hyperparameters)):
        raise ResponseError(
            "a response is attached to a torch.nn.Module, for a metaopt.Hyperparameters; these are "
            f"{type(model).__name__} and {type(hyper).__name__}."
        )
    _refuse(model)
    if method not in METHODS:
        raise ResponseError(f"no method {method!r}; choose one of {', '.join(METHODS)}.")
    if engine != "auto" and engine not in ENGINES:
        raise ResponseError(f"no engine {engine!r}; choose auto, or one of {', '.join(ENGINES)}.")
    banks = whole("banks", banks, 1, ResponseError)
    groups = None if groups is None else whole("groups", groups, 1, ResponseError)
    rank = None if rank is None else whole("rank", rank, 1, ResponseError)
    batch_dim = whole("batch_dim", batch_dim, 0, ResponseError)
    per_batch = [per_batch] if isinstance(per_batch, str) else per_batch
    if not isinstance(per_batch, Iterable):
        raise ResponseError(f"per_batch is a list of hyperparameters' names, not {type(per_batch).__name__}.")
    names = bound(model, hyper, bind or {})
    return Tuned(
        model,
        hyper,
        method,
        bound=names,
        per_batch=tuple(dict.fromkeys([*per_batch, *names.masks.values()])),
        banks=banks,
        rank=rank,
        standardize=standardize,
        groups=groups,
        batch_dim=batch_dim,
        engine=engine,
        verify=verify,
    )


def _refuse(model: nn.Module) -> None:
    """Refuse models whose functions can't be seen, or whose parameters are not there yet."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise ResponseError(
                f"{name or 'the model'!r} is compiled, and its functions can't be seen; transform the original module "
                "(the `_orig_mod` of one that `torch.compile` made), and export the weights to the compiled one."
            )
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
            raise ResponseError(f"{name or 'the model'!r} has parameters without a shape; call the model once, first.")
