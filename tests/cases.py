"""Training loops of the kind that users have: each is written as one would write it, and knows nothing of metaopt.

A case is called with its hyperparameters and a ``context``, a function from the optimizer to a context manager; it
trains inside the context and returns the outer objective.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt

Hyper = dict[str, Tensor]
Context = Callable[[torch.optim.Optimizer], AbstractContextManager[Any]]


@dataclass
class Trained:
    """What a case leaves: its outer objective, its model and its optimizer."""

    outer: Any
    model: nn.Module
    optimizer: torch.optim.Optimizer
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Case:
    """A loop and the values of its hyperparameters."""

    name: str
    train: Callable[[Hyper, Context], Trained]
    values: Callable[[], Hyper]

    def hyper(self, **shift: Any) -> Hyper:
        """The hyperparameters, as fresh leaves."""
        return {name: value.clone().requires_grad_() for name, value in self.values().items()}

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = []


def case(**values: Any) -> Callable[[Callable[[Hyper, Context], Trained]], Callable[[Hyper, Context], Trained]]:
    """Enter a loop in the table."""

    def enter(train: Callable[[Hyper, Context], Trained]) -> Callable[[Hyper, Context], Trained]:
        def make() -> Hyper:
            torch.manual_seed(1)
            return {k: v() if callable(v) else torch.tensor(float(v)) for k, v in values.items()}

        CASES.append(Case(train.__name__, train, make))
        return train

    return enter


def data(n: int = 12, features: int = 5, classes: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and labels, for training and for validation."""
    torch.manual_seed(2)
    return (
        torch.randn(n, features),
        torch.randint(0, classes, (n,)),
        torch.randn(7, features),
        torch.randint(0, classes, (7,)),
    )


def mlp(*sizes: int) -> nn.Sequential:
    """A small smooth network."""
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def weights(n: int) -> Callable[[], Tensor]:
    """One weight per example."""

    def make() -> Tensor:
        torch.manual_seed(1)
        return 0.5 + 0.5 * torch.rand(n)

    return make


def weighted(hyper: Hyper, i: Any, logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with a weight for each example."""
    return (hyper["weights"][i] * F.cross_entropy(logits, y, reduction="none")).mean()


def simple(
    model: nn.Module,
    make: Callable[[Any], torch.optim.Optimizer],
    hyper: Hyper,
    context: Context,
    steps: int = 4,
    **more: Any,
) -> Trained:
    """The plain loop: zero_grad, loss, backward, step."""
    x, y, x_val, y_val = data()
    optimizer = make(model.parameters())
    between = more.get("between", lambda: None)
    after = more.get("after", lambda: None)
    penalty = more.get("penalty", lambda: 0.0)
    torch.manual_seed(4)
    with context(optimizer):
        for t in range(steps):
            i = slice(4 * (t % 3), 4 * (t % 3) + 4)
            optimizer.zero_grad(set_to_none=more.get("set_to_none", True))
            loss = weighted(hyper, i, model(x[i]), y[i]) + penalty()
            loss.backward()
            between()
            optimizer.step()
            after()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


def sgd(hyper: Hyper, **more: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """SGD on whatever settings are among the hyperparameters."""
    settings = {k: v for k, v in hyper.items() if k in ("lr", "momentum", "weight_decay", "dampening")}
    return lambda parameters: metaopt.optim.SGD(parameters, **{"lr": 0.3, **settings, **more})


# -- the loop and the optimizer --------------------------------------------------------------------------------------


@case(lr=0.3, momentum=0.8, weight_decay=0.01, weights=weights(12))
def sgd_momentum(hyper: Hyper, context: Context) -> Trained:
    return simple(mlp(5, 6, 3), sgd(hyper), hyper, context)


@case(lr=0.3, momentum=0.8, weight_decay=0.01, weights=weights(12))
def nesterov(hyper: Hyper, context: Context) -> Trained:
    return simple(mlp(5, 6, 3), sgd(hyper, nesterov=True), hyper, context)


@case(lr=0.3, momentum=0.8, dampening=0.2, weights=weights(12))
def dampening(hyper: Hyper, context: Context) -> Trained:
    return simple(mlp(5, 6, 3), sgd(hyper), hyper, context)


@case(lr=0.3, momentum=0.0, weights=weights(12))
def momentum_zero(hyper: Hyper, context: Context) -> Trained:
    return simple(mlp(5, 6, 3), sgd(hyper), hyper, context)


@case(lr=0.3, weights=weights(12))
def one_step(hyper: Hyper, context: Context) -> Trained:
    return simple(mlp(5, 6, 3), sgd(hyper), hyper, context, steps=1)


@case(weights=weights(12))
def plain_torch_sgd(hyper: Hyper, context: Context) -> Trained:
    make = lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, maximize=False)  # noqa: E731
    return simple(mlp(5, 6, 3), make, hyper, context)


def adam_settings(hyper: Hyper) -> dict[str, Any]:
    """Adam's settings, from the hyperparameters."""
    return {
        "lr": hyper["lr"],
        "betas": (hyper["beta1"], hyper["beta2"]),
        "eps": hyper["eps"],
        "weight_decay": hyper["weight_decay"],
    }


ADAM = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 0.01, "weight_decay": 0.02}


@case(**ADAM, weights=weights(12))
def adam(hyper: Hyper, context: Context) -> Trained:
    return simple(mlp(5, 6, 3), lambda p: metaopt.optim.Adam(p, **adam_settings(hyper)), hyper, context)


@case(**ADAM, weights=weights(12))
def adamw(hyper: Hyper, context: Context) -> Trained:
    return simple(mlp(5, 6, 3), lambda p: metaopt.optim.AdamW(p, **adam_settings(hyper)), hyper, context)


@case(**ADAM, weights=weights(12))
def amsgrad(hyper: Hyper, context: Context) -> Trained:
    make = lambda p: metaopt.optim.Adam(p, **adam_settings(hyper), amsgrad=True)  # noqa: E731
    return simple(mlp(5, 6, 3), make, hyper, context, steps=2)


@case(**ADAM, weights=weights(12))
def maximize(hyper: Hyper, context: Context) -> Trained:
    make = lambda p: metaopt.optim.AdamW(p, **adam_settings(hyper), maximize=True)  # noqa: E731
    return simple(mlp(5, 6, 3), make, hyper, context, steps=2)


@case(lr=0.3, head=0.1, momentum=0.7, weights=weights(12))
def parameter_groups(hyper: Hyper, context: Context) -> Trained:
    model = mlp(5, 6, 3)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": hyper["head"]}]
    make = lambda _: metaopt.optim.SGD(groups, lr=hyper["lr"], momentum=hyper["momentum"])  # noqa: E731
    return simple(model, make, hyper, context)


@case(lr=lambda: torch.tensor([0.3, 0.2, 0.1, 0.05]), momentum=0.9, weights=weights(12))
def learned_schedule(hyper: Hyper, context: Context) -> Trained:
    return simple(mlp(5, 6, 3), sgd(hyper), hyper, context)


@case(lr=0.3, weights=weights(12))
def two_models(hyper: Hyper, context: Context) -> Trained:
    first, second = mlp(5, 4), mlp(4, 3)
    model = nn.Sequential(first, nn.Tanh(), second)
    make = lambda _: metaopt.optim.SGD([*first.parameters(), *second.parameters()], lr=hyper["lr"])  # noqa: E731
    return simple(model, make, hyper, context)


