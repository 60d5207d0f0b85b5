"""The model with a best response attached."""

from __future__ import annotations

__all__ = ["Tuned"]

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from metaopt.errors import ResponseError
from metaopt.hyperparameters import Hyperparameters
from metaopt.stn.batches import Shared, count, join, shared
from metaopt.stn.binding import Bound
from metaopt.stn.comparing import Compared
from metaopt.stn.coordinates import Coordinates
from metaopt.stn.engines import ENGINES, Runner
from metaopt.stn.generators import random_state, set_random_state
from metaopt.stn.layouts import NeedsGroups
from metaopt.stn.masks import masks_of
from metaopt.stn.passes import Pass, Unsupported
from metaopt.stn.perturbations import Perturbation, inverse_softplus
from metaopt.stn.responses import Responses
from metaopt.stn.running import Found
from metaopt.stn.substitution import Slots
from metaopt.stn.trees import mapped, objects

# The groups into which a batch is split where a parameter can't respond per example.
GROUPS = 8


class Tuned(Compared):
    """A model whose weights respond to hyperparameters; made by `transform`.

    Called as the model is. By itself it computes with the plain weights at the present hyperparameters; within a step
    of the tuner it computes at perturbed ones, each example at its own.

    Attributes:
        model: the model, itself; its parameters are w0 (φ0 of an uncentred response).
        hyper: the hyperparameters; their leaves are λ.
        responses: Θ.
        rho: the inverse softplus of the perturbation scales σ.
    """

    def __init__(
        self,
        model: nn.Module,
        hyper: Hyperparameters,
        method: str,
        *,
        bound: Bound,
        per_batch: tuple[str, ...],
        banks: int,
        rank: int | None,
        standardize: bool,
        groups: int | None,
        batch_dim: int,
        engine: str,
        verify: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.hyper = hyper
        self.method = method
        self.coordinates = Coordinates(hyper, per_batch)
        masks = masks_of(model, bound.masks)
        whole = {mask.name for mask in masks}
        self.responses = Responses(model, self.coordinates.size, banks, rank=rank, whole=whole)
        weight = self.responses.weight
        scales = self.coordinates.scales().to(weight)
        self.rho = Parameter(inverse_softplus(scales))
        self.reference: Tensor
        # A centred response is fed ε / σ, so that its curvature does not shrink with σ²; nothing is centred in "stn".
        self.standardize = standardize and method != "stn"
        self.register_buffer("reference", scales.clone() if self.standardize else torch.ones_like(scales))
        self.bound, self.rated = dict(bound.rates), frozenset(bound.rates.values())
        self.slots = Slots(model, self.bound, masks)
        self.groups, self.batch_dim, self.verify = groups, batch_dim, verify
        self.fallback: dict[str, str] = {}
        # Whether the model's output for some examples depends on others: then they are not split into groups.
        self.mixes, self.looked, self.epsilon = False, False, None
        self.shared: Shared = frozenset()
        self.draws = None
        self.engine = engine
        self._engines = {mode: list(ENGINES) if engine == "auto" else [engine] for mode in (True, False)}
        self._layouts: dict[bool, Found] = {}
        self._compared: set[bool] = set()
        self._at: Perturbation | None = None
        self.names = {entry.name for entry in self.responses.entries}
        self.warned: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        """Say what to do where a loss function asks for something of the model's own.

        Raises:
            AttributeError: there is nothing of that name here.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or not hasattr(self.model, name):
                raise
            raise AttributeError(
                f"{name!r} is of the original model, and its weights respond where that is called as `model(x)` alone: "
                f"let `forward` do what `{name}` does, as by an argument. Where no weights are used, read it from the "
                f"original, `model.model.{name}`."
            ) from None

    # -- scales

    @property
    def scale(self) -> Tensor:
        """The perturbation scales ``σ = softplus(ρ)``, shape ``(H,)``."""
        return nn.functional.softplus(self._parameters["rho"])  # type: ignore[arg-type]

    @torch.no_grad()
    def keep_scale(self, low: float, high: float) -> None:
        """Put σ back between two bounds; the response stays what it is."""
        scale, rho, reference = self.scale, self.rho, self.reference
        kept = scale.clamp(low, high)
        if not torch.equal(kept, scale):
            # One within the bounds stays as it is: the way there and back would round it, a frozen one too.
            rho.copy_(torch.where(kept == scale, rho, inverse_softplus(kept)))
            scale = self.scale
        if self.standardize:
            # The same response, fed with perturbations in the new unit.
            ratio = scale / reference
            self.responses.rescale_(ratio)
            reference.mul_(ratio)

    # -- calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, at the perturbation of the present step, if one is open."""
        at = self._at
        if at is None:
            point = self.coordinates.leaf().detach().unsqueeze(0)
            z = point.to(self.responses.weight) if self.method == "stn" else None
            with torch.no_grad():
                changes = {} if z is None else self.responses.changes(z[0])
            return self._plain(changes, self.coordinates.values(point), args, kwargs, None)
        if at.z is None:
            return self._plain({}, at.values, args, kwargs, at)
        at.running = True
        try:
            output = self._responding(at, args, kwargs)
        finally:
            at.running = False
        return at.noted(output) if at.watched else output

    @contextmanager
    def perturbed(self, at: Perturbation) -> Iterator[Perturbation]:
        """Compute at a perturbation until the block ends."""
        if self._at is not None:
            raise ResponseError("a step is open already; steps of a tuner don't nest.")
        # Not by `__setattr__`, in which a module looks for parameters.
        self.__dict__["_at"] = at
        try:
            yield at
        finally:
            self.__dict__["_at"] = None

    @property
    def at(self) -> Perturbation:
        """The perturbation of the present step.

        Raises:
            ResponseError: if no step is open.
        """
        if self._at is None:
            raise ResponseError(
                "this is defined within a step of the tuner, where the loss is computed; call it there."
            )
        return self._at

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """The weights for the present hyperparameters, as an ordinary ``state_dict`` of the original model.

        Centred responses vanish at the present hyperparameters: the weights are w0. The uncentred one's are
        ``φ0 + Φ λ``. Nothing of the response remains; the model costs what it always did.
        """
        state = {name: value.detach().clone() for name, value in self.model.state_dict(keep_vars=True).items()}
        if self.method == "stn":
            changes = self.responses.changes(self.coordinates.leaf().detach().to(self.responses.weight))
            for entry in self.responses.entries:
                for alias in entry.aliases:
                    if alias in state:
                        state[alias] += changes[entry.name]
        return state

    # -- passes

    def _responding(self, at: Perturbation, args: Any, kwargs: Any) -> Any:
        assert at.z is not None
        examples = count(args, kwargs, self.batch_dim)
        if examples != at.z.shape[0]:
            raise ResponseError(
                f"the model is called with {examples} examples in a step whose batch has {at.z.shape[0]}: each example "
                "has its own perturbation, so call it on the batch (once for each view, where examples have several: "
                "`model(one), model(two)` and not `model(torch.cat([one, two]))`), with the examples along axis "
                f"{self.batch_dim} (`transform(..., batch_dim=...)` says which), and let the first tensor of a "
                "batch of data be one with its examples."
            )
        self._prepare(args, kwargs)
        self._look_for_mixing(args, kwargs)
        if self.fallback and at.z.shape[0] > 1 and (at.groups is None or (self.mixes and at.groups > 1)):
            raise NeedsGroups(*next(iter(self.fallback.items())))
        if not self.fallback or at.groups in (None, 1):
            return self._whole(at, at.z, at.values, args, kwargs)
        outputs: list[Any] = []
        self.shared = self.shared | shared(args, kwargs, self.batch_dim, examples)
        start = None if at.attributes is None else at.attributes.now()
        for part in torch.arange(at.z.shape[0], device=at.z.device).tensor_split(at.groups):
            if outputs and at.attributes is not None and start is not None:
                at.attributes.back(start)
            inputs = self._part(args, kwargs, part)
            values = {name: value[part] for name, value in at.values.items()}
            outputs.append(self._whole(at, at.z[part], values, *inputs))
        kinds = objects(outputs[0])
        if kinds:
            raise ResponseError(
                f"the model returns an object of type `{type(kinds[0]).__name__}`, which can't be put together from "
                "groups of examples; return its tensors, or set `groups=1` in `transform`."
            )
        return join(outputs, self.batch_dim)

    def _whole(self, at: Perturbation, z: Tensor, values: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        """One run of the model."""

        def run(point: Tensor, kind: type[Pass]) -> tuple[Any, Pass]:
            return self._run(point, kind, values, args, kwargs, response=at.response, at=at)

        if not at.linearised:
            return run(z, Pass)[0]
        if torch.is_grad_enabled():
            return self._linearised(run, z, values, args, kwargs, at)
        # Pseudo-labels and the like, which a loss computes under `no_grad`: a constant, of the perturbed weights.
        with torch.inference_mode(False), torch.enable_grad():
            output = self._linearised(run, z, values, args, kwargs, at)
        return mapped(lambda y: y.detach() if isinstance(y, Tensor) else y, output)

    def _linearised(
        self, run: Runner, z: Tensor, values: Mapping[str, Tensor], args: Any, kwargs: Any, at: Perturbation
    ) -> Any:
        """One run of the model, or several until one engine can do it."""
        engines = self._engines[self.model.training]
        if self.verify and self.model.training not in self._compared:
            self._compare(z, values, args, kwargs, engines)
            self._compared.add(self.model.training)
        while True:
            state, place = random_state(self.device, self.draws is not False), at.noise.place()
            try:
                return ENGINES[engines[0]](run, z)
            except Unsupported as reason:
                # Only a failed attempt takes its randomness back.
                set_random_state(self.device, state)
                at.noise.back(place)
                self._fall_back(engines, reason)
