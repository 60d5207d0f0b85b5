"""Which hyperparameter is the rate of which dropout, by name: of a module, of a table of words, or of a weight."""

from __future__ import annotations

__all__ = ["Bound", "bound"]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from metaopt.errors import ResponseError
from metaopt.hyperparameters import Hyperparameters
from metaopt.hyperparameters.transformed import Interval
from metaopt.stn.randomness import DROPOUTS
from metaopt.stn.structures import structures
from metaopt.stn.substitution import rate_attribute

TABLES = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Bound:
    """What `transform` binds.

    Args:
        rates: the hyperparameter by the name of a module with a dropout rate.
        masks: the hyperparameter by the name of a weight whose entries are dropped, or of a table whose words are.
    """

    rates: dict[str, str] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)


def bound(model: nn.Module, hyper: Hyperparameters, bind: Mapping[str, str | Sequence[str]]) -> Bound:
    """Sort what is bound, and refuse what can't be.

    Raises:
        ResponseError: if a name is unknown, is bound twice or can't be dropped, or if a rate may reach 1.
    """
    modules = dict(model.named_modules())
    weights = {
        f"{prefix}.{key}" if prefix else key: parameter
        for prefix, module in modules.items()
        for key, parameter in module._parameters.items()
        if parameter is not None
    }
    rates = {name for name, module in modules.items() if rate_attribute(module) is not None}
    tables = {name for name, module in modules.items() if isinstance(module, TABLES)}
    result = Bound()
    if not isinstance(bind, Mapping):
        raise ResponseError(
            f"`bind` is a dictionary from a hyperparameter's name to what it is the rate of, not {type(bind).__name__}."
        )
    for key, given in bind.items():
        if key not in hyper:
            raise ResponseError(
                f"bind names {key!r}, and there is no such hyperparameter; there are: {', '.join(hyper)}."
            )
        names = [given] if isinstance(given, str) else given
        if not (isinstance(names, Iterable) and all(isinstance(name, str) for name in names)):
            raise ResponseError(
                f"hyperparameter {key!r} is bound to {type(given).__name__}; bind it to a name, as the model's "
                "`named_modules()` or `named_parameters()` has it, or to a list of names."
            )
        for name in names:
            if name in weights:
                _refuse_vector(key, name, weights[name], modules)
            if name in tables:
                _refuse_renormed(key, name, modules[name])
            kind = result.rates if name in rates else result.masks if name in tables or name in weights else None
            if kind is None:
                raise ResponseError(_unknown(key, name, sorted(rates), sorted(tables)))
            if kind.setdefault(name, key) != key:
                raise ResponseError(
                    f"{name!r} is bound to {kind[name]!r} and to {key!r}; one rate has one hyperparameter."
                )
    for name in sorted(tables & set(result.masks)):
        if f"{name}.weight" in result.masks:
            raise ResponseError(
                f"words of {name!r} are dropped, and connections of its weight too; bind one of the two."
            )
    for name in sorted(rates - set(result.rates)):
        key = name.replace(".", "_")
        if key in hyper and key not in bind and isinstance(modules[name], DROPOUTS):
            result.rates[name] = key
    for key in {*result.rates.values(), *result.masks.values()}:
        _require_rate(hyper, key)
    return result


def _unknown(key: str, name: str, rates: Sequence[str], tables: Sequence[str]) -> str:
    return (
        f"hyperparameter {key!r} can't be bound to {name!r}, which is no module with a dropout rate, no embedding, and "
        f"no weight; there are: {', '.join([*rates, *tables]) or 'none'}, and the weights by their names in "
        "`named_parameters()`. A dropout that `forward` calls as a function has no name: make it a module, "
        "`self.drop = nn.Dropout()`, call `self.drop(x)`, and bind it by that name."
    )


def _refuse_vector(key: str, name: str, parameter: nn.Parameter, modules: Mapping[str, nn.Module]) -> None:
    owner, _, last = name.rpartition(".")
    structure = structures(modules[owner]).get(last)
    if parameter.ndim < 2 or (structure is not None and structure.axis is None):
        raise ResponseError(
            f"hyperparameter {key!r} is bound to {name!r}, whose shape is {tuple(parameter.shape)}: the connections of "
            "a weight can be dropped, biases and scales can't; bind it to a weight of two or more axes."
        )


def _refuse_renormed(key: str, name: str, module: nn.Module) -> None:
    if getattr(module, "max_norm", None) is not None:
        raise ResponseError(
            f"hyperparameter {key!r} is bound to {name!r}, whose max_norm writes on the table while words of it are "
            "dropped; leave max_norm out, and use `metaopt.stn.l2`."
        )


def _require_rate(hyper: Hyperparameters, key: str) -> None:
    if hyper[key].numel() != 1:
        raise ResponseError(f"hyperparameter {key!r} is a dropout rate, and that is one number; use a scalar.")
    domain = hyper.domains[key]
    if not (isinstance(domain, Interval) and domain.low >= 0 and domain.high < 1):
        raise ResponseError(
            f"hyperparameter {key!r} is a dropout rate and lives in {domain}: at a rate of 1 the mask divides by "
            "zero. Use `interval(rate, 0, 0.95)`."
        )
