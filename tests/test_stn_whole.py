"""Models that can't be run on a part of a batch, and models with a state of their own."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metaopt.errors import FallbackWarning, ResponseError
from metaopt.stn import l2, train, transform
from metaopt.stn.checks import groups_of
from tests.stn_models import at, hyperparameters
from tests.test_stn_users import FIXED, problem


class Graph(nn.Module):
    """Messages along the edges of one graph, whose nodes are the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.drop, self.two = nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = torch.tanh(self.one(x))
        hidden = torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])
        y: Tensor = self.two(self.drop(hidden))
        return y


class Carried(nn.Module):
    """A state with the examples along its second axis, beside inputs with them along their first."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.drop, self.out = nn.GRU(3, 4, 2, batch_first=True), nn.Dropout(0.2), nn.Linear(4, 2)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        y: Tensor = self.out(self.drop(self.gru(x, state)[0]))
        return y


class Halves(nn.Module):
    """The first half of a batch against the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 4), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = torch.stack(self.drop(self.layer(x)).chunk(2))
        return one * two


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "graph": (Graph, lambda: (torch.randn(6, 3), torch.tensor([[0, 5, 2, 3, 4], [5, 1, 3, 2, 0]]))),
    "carried": (Carried, lambda: (torch.randn(6, 4, 3), torch.randn(2, 6, 4))),
    "halves": (Halves, lambda: (torch.randn(6, 3),)),
}


def valid_loss(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(*batch).square().mean()
    return loss


def train_loss(model: Any, batch: Any, values: Any) -> Tensor:
    return valid_loss(model, batch) + l2(model, values.decay)


@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_batch_that_can_not_be_split_has_one_perturbation(name: str, method: str) -> None:
    torch.manual_seed(0)
    build, draw = MODELS[name]
    tuned, batch = problem(build, method), draw()
    with train(tuned, train_loss, valid_loss, **FIXED) as tuner:
        with pytest.warns(FallbackWarning, match=r"was run on \d examples.*that failed"):
            tuner.train_step(batch)
        tuner.train_step(batch)
        tuner.valid_step(batch)
    assert set(tuned.fallback) == tuned.names
    model, h, expected = tuned.model.eval(), 1e-5, []
    for unit in torch.eye(2):
        losses = []
        for sign in (h, -h):
            z = tuned.coordinates.leaf() + sign * unit if method == "stn" else sign * unit / tuned.reference
            changes = tuned.responses.changes(z)
            weights = {n: p + changes[n] for n, p in model.named_parameters()}
            losses.append(functional_call(model, weights, batch).square().mean())
        expected.append((losses[0] - losses[1]) / (2 * h))
    gradient = torch.stack([leaf.grad for leaf in tuner.leaves if leaf.grad is not None])
    torch.testing.assert_close(gradient, torch.stack(expected), rtol=1e-6, atol=1e-9)


class Stateful(nn.Module):
    """Goes on from where the last batch ended, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.drop, self.out = nn.GRUCell(3, 4), nn.Dropout(0.2), nn.Linear(4, 2)
        self.state: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        state = self.cell(x, self.state)
        self.state = state.detach()
        y: Tensor = self.out(self.drop(state))
        return y


def trained(model: nn.Module, batches: list[Tensor], rate: float) -> list[float]:
    """The losses of plain training."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=rate), []
    for x in batches:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), torch.ones(5, 2))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning", "ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("method", ["centered", "delta"])
def test_a_state_between_batches_moves_as_in_plain_training(method: str) -> None:
    torch.manual_seed(0)
    tuned, batches = problem(Stateful, method), [torch.randn(5, 3) for _ in range(3)]
    plain = copy.deepcopy(tuned.model)
    plain.get_submodule("drop").eval()
    losses = trained(plain, batches, 0.1)

    def loss_of(model: Any, batch: Tensor, _: Any) -> Tensor:
        return F.mse_loss(model(batch), torch.ones(5, 2))

    with train(tuned, loss_of, valid_loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)) as tuner:
        tuned.model.get_submodule("drop").eval()
        assert [tuner.train_step(x) for x in batches] == losses
    assert tuned.model.calls == 3
    torch.testing.assert_close(tuned.model.state_dict(), plain.state_dict(), rtol=0, atol=0)