@case(lr=0.3, momentum=0.8, weights=weights(12))
def accumulation(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            for i in (slice(0, 5), slice(5, 9), slice(9, 12)):
                (weighted(hyper, i, model(x[i]), y[i]) / 3).backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.1, weights=weights(12))
def never_zeroed(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for t in range(3):
            weighted(hyper, slice(4 * t, 4 * t + 4), model(x[4 * t : 4 * t + 4]), y[4 * t : 4 * t + 4]).backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.1, weights=weights(12))
def a_gradient_used_much_later(hyper: Hyper, context: Context) -> Trained:
    """Two networks, of which one gets a gradient in the first iteration and steps in the sixth."""
    x, y, x_val, y_val = data()
    model, late = mlp(5, 6, 3), mlp(5, 3)
    optimizers = [sgd(hyper)(late.parameters()), sgd(hyper)(model.parameters())]
    with context(optimizers):  # type: ignore[arg-type]
        for t in range(6):
            optimizers[1].zero_grad()
            weighted(hyper, slice(None), model(x) + late(x) if t == 0 else model(x), y).backward()
            if t == 5:
                optimizers[0].step()
            optimizers[1].step()
    return Trained(F.cross_entropy(model(x_val) + late(x_val), y_val), model, optimizers[1])


@case(lr=0.3, momentum=0.8, weights=weights(12))
def zeroed_in_place(hyper: Hyper, context: Context) -> Trained:
    return simple(mlp(5, 6, 3), sgd(hyper), hyper, context, set_to_none=False)


@case(lr=0.5, weights=weights(12))
def clip_by_norm(hyper: Hyper, context: Context) -> Trained:
    model = mlp(5, 6, 3)
    clip = lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.3)  # noqa: E731
    return simple(model, sgd(hyper, momentum=0.9), hyper, context, between=clip)


@case(lr=0.5, clip=0.3, weights=weights(12))
def clip_to_a_learned_norm(hyper: Hyper, context: Context) -> Trained:
    model = mlp(5, 6, 3)

    def clip() -> None:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        for p in model.parameters():
            p.grad.mul_((hyper["clip"] / norm).clamp(max=1.0).detach())

    return simple(model, sgd(hyper, momentum=0.9), hyper, context, between=clip)


@case(lr=0.5, weights=weights(12))
def clip_by_value(hyper: Hyper, context: Context) -> Trained:
    model = mlp(5, 6, 3)
    return simple(
        model, sgd(hyper), hyper, context, between=lambda: nn.utils.clip_grad_value_(model.parameters(), 0.05)
    )


@case(lr=0.3, decay=0.05, weights=weights(12))
def gradient_edited_by_hand(hyper: Hyper, context: Context) -> Trained:
    model = mlp(5, 6, 3)

    def edit() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.grad += hyper["decay"] * p
        model[0].weight.grad = model[0].weight.grad * 0.5

    return simple(model, sgd(hyper), hyper, context, between=edit)


@case(lr=0.3, penalty=0.05, weights=weights(12))
def penalty(hyper: Hyper, context: Context) -> Trained:
    model = mlp(5, 6, 3)
    extra = lambda: hyper["penalty"] * sum((p**2).sum() for p in model.parameters())  # noqa: E731
    return simple(model, sgd(hyper), hyper, context, penalty=extra)


@case(lr=0.2, momentum=0.5, weights=weights(12))
def closure(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for t in range(3):
            i = slice(4 * t, 4 * t + 4)

            def evaluate(i: slice = i) -> Tensor:
                optimizer.zero_grad()
                loss = weighted(hyper, i, model(x[i]), y[i])
                loss.backward()
                return loss

            optimizer.step(evaluate)
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


def scheduled(make_scheduler: Callable[[torch.optim.Optimizer], Any]) -> Callable[[Hyper, Context], Trained]:
    def train(hyper: Hyper, context: Context) -> Trained:
        x, y, x_val, y_val = data()
        model = mlp(5, 6, 3)
        optimizer = sgd(hyper)(model.parameters())
        scheduler = make_scheduler(optimizer)
        with context(optimizer):
            for t in range(6):
                i = slice(4 * (t % 3), 4 * (t % 3) + 4)
                optimizer.zero_grad()
                weighted(hyper, i, model(x[i]), y[i]).backward()
                optimizer.step()
                scheduler.step()
        return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)

    return train


S = torch.optim.lr_scheduler
for _name, _make in {
    "step_lr": lambda o: S.StepLR(o, 2, 0.5),
    "cosine_lr": lambda o: S.CosineAnnealingLR(o, 6),
    "lambda_lr": lambda o: S.LambdaLR(o, lambda t: 1 / (1 + t)),
    "one_cycle": lambda o: S.OneCycleLR(o, max_lr=2 * o.param_groups[0]["lr"], total_steps=7, cycle_momentum=False),
    "warm_up": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.2, 1.0, 2), S.ExponentialLR(o, 0.8)], [2]),
}.items():
    CASES.append(
        Case(
            _name,
            scheduled(_make),
            lambda: {"lr": torch.tensor(0.3), "momentum": torch.tensor(0.5), "weights": weights(12)()},
        )
    )


# -- models ----------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """Train-mode batch norm used twice, dropout of several kinds, a shared convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop2d = nn.Dropout2d(0.3)
        self.drop = nn.Dropout(0.2)
        self.alpha = nn.AlphaDropout(0.1)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.norm(self.first(x)))
        x = self.drop2d(F.softplus(self.norm(self.shared(x))))
        x = self.alpha(self.drop(self.shared(x)))
        return self.out(F.avg_pool2d(x, 6).flatten(1))


@case(lr=0.2, momentum=0.8, weights=weights(12))
def convolution(hyper: Hyper, context: Context) -> Trained:
    torch.manual_seed(2)
    x, y = torch.randn(12, 1, 6, 6), torch.randint(0, 3, (12,))
    model = Conv()
    optimizer = sgd(hyper, nesterov=True)(model.parameters())
    torch.manual_seed(5)
    with context(optimizer):
        for t in range(3):
            i = slice(4 * t, 4 * t + 4)
            optimizer.zero_grad()
            weighted(hyper, i, model(x[i]), y[i]).backward()
            optimizer.step()
    model.eval()  # the outer objective reads the running statistics
    return Trained(F.cross_entropy(model(x), y), model, optimizer)


def sequence_case(make: Callable[[], nn.Module]) -> Callable[[Hyper, Context], Trained]:
    def train(hyper: Hyper, context: Context) -> Trained:
        torch.manual_seed(2)
        x, y = torch.randint(0, 11, (12, 5)), torch.randint(0, 11, (12, 5))
        torch.manual_seed(3)
        model = make()
        optimizer = metaopt.optim.Adam(model.parameters(), lr=hyper["lr"], eps=hyper["eps"])
        torch.manual_seed(5)
        with context(optimizer):
            for t in range(3):
                i = slice(4 * t, 4 * t + 4)
                optimizer.zero_grad()
                losses = F.cross_entropy(model(x[i]).transpose(1, 2), y[i], reduction="none").mean(1)
                (hyper["weights"][i] * losses).mean().backward()
                optimizer.step()
        model.eval()
        return Trained(F.cross_entropy(model(x).transpose(1, 2), y), model, optimizer)

    return train


