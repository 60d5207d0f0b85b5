"""``transform``: attach a best response to any model."""

from __future__ import annotations

__all__ = ["transform"]

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from metaopt.errors import ResponseError
from metaopt.hyperparameters import Hyperparameters
from metaopt.hyperparameters.transformed import Interval
from metaopt.stn import attention, composites, norms, tangents  # noqa: F401 -- they register their rules
from metaopt.stn.engines import ENGINES
from metaopt.stn.randomness import DROPOUTS
from metaopt.stn.substitution import rate_attribute
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
        bind: for a hyperparameter, the name of the module or modules whose dropout rate it is: ``nn.Dropout`` of
            any kind, or the dropout of ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and ``nn.MultiheadAttention``. One whose
            name is that of such a module, with ``_`` for ``.``, is bound to it by itself.
        per_batch: names of hyperparameters that have one perturbation for a minibatch.
        banks: the terms of each response matrix; 1 is the papers' form.
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
    _refuse(model)
    if method not in METHODS:
        raise ResponseError(f"no method {method!r}; choose one of {', '.join(METHODS)}.")
    if engine != "auto" and engine not in ENGINES:
        raise ResponseError(f"no engine {engine!r}; choose auto, or one of {', '.join(ENGINES)}.")
    if banks < 1 or (groups is not None and groups < 1):
        raise ResponseError(f"banks and groups are at least 1, got {banks} and {groups}.")
    return Tuned(
        model,
        hyper,
        method,
        bound=_bound(model, hyper, bind or {}),
        per_batch=tuple(per_batch),
        banks=banks,
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


def _bound(model: nn.Module, hyper: Hyperparameters, bind: Mapping[str, str | Sequence[str]]) -> dict[str, str]:
    """The hyperparameter of each bound module, by the module's name."""
    modules = dict(model.named_modules())
    names = {name for name, module in modules.items() if rate_attribute(module) is not None}
    bound: dict[str, str] = {}
    for key, given in bind.items():
        if key not in hyper:
            raise ResponseError(
                f"bind names {key!r}, and there is no such hyperparameter; there are: {', '.join(hyper)}."
            )
        for name in [given] if isinstance(given, str) else given:
            if name not in names:
                known = ", ".join(sorted(names)) or "none"
                raise ResponseError(
                    f"hyperparameter {key!r} can't be bound to {name!r}, which is no module with a dropout rate; there "
                    f"are: {known}. A dropout that `forward` calls as a function has no name: make it a module, "
                    "`self.drop = nn.Dropout()`, call `self.drop(x)`, and bind it by that name."
                )
            if bound.setdefault(name, key) != key:
                raise ResponseError(
                    f"{name!r} is bound to {bound[name]!r} and to {key!r}; one rate has one hyperparameter."
                )
    for name in sorted(names - set(bound)):
        key = name.replace(".", "_")
        if key in hyper and key not in bind and isinstance(modules[name], DROPOUTS):
            bound[name] = key
    for key in set(bound.values()):
        if hyper[key].numel() != 1:
            raise ResponseError(f"hyperparameter {key!r} is a dropout rate, and that is one number; use a scalar.")
        domain = hyper.domains[key]
        if not (isinstance(domain, Interval) and domain.low >= 0 and domain.high < 1):
            raise ResponseError(
                f"hyperparameter {key!r} is a dropout rate and lives in {domain}: at a rate of 1 the mask divides by "
                "zero. Use `interval(rate, 0, 0.95)`."
            )
    return bound
