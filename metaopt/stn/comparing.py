"""Which engine linearises a model, and whether another one agrees with it."""

from __future__ import annotations

__all__ = ["Compared"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.errors import FallbackWarning, ResponseError, warn
from metaopt.stn.engines import ENGINES
from metaopt.stn.generators import same_randomness
from metaopt.stn.guards import unrepeated
from metaopt.stn.outputs import close
from metaopt.stn.passes import Pass, Unsupported
from metaopt.stn.preparation import Prepared
from metaopt.stn.trees import leaves


class Compared(Prepared):
    """The part of `Tuned` that compares its engines before it relies on one."""

    engine: str

    def _fall_back(self, engines: list[str], reason: Exception) -> None:
        if len(engines) == 1:
            raise ResponseError(
                f"{_culprit(self.model, reason)} can't be linearised by the engine {engines[0]!r}: {reason}. Use "
                '`method="centered"`, which needs no second derivative'
                + ("; the other engines were tried before." if self.engine == "auto" else ', or `engine="auto"`.')
            ) from reason
        names = {"manual": "hand-written tangents", "forward": "forward-mode AD", "double": "two backward passes"}
        warn(
            f"{_culprit(self.model, reason)} can't be linearised by {names[engines[0]]} ({reason}); it falls back to "
            f"{names[engines[1]]}, which is slower.",
            FallbackWarning,
        )
        engines.pop(0)

    def _compare(self, z: Tensor, values: Mapping[str, Tensor], args: Any, kwargs: Any, engines: list[str]) -> None:
        """Compare hand-written tangents with another engine's, once: a wrong one must not go unnoticed."""
        # The response starts at zero, where all engines agree.
        with same_randomness(self.device):
            weight = torch.randn_like(self.responses.weight).requires_grad_()

        found: list[Any] = []
        passes: list[Pass] = []
        unable: list[str] = []

        def run(point: Tensor, kind: type[Pass]) -> tuple[Any, Pass]:
            output, p = self._run(point, kind, values, args, kwargs, response=False, weight=weight)
            passes.append(p)
            return output, p

        for engine in ENGINES:
            with self._unmoved():
                try:
                    output = ENGINES[engine](run, z.detach())
                    with unrepeated(self.slots.responding):
                        pair = output, _gradient(output, weight)
                    if found and _finite(found[0]) and not _finite(pair):
                        # Torch's own derivatives have gaps; where they are NaN they tell nothing of ours.
                        raise Unsupported("derivatives that are not finite")
                    found.append(pair)
                except Unsupported as reason:
                    unable.append(engine)
                    if engine == engines[0]:
                        self._fall_back(engines, reason)
            if len(found) == 2:
                break
        epsilon = max((p.epsilon for p in passes), default=0.0)
        if len(found) < 2 or engines[0] != "manual" or close(found[0], found[1], epsilon):
            return
        differ = f"hand-written tangents of `{type(self.model).__name__}` differ from torch's own"
        why = "does the model write on its intermediate values, or use a custom autograd.Function?"
        if len(engines) == 1:
            raise ResponseError(f'{differ}; {why} Use `engine="auto"`, which takes another engine then.')
        engines[:] = [engine for engine in engines[1:] if engine not in unable]
        warn(f"{differ}, which are used from now on; {why}", FallbackWarning)


def _finite(values: Any) -> bool:
    return all(bool(v.isfinite().all()) for v in leaves(values) if isinstance(v, Tensor))


def _gradient(output: Any, weight: Tensor) -> Tensor | None:
    """A gradient through the tangents; some functions of torch have tangents without one."""
    found = [y for y in leaves(output) if isinstance(y, Tensor) and y.requires_grad]
    if not found:
        return None
    try:
        return torch.autograd.grad(
            torch.stack([y.abs().square().mean() for y in found]).sum(), weight, allow_unused=True
        )[0]
    except RuntimeError as error:
        text = str(error)
        if "not implemented" not in text and "inplace operation" not in text:
            raise
        raise Unsupported(text.splitlines()[0]) from error


def _culprit(model: nn.Module, reason: BaseException) -> str:
    """The innermost module in whose ``forward`` an exception was raised, in words."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = "", (reason.__cause__ or reason).__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    inner = model.get_submodule(found)
    return f"`{type(model).__name__}`" if inner is model else f"{found!r}, of type `{type(inner).__name__}`,"