class Held(nn.Module):
    """A state within what a module keeps: in a list, a dictionary, or a tensor that is no buffer and is written on."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.cell, self.out, self.way = nn.GRUCell(3, 3), nn.Linear(3, 2), way
        self.written, self.kept, self.found = torch.zeros(3), [torch.zeros(3), [0]], {"state": torch.zeros(3)}
        self.past: collections.deque[Tensor] = collections.deque(maxlen=2)
        self.seen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        kept: Any = self.kept
        now = {"written": self.written, "list": kept[0], "dict": self.found["state"]}.get(self.way)
        before = sum(self.past, torch.zeros(3)) if now is None else now
        hidden: Tensor = self.cell(x, before.repeat(len(x), 1))
        after = hidden.detach().mean(0)
        kept[1][0] += 1
        self.seen.add(len(self.seen))
        if self.way == "written":
            self.written.mul_(0.5).add_(after)
        elif self.way == "list":
            kept[0] = after
        elif self.way == "dict":
            self.found["state"] = after
            self.found[f"call {len(self.found)}"] = after
        else:
            self.past.append(after)
        y: Tensor = self.out(torch.tanh(hidden)) * (1 + 0.1 * kept[1][0] + 0.1 * len(self.seen))
        return y


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning", "ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("way", ["written", "list", "dict", "deque"])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_a_state_within_what_a_module_keeps_moves_once(method: str, way: str, verify: bool) -> None:
    """It went on from the weights' step in the response's; with the comparison, weights were said to be used unseen."""
    torch.manual_seed(0)
    tuned, batches = problem(lambda: Held(way), method, bind={}, verify=verify), [torch.randn(5, 3) for _ in range(4)]
    plain = copy.deepcopy(tuned.model)
    rate = 0.0 if method == "stn" else 0.1
    with torch.no_grad():
        tuned.responses.weight.zero_()
    losses = trained(plain, batches, rate)

    def loss_of(model: Any, batch: Tensor, _: Any) -> Tensor:
        return F.mse_loss(model(batch), torch.ones(5, 2))

    seen: list[float] = []
    with train(tuned, loss_of, valid_loss, optimizer=lambda p: torch.optim.SGD(p, lr=rate)) as tuner:
        step = tuner.descent.step

        def noted(what: str, loss: Tensor, *moves: Any) -> bool:
            seen.append(loss.item())
            return step(what, loss, *moves)

        tuner.descent.step = noted  # type: ignore[method-assign]
        for x in batches:
            tuner.train_step(x)
    torch.testing.assert_close(seen[:: 1 if method == "stn" else 2], losses)
    assert tuned.model.seen == plain.seen
    for name in ("written", "kept", "found"):
        torch.testing.assert_close(getattr(tuned.model, name), getattr(plain, name))
    torch.testing.assert_close(list(tuned.model.past), list(plain.past))  # type: ignore[arg-type]


GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "python": lambda: random.Random(3),
    "numpy": lambda: numpy.random.default_rng(3),
    "twister": lambda: numpy.random.RandomState(3),
    "list": lambda: [torch.Generator().manual_seed(3)],
}


class Drawing(nn.Module):
    """Draws from a generator of its own."""

    drawn: ClassVar[list[float]] = []

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer, self.generator = nn.Linear(3, 2), GENERATORS[name]()

    def forward(self, x: Tensor) -> Tensor:
        own = self.generator[0] if isinstance(self.generator, list) else self.generator
        factor = float(torch.rand((), generator=own) if isinstance(own, torch.Generator) else own.uniform(0, 1))
        self.drawn.append(factor)
        y: Tensor = self.layer(x * factor) if self.training else self.layer(x)
        return y


@pytest.mark.filterwarnings("ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", GENERATORS)
def test_both_steps_draw_the_same_from_a_generator_of_the_models_own(name: str, verify: bool) -> None:
    """It went on from the first in the second, or was said to be a use of weights that can't be seen."""
    torch.manual_seed(0)
    tuned, x = problem(lambda: Drawing(name), "delta", bind={}, verify=verify), torch.randn(5, 3)
    with train(tuned, lambda m, b, _: F.mse_loss(m(b), torch.ones(5, 2)), valid_loss) as tuner:
        tuner.train_step(x)
        Drawing.drawn.clear()
        for _ in range(2):
            tuner.train_step(x)
    first, again, second, third = Drawing.drawn
    assert first == again != second == third


class Meter:
    """An object of the user's own."""

    calls = 0


