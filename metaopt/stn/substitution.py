"""What stands in for parameters, buffers and dropout rates while a pass runs, and is put back after it."""

from __future__ import annotations

__all__ = ["ANOTHER", "Slots", "modules_of", "rate_attribute", "substituted"]

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from metaopt.errors import ResponseError
from metaopt.stn.buffers import copied
from metaopt.stn.masks import Mask
from metaopt.stn.randomness import DROPOUTS, Rate

# What to do where a model has other parameters than it had.
ANOTHER = (
    "to unfreeze, prune, add or replace parameters changes what is trained, and what responds, and neither follows; do "
    "that before `transform`, or call `metaopt.stn.transform` and `metaopt.stn.train` anew after it"
)


class Slots:
    """Where a model keeps its parameters, its buffers and its rates.

    Args:
        model: the model.
        bound: the hyperparameter by the name of the module that it sets the dropout rate of.
        masks: of weights.
    """

    def __init__(self, model: nn.Module, bound: Mapping[str, str], masks: Sequence[Mask] = ()) -> None:
        self.masks = list(masks)
        self.parameters: dict[str, list[tuple[dict[str, Any], str]]] = {}
        # Modules, and not their `__dict__`: a copy of the model has others.
        self.rates: list[tuple[nn.Module, str, Rate]] = []
        self.modules = list(model.modules())
        # Whole, since a buffer may be None at first, or come later.
        self.buffers = [module._buffers for module in self.modules]
        # For which something stands in: they compute another thing once a pass is over.
        self.responding = [m for n, m in model.named_modules() if n in bound or _trained(m)]
        self.recurrent = [m for m in self.modules if isinstance(m, nn.RNNBase)]
        first: dict[int, str] = {}
        for prefix, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    name = first.setdefault(id(parameter), f"{prefix}.{key}" if prefix else key)
                    self.parameters.setdefault(name, []).append((module._parameters, key))
            attribute = rate_attribute(module)
            if attribute is not None:
                rate = Rate(getattr(module, attribute), prefix, bound.get(prefix))
                self.rates.append((module, attribute, rate))

    def parameter(self, name: str) -> Tensor:
        """The parameter of a name, as the model has it now."""
        store, key = self.parameters[name][0]
        parameter: Tensor | None = store.get(key)
        if parameter is None:
            raise ResponseError(f"the model no longer has its parameter {name!r}: {ANOTHER}.")
        return parameter


def _trained(module: nn.Module) -> bool:
    return any(p is not None and p.requires_grad for p in module._parameters.values())


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All of a model's modules now, once each; a step asks for them, and ``modules()`` takes longer."""
    found = {id(model): model}
    queue = [model]
    for module in queue:
        for child in module._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                queue.append(child)
    return queue


def rate_attribute(module: nn.Module) -> str | None:
    """The attribute in which a module keeps its dropout rate, if it has one."""
    if isinstance(module, DROPOUTS):
        return "p"
    return "dropout" if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) else None


class substituted:
    """Let tensors stand in for parameters, copies for buffers, and marked numbers for rates.

    Args:
        slots: where they are.
        replaced: the stand-ins by the parameters' first names.
        masked: those of single uses, which have some entries dropped.
        buffers: whether to run on copies of the buffers, so that no statistic moves.
        rates: whether dropout rates are marked.
    """

    def __init__(
        self,
        slots: Slots,
        replaced: Mapping[str, Tensor],
        *,
        buffers: bool,
        rates: bool,
        masked: Sequence[tuple[Mask, Tensor]] = (),
    ) -> None:
        self._slots, self._replaced, self._masked = slots, replaced, masked
        self._buffers, self._rates = buffers, rates
        self._undo: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        try:
            self._put_parameters()
            if parametrize._cache_enabled:
                # `with parametrize.cached()` around a call would hand on what another pass computed.
                self._put(vars(parametrize), "_cache", {})
            copies: dict[int, Tensor] = {}
            for store in self._slots.buffers if self._buffers else ():
                for key, buffer in store.items():
                    if buffer is not None:
                        self._put(store, key, copied(buffer, copies))
            for holder, key, rate in self._slots.rates if self._rates else ():
                value = holder.__dict__[key]
                # The same number as ever, most of the time.
                self._put(holder.__dict__, key, rate if value == rate else Rate(value, rate.module, rate.hyper))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for store, key, value in reversed(self._undo):
            store[key] = value
        self._undo.clear()

    def _put(self, store: dict[str, Any], key: str, value: Any) -> None:
        self._undo.append((store, key, store[key]))
        store[key] = value

    def _put_parameters(self) -> None:
        slots, replaced, masked = self._slots, self._replaced, self._masked
        before = [dict(module._parameters) for module in slots.recurrent]
        for name, tensor in replaced.items():
            for store, key in slots.parameters[name]:
                self._put(store, key, tensor)
        for mask, tensor in masked:
            self._put(mask.module._parameters, mask.key, tensor)
        for module, kept in zip(slots.recurrent, before, strict=True):
            # These keep a second list of their parameters.
            now = {id(p): module._parameters[key] for key, p in kept.items()}
            if replaced or masked:
                self._put(module.__dict__, "_flat_weights", [now.get(id(w), w) for w in module._flat_weights])