class Tied(nn.Module):
    """A transformer encoder with tied embedding and decoder, layer norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.Linear(8, 11)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(self.embedding(x)))


class Recurrent(nn.Module):
    """A two-layer LSTM, a GRU, dropout between, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, dropout=0.2, batch_first=True)
        self.gru = nn.GRU(5, 4, batch_first=True)
        self.out = nn.Linear(4, 11)
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(x))
        x, _ = self.gru(x)
        return self.out(x)


class Attention(nn.Module):
    """Multi-head attention on its own, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        a, _ = self.attention(h, h, h, need_weights=False)
        return self.out(self.norm(h + a))


for _name, _module in {"transformer": Tied, "recurrent": Recurrent, "attention": Attention}.items():
    CASES.append(
        Case(
            _name,
            sequence_case(_module),
            lambda: {"lr": torch.tensor(0.02), "eps": torch.tensor(0.05), "weights": weights(12)()},
        )
    )


@case(lr=0.3, weight_decay=0.1, weights=weights(12))
def padding(hyper: Hyper, context: Context) -> Trained:
    torch.manual_seed(3)
    words, out = nn.Embedding(9, 4, padding_idx=-9), nn.Linear(4, 3)
    nn.init.constant_(words.weight[0], 0.5)  # no gradient moves it, and the decay does
    model = nn.ModuleList([words, out])
    x, y = torch.randint(0, 9, (12, 5)), torch.randint(0, 3, (12,))
    optimizer = sgd(hyper, momentum=0.5)(model.parameters())
    predict = lambda: out(words(x).tanh().mean(1))  # noqa: E731
    with context(optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            weighted(hyper, slice(None), predict(), y).backward()
            optimizer.step()
    return Trained(lambda: F.cross_entropy(predict(), y), model, optimizer)


@case(lr=0.3, weights=weights(12))
def bags(hyper: Hyper, context: Context) -> Trained:
    torch.manual_seed(3)
    words, out = nn.Parameter(torch.randn(9, 4)), nn.Linear(4, 3)
    model = nn.ParameterList([words, *out.parameters()])
    x, y, offsets = torch.randint(0, 9, (40,)), torch.randint(0, 3, (12,)), torch.arange(0, 36, 3)
    optimizer = sgd(hyper, momentum=0.5)(model.parameters())
    predict = lambda: out(F.embedding_bag(x, words, offsets, None, 2.0, False, "sum").tanh())  # noqa: E731
    with context(optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            weighted(hyper, slice(None), predict(), y).backward()
            optimizer.step()
    return Trained(lambda: F.cross_entropy(predict(), y), model, optimizer)


@case(lr=0.3, weights=weights(12))
def transcripts(hyper: Hyper, context: Context) -> Trained:
    torch.manual_seed(3)
    model = mlp(5, 6, 4)
    x, y = torch.randn(6, 12, 5), torch.randint(1, 4, (12, 2))
    times, counts = torch.randint(3, 7, (12,)), torch.randint(0, 3, (12,))
    optimizer = sgd(hyper, momentum=0.5)(model.parameters())
    losses = lambda: F.ctc_loss(model(x).log_softmax(2), y, times, counts, reduction="none")  # noqa: E731
    with context(optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            (hyper["weights"] * losses()).mean().backward()
            optimizer.step()
    return Trained(lambda: losses().mean(), model, optimizer)


@case(lr=0.3, weights=weights(12))
def frozen(hyper: Hyper, context: Context) -> Trained:
    model = mlp(5, 6, 6, 3)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return simple(model, sgd(hyper, weight_decay=0.1), hyper, context)


@case(lr=0.1, late=0.05, weights=weights(12))
def layers_added_as_it_goes(hyper: Hyper, context: Context) -> Trained:
    """Some were frozen until then, one received gradients that nobody used, and one is made in the loop."""
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 6, 3)
    model[0].requires_grad_(False)
    optimizer = sgd(hyper, momentum=0.5)(model[4].parameters())
    layers: list[nn.Module] = list(model)

    def predict(x: Tensor) -> Tensor:
        features = model[:4](x)
        return torch.stack([head(features) for head in layers[4:]]).sum(0)

    with context(optimizer):
        for t in range(6):
            if t == 2:
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": model[0].parameters(), "lr": hyper["late"], "weight_decay": 0.1})
            elif t == 4:
                head = copy.deepcopy(model[4])
                head.weight.data *= 0.5
                optimizer.add_param_group({"params": head.parameters()})
                layers = [*model, head]
            optimizer.zero_grad()
            weighted(hyper, slice(None), predict(x), y).backward()
            optimizer.step()
    return Trained(F.cross_entropy(predict(x_val), y_val), model, optimizer)


@case(lr=0.1, weights=weights(12))
def a_layer_made_of_a_product_of_others(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model, layers = mlp(5, 6, 3), nn.ParameterList()
    optimizer = sgd(hyper, momentum=0.5)(model.parameters())

    def predict(x: Tensor) -> Tensor:
        return model(x) + sum(F.linear(x, layer) for layer in layers)

    with context(optimizer):
        for t in range(5):
            if t == 3:
                layers.append(nn.Parameter((model[2].weight @ model[0].weight).detach()))
                optimizer.add_param_group({"params": list(layers)})
            optimizer.zero_grad()
            weighted(hyper, slice(None), predict(x), y).backward()
            optimizer.step()
    return Trained(F.cross_entropy(predict(x_val), y_val), model, optimizer)


@case(lr=0.3, weights=weights(12))
def used_twice(hyper: Hyper, context: Context) -> Trained:
    torch.manual_seed(3)
    block = nn.Linear(5, 5)
    model = nn.Sequential(block, nn.Tanh(), block, nn.Tanh(), nn.Linear(5, 3))
    return simple(model, sgd(hyper, momentum=0.5), hyper, context)


@case(lr=0.1, weights=weights(12))
def weight_norm_and_in_place(hyper: Hyper, context: Context) -> Trained:
    torch.manual_seed(3)
    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
    model = nn.Sequential(first, nn.ELU(inplace=True), nn.Linear(6, 3))
    return simple(model, sgd(hyper), hyper, context)


@case(lr=0.1, weights=weights(12))
def spectral_norm(hyper: Hyper, context: Context) -> Trained:
    torch.manual_seed(3)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6))
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(6, 3))
    x, y, x_val, y_val = data()
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            weighted(hyper, slice(None), model(x), y).backward()
            optimizer.step()
    model.eval()
    return Trained(lambda: F.cross_entropy(model(x_val), y_val), model, optimizer)


# -- what stops a gradient, and what does not ------------------------------------------------------------------------


@case(lr=0.3, momentum=0.5, temperature=2.0, weights=weights(12))
def pseudo_labels(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for t in range(4):
            i = slice(4 * (t % 3), 4 * (t % 3) + 4)
            with torch.no_grad():
                target = (hyper["temperature"] * model(x_val)).softmax(-1)
            optimizer.zero_grad()
            loss = weighted(hyper, i, model(x[i]), y[i]) - (target * model(x_val).log_softmax(-1)).sum(-1).mean()
            loss.backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.1, weights=weights(12))
def inference_mode(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for _ in range(3):
            with torch.inference_mode():
                target = model(x_val).softmax(-1)
            target = target.clone()
            optimizer.zero_grad()
            loss = weighted(hyper, slice(None), model(x), y) - (target * model(x_val).log_softmax(-1)).sum(-1).mean()
            loss.backward()
            optimizer.step()
            with torch.inference_mode():
                model(x_val).argmax(-1).eq(y_val).float().mean()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, weights=weights(12))
def detached_norm(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            logits = model(x)
            logits = logits / logits.detach().norm(dim=1, keepdim=True)
            (weighted(hyper, slice(None), logits, y) * (1 + logits.data.mean())).backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, decay=0.7, weights=weights(12))
def teacher(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            loss = weighted(hyper, slice(None), model(x), y) + F.mse_loss(model(x_val), teacher(x_val))
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(teacher.parameters(), model.parameters(), strict=True):
                    slow.mul_(hyper["decay"]).add_((1 - hyper["decay"]) * fast)
    return Trained(
        lambda: F.cross_entropy(teacher(x_val) + model(x_val), y_val), model, optimizer, {"teacher": teacher}
    )


@case(lr=0.3, weights=weights(12))
def hooks_on_weights_that_move_within_a_step(hyper: Hyper, context: Context) -> Trained:
    """Gradients are taken, and clipped by a hook, at weights that the iteration has written."""
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    for weight in model.parameters():
        weight.register_hook(lambda grad: torch.nan_to_num(grad).clamp(-0.03, 0.03))
    optimizer = sgd(hyper, momentum=0.5)(model.parameters())
    with context(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            weighted(hyper, slice(None), model(x), y).backward()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(2 * weight.grad)
            optimizer.zero_grad()
            weighted(hyper, slice(None), model(x), y).backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, weights=weights(12))
def written_through_data_now_and_then(hyper: Hyper, context: Context) -> Trained:
    """An average of some weights, and slow weights that the fast ones go back to, steps apart."""
    x, y, x_val, y_val = data()
    model = mlp(5, 4, 3)
    average = torch.zeros(4, 5)
    slow = model[2].weight.detach().clone()
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for t in range(6):
            optimizer.zero_grad()
            weighted(hyper, slice(None), model(x), y).backward()
            optimizer.step()
            if t in (0, 5):
                average.data += model[0].weight.data / 2
                slow.data.add_(0.5 * (model[2].weight.data - slow.data))
                model[2].weight.data.copy_(slow.data)
    return Trained(lambda: F.cross_entropy(model(x_val) + (x_val @ average.T)[:, :3], y_val), model, optimizer)


@case(lr=0.3, rho=0.1, weights=weights(12))
def sharpness_aware(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper, momentum=0.5)(model.parameters())
    with context(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            weighted(hyper, slice(None), model(x), y).backward()
            with torch.no_grad():
                norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
                moves = [hyper["rho"] * p.grad / norm for p in model.parameters()]
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.add_(move)
            optimizer.zero_grad()
            weighted(hyper, slice(None), model(x), y).backward()
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.sub_(move)
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, strength=0.1, weights=weights(12))
def adversarial(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for _ in range(3):
            near = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(model(near), y), near)
            near = (x + hyper["strength"] * g / g.norm()).detach()
            optimizer.zero_grad()
            weighted(hyper, slice(None), model(near), y).backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, strength=0.1, weights=weights(12))
def adversarial_by_variables(hyper: Hyper, context: Context) -> Trained:
    """As old code attacks: a backward pass that fills the gradients of the weights and of a `Variable`."""
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for _ in range(3):
            near = torch.autograd.Variable(x.data, requires_grad=True)
            for _ in range(2):
                model.zero_grad()
                weighted(hyper, slice(None), model(near), y).backward()
                moved = near.data + hyper["strength"] * torch.tanh(50 * near.grad.data)
                near = torch.autograd.Variable(moved, requires_grad=True)
            optimizer.zero_grad()
            weighted(hyper, slice(None), model(torch.autograd.Variable(near)), y).backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.2, penalty=0.3, weights=weights(12))
def gradient_penalty(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for _ in range(3):
            points = x.clone().requires_grad_()
            loss = weighted(hyper, slice(None), model(points), y)
            (g,) = torch.autograd.grad(loss, points, create_graph=True)
            optimizer.zero_grad()
            (loss + hyper["penalty"] * (g**2).sum()).backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, strength=0.5, weights=weights(12))
def views_of_constants(hyper: Hyper, context: Context) -> Trained:
    """A view of a constant is written, or its base is: both then have the graph of what was written."""
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for _ in range(3):
            near, logits = x.clone(), torch.zeros(12, 3)
            patch, first, flat = near[:, :2], logits[:4], logits.view(-1)
            patch *= hyper["strength"]
            logits += model(near)
            with torch.no_grad():
                targets = first.softmax(1)
            optimizer.zero_grad()
            loss = weighted(hyper, slice(None), logits, y) + 0.1 * flat.square().mean()
            (loss + F.cross_entropy(model(x[:4]), targets)).backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, noise=0.2, weights=weights(12))
def augmentation(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    torch.manual_seed(6)
    with context(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            noisy = x + hyper["noise"] * torch.randn_like(x)
            weighted(hyper, slice(None), model(noisy), y).backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, scale=0.7, weights=weights(12))
def initial_weights(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper, momentum=0.9)(model.parameters())
    with context(optimizer):
        with torch.no_grad():
            model[0].weight.copy_(hyper["scale"] * model[0].weight)
            model[2].weight.mul_(hyper["scale"])
            model[2].bias[1] = hyper["scale"]
        for _ in range(3):
            optimizer.zero_grad()
            weighted(hyper, slice(None), model(x), y).backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, rate=0.2, weights=weights(12))
def writes_through_views_and_data(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    memory = torch.zeros(3, 6)
    outside = model[0].weight.data[:2]
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for t in range(3):
            optimizer.zero_grad()
            hidden = torch.zeros(12, 6)
            hidden[:, 1:] = model[0](x)[:, 1:]
            row = memory[t]
            row.add_(hidden.detach().mean(0))
            loss = weighted(hyper, slice(None), model[2](torch.tanh(hidden + memory.sum(0))), y)
            loss.backward()
            optimizer.step()
            model[2].weight.data.mul_(1 - hyper["rate"].detach())
            model[0].bias.data[0] = 0.1
            outside.mul_(0.9)
    return Trained(lambda: F.cross_entropy(model(x_val) + memory[:, :3].mean(0), y_val), model, optimizer)


class Squash(torch.autograd.Function):
    """A hand-written backward, bound before any context as people do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.atan().detach() + 0.0 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad / (1 + x**2)


