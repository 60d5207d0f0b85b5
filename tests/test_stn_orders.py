"""Models that select examples, or put them in an order of their own: right for each example, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaopt.errors import ResponseError
from metaopt.stn import Tuned, transform
from metaopt.stn.layouts import NeedsGroups
from tests.stn_models import Packed, at, hyperparameters, output


class Sorted(nn.Module):
    """Runs on the examples from the largest to the smallest, or in another order, and puts them back."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.before, self.within, self.after = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(len(x))
        order = {"sorted": x[:, 0].argsort(), "reversed": places.flip(0), "rolled": places.roll(1)}[self.way]
        y = torch.tanh(self.within(torch.tanh(self.before(x))[order]))
        result: Tensor = self.after(y[order.argsort()])
        return result


class Experts(nn.Module):
    """Each example goes to the expert that its first entry chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(3, 4) for _ in range(3)]), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, chosen = x.new_zeros(len(x), 4), (x[:, 0] > -0.5).long() + (x[:, 0] > 0.5).long()
        for i, expert in enumerate(self.experts):
            where = (chosen == i).nonzero().squeeze(1)
            y = y.index_add(0, where, expert(x[where]))
        result: Tensor = self.head(torch.tanh(y))
        return result


class Flat(nn.Module):
    """A layer on all words of all sentences, along one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.words(x).reshape(-1, 4))).unflatten(0, (len(x), -1)).sum(1)


def responding(model: nn.Module, **options: Any) -> Tuned:
    tuned = transform(model.eval(), hyperparameters(), **options)
    with torch.no_grad():
        tuned.responses.weight.normal_()
    return tuned


def run(tuned: Tuned, x: Tensor, z: Tensor, **kind: Any) -> Tensor:
    """As the tuner does: again, with a perturbation for each group, where it can't be for each example."""
    while True:
        try:
            return output(tuned, x, at(tuned, z, groups=len(z) if tuned.fallback else None, **kind))
        except NeedsGroups as needs:
            tuned.fallback[needs.name] = needs.why


def looped(tuned: Tuned, x: Tensor, z: Tensor) -> Tensor:
    found = []
    for b in range(len(z)):
        changes = tuned.responses.changes(z[b])
        weights = {name: p + changes.get(name, 0) for name, p in tuned.model.named_parameters()}
        found.append(functional_call(tuned.model, weights, (x[b : b + 1],)))
    return torch.cat(found)


@pytest.mark.parametrize("way", ["sorted", "reversed", "rolled"])
def test_an_order_of_the_models_own_is_noticed(way: str) -> None:
    tuned, x, z = responding(Sorted(way)), torch.randn(7, 3), torch.randn(7, 3)
    torch.testing.assert_close(run(tuned, x, z), looped(tuned, x, z))
    assert set(tuned.fallback) == {"within.weight", "within.bias"}
    assert "another order" in tuned.fallback["within.weight"]


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_experts_that_see_some_of_the_examples_take_groups(first: float) -> None:
    tuned, z = responding(Experts()), torch.randn(7, 3)
    # The axes are looked for where all examples go to one expert, or to several.
    x = torch.randn(7, 3)
    run(tuned, x * torch.tensor([first, 1.0, 1.0]), z)
    torch.testing.assert_close(run(tuned, x, z), looped(tuned, x, z))
    assert not any("head" in name for name in tuned.fallback)


def test_flattened_sequences_may_be_of_another_length_than_the_first() -> None:
    tuned = responding(Flat())
    for examples, length in ((5, 6), (5, 3), (3, 12), (4, 7)):
        x, z = torch.randint(9, (examples, length)), torch.randn(examples, 3)
        torch.testing.assert_close(run(tuned, x, z), looped(tuned, x, z))
    assert not tuned.fallback


def test_packed_sequences_are_packed_by_the_model() -> None:
    tuned = responding(nn.LSTM(3, 4, batch_first=True))
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    with pytest.raises(ResponseError, match="pass the padded sequences and their lengths"):
        output(tuned, packed, at(tuned, torch.randn(2, 3)))  # type: ignore[arg-type]


