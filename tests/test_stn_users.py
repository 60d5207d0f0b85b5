"""Models and loops as users have them: right hypergradients and resumed runs, or an error with the cure."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import metaopt
from metaopt.errors import FallbackWarning, ResponseError
from metaopt.stn import Tuned, l2, train, transform
from metaopt.stn.linearised import LinearisedPass
from tests.stn_models import at, hyperparameters, output

ENGINES = ("manual", "forward", "double")


class Dict(nn.Module):
    """Heads by name, keyword arguments, and a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = nn.Linear(4, 6), nn.Dropout(0.2)
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 2), "b": nn.Linear(6, 3)})

    def forward(self, *, inputs: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = self.drop(torch.relu(self.body(inputs)))
        return {name: scale * head(hidden) for name, head in self.heads.items()}


class Variational(nn.Module):
    """An autoencoder that samples in training, and returns three tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.log = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.drop, self.decoder = nn.Dropout(0.2), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.drop(torch.relu(self.encoder(x)))
        mean, log = self.mean(hidden), self.log(hidden)
        z = mean + torch.exp(0.5 * log) * torch.randn_like(mean) if self.training else mean
        return self.decoder(z), mean, log


class UNet(nn.Module):
    """Down, up, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.LeakyReLU(0.1, inplace=True))
        self.up, self.drop, self.out = nn.ConvTranspose2d(6, 4, 2, 2), nn.Dropout2d(0.2), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        above = self.down(x.reshape(-1, 1, 4, 4))
        below = self.up(self.drop(self.deep(F.max_pool2d(above, 2))))
        y: Tensor = self.out(torch.cat([above, below], 1))
        return y