squash = Squash.apply


@case(lr=0.3, weights=weights(12))
def custom_function(hyper: Hyper, context: Context) -> Trained:
    torch.manual_seed(3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(squash(self.first(x))))

    return simple(Net(), sgd(hyper), hyper, context)


@case(lr=0.3, weights=weights(12))
def gradient_hooks(hyper: Hyper, context: Context) -> Trained:
    model = mlp(5, 6, 3)
    model[0].weight.register_hook(lambda g: g * 0.5 + 0.1 * g**2)
    model[2].register_forward_hook(lambda module, args, out: out * 1.5)
    return simple(model, sgd(hyper), hyper, context)


@case(lr=0.3, weights=weights(12))
def checkpointed(hyper: Hyper, context: Context) -> Trained:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(3)
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(5, 6), inner, nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.inner, self.first(x), use_reentrant=False))

    model = Net()
    trained = simple(model, sgd(hyper), hyper, context)
    model.eval()
    _, _, x_val, y_val = data()
    trained.outer = F.cross_entropy(model(x_val), y_val)
    return trained


class Aside(torch.autograd.Function):
    """Keeps what it is given on the graph and gives no values, as torch's checkpoints did."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise AssertionError("nothing goes through here")


@case(lr=0.3, weights=weights(12))
def kept_aside(hyper: Hyper, context: Context) -> Trained:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = Aside.apply(y := super().forward(x))
            return torch.tanh(y)

    return simple(Net(5, 3), sgd(hyper), hyper, context)


# -- loops that were got wrong once -----------------------------------------------------------------------------------


def looping(
    hyper: Hyper,
    context: Context,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    after: Callable[[int, nn.Module], Any] = lambda t, model: None,
    prepare: Callable[[torch.optim.Optimizer], Any] = lambda optimizer: None,
    outer: Callable[[nn.Module], Tensor] | None = None,
) -> Trained:
    """A loop over whole batches, with something done after each step."""
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper, momentum=0.5)(model.parameters())
    prepare(optimizer)
    torch.manual_seed(4)
    with context(optimizer):
        for t in range(4):
            optimizer.zero_grad()
            (weighted(hyper, slice(None), model(x), y) + loss(model, x, y)).backward()
            optimizer.step()
            after(t, model)
    return Trained(F.cross_entropy(model(x_val), y_val) if outer is None else outer(model), model, optimizer)


@case(lr=0.3, weights=weights(12))
def teacher_copied_in_the_loop(hyper: Hyper, context: Context) -> Trained:
    kept: list[nn.Module] = []

    def copied(t: int, model: nn.Module) -> None:
        if t in (0, 2):
            kept[:] = [copy.deepcopy(model).requires_grad_(t == 2)]

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), kept[0](x)) if kept else torch.zeros(())

    return looping(hyper, context, loss, copied)


@case(lr=0.3, weights=weights(12))
def teacher_that_requires_grad(hyper: Hyper, context: Context) -> Trained:
    slow = mlp(5, 6, 3)

    def average(t: int, model: nn.Module) -> None:
        for a, b in zip(slow.parameters(), model.parameters(), strict=True):
            a.data.mul_(0.5).add_(b.data, alpha=0.5)

    return looping(hyper, context, lambda model, x, y: F.mse_loss(model(x), slow(x).detach()), average)


@case(lr=0.3, weights=weights(12))
def averaged_model(hyper: Hyper, context: Context) -> Trained:
    averages: list[Any] = []

    def update(t: int, model: nn.Module) -> None:
        averages[0].update_parameters(model)

    def prepare(optimizer: torch.optim.Optimizer) -> None:
        model = mlp(5, 6, 3)
        averages.append(torch.optim.swa_utils.AveragedModel(model))

    _, _, x_val, y_val = data()
    return looping(
        hyper,
        context,
        lambda model, x, y: torch.zeros(()),
        update,
        prepare,
        lambda model: F.cross_entropy(averages[0](x_val), y_val),
    )


@case(lr=0.3, weights=weights(12))
def layer_reset_midway(hyper: Hyper, context: Context) -> Trained:
    def reset(t: int, model: nn.Module) -> None:
        if t == 1:
            model[2].reset_parameters()  # type: ignore[index, operator]

    return looping(hyper, context, lambda model, x, y: torch.zeros(()), reset)


@case(lr=0.3, weights=weights(12))
def users_step_hooks(hyper: Hyper, context: Context) -> Trained:
    steps: list[int] = []

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = p.grad.tanh() * 2

    def behind(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        steps.append(0)
        if len(steps) == 2:
            with torch.no_grad():
                for p in optimizer.param_groups[0]["params"]:
                    p.mul_(0.8)

    def prepare(optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(behind)

    return looping(hyper, context, lambda model, x, y: torch.zeros(()), prepare=prepare)


@case(lr=0.3, weights=weights(12))
def numpy_index_shuffled_in_place(hyper: Hyper, context: Context) -> Trained:
    index, generator = numpy.arange(12), numpy.random.RandomState(0)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        generator.shuffle(index)
        return (
            hyper["weights"][index[:4]] * F.cross_entropy(model(x[index[:4]]), y[index[:4]], reduction="none")
        ).sum()

    return looping(hyper, context, loss)


@case(lr=0.1, weights=weights(12))
def truncated_backpropagation(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    hidden = torch.zeros(12, 6)
    with context(optimizer):
        for t in range(4):
            hidden = hidden.detach() if t % 2 else hidden.detach_()
            hidden = torch.tanh(model[0](x) + hidden)
            optimizer.zero_grad()
            weighted(hyper, slice(None), model[2](hidden), y).backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, weights=weights(12))
def grad_scaler(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with context(optimizer), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes numbers out of tensors, for itself
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(weighted(hyper, slice(None), model(x), y)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.4)
            scaler.step(optimizer)
            scaler.update()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


class Reversal(torch.autograd.Function):
    """Gradient reversal, as domain adaptation has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -0.5 * grad


