"""Small strategies that compose: None draws, a value pins.

They draw the nasty values on purpose: momentum, decay, betas and gradients that are exactly 0, tiny and large eps, no
step and one step, no element and one element, tied, frozen and unused weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn

import metaopt

Hyper = dict[str, Tensor]
Context = Callable[[torch.optim.Optimizer], AbstractContextManager[Any]]
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (0,), (5,), (3, 4), (2, 1, 3))

seeds = st.integers(0, 2**16)


def randn(seed: int, *shape: int) -> Tensor:
    """Normal numbers that depend on the seed alone, on the default device."""
    values = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return values.to(torch.get_default_device())


# -- tensors -----------------------------------------------------------------------------------------------------------


@st.composite
def tensors(
    draw: DrawFn,
    shape: tuple[int, ...] | None = None,
    *,
    zeros: str | None = None,
    magnitude: float | None = None,
) -> Tensor:
    """A tensor; ``zeros`` says how many of its entries are exactly 0: ``"none"``, ``"some"`` or ``"all"``."""
    shape = draw(st.sampled_from(SHAPES)) if shape is None else shape
    zeros = draw(st.sampled_from(("none", "some", "all"))) if zeros is None else zeros
    magnitude = draw(st.sampled_from((1.0, 1e-3, 1e3))) if magnitude is None else magnitude
    seed = draw(seeds)
    value = randn(seed, *shape) * magnitude
    if zeros == "some":
        return torch.where(randn(seed + 1, *shape) > 0, value, 0.0)
    return torch.zeros_like(value) if zeros == "all" else value


# -- optimizers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """An optimizer by its name, its continuous settings by their rule's names, and its flags."""

    name: str
    numbers: Mapping[str, float]
    flags: Mapping[str, bool] = field(default_factory=dict)

    def arguments(self, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The constructor's arguments; ``values`` takes the place of some numbers."""
        merged = {**self.numbers, **(values or {})}
        if "beta1" in merged:
            merged["betas"] = (merged.pop("beta1"), merged.pop("beta2"))
        return {**merged, **self.flags}

    def but(self, **changed: float | bool) -> Settings:
        """The same with some numbers or flags changed."""
        numbers = {name: changed.get(name, number) for name, number in self.numbers.items()}
        return replace(
            self, numbers=numbers, flags={name: bool(changed.get(name, v)) for name, v in self.flags.items()}
        )


def numbers(*nasty: float, low: float, high: float) -> SearchStrategy[float]:
    """Some values on purpose, or any of a grid between two bounds."""
    return st.sampled_from(nasty) | st.integers(1, 31).map(lambda k: low + (high - low) * k / 32)


_ADAM = {
    "lr": numbers(0.1, 0.0, low=0.0, high=0.3),
    "beta1": numbers(0.9, 0.0, 0.5, low=0.0, high=1.0),
    "beta2": numbers(0.999, 0.0, 0.5, low=0.0, high=1.0),
    "eps": numbers(1e-8, 1e-3, 1.0, low=0.0, high=0.5),
    "weight_decay": numbers(0.0, 1e-2, low=0.0, high=0.5),
}
NUMBERS: dict[str, dict[str, SearchStrategy[float]]] = {
    "SGD": {
        "lr": numbers(0.1, 0.0, 1.0, low=0.0, high=0.5),
        "momentum": numbers(0.9, 0.0, low=0.0, high=1.0),
        "dampening": numbers(0.0, 0.5, low=-0.5, high=1.0),
        "weight_decay": numbers(0.0, 1e-2, low=0.0, high=0.5),
    },
    "Adam": _ADAM,
    "AdamW": _ADAM,
}
ADAM_DECOUPLES = "decoupled_weight_decay" in torch.optim.Adam([torch.zeros(1)]).defaults  # not before torch 2.7
FLAGS = {
    "SGD": ("nesterov", "maximize"),
    "Adam": ("amsgrad", "maximize", *(["decoupled_weight_decay"] if ADAM_DECOUPLES else [])),
    "AdamW": ("amsgrad", "maximize"),
}


@st.composite
def settings(draw: DrawFn, /, name: str | None = None, **pinned: float | bool) -> Settings:
    """The settings of an optimizer."""
    name = draw(st.sampled_from(sorted(NUMBERS))) if name is None else name
    chosen = {key: float(pinned[key]) if key in pinned else draw(strategy) for key, strategy in NUMBERS[name].items()}
    flags = {flag: bool(pinned[flag]) if flag in pinned else draw(st.booleans()) for flag in FLAGS[name]}
    if name == "SGD":
        if flags["nesterov"]:  # torch asks for these two
            chosen["dampening"] = 0.0
            flags["nesterov"] = chosen["momentum"] > 0
        if chosen["momentum"] == 0:  # discontinuous there with dampening
            chosen["dampening"] = 0.0
    return Settings(name, chosen, flags)


# -- networks ----------------------------------------------------------------------------------------------------------

FEATURES, TARGETS, EXAMPLES = 3, 2, 6


class Net(nn.Module):
    """A small smooth network; called with the number of the step, since some of its parts may rest."""

    def forward(self, x: Tensor, t: int) -> Tensor:
        raise NotImplementedError


class Scalar(Net):
    """One weight of one element, without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, t: int) -> Tensor:
        return torch.sin(self.weight * x[:, :TARGETS])


class Layers(Net):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 4)
        self.last = nn.Linear(4, TARGETS)

    def forward(self, x: Tensor, t: int) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Tied(Net):
    """One matrix in two layers, and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.last = nn.Linear(FEATURES, TARGETS)

    def forward(self, x: Tensor, t: int) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))))