class Siamese(nn.Module):
    """One network on two halves of the input, put together along the axis of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.drop(self.net(torch.cat([x[:, :2], x[:, 2:]]))).chunk(2)
        return (one - two).square().sum(1)


class Classifier(nn.Module):
    """A table of words before packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.gru = nn.Embedding(9, 3), nn.GRU(3, 4, batch_first=True)
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + x[:, 0] % 4
        packed = nn.utils.rnn.pack_padded_sequence(self.words(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        y: Tensor = self.out(self.drop(self.gru(packed)[1][0]))
        return y


class Pairs(nn.Module):
    """Every example against every other one of the batch, at a temperature that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(4, 3), nn.Linear(4, 3), nn.Dropout(0.2)
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.one(x)) @ self.two(x).t() * self.temperature.exp()


class Dropped(nn.Module):
    """Whole layers that are left out at random in training, each with a scale of its own."""

    # Of the class: what an instance keeps is put back after the response's step.
    left: ClassVar[list[str]] = []

    def __init__(self, draw: Callable[[], Any] = lambda: torch.rand(())) -> None:
        super().__init__()
        self.draw = draw
        self.layers, self.drop = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), nn.Dropout(0.2)
        self.scales = nn.ParameterList(nn.Parameter(torch.randn(4)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        self.left.append("")
        for layer, scale in zip(self.layers, self.scales, strict=True):
            kept = not self.training or self.draw() > 0.3
            self.left[-1] += str(int(kept))
            if kept:
                x = x + torch.tanh(layer(x)) * scale
        y: Tensor = self.drop(x)
        return y


USERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "dict": (Dict, lambda: {"inputs": torch.randn(6, 4)}),
    "variational": (Variational, lambda: torch.randn(6, 4)),
    "unet": (UNet, lambda: torch.randn(6, 16)),
    "siamese": (Siamese, lambda: torch.randn(6, 4)),
    "classifier": (Classifier, lambda: torch.randint(9, (6, 4))),
    "dropped": (Dropped, lambda: torch.randn(6, 4)),
    "pairs": (Pairs, lambda: torch.randn(6, 4)),
}


def call(model: Any, batch: Any) -> Any:
    return model(**batch, scale=2.0) if isinstance(batch, dict) else model(batch)


def valid_loss(model: Any, batch: Any) -> Tensor:
    return torch.stack([y.square().mean() for y in pytree.tree_leaves(call(model, batch))]).sum()


def train_loss(model: Any, batch: Any, values: Any) -> Tensor:
    return valid_loss(model, batch) + l2(model, values.decay)


def problem(build: Callable[[], nn.Module], method: str = "delta", **options: Any) -> Tuned:
    torch.manual_seed(1)
    hyper = metaopt.Hyperparameters(drop=metaopt.interval(0.3, 0, 0.9), decay=metaopt.positive(0.1))
    tuned = transform(build(), hyper, method, **options)
    with torch.no_grad():
        tuned.responses.weight.normal_(std=0.3)
    return tuned


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


FIXED: dict[str, Any] = {"scale_optimizer": None, "hyper_optimizer": still, "seed": 3}


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning")
@pytest.mark.parametrize("name", list(USERS))
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_hypergradients_are_those_of_changed_weights_and_runs_resume(name: str, method: str) -> None:
    build, draw = USERS[name]
    tuned = problem(build, method)
    batch = draw()
    with train(tuned, train_loss, valid_loss, **FIXED) as tuner:
        tuner.train_step(batch)
        kept = copy.deepcopy(tuner.state_dict())
        found = [tuner.train_step(batch), tuner.valid_step(batch)]
    gradient = torch.stack([leaf.grad for leaf in tuner.leaves if leaf.grad is not None])
    plain, expected, h = copy.deepcopy(tuned.model).eval(), [], 1e-5
    for unit in torch.eye(2):
        losses = []
        for sign in (1, -1):
            point = sign * h * unit
            z = tuned.coordinates.leaf() + point if method == "stn" else point / tuned.reference
            changes = tuned.responses.changes(z)
            weights = {n: p + changes.get(n, 0) for n, p in plain.named_parameters()}
            losses.append(valid_loss(lambda *a, w=weights, **k: functional_call(plain, w, a, k), batch))
        expected.append((losses[0] - losses[1]) / (2 * h))
    torch.testing.assert_close(gradient, torch.stack(expected), rtol=1e-6, atol=1e-9)
    with train(problem(build, method), train_loss, valid_loss, **{**FIXED, "seed": 9}) as tuner:
        tuner.load_state_dict(kept)
        assert [tuner.train_step(batch), tuner.valid_step(batch)] == found


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random, numpy.random.rand], ids=["torch", "py", "np"])
def test_layers_that_are_left_out_at_random_respond_per_example(draw: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    tuned, batch = problem(lambda: Dropped(draw)), torch.randn(6, 4)
    left = Dropped.left
    left.clear()
    with train(tuned, train_loss, valid_loss) as tuner:
        for _ in range(4):
            tuner.train_step(batch)
            assert left[-1] == left[-2]  # in both steps
            before = copy.deepcopy(tuner.state_dict())
        found = [tuner.train_step(batch) for _ in range(3)]
        tuner.valid_step(batch)
        tuner.load_state_dict(before)
        assert [tuner.train_step(batch) for _ in range(3)] == found
    assert not tuned.fallback
    assert len(set(left)) > 3


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand], ids=["py", "np"])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_a_loss_may_draw_from_other_generators(draw: Callable[[], float], method: str) -> None:
    """Its augmentation was another in each of the two steps, and a run that was gone on with was another run."""
    tuned, batch, drawn = problem(lambda: nn.Linear(4, 2), method), torch.randn(6, 4), []

    def mixed(model: Any, x: Tensor, values: Any) -> Tensor:
        drawn.append(draw())
        return model(x + drawn[-1] * x.flip(0)).square().mean() + l2(model, values.decay) * values.drop.mean()

    with train(tuned, mixed, valid_loss) as tuner:
        for _ in range(2):
            tuner.train_step(batch)
            tuner.valid_step(batch)
        before = copy.deepcopy(tuner.state_dict())
        found = [tuner.train_step(batch) for _ in range(2)]
        tuner.load_state_dict(before)
        assert [tuner.train_step(batch) for _ in range(2)] == found
    steps = 1 if method == "stn" else 2
    assert drawn[::steps] == drawn[steps - 1 :: steps]
    assert len(set(drawn)) == 4


# -- examples that see each other


def test_examples_that_see_each_other_are_not_split_into_groups() -> None:
    seen: list[torch.Size] = []

    def loss(model: Any, batch: Any, values: Any) -> Tensor:
        y = model(batch)
        seen.append(y.shape)
        return y.square().mean() + l2(model, values.decay)

    with train(problem(Pairs), loss, valid_loss) as tuner:
        with pytest.warns(FallbackWarning, match="temperature"):
            tuner.train_step(torch.randn(6, 4))
        tuner.train_step(torch.randn(6, 4))
    assert set(seen) == {(6, 6)}
    grouped = train(problem(Pairs, groups=2), loss, valid_loss)
    refused = pytest.raises(ResponseError, match="depends on the others of the batch")
    with grouped as tuner, refused, pytest.warns(FallbackWarning):
        tuner.train_step(torch.randn(6, 4))


# -- lower precision


class Mixed(nn.Module):
    """A network of which some, or all, runs in half precision."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside, self.drop = inside, nn.Dropout(0.2)
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.LayerNorm(128)
        self.deep, self.out = nn.Linear(128, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.inside or torch.is_autocast_enabled("cpu")):
            hidden = self.norm(torch.relu(self.conv(x.reshape(-1, 1, 4, 4))).flatten(1))
            y: Tensor = self.out(self.drop(F.gelu(self.deep(hidden))))
        return y.float()


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
@pytest.mark.parametrize("engine", ["auto", "double"])
def test_autocast_changes_no_more_than_rounding(inside: bool, engine: str) -> None:
    torch.set_default_dtype(torch.float32)
    found = []
    for half in (False, True):
        torch.manual_seed(1)
        tuned = transform(Mixed(half and inside), hyperparameters(), engine=engine)
        with torch.no_grad():
            tuned.responses.weight.normal_(std=0.3)
        x, z = torch.randn(16, 16), torch.randn(16, 3)
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=half and not inside):
            y = output(tuned, x, at(tuned, z, linearised=True, response=True))
        gradient = torch.autograd.grad(y.square().sum(), tuned.responses.weight)[0]
        found.append((y.detach(), gradient))
    for exact, rounded in zip(*found, strict=True):
        assert exact.dtype == rounded.dtype
        assert 0 < float((exact - rounded).norm() / exact.norm()) < 0.05


# -- losses that differentiate


@pytest.mark.parametrize("engine", ENGINES)
def test_a_penalty_of_the_outputs_gradient_by_the_input_is_right(engine: str) -> None:
    build: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))  # noqa: E731
    tuned = problem(build, engine=engine)
    x, z = torch.randn(5, 3).requires_grad_(), torch.randn(5, 2)

    def penalty() -> Tensor:
        y = output(tuned, x, at(tuned, z, linearised=True, response=True))
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0].square().sum()

    direction, h, values = torch.randn_like(tuned.responses.weight), 1e-5, []
    gradient = torch.autograd.grad(penalty(), tuned.responses.weight)[0]
    for sign in (1, -2, 1):
        with torch.no_grad():
            tuned.responses.weight.add_(sign * h * direction)
        values.append(penalty().detach())
    torch.testing.assert_close((gradient * direction).sum(), (values[0] - values[1]) / (2 * h), rtol=1e-6, atol=1e-8)
    # The derivative by the input is that of the value.
    with torch.no_grad():
        shift = 1e-5 * torch.randn_like(x)
    slope = torch.autograd.grad(output(tuned, x, at(tuned, z, linearised=True)).sum(), x)[0]
    ends = [output(tuned, (x + s * shift).detach(), at(tuned, z, linearised=True)).sum() for s in (1, -1)]
    torch.testing.assert_close(2 * (slope * shift).sum(), (ends[0] - ends[1]).detach(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_called_by_the_model_has_every_engine(engine: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.layer(x).chunk(3, -1)
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    tuned = problem(Attention, engine=engine)
    x, z = torch.randn(5, 3, 4), torch.randn(5, 2)
    y = output(tuned, x, at(tuned, z, linearised=True, response=True))
    gradient = torch.autograd.grad(y.square().sum(), tuned.responses.weight)[0]
    tuned._engines = {True: ["manual"], False: ["manual"]}
    expected = output(tuned, x, at(tuned, z, linearised=True, response=True))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), tuned.responses.weight)[0])