class Metered(nn.Module):
    """Keeps its state in an object that can't be known."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.meter = nn.Linear(3, 2), Meter()

    def forward(self, x: Tensor) -> Tensor:
        self.meter.calls += 1
        y: Tensor = self.layer(x) * self.meter.calls
        return y


@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_a_state_in_an_object_of_ones_own_says_what_to_do(method: str) -> None:
    """It was said that weights are used in a way that can't be seen."""
    tuned, x = problem(Metered, method, bind={}), torch.randn(5, 3)
    with (
        train(tuned, lambda m, b, _: m(b).square().mean(), valid_loss) as tuner,
        pytest.raises(ResponseError, match="another output when it is called again"),
    ):
        tuner.train_step(x)


class Buffered(nn.Module):
    """A state that is a buffer: written in place, a new tensor each time, or none at first."""

    state: Tensor | None
    # Of the class: what an instance keeps is put back after the response's step.
    seen: ClassVar[list[Tensor | None]] = []

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.other, self.way = nn.Linear(3, 3), nn.Linear(3, 3), way
        self.norm: Any = nn.BatchNorm1d(3)
        self.register_buffer("state", None if way == "none" else torch.zeros(3))

    def forward(self, x: Tensor, *, first: bool = True) -> Tensor:
        y: Tensor = (self.layer if first else self.other)(torch.tanh(self.norm(x)))
        state = self.state
        self.seen.append(None if state is None else state.clone())
        if state is not None:
            y = y + state
        if self.training and self.way == "written" and state is not None:
            state.mul_(0.5).add_(x.mean(0))
        elif self.training:
            self.state = x.mean(0) + (0 if state is None else 0.5 * state)
        return y