class Frozen(Layers):
    """A frozen bias, and a weight that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))


class Alternating(Layers):
    """A layer that takes part in every other step only."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor, t: int) -> Tensor:
        first = self.other if t % 2 else self.first
        return self.last(torch.tanh(first(x)))


class BatchNorm(nn.Module):
    """Batch norm in torch's plain operations, so that autograd sees its running statistics."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            m, mean = self.momentum, x.mean(0)
            var = ((x - mean) ** 2).mean(0)
            self.running_mean = (1 - m) * self.running_mean + m * mean
            self.running_var = (1 - m) * self.running_var + m * var * len(x) / (len(x) - 1)
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


class Normalised(Net):
    """Batch norm and dropout: buffers and random numbers. ``plain`` builds the batch norm that an oracle can follow."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 4, bias=False)  # its gradient would be 0 up to rounding
        self.norm = BatchNorm(4, 0.4) if plain else nn.BatchNorm1d(4, momentum=0.4)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(4, TARGETS)

    def forward(self, x: Tensor, t: int) -> Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


NETWORKS: dict[str, type[Net]] = {
    "layers": Layers,
    "scalar": Scalar,
    "tied": Tied,
    "frozen": Frozen,
    "alternating": Alternating,
    "normalised": Normalised,
}
networks = st.sampled_from(list(NETWORKS))


# -- loops -------------------------------------------------------------------------------------------------------------


S = torch.optim.lr_scheduler


def one_cycle(optimizer: torch.optim.Optimizer) -> S.OneCycleLR:
    """A cycle of lr, and of the momentum or the first beta, in multiples of the groups' own numbers."""
    groups = optimizer.param_groups
    momenta = [group["momentum"] if "momentum" in group else group.get("betas", (None,))[0] for group in groups]
    cycled = None not in momenta
    options: dict[str, Any] = {"base_momentum": [0.6 * m for m in momenta], "max_momentum": momenta} if cycled else {}
    return S.OneCycleLR(
        optimizer, [3 * group["lr"] for group in groups], total_steps=8, cycle_momentum=cycled, **options
    )


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], S.LRScheduler]] = {
    "step": lambda o: S.StepLR(o, 2, 0.5),
    "multi_step": lambda o: S.MultiStepLR(o, [1, 3], 0.5),
    "exponential": lambda o: S.ExponentialLR(o, 0.8),
    "cosine": lambda o: S.CosineAnnealingLR(o, 8),
    "restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "lambda": lambda o: S.LambdaLR(o, lambda t: 1 / (1 + t)),
    "linear": lambda o: S.LinearLR(o, 0.25, 1.0, 4),
    "polynomial": lambda o: S.PolynomialLR(o, 8),
    "sequential": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.25, 1.0, 2), S.ExponentialLR(o, 0.8)], [2]),
    "chained": lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.5, 2), S.ExponentialLR(o, 0.8)]),
    "one_cycle": lambda o: one_cycle(o),
}