# -- what is refused


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.first, self.drop = reentrant, nn.Linear(4, 4), nn.Dropout(0.2)
        self.block, self.out = nn.Sequential(nn.Linear(4, 4), nn.GELU(), self.drop), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)
        y: Tensor = self.out(hidden)
        return y


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_checkpointing_is_refused(reentrant: bool, method: str) -> None:
    tuned = problem(lambda: Recomputed(reentrant), method)
    with train(tuned, train_loss, valid_loss) as tuner, pytest.raises(ResponseError, match="Call that part itself"):
        tuner.train_step(torch.randn(6, 4))


class RecomputedBias(nn.Module):
    """What is computed again saves as many tensors without a response as with one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias, self.out = nn.Linear(4, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 1)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda h: torch.tanh(h + self.bias), self.first(x), use_reentrant=False)
        y: Tensor = self.out(self.drop(hidden))
        return y


@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_checkpointing_is_refused_where_the_user_saves_values_elsewhere(method: str) -> None:
    """Torch can't refuse the model's hooks where others are open; the gradient was wrong, in silence."""
    tuned, push = problem(RecomputedBias, method), torch._C._autograd._push_saved_tensors_default_hooks
    with train(tuned, train_loss, valid_loss) as tuner, torch.autograd.graph.save_on_cpu():
        with pytest.raises(ResponseError, match="Call that part itself"):
            tuner.train_step(torch.randn(6, 4))
        assert torch._C._autograd._push_saved_tensors_default_hooks is push
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            torch.ones(2, requires_grad=True).square().sum().backward()


@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
@pytest.mark.parametrize("refused", [False, True])
def test_the_users_hooks_on_what_gradients_save_go_on(refused: bool, method: str) -> None:
    """They were once switched off by the first step, silently, and refused after the training."""
    layers = nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)
    tuned = problem(lambda: nn.Sequential(*layers), method, bind={"drop": "2"})
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    message = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message
    with train(tuned, train_loss, valid_loss) as tuner:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for step in (tuner.train_step, tuner.train_step, tuner.valid_step):
                before = len(saved)
                step(torch.randn(6, 4))
                assert len(saved) > before
                assert message() is None
        assert message() is None
        if refused:
            with torch.autograd.graph.disable_saved_tensors_hooks("by the user"):
                tuner.train_step(torch.randn(6, 4))
                assert message() == "by the user"
            assert message() is None


class Adjoint(torch.autograd.Function):
    """A function of a module whose backward calls that again, as adjoint solvers of differential equations do."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x, *parameters)
        return torch.tanh(module(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = torch.tanh(ctx.module(x))
        return None, *torch.autograd.grad(y, (x, *parameters), gradients[0], allow_unused=True, create_graph=True)


class Solved(nn.Module):
    """A layer within such a function, whose parameters are passed on where they require a gradient."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.first, self.layer, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.2)
        self.layer.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        adjoint: Any = Adjoint
        y: Tensor = adjoint.apply(self.layer, self.first(x), *(p for p in self.layer.parameters() if p.requires_grad))
        return self.drop(y)


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning")
@pytest.mark.parametrize("engine", ["auto", "manual", "forward", "double"])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_weights_that_are_used_again_while_gradients_are_taken_are_refused(method: str, engine: str) -> None:
    tuned = problem(Solved, method, engine=engine)
    with train(tuned, train_loss, valid_loss) as tuner, pytest.raises(ResponseError) as error:
        tuner.train_step(torch.randn(6, 4))
    assert (method == "delta" and engine in ("manual", "forward")) or "Call that part itself" in str(error.value)


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning")
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_constant_weights_may_be_used_again(method: str) -> None:
    tuned = problem(lambda: Solved(frozen=True), method)
    with train(tuned, train_loss, valid_loss) as tuner:
        tuner.train_step(torch.randn(6, 4))
        tuner.valid_step(torch.randn(6, 4))


def test_hooks_around_the_whole_step_are_not() -> None:
    with train(problem(Siamese), train_loss, valid_loss) as tuner, torch.autograd.graph.save_on_cpu():
        tuner.train_step(torch.randn(6, 4))


def test_a_model_that_writes_on_its_input_is_refused() -> None:
    class Normalised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(x.mean()))

    tuned = problem(lambda: Normalised(4, 1))
    with train(tuned, train_loss, valid_loss) as tuner, pytest.raises(ResponseError, match="writes on its input"):
        tuner.train_step(torch.randn(6, 4))


class Rescaled(nn.Linear):
    """Weights that are halved for evaluation, as in a published recurrent model; and one that keeps their norm."""

    def __init__(self, bounded: bool) -> None:
        super().__init__(4, 2)
        self.bounded, self.halved = bounded, False

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.bounded:
                self.weight.div_(self.weight.norm().clamp_min(1))
            elif self.halved == self.training:
                self.weight.mul_(2.0 if self.training else 0.5)
                self.halved = not self.training
        return super().forward(x)


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning", "ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_a_model_that_writes_on_its_weights_is_refused_unless_they_stay(method: str) -> None:
    for bounded in (True, False):
        tuned = problem(partial(Rescaled, bounded), method)
        before = copy.deepcopy(tuned.model.state_dict())
        with train(tuned, train_loss, valid_loss, optimizer=still) as tuner:
            if bounded:
                tuner.train_step(torch.randn(6, 4))
                tuner.valid_step(torch.randn(6, 4))
                continue
            with pytest.raises(ResponseError, match="writes on its parameter 'weight' each time"):
                tuner.train_step(torch.randn(6, 4))
        assert all(torch.equal(value, before[name]) for name, value in tuned.model.state_dict().items())


def test_a_parameter_that_is_frozen_too_late_is_said() -> None:
    tuned = problem(Siamese)
    with train(tuned, train_loss, valid_loss) as tuner:
        tuner.train_step(torch.randn(6, 4))
        next(tuned.model.parameters()).requires_grad_(False)
        with pytest.raises(ResponseError, match="frozen after the response"):
            tuner.train_step(torch.randn(6, 4))


def unfrozen(model: Any) -> None:
    model.b.requires_grad_(True)


def pruned(model: Any) -> None:
    nn.utils.prune.l1_unstructured(model.a, "weight", amount=0.3)


def exchanged(model: Any) -> None:
    model.a = nn.Linear(4, 4)


def initialised(model: Any) -> None:
    model.a.weight = nn.Parameter(torch.randn(4, 4))


@pytest.mark.parametrize("change", [unfrozen, pruned, exchanged, initialised])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_parameters_that_come_later_are_said(change: Callable[[Any], None], method: str) -> None:
    """They were not trained, in silence."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False), nn.Dropout(0.2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.drop(self.b(torch.tanh(self.a(x))))
            return y

    tuned, x = problem(Two, method), torch.randn(6, 4)
    with train(tuned, train_loss, valid_loss) as tuner:
        tuner.train_step(x)
        tuner.valid_step(x)
        change(tuned.model)
        with pytest.raises(ResponseError, match=r"(b\.weight|a\.weight).*before `transform`"):
            tuner.train_step(x)
            tuner.valid_step(x)


def test_a_method_of_the_model_says_what_to_do() -> None:
    tuned = problem(Encoding)
    loss, text = lambda m, b, _: m.encode(b).square().mean(), "'encode' is of the original model.*let `forward` do"
    with train(tuned, loss, valid_loss) as tuner, pytest.raises(AttributeError, match=text):
        tuner.train_step(torch.randn(6, 4))
    with pytest.raises(AttributeError, match="no attribute 'decode'"):
        tuned.decode  # noqa: B018


class Encoding(Siamese):
    def encode(self, x: Tensor) -> Tensor:
        return 2 * x


def test_sequences_with_the_time_first_are_counted_along_their_own_axis() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.drop = nn.GRU(2, 3), nn.Dropout(0.2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.drop(self.gru(x)[0])[-1]
            return y

    loss: Callable[..., Tensor] = lambda m, b, v=None: (m(b[1]).sum(1) - b[0]).square().mean()  # noqa: E731
    with train(problem(Last, batch_dim=1), lambda m, b, v: loss(m, b) + l2(m, v.decay), loss) as tuner:
        tuner.train_step((torch.randn(6), torch.randn(4, 6, 2)))
        assert tuner.valid_step((torch.randn(5), torch.randn(4, 5, 2))) > 0


def test_a_batch_begins_with_its_examples() -> None:
    x, y = torch.arange(3), torch.randn(6, 4)
    loss: Callable[..., Tensor] = lambda model, batch, values=None: model(batch[1]).mean()  # noqa: E731
    with (
        train(problem(Siamese), loss, loss) as tuner,
        pytest.raises(ResponseError, match="first tensor of a batch of data"),
    ):
        tuner.train_step((x, y))


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda tuned: pickle.loads(pickle.dumps(tuned))], ids=["copy", "pickle"]
)
def test_a_copy_runs_as_the_original_does(way: Callable[[Tuned], Tuned]) -> None:
    tuned = problem(Siamese, bind={"drop": ["drop", "net.0.weight"]})
    batch, found = torch.randn(6, 4), []
    with train(tuned, train_loss, valid_loss) as tuner:
        tuner.train_step(batch)
    twin = way(tuned)
    for one in (tuned, twin):
        torch.manual_seed(2)
        with train(one, train_loss, valid_loss, seed=3) as tuner:
            found.append([tuner.train_step(batch), tuner.train_step(batch), tuner.valid_step(batch)])
    assert found[0] == found[1]
    assert twin.model.get_submodule("net.0") is not tuned.model.get_submodule("net.0")


@pytest.mark.parametrize("way", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["copy", "pickle"])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_a_copy_of_a_tuner_goes_on_as_the_original_does(method: str, way: Callable[[Any], Any]) -> None:
    tuned = problem(Siamese, method, bind={"drop": ["drop", "net.0.weight"]})
    batch, found = torch.randn(6, 4), []
    with train(tuned, train_loss, valid_loss, seed=3) as tuner:
        tuner.train_step(batch)
        twin = way(tuner)
        for one in (tuner, twin):
            torch.manual_seed(2)
            found.append([step(batch) for step in (one.train_step, one.valid_step, one.train_step, one.valid_step)])
    assert found[0] == found[1]
    assert twin.tuned is not tuned
    for mine, other in zip(tuned.parameters(), twin.tuned.parameters(), strict=True):
        assert mine is not other
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["decay", "scale"])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_a_hyperparameter_that_is_frozen_in_the_middle_stays(name: str, method: str) -> None:
    """Its optimizer went on by the gradient that it had had."""
    tuned, batch = problem(Siamese, method), torch.randn(6, 4)
    leaf = tuned.rho if name == "scale" else tuned.hyper.get_leaf(name)
    with train(tuned, train_loss, valid_loss, optimizer=still) as tuner:
        for free in (True, False, False, True):
            leaf.requires_grad_(free)
            before = [leaf.detach().clone(), tuned.hyper.get_leaf("drop").detach().clone()]
            tuner.train_step(batch)
            tuner.valid_step(batch)
            assert torch.equal(before[0], leaf) != free
            assert not torch.equal(before[1], tuned.hyper.get_leaf("drop"))