class Straight(torch.autograd.Function):
    """A straight-through estimator, with the newer way to write a context."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Clipped(torch.autograd.Function):
    """A backward that clips gradients, of a size that the loop's are below and the sweep's are not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clamp(-5.0, 5.0)


class Penalty(torch.autograd.Function):
    """A backward that adds the gradient of a penalty, whatever comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad + ctx.scale * x.tanh(), None


class Halved(torch.autograd.Function):
    """A backward of half the slope, by the saved results, one of which is drawn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y, noise = torch.tanh(2 * x), torch.rand_like(x)
        ctx.save_for_backward(y, noise)
        return y, x * noise

    @staticmethod
    def backward(ctx: Any, grad: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        y, noise = ctx.saved_tensors
        return grad * (1 - y * y) + 0.5 * other * noise


@case(lr=0.3, weights=weights(12))
def backward_that_does_not_take_gradients_as_they_are(hyper: Hyper, context: Context) -> Trained:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hidden = Penalty.apply(torch.tanh(model[0](x)), 0.1)  # type: ignore[index, operator]
        return F.cross_entropy(model[2](Clipped.apply(hidden)), y)  # type: ignore[index, operator]

    def outer(model: nn.Module) -> Tensor:
        _, _, x, y = data()
        return 1e5 * F.cross_entropy(model(x), y)

    return looping(hyper, context, loss, outer=outer)


class Damped(nn.Module):
    """Gradients of the hidden values are scaled and clipped on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: (0.5 * grad).clamp(-0.01, 0.01))
        return self.second(hidden)  # type: ignore[no-any-return]


class Both(nn.Module):
    """Several arguments, of which one is no tensor, and several results."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, squash: bool, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(torch.tanh(x) if squash else x) + y, self.second(x).square().sum()


@case(lr=0.3, weights=weights(12))
def hooks_of_modules_that_change_gradients(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model, both = mlp(5, 6, 3), Both()
    weights = [*model.parameters(), *both.parameters()]
    optimizer = sgd(hyper, momentum=0.5)(weights)
    both.register_full_backward_hook(lambda _, given, out: (given[0].clamp(min=0.0), None, given[2] * out[1]))
    both.register_full_backward_hook(lambda *_: None)
    model[2].register_full_backward_pre_hook(lambda _, out: (out[0] + 0.1 * out[0].tanh(),))  # type: ignore[operator]
    with context(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            hidden = model[0](x)
            found, penalty = both(hidden, True, 2 * hidden)
            (weighted(hyper, slice(None), model[2](found), y) + 0.01 * penalty).backward()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, tilt=0.2, weights=weights(12))
def weights_of_classes(hyper: Hyper, context: Context) -> Trained:
    """Computed under `no_grad`, of predictions and hyperparameters."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        with torch.no_grad():
            rare = torch.exp(hyper["tilt"] * torch.arange(3.0)) / logits.softmax(1).mean(0)
        several = F.one_hot(y, 3).to(x.dtype)
        return (
            F.cross_entropy(logits, y, rare, label_smoothing=0.1)
            + F.nll_loss(logits.log_softmax(1), y, rare)
            + F.binary_cross_entropy_with_logits(logits, several, rare, pos_weight=rare)
        )

    return looping(hyper, context, loss)


@case(lr=0.3, weights=weights(12))
def margins(hyper: Hyper, context: Context) -> Trained:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        labels = torch.stack([y, torch.full_like(y, -1), y], 1)
        return F.multi_margin_loss(logits, y, p=2) + nn.MultiLabelMarginLoss()(logits.tanh(), labels)

    return looping(hyper, context, loss)


@case(lr=0.3, weights=weights(12))
def views_turned_in_place(hyper: Hyper, context: Context) -> Trained:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        first, rest = logits[:, :1], logits.view(4, 3, 3)
        first.squeeze_(1)
        rest.transpose_(0, 1).unsqueeze_(0)
        with torch.no_grad():
            targets = logits[:4].softmax(1).view(2, 2, 3)
            targets.swapaxes_(0, 1).mul_(0.9)
        return (first - x[:, 0]).square().mean() + (rest[0, 0] - targets.reshape(4, 3)).square().mean()

    return looping(hyper, context, loss)


class Settings:
    """As packages have them."""

    clips = False
    squashes = True

    @contextmanager
    def linear(self) -> Iterator[None]:
        Settings.squashes = False
        try:
            yield
        finally:
            Settings.squashes = True


class Switched(torch.autograd.Function):
    """Flags of its class, of a package and among its arguments say what it is."""

    scale = 0.0

    @staticmethod
    def forward(ctx: Any, x: Tensor, straight: bool) -> Tensor:
        y = torch.tanh(x) if Settings.squashes else x.clone()
        ctx.save_for_backward(y)
        ctx.flags = straight, Settings.squashes, Switched.scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        straight, squashes, scale = ctx.flags
        grad = grad + scale * y
        grad = grad.clamp(-5.0, 5.0) if Settings.clips else grad
        return grad * (1 - y * y) if squashes and not straight else grad, None


@case(lr=0.3, weights=weights(12))
def functions_whose_flags_change(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        for t in range(6):
            Settings.clips, Switched.scale = t > 1, 0.1 * (t > 2)
            with Settings().linear() if t > 3 else nullcontext():
                hidden = Switched.apply(model[0](x), t > 4)
            optimizer.zero_grad()
            weighted(hyper, slice(None), model[2](hidden), y).backward()
            optimizer.step()
    Settings.clips, Switched.scale = False, 0.0
    return Trained(1e5 * F.cross_entropy(model(x_val), y_val), model, optimizer)


class Gated(torch.autograd.Function):
    """The product of two values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, gate = ctx.saved_tensors
        return grad * gate, grad * x


@case(lr=0.3, weights=weights(12))
def function_of_two_values_one_of_which_is_computed_from_the_other(hyper: Hyper, context: Context) -> Trained:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hidden = model[0](x)  # type: ignore[index, operator]
        return F.cross_entropy(model[2](Gated.apply(hidden, torch.sigmoid(hidden))), y)  # type: ignore[index, operator]

    return looping(hyper, context, loss)


class Noted(Clipped):
    """The same, in a class that no other case has shown to metaopt."""


@case(lr=0.3, weights=weights(12))
def backward_that_the_loop_does_not_call(hyper: Hyper, context: Context) -> Trained:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = Noted.apply(0.5 * model(x))
        return F.mse_loss(model(x), target)

    def outer(model: nn.Module) -> Tensor:
        _, _, x, y = data()
        return 1e5 * F.cross_entropy(model(x), y)

    return looping(hyper, context, loss, outer=outer)


@case(lr=0.3, weights=weights(12))
def backward_of_results_that_is_no_derivative(hyper: Hyper, context: Context) -> Trained:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hidden, noise = Halved.apply(model[0](x))  # type: ignore[index, operator]
        return F.cross_entropy(model[2](hidden + noise), y)  # type: ignore[index, operator]

    return looping(hyper, context, loss)


@case(lr=0.3, weights=weights(12))
def backward_that_is_no_derivative(hyper: Hyper, context: Context) -> Trained:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(model[0](x))  # type: ignore[index, operator]
        domain = model[2](Reversal.apply(hidden)).square().mean()  # type: ignore[index, operator]
        return domain + model[2](Straight.apply(hidden)).tanh().mean()  # type: ignore[index, operator]

    return looping(hyper, context, loss)


class Once(torch.autograd.Function):
    """A backward that says of itself that it has no derivative, of a forward that has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        if ctx.needs_input_grad[1]:
            raise RuntimeError("no derivative by y")
        ctx.save_for_backward(x, y)
        return x.exp() * y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        return grad * x.exp() * y, None


class Product(torch.autograd.Function):
    """A backward of saved intermediates, which autograd takes for constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.slopes = y.detach().clone(), x.detach().clone()
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        by_x, by_y = ctx.slopes
        return grad * by_x, grad * by_y


class Solve(torch.autograd.Function):
    """The solution of a symmetric system, of which the forward reads one triangle."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, right: Tensor) -> Tensor:
        found = torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
        ctx.save_for_backward(matrix, found)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        matrix, found = ctx.saved_tensors
        by_right = torch.linalg.solve(matrix, grad)
        return -by_right @ found.mT, by_right


@case(lr=0.3, weights=weights(12))
def backward_that_has_no_derivative(hyper: Hyper, context: Context) -> Trained:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(model[0](x))  # type: ignore[index, operator]
        matrix = hidden.mT @ hidden + torch.eye(hidden.shape[1])
        solved = Solve.apply(matrix, Product.apply(hidden, hidden).mT).mT
        return model[2](Once.apply(solved, x[:, :1])).tanh().mean()  # type: ignore[index, operator]

    return looping(hyper, context, loss)


@case(lr=0.3, weights=weights(12))
def hard_gumbel_softmax(hyper: Hyper, context: Context) -> Trained:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        return (F.gumbel_softmax(logits, tau=0.7, hard=True) * logits).tanh().mean()

    return looping(hyper, context, loss)


@case(lr=0.3, weights=weights(12))
def fake_quantized(hyper: Hyper, context: Context) -> Trained:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        coarse = torch.fake_quantize_per_tensor_affine(logits, 0.1, 0, -8, 7)
        return (coarse * logits).tanh().mean()

    return looping(hyper, context, loss)


@case(lr=0.3, weights=weights(12))
def detached_by_functions(hyper: Hyper, context: Context) -> Trained:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        written = logits.sin()
        torch.detach_(written)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that `x.detach().clone()` is better
            copies = torch.tensor(logits).cos() + x.new_tensor(data=logits).tanh()
        return ((torch.detach(logits).exp() + torch.detach(input=written) * copies) * logits).tanh().mean()

    return looping(hyper, context, loss)


@case(lr=0.3, gamma=0.9, weights=weights(12))
def gathered_from_python(hyper: Hyper, context: Context) -> Trained:
    """Returns of a policy are made so: numbers and tensors in a list or a deque, which torch takes for data."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        returns: deque[Any] = deque([1.0])
        for reward in logits.mean(0).detach():
            returns.appendleft(reward + hyper["gamma"] * returns[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a tensor with a graph becomes a scalar
            made = torch.tensor(returns) + torch.as_tensor(list(returns)) * torch.asarray(tuple(returns)).cos()
            made = made * torch.tensor([hyper["gamma"], *(reward.reshape(1) for reward in list(returns)[:-1])])
            made = made + x.new_tensor(returns).exp() + x.new([returns[0], 1.0, 0.5, returns[1]])
        worst = logits.detach().amax()
        copied = torch.asarray(worst, copy=True) + torch.asarray(worst).sin()
        filled = torch.full((4,), worst) + torch.full_like(made, fill_value=worst).sin() * x.new_full((4,), worst)
        return (logits.mean() * (made + filled + copied)).tanh().sum()

    return looping(hyper, context, loss)


@case(lr=0.3, weights=weights(12))
def attention_that_is_viewed(hyper: Hyper, context: Context) -> Trained:
    """The loop's kernel lays its result out so that `contiguous` has nothing to do, and the replay's does not."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        features = torch.cat([model(x * scale) for scale in (0.5, 1.0, 2.0, 3.0)], 1)
        query = features.view(2, -1, 3, 4).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(query, query.sin(), query.cos(), is_causal=True)
        return mixed.transpose(1, 2).contiguous().view(2, -1).view_as(features.view(2, -1)).tanh().mean()

    return looping(hyper, context, loss)


@case(lr=0.3, weights=weights(12))
def constants_of_a_followed_shape(hyper: Hyper, context: Context) -> Trained:
    """A view of a constant is one, though the call was given what is followed too."""
    mask, prior = torch.rand(3), torch.rand(12)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        narrow, whole = torch.broadcast_tensors(mask, logits)
        wide = mask.expand_as(logits) + narrow * whole
        grid = torch.meshgrid(prior[:3], logits[0], indexing="ij")
        return (wide * logits * mask).tanh().mean() + (grid[0] * grid[1]).sin().mean() * prior.sum() * mask[0]

    return looping(hyper, context, loss)


@case(lr=0.3, weights=weights(12))
def norms_of_zero(hyper: Hyper, context: Context) -> Trained:
    """Of padding, or of what dropout took away. torch's gradient there is 0, and its second derivative no number."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        kept = torch.arange(len(x)).remainder(3).sign().unsqueeze(1)
        logits = model(x)
        apart = torch.cdist(logits, kept * logits).mean() + torch.dist(logits, logits)
        padded = nn.functional.normalize(kept * logits) + (kept * logits).norm(dim=1, keepdim=True).sin()
        return (padded * logits.cos()).mean() + apart

    return looping(hyper, context, loss)


@case(lr=0.3, weights=weights(12))
def roots_of_zero(hyper: Hyper, context: Context) -> Trained:
    """Whose infinite gradient something selects away; and those of squared gradients, by an optimizer written out."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
        logits = model(x)
        squares = (logits.unsqueeze(0) - logits.unsqueeze(1)).square().sum(-1)
        apart = torch.where(torch.eye(len(x), dtype=torch.bool), 0.0, squares).sqrt()
        likely = logits.softmax(1)
        chosen = torch.where(likely > 0.35, likely, 0.0)
        (slopes,) = torch.autograd.grad(logits.sin().sum(), model[0].weight, retain_graph=True)
        scaled = slopes / (slopes.square().sqrt() + 1.0)  # no `no_grad`, and a column of zeros
        spread = torch.special.entr(chosen).mean() - torch.xlogy(chosen, chosen).sum(1).square().mean()
        return apart.mean() + spread + (scaled * model[0].weight).mean()

    return looping(hyper, context, loss)


@case(lr=0.3, weights=weights(12))
def complex_state(hyper: Hyper, context: Context) -> Trained:
    spectrum = [torch.zeros(3, dtype=torch.complex128)]

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        spectrum[0] = 0.5 * spectrum[0] + torch.fft.fft(model(x).mean(0)).detach()
        return (spectrum[0].abs() * model(x)).mean()

    return looping(hyper, context, loss)


@case(lr=0.3, filter=lambda: torch.rand(3, 2), weights=weights(12))
def complex_state_in_the_objective(hyper: Hyper, context: Context) -> Trained:
    spectrum = torch.zeros(3, dtype=torch.complex128)
    given = hyper["filter"]
    factor = given if given.is_complex() else torch.view_as_complex(given)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found = factor.exp() * torch.fft.fft(model(x).mean(0))
        with torch.no_grad():
            spectrum.mul_(0.5 + 0.2j).add_(found)
        return (spectrum * found).abs().mean()

    trained = looping(hyper, context, loss)
    trained.outer = lambda: trained.model[0].weight.square().mean() + (spectrum * (1 + 2j)).real.square().sum()  # type: ignore[index, union-attr, operator]
    return trained


@case(lr=0.3, weights=weights(12))
def objective_that_is_a_view(hyper: Hyper, context: Context) -> Trained:
    _, _, x_val, y_val = data()
    trained = looping(hyper, context, lambda model, x, y: torch.zeros(()))
    trained.outer = lambda: F.cross_entropy(trained.model(x_val), y_val, reduction="none")[2]
    return trained


@case(lr=0.3, weights=weights(12))
def networks_trained_aside(hyper: Hyper, context: Context) -> Trained:
    """One on data of its own, which the loss reads; and a probe on features, which nothing reads."""
    x, y, x_val, y_val = data()
    model, reward, probe = mlp(5, 6, 3), mlp(3, 4, 1), mlp(6, 3)
    optimizer = sgd(hyper)(model.parameters())
    aside = [torch.optim.Adam(network.parameters(), lr=0.1) for network in (reward, probe)]
    with context(optimizer):
        for t in range(3):
            reward.requires_grad_(True)
            aside[0].zero_grad()
            (reward(t * torch.ones(4, 3)) - 1).square().mean().backward()
            aside[0].step()
            reward.requires_grad_(False)
            optimizer.zero_grad()
            aside[1].zero_grad()
            features = model[0](x)
            logits = model[2](features.tanh())
            (weighted(hyper, slice(None), logits, y) - reward(logits).mean()).backward()
            F.cross_entropy(probe(features.detach()), y).backward()
            optimizer.step()
            aside[1].step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, weights=weights(12))
def replay_buffer_with_repeated_indices(hyper: Hyper, context: Context) -> Trained:
    buffer, table, twice = torch.zeros(4, 6), torch.ones(2, 6), torch.tensor([2, 2])
    index = torch.tensor([[0, 1, 2, 0], [3, 3, 1, 0], [2, 1, 2, 2], [0, 1, 3, 0]])

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(model[0](x[:4] + buffer[0, 0]))  # type: ignore[index, operator]
        return (hidden * (buffer + table.mean(0))).mean()

    def store(t: int, model: nn.Module) -> None:
        features = model[0](torch.eye(4, 5)).detach()  # type: ignore[index, operator]
        buffer[index[t]] = features
        table.scatter_(0, (index % 2)[:, [0, 1, 2, 3, 0, 1]], features)
        table.index_copy_(1, index[t], torch.index_put(table, (index[t] % 2, index[t]), features[0, :4])[:, :4])
        table[1, twice] = features[:2, 0]

    _, _, x_val, y_val = data()
    outer = lambda model: F.cross_entropy(model(x_val), y_val) + buffer.square().mean() + table.mean()  # noqa: E731
    trained = looping(hyper, context, loss, store)
    trained.outer = lambda: outer(trained.model)
    return trained


@case(lr=0.3, weights=weights(12))
def noise_that_the_loop_trains(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper)(model.parameters())
    with context(optimizer):
        noise = torch.zeros(12, 5, requires_grad=True)
        for _ in range(3):
            optimizer.zero_grad()
            weighted(hyper, slice(None), model(x + noise), y).backward()
            with torch.no_grad():
                noise.add_(torch.tanh(20 * noise.grad))
            noise.grad = None
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.3, weights=weights(12))
def an_optimizer_for_a_copy(hyper: Hyper, context: Context) -> Trained:
    """First-order MAML: each iteration trains a copy of the model, and the model goes by the copy's gradients."""
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    optimizer = sgd(hyper, momentum=0.5)(model.parameters())
    with context(optimizer):
        for _ in range(2):
            fast = copy.deepcopy(model)
            inner = torch.optim.Adam(fast.parameters(), lr=0.1, eps=0.1)
            for _ in range(2):
                inner.zero_grad()
                weighted(hyper, slice(None), fast(x), y).backward()
                inner.step()
            inner.zero_grad()
            F.cross_entropy(fast(x_val), y_val).backward()
            for weight, other in zip(model.parameters(), fast.parameters(), strict=True):
                weight.grad = other.grad.clone() + 0.1 * (weight - other).detach()
            optimizer.step()
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.1, weights=weights(12))
def adversary_made_in_the_loop(hyper: Hyper, context: Context) -> Trained:
    x, _, x_val, _ = data()
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.Adam(model.parameters(), lr=hyper["lr"], eps=0.01)
    with context(optimizer):
        adversary = copy.deepcopy(mlp(3, 4, 1))
        inner = torch.optim.AdamW(adversary.parameters(), lr=0.1, eps=0.01)
        for _ in range(3):
            inner.zero_grad()
            real, fake = adversary(x[:, :3]), adversary(model(x).detach())
            (F.softplus(-real).mean() + F.softplus(fake).mean()).backward()
            inner.step()
            optimizer.zero_grad()
            (F.softplus(-adversary(model(x)))[:, 0] * hyper["weights"]).mean().backward()
            optimizer.step()
    return Trained(lambda: (adversary(model(x_val)) * model(x_val)).mean(), model, optimizer)


@case(lr=0.3, decay=0.7, weights=weights(12))
def data_replaced(hyper: Hyper, context: Context) -> Trained:
    x, y, x_val, y_val = data()
    model = mlp(5, 6, 3)
    teacher = copy.deepcopy(model)
    optimizer = sgd(hyper, momentum=0.5)(model.parameters())
    with context(optimizer):
        for t in range(4):
            optimizer.zero_grad()
            target = teacher(x).softmax(-1).detach()
            soft = -(target * model(x).log_softmax(-1)).mean()
            (weighted(hyper, slice(None), model(x), y) + soft * model[0].bias.sum()).backward()
            model[0].weight.grad.data = model[0].weight.grad.data.tanh()
            optimizer.step()
            for slow, fast in zip(teacher.parameters(), model.parameters(), strict=True):
                old, new = slow.data, fast.data
                slow.data = 0.6 * old + 0.4 * new
            if t == 0:
                with torch.no_grad():
                    model[0].weight.data = model[0].weight.data * hyper["decay"]
                nn.utils.vector_to_parameters(
                    0.9 * nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters()
                )
            elif t == 1:
                model[0].weight.data = model[0].weight.data + 0.1
                model[2].bias.data = torch.full((3,), 0.1)
    return Trained(F.cross_entropy(model(x_val), y_val), model, optimizer)


@case(lr=0.1, width=0.4, weights=weights(12))
def samples_of_distributions(hyper: Hyper, context: Context) -> Trained:
    """A policy gradient: the actions move with the policy, though no gradient of the loop goes through them."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        mean = model(x)
        policy = torch.distributions.Normal(mean, hyper["width"])
        action = policy.sample()
        reward = (-((action - 1) ** 2)).detach()
        scale = F.softplus(mean)
        noise = torch.distributions.Laplace(mean, scale).sample() + torch.distributions.Exponential(scale).sample()
        noise = noise + torch.normal(0.3, scale.detach()) + torch.normal(mean.detach(), 0.2)
        noise = noise + torch.distributions.Binomial(5, logits=mean).sample()
        return (-policy.log_prob(action) * reward + 0.1 * noise * mean).mean()

    return looping(hyper, context, loss)


@case(lr=0.3, weights=weights(12))
def written_without_a_graph(hyper: Hyper, context: Context) -> Trained:
    """What autograd refuses to write: views that were made together, and a tensor that is its own argument."""

    def after(t: int, model: nn.Module) -> None:
        first, last = model[0].weight, model[2].weight  # type: ignore[index, union-attr]
        with torch.no_grad():
            for row in first[:2]:
                row.mul_(0.9).add_(0.1 * row.square().mean())
            left, right = last.chunk(2, dim=1)
            left.mul_(right.abs().mean() + 0.5)
            torch._foreach_mul_(last.split([1, 2]), 0.95)
            own = torch.tanh(last)
            own.mul_(own)
            squares = [own, own + 0.1]
            torch._foreach_mul_(squares, squares)
            torch._foreach_maximum_(squares, 0.01)
            torch._foreach_minimum_(squares, [0.5, 0.4])
            ratio, _ = torch._foreach_addcdiv([last, first], [own, 0.1 * first], [own + 1.0, first + 2.0], value=-0.2)
            last.copy_(ratio)

    return looping(hyper, context, lambda model, x, y: torch.zeros(()), after)


@case(lr=0.3, weights=weights(12))
def names_that_outlive_a_tensor(hyper: Hyper, context: Context) -> Trained:
    """The tensor that was detached is gone when what shares its memory is written."""
    kept: list[Tensor] = []

    def after(t: int, model: nn.Module) -> None:
        weight = model[2].weight  # type: ignore[index, union-attr]
        if t == 0:
            made = weight.detach() * 0.5
            kept.extend([made.detach(), made.data, made.detach()])
        else:
            kept[1].mul_(0.8).add_(0.2 * weight.detach())
            weight.data.sub_(0.3 * kept[0] + 0.1 * kept[2].square())

    return looping(hyper, context, lambda model, x, y: torch.zeros(()), after)