class Unpadded(Packed):
    """Pads to the longest sequence of those that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, : 1 + int(x[:, 0, 0].gt(0).sum() > 0)]


def test_groups_that_differ_in_length_say_what_to_do() -> None:
    tuned = responding(Unpadded(nn.GRU))
    x = torch.cat([torch.ones(2, 4, 3), -torch.ones(2, 4, 3)])
    with pytest.raises(ResponseError, match="pad them to one length"):
        run(tuned, x, torch.randn(4, 3))


def test_a_bound_dropout_within_packed_recurrence_says_what_to_do() -> None:
    model = Packed(nn.LSTM)
    tuned = transform(model, hyperparameters(), bind={"a": "network"}, groups=1)
    with pytest.raises(ResponseError, match="Bind a dropout module before or behind"):
        run(tuned, torch.randn(4, 4, 3), torch.randn(1, 3).expand(4, 3))


class Reading(nn.Module):
    """A layer on what is read at indices, which depend on the data."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.before, self.after = way, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, chosen = torch.tanh(self.before(x)), x[..., 0] > 0
        order, last = x[:, 0, 0].argsort(descending=True, stable=True), x[:, :, 1].argmax(1)
        match self.way:
            case "masked words":
                return self.after(h[chosen])
            case "places":
                return self.after(h[chosen.nonzero(as_tuple=True)])
            case "flat places":
                return self.after(h.flatten(0, 1)[chosen.flatten().nonzero().squeeze(1)])
            case "sorted":
                return torch.zeros(len(x), h.shape[1], 2).index_copy(0, order, self.after(torch.sin(h[order])))
            case "selected":
                return self.after(h.index_select(0, order))[order.argsort()]
            case "list":
                return self.after(h[order.tolist()])[order.argsort()]
            case "put together":
                first = x[:, 0, 0] > 0
                return self.after(torch.cat([h[first], h[~first]]))[
                    torch.cat([first.argwhere(), (~first).argwhere()]).squeeze(1).argsort()
                ]
            case "written":
                y = torch.zeros_like(h)
                y[:] = h[order]
                return self.after(y)[order.argsort()]
            case "last":
                return self.after(h[torch.arange(len(x)), last])
            case "restored":
                return self.after(torch.sin(h[order])[order.argsort()])
            case "added":
                return self.after(torch.zeros_like(h).index_add(0, order, h[order]))
            case "gathered":
                return self.after(h.gather(1, last.reshape(-1, 1, 1).expand(-1, 2, 4)))
            case "table":
                return self.after(torch.eye(15, 4)[last] + h[:, 0])
        raise NotImplementedError


def sentences(*counts: int) -> Tensor:
    """As many chosen words in each; the sentences are in falling order of their first number where counts are equal."""
    x = torch.randn(len(counts), 3, 3)
    x[..., 0] = torch.tensor([[1.0 if i < n else -1.0 for i in range(3)] for n in counts])
    return x


@pytest.mark.parametrize("linearised", [False, True], ids=["centered", "delta"])
@pytest.mark.parametrize(
    "way", ["masked words", "places", "flat places", "sorted", "selected", "list", "put together", "written"]
)
@pytest.mark.filterwarnings("ignore:.*can't be linearised by hand:metaopt.FallbackWarning")
def test_an_order_that_depends_on_the_batch_is_noticed_in_any_batch(way: str, linearised: bool) -> None:
    """The first batch was in order, and the next one's examples had each other's weights."""
    torch.manual_seed(0)
    tuned, z = responding(Reading(way)), torch.randn(5, 3)
    for counts, falls_back in (((2, 2, 2, 2, 2), False), ((1, 3, 0, 3, 3), True)):
        x = sentences(*counts)
        found = run(tuned, x, z, linearised=linearised)
        assert bool(tuned.fallback) == falls_back
        if not linearised:
            torch.testing.assert_close(found, looped(tuned, x, z))
    assert set(tuned.fallback) >= {"after.weight"}
    assert "before.weight" not in tuned.fallback


@pytest.mark.parametrize("way", ["last", "restored", "added", "gathered", "table"])
def test_what_is_read_in_the_order_of_the_batch_responds_per_example(way: str) -> None:
    torch.manual_seed(0)
    tuned, z = responding(Reading(way)), torch.randn(5, 3)
    for _ in range(3):
        x = torch.randn(5, 3, 3)
        torch.testing.assert_close(run(tuned, x, z), looped(tuned, x, z))
    assert not tuned.fallback
