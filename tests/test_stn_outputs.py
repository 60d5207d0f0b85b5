"""What a model returns, and what it is called with, may be objects: every tensor within responds."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn.utils.rnn import pack_padded_sequence

import metaopt
from metaopt.errors import ResponseError
from metaopt.stn import Tuned, train, transform
from metaopt.stn.perturbations import Perturbation
from metaopt.stn.trees import leaves
from tests.stn_models import at, hyperparameters, output

ENGINES = ("manual", "forward", "double")


@dataclass
class Scores:
    first: Tensor
    rest: list[Tensor]
    name: str = "scores"


@dataclass(frozen=True, slots=True)
class Frozen:
    first: Tensor
    second: Tensor


class Plain:
    """An object that refers to itself."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second, self.me = first, second, self


class Named(dict[str, Tensor]):
    """A dictionary whose type is no container that torch knows."""


KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "data class": lambda a, b: Scores(a, [b]),
    "frozen": Frozen,
    "object": Plain,
    "dictionary": lambda a, b: Named(first=a, second=b),
    "user dictionary": lambda a, b: UserDict(first=a, second=b),
    "distribution": lambda a, b: Independent(Normal(a, b.exp()), 1),
    "beside": lambda a, b: (a, {"law": Normal(a, b.exp())}),
    "packed": lambda a, b: pack_padded_sequence(torch.stack([a, b], 1), torch.full((len(a),), 2, device="cpu"), True),
}
kinds = pytest.mark.parametrize("kind", list(KINDS))


class Returning(nn.Module):
    """Two tensors, in an object."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 4), kind

    def forward(self, x: Tensor) -> Any:
        return KINDS[self.kind](*torch.tanh(self.layer(x)).chunk(2, -1))


def responding(model: nn.Module, method: str = "delta", **options: Any) -> Tuned:
    tuned = transform(model, hyperparameters(), method, **options)
    with torch.no_grad():
        tuned.responses.weight.normal_()
    return tuned


def floats(value: Any) -> Tensor:
    return torch.cat([y.flatten() for y in leaves(value) if isinstance(y, Tensor) and y.is_floating_point()])


# Torch has no forward derivative of packing.
@pytest.mark.parametrize(
    ("kind", "engine"), [(k, e) for k in KINDS for e in ENGINES if (k, e) != ("packed", "forward")]
)
def test_tensors_within_objects_are_linearised(kind: str, engine: str) -> None:
    torch.manual_seed(0)
    tuned, x, z = responding(Returning(kind), engine=engine, verify=False), torch.randn(4, 3), torch.randn(4, 3)

    def curve(scale: float, linearised: bool) -> Tensor:
        return floats(output(tuned, x, at(tuned, scale * z, linearised=linearised, response=True))).detach()

    h = 1e-5
    tangent = (curve(h, False) - curve(-h, False)) / (2 * h)
    assert float(tangent.abs().max()) > 0.1
    torch.testing.assert_close(curve(1.0, True) - curve(0.0, True), tangent, rtol=1e-6, atol=1e-8)


@kinds
def test_the_kind_and_the_rest_of_an_object_stay(kind: str) -> None:
    tuned, x = responding(Returning(kind)), torch.randn(4, 3)
    result: Any = output(tuned, x, at(tuned, torch.randn(4, 3), linearised=True, response=True))
    plain = tuned.model(x)
    assert type(result) is type(plain)
    assert len(leaves(result)) == len(leaves(plain))
    if kind == "distribution":
        assert result.log_prob(torch.zeros(4, 2)).shape == (4,)


def test_a_likelihood_trains_the_response() -> None:
    torch.manual_seed(0)
    tuned = transform(Returning("distribution"), metaopt.Hyperparameters(noise=metaopt.positive(0.3)), "delta")
    x = torch.randn(4, 3)

    def train_loss(model: Any, batch: Tensor, values: Any) -> Tensor:
        noisy: Tensor = batch + values.noise.unsqueeze(1) * torch.randn_like(batch)
        likelihood: Tensor = model(noisy).log_prob(torch.ones(4, 2))
        return -likelihood.mean()

    with train(tuned, train_loss, lambda model, batch: -model(batch).log_prob(torch.ones(4, 2)).mean()) as tuner:
        tuner.train_step(x)
        tuner.valid_step(x)
    assert float(tuned.responses.weight.detach().abs().max()) > 0


def test_objects_are_put_together_from_groups_or_say_what_to_do() -> None:
    x, z = torch.randn(4, 3), torch.randn(2, 3).repeat_interleave(2, 0)
    for kind in ("data class", "dictionary", "distribution"):
        tuned = responding(Returning(kind), verify=False)
        tuned.fallback = {"layer.bias": "by hand"}
        point = Perturbation(z, tuned.coordinates.values(z), 2, linearised=True, response=True)
        if kind != "distribution":
            assert floats(output(tuned, x, point)).numel() == 16
            continue
        with pytest.raises(ResponseError, match="`Independent`, which can't be put together"):
            output(tuned, x, point)


class Taking(nn.Module):
    """A layer on one field of what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch: Any) -> Tensor:
        y: Tensor = self.layer(batch["first"] if isinstance(batch, UserDict) else batch.first)
        return y


@pytest.mark.parametrize("kind", ["data class", "frozen", "object", "user dictionary"])
def test_batches_may_be_objects(kind: str) -> None:
    tuned, batch = responding(Taking()), KINDS[kind](torch.randn(4, 3), torch.randn(4, 1))
    loss = lambda model, batch, *_: model(batch).square().mean()  # noqa: E731
    with train(tuned, loss, lambda model, batch: loss(model, batch)) as tuner:
        with pytest.warns(metaopt.UnusedHyperparameterWarning):
            tuner.train_step(batch)
        tuner.valid_step(batch)
    assert not tuned.fallback


class Keeping(nn.Module):
    """Keeps a penalty as an attribute, and leaves its features to a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.penalty = nn.Linear(3, 4), nn.Linear(4, 2), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        self.penalty = hidden.square().mean()
        y: Tensor = self.head(hidden)
        return y


@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
@pytest.mark.parametrize("kind", ["attribute", "hook", "detached", "shape", "no grad"])
def test_what_is_kept_beside_the_output_is_not_linearised_and_says_so(kind: str, method: str) -> None:
    """The loss of such a value trained the weights, and the response as if it had none."""
    model, seen = Keeping(), []
    model.body.register_forward_hook(lambda *given: seen.append(given[2]))
    tuned = transform(model, metaopt.Hyperparameters(noise=metaopt.positive(0.3)), method)

    def train_loss(tuned: Any, batch: Tensor, values: Any) -> Tensor:
        loss: Tensor = tuned(batch + values.noise.unsqueeze(1)).square().mean()
        with torch.no_grad():
            size = seen[-1].norm() if kind == "no grad" else 0
        more = {
            "attribute": lambda: model.penalty,
            "hook": lambda: seen[-1].abs().mean(),
            "shape": lambda: len(seen[-1]),
        }
        return loss + more.get(kind, lambda: model.penalty.detach() + size)()

    with train(tuned, train_loss, lambda model, batch: model(batch).square().mean()) as tuner:
        if method == "delta" and kind in ("attribute", "hook"):
            with pytest.raises(ResponseError, match=r"kept beside its output.*let `forward` return it too"):
                tuner.train_step(torch.randn(4, 3))
        else:
            tuner.train_step(torch.randn(4, 3))