@pytest.mark.filterwarnings("ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("way", ["written", "new", "none"])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_both_steps_start_from_the_same_buffers(way: str, method: str) -> None:
    """The response's step began from what the weights' step had left."""
    torch.manual_seed(0)
    model, state = Buffered(way), None
    tuned = problem(lambda: model, method, bind={})
    with train(tuned, lambda m, b, _: F.mse_loss(m(b), torch.ones(5, 3)), lambda m, b: m(b).square().mean()) as tuner:
        for number in range(1, 4):
            x = torch.randn(5, 3)
            Buffered.seen.clear()
            tuner.train_step(x)
            found = Buffered.seen[-1 if method == "stn" else -2 :]
            assert len(found) == (1 if method == "stn" else 2)
            for seen in found:
                torch.testing.assert_close(seen, torch.zeros(3) if state is None and way != "none" else state)
            state = x.mean(0) + (0 if state is None else 0.5 * state)
            torch.testing.assert_close(model.state, state)
            assert int(model.norm.num_batches_tracked or 0) == number
            tuner.valid_step(x)


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning", "ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_a_step_that_is_done_again_moves_buffers_once(method: str) -> None:
    """A layer that the first batches did not use takes groups, when the step is half done."""
    model, state = Buffered("written"), torch.zeros(3)
    tuned = problem(lambda: model, method)

    def loss_of(model: Any, batch: tuple[Tensor, bool], _: Any) -> Tensor:
        return F.mse_loss(model(batch[0], first=batch[1]), torch.ones(5, 3))

    with train(tuned, loss_of, valid_loss) as tuner:
        for number, first in enumerate([True, True, False, False], 1):
            x = torch.randn(5, 3)
            tuner.train_step((x, first))
            state = 0.5 * state + x.mean(0)
            torch.testing.assert_close(model.state, state)
            assert int(model.norm.num_batches_tracked or 0) == number


class Masked(nn.Module):
    """Attention with a mask that all examples have in common, and a parameter that takes groups."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        y = self.layer(x) * self.scale[self.scale != 0]
        scores = y @ y.transpose(1, 2)
        return (scores if hidden is None else scores.masked_fill(hidden, -1e9)).softmax(-1) @ y


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning")
@pytest.mark.parametrize("by_name", [False, True])
def test_a_mask_as_long_as_the_batch_is_large_is_not_split(by_name: bool) -> None:
    """Its rows were given to the examples, in silence."""
    torch.manual_seed(0)
    tuned = transform(Masked(), hyperparameters(), "centered")
    with torch.no_grad():
        tuned.responses.weight.normal_()
    hidden = torch.ones(8, 8).triu(1).bool()
    for examples in (6, 8):
        x, z = torch.randn(examples, 8, 3), torch.randn(examples, 3)
        tuned.fallback = {"scale": "its indices depend on its values"}
        with tuned.perturbed(at(tuned, z, groups=examples)):
            y = tuned(x, hidden=hidden) if by_name else tuned(x, hidden)
        for i in range(examples):
            changes = tuned.responses.changes(z[i])
            weights = {n: p + changes[n] for n, p in tuned.model.named_parameters()}
            torch.testing.assert_close(y[i : i + 1], functional_call(tuned.model, weights, (x[i : i + 1], hidden)))


class Normalised(nn.Module):
    """A batch norm that is written by hand, and a parameter that takes groups: from the start, or by another task."""

    def __init__(self, late: bool, rate: float) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(3, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4), requires_grad=not late)
        self.late, self.drop = late, nn.Dropout(rate)
        self.register_buffer("mean", torch.zeros(4))
        self.mean: Tensor

    def forward(self, x: Tensor, first: bool = True) -> Tensor:
        y = self.layer(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            y = self.drop(y) - y.mean(0)
        else:
            y = y - (y.mean(0) if self.late else self.mean)
        y = torch.tanh(y if first else self.other(y))
        return y if self.late else y * self.scale[self.scale != 0]


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning", "ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_examples_that_see_each_other_in_training_are_not_split(late: bool, rate: float) -> None:
    """Groups had statistics of their own, in silence."""
    torch.manual_seed(0)
    tuned = transform(Normalised(late, rate), hyperparameters(), "centered")
    loss: Callable[..., Tensor] = lambda m, b, v=None: m(*b).square().mean()  # noqa: E731
    with train(tuned, loss, loss) as tuner:
        for first in (True, not late, not late):
            tuner.train_step((torch.randn(6, 3), first))
        assert (tuned.mixes, groups_of(tuned, 6)) == (True, 1)
        tuner.valid_step((torch.randn(6, 3), not late))


class Averaging(Buffered):
    """With a parameter that takes groups."""

    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.scale, self.norm = nn.Parameter(torch.randn(3)), nn.Identity()

    def forward(self, x: Tensor, *, first: bool = True) -> Tensor:
        y: Tensor = super().forward(x, first=first) * self.scale[self.scale != 0]
        return y


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning", "ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("way", ["written", "new"])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_statistics_are_those_of_the_whole_batch(way: str, method: str) -> None:
    """With STN each group moved them."""
    torch.manual_seed(0)
    model, state = Averaging(way), torch.zeros(3)
    tuned = transform(model, hyperparameters(), method)
    loss: Callable[..., Tensor] = lambda m, b, v=None: m(b).square().mean()  # noqa: E731
    with train(tuned, loss, loss) as tuner:
        for x in torch.randn(3, 6, 3):
            tuner.train_step(x)
            state = x.mean(0) + 0.5 * state
            torch.testing.assert_close(model.state, state)
    assert tuned.fallback


class Counting(nn.Module):
    """Counts its batches, and has a parameter that takes groups."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.scale, self.way = nn.Linear(3, 3), nn.Parameter(torch.randn(3)), way
        self.number, self.held, self.written = 0, [0], torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.way == "number":
            self.number += 1
        elif self.training and self.way == "list":
            self.held[0] += 1
        elif self.training:
            self.written += 1
        y: Tensor = self.layer(x) * self.scale[self.scale != 0]
        return y / (1 + self.number + self.held[0] + self.written)


@pytest.mark.filterwarnings("ignore::metaopt.FallbackWarning", "ignore::metaopt.UnusedHyperparameterWarning")
@pytest.mark.parametrize("way", ["number", "list", "written"])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_a_batch_in_groups_is_counted_once(way: str, method: str) -> None:
    """Each group of a joint step moved it, and in the response's step each went on from the one before."""
    torch.manual_seed(0)
    model, losses = Counting(way), []
    tuned = problem(lambda: model, method, bind={})
    with torch.no_grad():
        tuned.responses.weight.zero_()

    def loss_of(model: Any, batch: Tensor, _: Any) -> Tensor:
        loss = F.mse_loss(model(batch), torch.ones(9, 3))
        losses.append(loss.item())
        return loss

    still: Any = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    with train(tuned, loss_of, valid_loss, optimizer=still) as tuner:
        for _ in range(3):
            tuner.train_step(torch.randn(9, 3))
    if method != "stn":
        assert losses[-2] == pytest.approx(losses[-1])
    assert model.number + model.held[0] + model.written == 3
