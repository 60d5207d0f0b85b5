"""What is found out, and checked, when a transformed model is first called."""

from __future__ import annotations

__all__ = ["Prepared"]

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from metaopt.errors import FallbackWarning, ResponseError
from metaopt.stn.batches import count, select, split
from metaopt.stn.engines import ENGINES
from metaopt.stn.generators import random_state, same_randomness
from metaopt.stn.layouts import Layout, NeedsGroups, Site, infer, reordered
from metaopt.stn.passes import Pass, Recorder, Unsupported
from metaopt.stn.perturbations import Coordinates, Perturbation
from metaopt.stn.responses import Responses

# Examples on which it is seen whether a model keeps their order.
MOST = 16


class Prepared(nn.Module):
    """The part of `Tuned` that looks at the model before it relies on it."""

    model: nn.Module
    coordinates: Coordinates
    responses: Responses
    rho: Parameter
    batch_dim: int
    verify: bool
    names: set[str]
    fallback: dict[str, str]
    mixes: bool
    _layouts: dict[bool, dict[Site, Layout | str]]

    @property
    def device(self) -> torch.device:
        """Where the response is."""
        return self.responses.weight.device

    def _run(
        self,
        z: Tensor,
        kind: type[Pass],
        values: Mapping[str, Tensor],
        args: Any,
        kwargs: Any,
        *,
        weights: bool,
        response: bool,
        at: Perturbation | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Any, Pass]:
        raise NotImplementedError

    def _prepare(self, args: Any, kwargs: Any) -> None:
        """Find out where the examples are in the model, and check that every use of a weight was seen."""
        training = self.model.training
        if training in self._layouts:
            return
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            with same_randomness(self.device), torch.no_grad():
                self.model.eval()
                known = self._infer(args, kwargs, {})
                if self.verify:
                    known |= self._reordered(known, args, kwargs)
                for module, mode in modes:
                    module.training = mode
                self._layouts[training] = self._infer(args, kwargs, known) if training else known
                if self.verify:
                    epsilon = self._check(args, kwargs)
                    self.mixes = self.mixes or (bool(self.fallback) and self._mixes(args, kwargs, epsilon))
        except BaseException:
            self._layouts.pop(training, None)
            raise
        finally:
            for module, mode in modes:
                module.training = mode

    def _infer(self, args: Any, kwargs: Any, known: Mapping[Site, Layout | str]) -> dict[Site, Layout | str]:
        runs = [self._recorded(*select(args, kwargs, n, self.batch_dim), n) for n in (2, 3)]
        return infer(runs[0].seen, runs[1].seen, known)

    def _reordered(self, known: Mapping[Site, Layout | str], args: Any, kwargs: Any) -> dict[Site, str]:
        whole = count(args, kwargs, self.batch_dim)
        first = torch.arange(min(whole, MOST), device="cpu")
        # An order of its own, with which a reversal or a rotation by the model does not commute.
        order = torch.randperm(len(first), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        try:
            given, permuted = (
                self._recorded(*split(args, kwargs, part, self.batch_dim, whole), len(part)).seen
                for part in (first, order)
            )
        except ResponseError:
            # It insists on an order, such as sequences of falling length: then it keeps the one that it is given.
            return {}
        return reordered(known, given, permuted, order)

    def _mixes(self, args: Any, kwargs: Any, epsilon: float) -> bool:
        """Whether groups of examples have another output than all at once, as with negatives from the batch."""
        whole = count(args, kwargs, self.batch_dim)
        examples = torch.arange(min(whole, MOST))
        if len(examples) < 2:
            return False
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            parts = [split(args, kwargs, part, self.batch_dim, whole) for part in (examples, *examples.tensor_split(2))]
            before = random_state(self.device)
            together, *halves = [self.model(*inputs, **options) for inputs, options in parts]
            drawn = _moved(before, random_state(self.device))
        finally:
            for module, mode in modes:
                module.training = mode
        joined = pytree.tree_map(lambda *ys: self._join(ys), *halves)
        # Where the model draws random numbers in evaluation, no two runs agree, and shapes must do.
        return _shapes(together) != _shapes(joined) or not (drawn or _close(together, joined, epsilon))

    def _join(self, parts: tuple[Any, ...]) -> Any:
        raise NotImplementedError

    def _recorded(self, args: Any, kwargs: Any, examples: int) -> Recorder:
        z = self.rho.new_zeros(examples, self.coordinates.size)
        values = self.coordinates.values(self.coordinates.leaf().detach().expand(examples, -1))
        try:
            _, p = self._run(z, Recorder, values, args, kwargs, weights=False, response=False)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ResponseError(
                f"`{type(self.model).__name__}` was run on {examples} examples, to find out where they are in what "
                f"its layers see, and that failed: {error}. The examples must be along axis {self.batch_dim} of "
                "every tensor that it is called with (`transform(..., batch_dim=...)` says which), and tensors "
                "without examples must be of another size along it."
            ) from error
        assert isinstance(p, Recorder)
        return p

    def _check(self, args: Any, kwargs: Any) -> float:
        """With the same perturbation for all examples, responses must do what changed weights do.

        Returns:
            The rounding of the lowest precision within the model.
        """
        examples = count(args, kwargs, self.batch_dim)
        z = self.rho.new_ones(1, self.coordinates.size)
        weight = 0.3 * torch.randn_like(self.responses.weight) / self.coordinates.size
        values = self.coordinates.values(self.coordinates.leaf().detach().expand(examples, -1))
        constant: dict[str, Any] = {"weights": False, "response": False, "weight": weight}
        before = dict(self.fallback)
        while True:
            try:
                with same_randomness(self.device):
                    output, p = self._run(z.expand(examples, -1), Pass, values, args, kwargs, **constant)
                break
            except NeedsGroups as needs:
                if needs.name not in self.names:
                    raise
                self.fallback[needs.name] = needs.why
        unseen = {e.name for e in self.responses.entries} - p.used - set(self.fallback)
        everything = dict.fromkeys((e.name for e in self.responses.entries), "")
        with same_randomness(self.device):
            kept, self.fallback = self.fallback, everything
            try:
                expected, _ = self._run(z, Pass, values, args, kwargs, **constant)
            finally:
                self.fallback = kept
        if _close(output, expected, p.epsilon):
            return p.epsilon
        if not unseen:
            self.fallback = before
            raise ResponseError(
                f"`{type(self.model).__name__}` uses its weights in a way that can't be seen, such as a custom "
                "autograd.Function beside a layer: its response would be wrong. Let one parameter be used either by "
                "layers or by such a function."
            )
        self.fallback |= dict.fromkeys(unseen, "no function of torch was seen to use it")
        return self._check(args, kwargs)

    def _fall_back(self, engines: list[str], reason: Exception) -> None:
        if len(engines) == 1:
            raise ResponseError(
                f"{_culprit(self.model, reason)} can't be linearised by the engine {engines[0]!r}: {reason}. Use "
                '`method="centered"`, which needs no second derivative, or `engine="auto"`.'
            ) from reason
        names = {"manual": "hand-written tangents", "forward": "forward-mode AD", "double": "two backward passes"}
        warnings.warn(
            f"{_culprit(self.model, reason)} can't be linearised by {names[engines[0]]} ({reason}); it falls back to "
            f"{names[engines[1]]}, which is slower.",
            FallbackWarning,
            stacklevel=2,
        )
        engines.pop(0)

    def _compare(self, z: Tensor, values: Mapping[str, Tensor], args: Any, kwargs: Any, engines: list[str]) -> None:
        """Compare hand-written tangents with another engine's, once: a wrong one must not go unnoticed."""
        # The response starts at zero, where all engines agree.
        with same_randomness(self.device):
            weight = torch.randn_like(self.responses.weight)

        found, passes = [], []

        def run(point: Tensor, kind: type[Pass]) -> tuple[Any, Pass]:
            output, p = self._run(point, kind, values, args, kwargs, weights=False, response=False, weight=weight)
            passes.append(p)
            return output, p

        for engine in ENGINES:
            with same_randomness(self.device):
                try:
                    found.append(ENGINES[engine](run, z.detach()))
                except Unsupported as reason:
                    if engine == engines[0]:
                        self._fall_back(engines, reason)
            if len(found) == 2:
                break
        epsilon = max((p.epsilon for p in passes), default=0.0)
        if len(found) < 2 or engines[0] != "manual" or _close(found[0], found[1], epsilon):
            return
        differ = f"hand-written tangents of `{type(self.model).__name__}` differ from torch's own"
        why = "does the model write on its intermediate values, or use a custom autograd.Function?"
        if len(engines) == 1:
            raise ResponseError(f'{differ}; {why} Use `engine="auto"`, which takes another engine then.')
        engines.pop(0)
        warnings.warn(f"{differ}, which are used from now on; {why}", FallbackWarning, stacklevel=2)


def _culprit(model: nn.Module, reason: BaseException) -> str:
    """The innermost module in whose ``forward`` an exception was raised, in words."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = "", (reason.__cause__ or reason).__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    inner = model.get_submodule(found)
    return f"`{type(model).__name__}`" if inner is model else f"{found!r}, of type `{type(inner).__name__}`,"


def _moved(before: tuple[Tensor, Tensor | None], after: tuple[Tensor, Tensor | None]) -> bool:
    pairs = zip(before, after, strict=True)
    return any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs)


def _shapes(output: Any) -> list[Any]:
    return [leaf.shape for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _close(a: Any, b: Any, epsilon: float) -> bool:
    """Whether two outputs agree up to the rounding of the lowest precision within."""
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if isinstance(x, Tensor) and x.is_floating_point():
            rounding = max(epsilon, torch.finfo(x.dtype).eps)
            tolerance = 1e-8 if rounding < 1e-15 else 2e-3 if rounding < 1e-6 else 1e-1
            bound = tolerance * float(y.detach().abs().nan_to_num().max() if y.numel() else 0) + 1e-12
            if x.shape != y.shape or not torch.allclose(
                x.detach(), y.detach(), rtol=tolerance, atol=bound, equal_nan=True
            ):
                return False
    return True