class Noisy(nn.Module):
    """A bound dropout that sees the batch twice, one after the other, behind another one that is random."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.layer = nn.Dropout(0.5), nn.Dropout(0.2), nn.Linear(4, 2)
        self.locked = metaopt.stn.VariationalDropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.drop(self.first(torch.cat([x, x]))).unsqueeze(0)
        y: Tensor = self.layer(self.locked(twice)).squeeze(0)
        return y[: len(x)]


def test_a_bound_dropout_behind_a_random_one_finds_its_examples_or_says_what_to_do() -> None:
    batch = torch.randn(6, 4)
    with train(problem(Noisy, bind={"drop": "drop"}), train_loss, valid_loss) as tuner:
        tuner.train_step(batch)
    # All that this one sees of the batch are ones.
    unknown = train(problem(Noisy, bind={"drop": "locked"}), train_loss, valid_loss)
    with unknown as tuner, pytest.raises(ResponseError, match="name its hyperparameter in `per_batch`"):
        tuner.train_step(batch)
    with train(problem(Noisy, bind={"drop": "locked"}, per_batch=["drop"]), train_loss, valid_loss) as tuner:
        tuner.train_step(batch)


def test_an_engine_that_was_asked_for_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LinearisedPass.tangent_rules, torch.tanh, lambda p, func, x: func(x))
    tuned = problem(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()), engine="manual")
    with pytest.raises(ResponseError, match=r"differ from torch's own.*engine=\"auto\""):
        output(tuned, torch.randn(4, 3), at(tuned, torch.randn(4, 2), linearised=True))


class Discrete(nn.Module):
    """Samples one of a few values, in evaluation too; or calls what torch's second derivatives have no number for."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.three, self.function = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2), function
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.three(self.drop(torch.tanh(self.two(self.function(torch.tanh(self.one(x)))))))
        return y