@dataclass
class Training:
    """A model, its optimizer and its scheduler, before or after the loop."""

    model: Net
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None

    @property
    def trained(self) -> list[nn.Parameter]:
        """The weights that gradients are taken at."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]


@dataclass(frozen=True)
class Loop:
    """A training loop, as data: what `train` does here, an oracle can do in another way.

    Attributes:
        network: a key of `NETWORKS`.
        settings: the optimizer.
        hyper: which of its settings are hyperparameters, and how: ``"scalar"``, ``"group"`` (the second group has its
            own) or ``"schedule"`` (a vector with one entry per step); and which of ``"examples"``, ``"penalty"``,
            ``"scale"`` (of the initial weights) there are.
        steps: how many optimizer steps.
        batches: how many backward passes are accumulated in each.
        zero: what is done to the gradients before: ``"none"``, ``"zeros"`` or ``"never"``.
        groups: how many parameter groups, 1 or 2.
        scheduler: a key of `SCHEDULERS`, or ``""``.
        loaded: whether weights have gradients and the optimizer has a state before the loop begins.
        silent: whether the weights of all examples are 0, so that gradients are exactly 0.
        seed: of weights, data and dropout.
    """

    network: str
    settings: Settings
    hyper: Mapping[str, str]
    steps: int
    batches: int = 1
    zero: str = "none"
    groups: int = 1
    scheduler: str = ""
    loaded: bool = False
    silent: bool = False
    seed: int = 0

    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs and targets, for training and for validation."""
        x, y = randn(self.seed + 1, EXAMPLES, FEATURES), randn(self.seed + 2, EXAMPLES, TARGETS)
        return x, y, randn(self.seed + 3, EXAMPLES, FEATURES), randn(self.seed + 4, EXAMPLES, TARGETS)

    def leaves(self) -> Hyper:
        """The hyperparameters, as fresh leaves by name; the second group's are called ``name.1``."""
        values: Hyper = {}
        for name, kind in self.hyper.items():
            if name == "examples":
                values[name] = self.examples()
            elif name in ("penalty", "scale"):
                values[name] = torch.tensor({"penalty": 0.05, "scale": 0.8}[name])
            else:
                number = torch.tensor(self.settings.numbers[name])
                values[name] = number * (1 - 0.1 * torch.arange(max(self.steps, 2))) if kind == "schedule" else number
                if kind == "group":
                    values[f"{name}.1"] = 0.5 * number
        return {name: value.clone().requires_grad_() for name, value in values.items()}

    def examples(self) -> Tensor:
        """A weight for each example; one is exactly 0."""
        weights = randn(self.seed + 5, EXAMPLES).abs()
        weights[0] = 0.0
        return weights * (not self.silent)

    def model(self, **options: Any) -> Net:
        """The network, with the initial weights that the seed gives."""
        model = NETWORKS[self.network](**options).to(torch.get_default_device())
        with torch.no_grad():
            for place, weight in enumerate(model.parameters()):
                weight.copy_(0.7 * randn(self.seed + 10 + place, *weight.shape))
        return model

    def split(self, weights: list[Any]) -> list[list[Any]]:
        """The weights by group."""
        return [weights] if self.groups == 1 else [weights[: len(weights) // 2], weights[len(weights) // 2 :]]

    def state(self, place: int, weight: Tensor) -> dict[str, Tensor]:
        """The optimizer's state for a weight before the loop begins, if it is loaded."""
        first = randn(self.seed + 50 + place, *weight.shape)
        second = 0.1 + randn(self.seed + 70 + place, *weight.shape) ** 2
        if self.settings.name == "SGD":
            return {"momentum_buffer": first} if self.settings.numbers["momentum"] else {}
        state = {"exp_avg": first, "exp_avg_sq": second}
        return {**state, "max_exp_avg_sq": second + 0.1} if self.settings.flags["amsgrad"] else state

    def grad(self, place: int, weight: Tensor) -> Tensor:
        """A weight's gradient before the loop begins, if it is loaded."""
        return randn(self.seed + 90 + place, *weight.shape)

    def build(self, hyper: Hyper, library: Any = metaopt.optim) -> Training:
        """The model and the optimizer, with the hyperparameters in it."""
        model = self.model()
        linked = {name: hyper[name] for name in self.settings.numbers if name in hyper}
        own = {**linked, **{name[:-2]: hyper[name] for name in hyper if name.endswith(".1")}}
        groups: list[dict[str, Any]] = [{"params": weights} for weights in self.split(list(model.parameters()))]
        if self.groups == 2:
            arguments = self.settings.arguments(own)
            groups[1] |= {key: arguments[key] for key in arguments if key not in self.settings.flags}
        optimizer = getattr(library, self.settings.name)(groups, **self.settings.arguments(linked))
        scheduler = SCHEDULERS[self.scheduler](optimizer) if self.scheduler else None
        if self.loaded:
            for place, weight in enumerate(model.parameters()):
                state = self.state(place, weight)
                if weight.requires_grad:
                    weight.grad = self.grad(place, weight)
                    step = {} if self.settings.name == "SGD" else {"step": torch.tensor(3.0, device="cpu")}
                    if state:
                        optimizer.state[weight] = {**step, **state}
        return Training(model, optimizer, scheduler)

    def loss(
        self, hyper: Mapping[str, Tensor], out: Tensor, y: Tensor, part: slice, weights: Iterator[Tensor]
    ) -> Tensor:
        """The inner objective on one batch."""
        examples = hyper["examples"] if "examples" in hyper else self.examples()
        loss = (examples[part] * F.mse_loss(out, y[part], reduction="none").mean(1)).sum() / EXAMPLES
        if "penalty" in hyper:
            loss = loss + hyper["penalty"] * sum((weight**2).sum() for weight in weights)
        return loss

    def run(self, training: Training, hyper: Hyper, *, start: int = 0, stop: int | None = None) -> None:
        """The loop itself, as one would write it."""
        x, y, _, _ = self.data()
        model, optimizer, scheduler = training.model, training.optimizer, training.scheduler
        model.train()
        if "scale" in hyper and start == 0:
            with torch.no_grad():
                next(model.parameters()).mul_(hyper["scale"])
        for t in range(start, self.steps if stop is None else stop):
            if self.zero != "never":
                optimizer.zero_grad(set_to_none=self.zero == "none")
            for batch in range(self.batches):
                part = slice(batch, None, self.batches)
                self.loss(hyper, model(x[part], t), y, part, iter(training.trained)).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()

    def outer(self, model: Net, *, second: bool = False) -> Tensor:
        """An outer objective of the trained model, and another one."""
        _, _, x, y = self.data()
        model.eval()
        return F.l1_loss(model(x, 0), 4 + y) if second else F.mse_loss(model(x, 0), y)

    def train(self, hyper: Hyper, context: Context | None = None, library: Any = metaopt.optim) -> Training:
        """Build and run, in a context (None: bare)."""
        training = self.build(hyper, library)
        torch.manual_seed(self.seed)
        with nullcontext() if context is None else context(training.optimizer):
            self.run(training, hyper)
        return training


@st.composite
def loops(
    draw: DrawFn,
    network: str | None = None,
    settings_: Settings | None = None,
    *,
    hyper: Mapping[str, str] | None = None,
    steps: int | None = None,
    scheduler: str | None = None,
    loaded: bool | None = None,
    silent: bool | None = None,
) -> Loop:
    """A training loop."""
    chosen = draw(settings()) if settings_ is None else settings_
    groups = draw(st.sampled_from((1, 2)))
    scheduler = draw(st.just("") | st.sampled_from(list(SCHEDULERS))) if scheduler is None else scheduler
    if scheduler:  # a factor on 0 can't be seen: an error of its own
        chosen = chosen.but(lr=chosen.numbers["lr"] or 0.1)
    if scheduler == "one_cycle":  # which sets these two as well
        chosen = chosen.but(
            **{name: chosen.numbers[name] or 0.5 for name in ("momentum", "beta1") if name in chosen.numbers}
        )
    return Loop(
        network=draw(networks) if network is None else network,
        settings=chosen,
        hyper=draw(hyperparameters(chosen, groups)) if hyper is None else hyper,
        steps=draw(st.integers(0, 5)) if steps is None else steps,
        batches=draw(st.sampled_from((1, 2))),
        zero=draw(st.sampled_from(("none", "zeros", "never"))),
        groups=groups,
        scheduler=scheduler,
        loaded=draw(st.booleans()) if loaded is None else loaded,
        silent=draw(st.sampled_from((False, False, False, True))) if silent is None else silent,
        seed=draw(seeds),
    )


@st.composite
def hyperparameters(draw: DrawFn, chosen: Settings, groups: int = 1) -> dict[str, str]:
    """Which hyperparameters a loop has, and of which kind; at least one."""
    kinds = ("", "scalar", "schedule") + (("group",) if groups == 2 else ())
    found = {name: draw(st.sampled_from(kinds)) for name in chosen.numbers}
    found |= {name: draw(st.sampled_from(("", "own"))) for name in ("examples", "penalty", "scale")}
    found = {name: kind for name, kind in found.items() if kind}
    return found or {"lr": "scalar"}
