"""Evaluation mode, and back."""

from __future__ import annotations

__all__ = ["evaluation"]

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from metaopt.errors import ResponseError
from metaopt.stn.substitution import modules_of

_TRAIN, _EVAL = nn.Module.train, nn.Module.eval


def evaluation(model: nn.Module) -> AbstractContextManager[None]:
    """Evaluation mode, and back to the mode of each module.

    Raises:
        ResponseError: if the model's weights are others then, as those of layers that merge adapters.
    """
    modules = modules_of(model)
    trained = [module for module in modules if module.training]
    return _flags(trained) if all(map(_switched_by_torch, modules)) else _switched(model, modules, trained)


@contextmanager
def _flags(trained: Sequence[nn.Module]) -> Iterator[None]:
    # As `eval()` does it, without the time that a module takes to set what may be a parameter.
    flags = [module.__dict__ for module in trained]
    for flag in flags:
        flag["training"] = False
    try:
        yield
    finally:
        for flag in flags:
            flag["training"] = True


@contextmanager
def _switched(model: nn.Module, modules: Sequence[nn.Module], trained: Sequence[nn.Module]) -> Iterator[None]:
    """The same by calls of `eval` and `train`, in which a module may do more: drop what it kept, freeze a part."""
    modes = [(module, module.training) for module in modules]
    kept = [(name, p.detach(), p.detach().clone()) for name, p in model.named_parameters()] if trained else []
    try:
        if trained:
            model.eval()
        written = next((name for name, now, before in kept if not _equal(now, before)), None)
        if written is None:
            yield
    finally:
        again: set[int] = set()
        for module in trained:
            if id(module) not in again:
                module.train()
                again.update(map(id, module.modules()))
        for module, mode in modes:
            module.training = mode
    if written is not None:
        for _, now, before in kept:
            now.copy_(before)
        raise ResponseError(
            f"`{type(model).__name__}` writes on its parameter {written!r} when it changes to evaluation mode, as "
            "layers do that merge an adapter into a weight: a validation loss would not see how what was merged "
            "responds. Let it compute in evaluation as in training (`merge_weights=False` of such layers), and merge "
            "what is exported."
        )


def _equal(now: Tensor, before: Tensor) -> bool:
    return bool(((now == before) | ((now != now) & (before != before))).all())


def _switched_by_torch(module: nn.Module) -> bool:
    """Whether a module's mode is a flag of its own and no more."""
    kind, own = type(module), module.__dict__
    return (
        kind.train is _TRAIN and kind.eval is _EVAL and "training" in own and "train" not in own and "eval" not in own
    )