@pytest.mark.parametrize(
    "function", [partial(F.gumbel_softmax, tau=0.7, hard=True), partial(torch.logcumsumexp, dim=1)], ids=["one", "scan"]
)
def test_functions_that_were_taken_for_wrong_ones_keep_the_examples_apart(function: Callable[[Tensor], Tensor]) -> None:
    """Samples that another example may have too had moved; an engine that gives NaN was believed."""
    tuned, x = problem(lambda: Discrete(function)), torch.randn(6, 4)
    with train(tuned, train_loss, valid_loss) as tuner:
        tuner.train_step(x)
        tuner.valid_step(x)
    assert not tuned.fallback
    assert tuner.skipped == 0


def test_a_value_that_is_written_beneath_a_view_of_it_is_right() -> None:
    class Seen(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            hidden = x.new_zeros(len(x), 2)
            part = hidden[:, 0]
            hidden.add_(super().forward(x))
            return part.unsqueeze(1) * hidden

    x, z, found = torch.randn(4, 3), torch.randn(4, 2), []
    with pytest.raises(ResponseError, match=r"tensor that has views|write on its intermediate values"):
        output(problem(lambda: Seen(3, 2), engine="manual"), x, at(problem(lambda: Seen(3, 2)), z, linearised=True))
    for engine in ("forward", "double"):
        tuned = problem(lambda: Seen(3, 2), engine=engine)
        found.append(output(tuned, x, at(tuned, z, linearised=True)))
    torch.testing.assert_close(*found)


def test_a_gradient_within_the_model_is_right() -> None:
    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(3, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                energy = self.out(torch.tanh(self.first(x))).sum()
                return torch.autograd.grad(energy, x, create_graph=True)[0]

    x, z, found = torch.randn(4, 3), torch.randn(4, 2), []
    with pytest.raises(ResponseError, match=r"a gradient within the model.*engine=\"auto\""):
        output(problem(Forces, engine="manual"), x, at(problem(Forces), z, linearised=True))
    for engine in ("forward", "double"):
        tuned = problem(Forces, engine=engine)
        found.append(output(tuned, x, at(tuned, z, linearised=True)))
    torch.testing.assert_close(*found)
