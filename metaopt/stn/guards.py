"""What a model must not do while its response is learnt: recompute its values later, or write on its input."""

from __future__ import annotations

__all__ = ["CHECKPOINT", "WRITTEN", "differentiate", "guarded", "unchanged", "unhooked", "unrepeated"]

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from metaopt.capture.seams import Seam
from metaopt.errors import ResponseError
from metaopt.stn.trees import leaves

_autograd: Any = torch._C._autograd

RECOMPUTED = (
    "the model uses {}, which computes a part of it once more while gradients are taken, when "
    "its weights no longer respond and its dropout is no longer bound: the gradient would be wrong. Call that part "
    "itself, {}, while the response is learnt."
)
CHECKPOINT = RECOMPUTED.format("`torch.utils.checkpoint`", "`block(x)` and not `checkpoint(block, x)`")

WRITTEN = (
    "the model writes in place on a value that a gradient needs. A validation step takes gradients too, in evaluation "
    "mode: where the model keeps a state or a cache there, switch that off (such as `use_cache=False`); else let it "
    "compute a new tensor, as `x = x + y` and not `x += y`."
)


class guarded:
    """Run a model once.

    Args:
        args: its arguments.
        kwargs: the same.
        recomputes: whether it may be computed again later.

    Raises:
        ResponseError: if it writes on its input, or saves less than its gradient needs.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, recomputes: bool = False) -> None:
        found = leaves((*args, *kwargs.values()))
        self._tensors = [t for t in found if isinstance(t, Tensor) and not t.is_inference()]
        self._recomputes = recomputes

    def __enter__(self) -> None:
        self._versions = [t._version for t in self._tensors]
        self._before = _autograd._saved_tensors_hooks_get_disabled_error_message()
        self._closed = not self._recomputes and _close_saving_hooks(self._before)
        self._watched = not self._recomputes and not self._closed
        if self._watched:
            _OPENED.__enter__()
            _here.refused += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._closed:
            _open_saving_hooks(self._before)
        elif self._watched:
            _here.refused -= 1
            _OPENED.__exit__()
        if isinstance(error, RuntimeError) and str(error).startswith(CHECKPOINT):
            raise ResponseError(CHECKPOINT) from None
        if error is None and self._versions != [t._version for t in self._tensors]:
            raise ResponseError(
                "the model writes on its input in place. It is called several times on one batch, which would be "
                "another one each time; let it compute new tensors, as `x = x - mean` and not `x -= mean`."
            )


def _close_saving_hooks(before: str | None) -> bool:
    """Refuse hooks on what gradients save from here on, where the user's own are not open already."""
    # As `torch.autograd.graph.disable_saved_tensors_hooks` does it, without the time that its context takes.
    try:
        _autograd._saved_tensors_hooks_disable(CHECKPOINT)
    except RuntimeError:  # those save all values
        # They are refused already: torch looks for open ones after that. It does the same to what was refused before.
        with suppress(RuntimeError):
            _open_saving_hooks(before)
        return False
    return True


class _Here(threading.local):
    """In this thread: how many runs refuse hooks although the user's own are open."""

    refused = 0


_here, _push = _Here(), _autograd._push_saved_tensors_default_hooks


def _open_more(*hooks: Any) -> None:
    if _here.refused:
        raise RuntimeError(CHECKPOINT)
    _push(*hooks)


# Torch can't refuse those of the model alone.
_OPENED = Seam(_autograd, "_push_saved_tensors_default_hooks", _open_more)


def _open_saving_hooks(before: str | None) -> None:
    if before is None:
        _autograd._saved_tensors_hooks_enable()
    else:
        _autograd._saved_tensors_hooks_disable(before)


@contextmanager
def unhooked(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Without the hooks of modules on gradients, which belong to training."""
    hooked = [m for m in modules if m._backward_hooks or m._backward_pre_hooks]
    kept = [(m._backward_hooks, m._backward_pre_hooks) for m in hooked]
    try:
        for module in hooked:
            module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for module, (hooks, before) in zip(hooked, kept, strict=True):
            module._backward_hooks, module._backward_pre_hooks = hooks, before


class unrepeated:
    """Take gradients, while no module may be called: its parameters are its own again, without a response.

    Args:
        modules: those whose parameters respond, or whose dropout is bound.

    Raises:
        ResponseError: if one is called, as by the backward of a custom function that calls it again.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules

    def __enter__(self) -> None:
        # Of all modules: a backward may run in another thread, as it does on a GPU.
        self._handle = register_module_forward_pre_hook(self._refuse)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _refuse(self, module: nn.Module, _: Any) -> None:
        if any(module is own for own in self._modules):
            raise ResponseError(
                RECOMPUTED.format(
                    f"a function whose backward calls a module again (one of type `{type(module).__name__}`), as "
                    "adjoint solvers of differential equations do",
                    "`odeint` and not `odeint_adjoint`",
                )
            )


@contextmanager
def unchanged(named: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """Take gradients of parameters, while hooks on these may look at them and not change them.

    Raises:
        ResponseError: if one does, or is called when a gradient is accumulated.
    """
    changed: list[str] = []

    def noted(name: str, hook: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        def call(gradient: Tensor) -> Tensor | None:
            result = hook(gradient)
            changed.extend([name] if result is not None else [])
            return result

        return call

    undo: list[tuple[Any, dict[int, Any]]] = []
    try:
        for name, parameter in named:
            if parameter._post_accumulate_grad_hooks:
                changed.append(name)
            hooks = parameter._backward_hooks
            if hooks:
                undo.append((hooks, dict(hooks)))
                hooks.update({key: noted(name, hook) for key, hook in hooks.items()})
        yield
    finally:
        for hooks, before in undo:
            hooks.update(before)
    if changed:
        raise ResponseError(
            f"the parameter {changed[0]!r} has a hook that changes its gradient, which the gradient of its response "
            "does not go through: the response would be that of other weights. Remove the hook; freeze a parameter "
            "that should stay before `transform`, multiply one of which some entries should stay with a mask in "
            "`forward` (as `torch.nn.utils.prune` does), and clip by `clip` in `metaopt.stn.train`."
        )


def differentiate(loss: Tensor, tensors: Sequence[Tensor]) -> None:
    """Give tensors the gradients of a loss, None where it does not depend on one.

    By ``backward``: a gradient from ``torch.autograd.grad`` may lie in memory in another order than its parameter, of
    which torch's fused optimizers on a CPU take no notice, and may be that of two parameters at once, as that of
    ``a + b`` is, on which a clip would write twice.

    Raises:
        ResponseError: if the model computes values a second time, or a parameter was frozen.
    """
    if False in [t.requires_grad for t in tensors]:
        raise ResponseError(
            "a parameter was frozen after the response was attached to it; freeze what should not be trained first, "
            "and call `transform` then."
        )
    try:
        torch.autograd.backward(loss, inputs=tensors)
    except RuntimeError as error:
        if "torch.utils.checkpoint" in str(error) and not isinstance(error, ResponseError):
            raise ResponseError(CHECKPOINT) from error
        if "modified by an inplace operation" in str(error):
            raise ResponseError(WRITTEN) from error
        raise
