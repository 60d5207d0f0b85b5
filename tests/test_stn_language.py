"""Regularisers of language models: variational dropout, dropped words, drop-connect, penalties of activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from metaopt.errors import ResponseError
from metaopt.stn import (
    Tuned,
    VariationalDropout,
    activation_penalty,
    temporal_activation_penalty,
    train,
    transform,
)
from tests.stn_models import Bare, at, output

ENGINES = ("manual", "forward", "double")
METHODS = ("stn", "centered", "delta")
networks = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
BIND: dict[str, Any] = {
    "locked": ["before", "behind"],
    "words": "words",
    "connect": ["network.weight_hh_l0", "network.weight_hh_l1", "middle.weight"],
}


class Language(nn.Module):
    """A small language model with a tied decoder, that returns its hidden states too."""

    def __init__(self, kind: Callable[..., nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.before, self.behind = VariationalDropout(0.2, batch_first=True), VariationalDropout(0.2, batch_first=True)
        self.network = kind(4, 4, 2, batch_first=True)
        self.middle, self.decoder = nn.Linear(4, 4), nn.Linear(4, 7)
        self.decoder.weight = self.words.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.behind(self.middle(self.network(self.before(self.words(x)))[0]))
        return self.decoder(hidden), hidden


class Scores(Language):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def rates(value: float = 0.4) -> metaopt.Hyperparameters:
    return metaopt.Hyperparameters(**{name: metaopt.interval(value, 0, 0.9) for name in BIND})


def responding(kind: Any = nn.LSTM, model: type[nn.Module] = Scores, **options: Any) -> Tuned:
    tuned = transform(model(kind), rates(), bind=BIND, **options)
    with torch.no_grad():
        tuned.responses.weight.normal_()
    return tuned


def sentences(n: int = 5) -> Tensor:
    return torch.randint(7, (n, 6))


def points(tuned: Tuned, n: int = 5) -> Tensor:
    z = torch.randn(n, 3)
    z[:, tuned.coordinates.shared] = z[:1, tuned.coordinates.shared]
    return z


@networks
@pytest.mark.parametrize("options", [{}, {"banks": 2}, {"rank": 2}], ids=str)
def test_engines_agree_under_masks_of_weights(kind: Any, options: dict[str, Any]) -> None:
    tuned, x = responding(kind, **options), sentences()
    z, found = points(tuned), []
    for engine in ENGINES:
        tuned._engines = {True: [engine], False: [engine]}
        torch.manual_seed(3)
        y = output(tuned, x, at(tuned, z, linearised=True, response=True))
        found.append((y, torch.autograd.grad(y.square().sum(), list(tuned.responses.parameters()))))
    for y, gradients in found[1:]:
        torch.testing.assert_close(y, found[0][0], rtol=1e-10, atol=1e-10)
        for a, b in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-9)


@networks
def test_an_example_in_a_batch_is_the_example_alone_under_the_same_masks(kind: Any) -> None:
    """Each sequence with its changed weights written into the model, and nothing left to respond."""
    tuned, x = responding(kind), sentences()
    z = points(tuned)
    torch.manual_seed(3)
    y = output(tuned, x, at(tuned, z))
    for b in range(5):
        changed = transform(copy.deepcopy(tuned.model), rates(), bind=BIND)
        with torch.no_grad():
            for name, change in tuned.responses.changes(z[b]).items():
                changed.slots.parameter(name).add_(change)
        torch.manual_seed(3)
        # The rates are those of the example; U is zero, so that the weights are the model's own.
        alone = output(changed, x, at(changed, z))
        torch.testing.assert_close(y[b], alone[b], rtol=1e-9, atol=1e-10)


def test_connections_of_a_parameter_without_a_rule_are_dropped_too() -> None:
    hyper = metaopt.Hyperparameters(connect=metaopt.interval(0.4, 0, 0.9))
    tuned = transform(Bare(), hyper, bind={"connect": ["matrix", "layer.weight"]}, groups=2)
    with torch.no_grad():
        tuned.responses.weight.normal_()
    x, z, found = torch.randn(4, 3), torch.full((4, 1), 0.7), []
    for engine in ENGINES:
        tuned._engines = {True: [engine], False: [engine]}
        torch.manual_seed(3)
        found.append(output(tuned, x, at(tuned, z, groups=2, linearised=True)))
    for y in found[1:]:
        torch.testing.assert_close(y, found[0], rtol=1e-10, atol=1e-10)


def test_no_rate_and_no_perturbation_is_the_model_itself() -> None:
    tuned, x = responding(), sentences()
    point = at(tuned, torch.zeros(5, 3))
    for name in BIND:
        dict.__setitem__(point.values, name, torch.zeros(5))
    plain = copy.deepcopy(tuned.model)
    for module in (plain.before, plain.behind):
        module.p = 0.0  # type: ignore[union-attr]
    torch.testing.assert_close(output(tuned, x, point), plain(x), rtol=1e-12, atol=1e-12)


def test_in_evaluation_nothing_is_dropped() -> None:
    tuned, x = responding().eval(), sentences()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    y = tuned(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(y, tuned.model(x), rtol=0, atol=0)


class Watching(nn.Module):
    """Notes the weights that its layers use."""

    # Of the class: what an instance keeps is put back after the response's step.
    seen: ClassVar[list[tuple[Tensor, Tensor, Tensor]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(200, 10), nn.Linear(10, 100)
        self.locked = VariationalDropout(0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        ones = self.locked(torch.ones(len(x), 6, 50)).detach()
        y: Tensor = self.layer(self.words(x)).mean((1, 2))
        with torch._C.DisableTorchFunction():
            self.seen.append((self.words.weight.detach(), self.layer.weight.detach(), ones))
        return y


def watched(rate: float, scale: float) -> Tuned:
    hyper = metaopt.Hyperparameters(
        words=metaopt.interval(rate, 0, 0.9, scale=scale),
        connect=metaopt.interval(rate, 0, 0.9, scale=scale),
        locked=metaopt.interval(rate, 0, 0.9, scale=scale),
    )
    return transform(Watching(), hyper, bind={"words": "words", "connect": "layer.weight"}, verify=False)


def step(tuned: Tuned) -> list[tuple[Tensor, Tensor, Tensor]]:
    seen = Watching.seen
    x = torch.randint(200, (400, 6))
    with train(tuned, lambda m, b, v: m(b).square().mean(), lambda m, b: m(b).mean(), optimizer=still) as tuner:
        tuner.train_step(x)
        seen.clear()
        tuner.train_step(x)
    return list(seen)


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def test_both_steps_of_a_centred_method_see_the_same_masks() -> None:
    first, second = step(watched(0.4, 1e-9))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


def test_masks_have_the_law_that_they_should() -> None:
    """Whole words, single connections, one mask for all time steps; at the rate, and inverted."""
    tuned = watched(0.3, 1e-9)
    words, weights, ones = step(tuned)[0]
    table, layer = (tuned.slots.parameter(n).detach() for n in ("words.weight", "layer.weight"))
    factor = words / table
    assert torch.equal(factor == 0, (factor == 0).any(1, keepdim=True).expand_as(factor))
    for kept, share in ((factor[:, 0], 0.1), (weights / layer, 0.05), (ones[:, 0], 0.01)):
        torch.testing.assert_close(kept[kept > 0], torch.full_like(kept[kept > 0], 1 / 0.7))
        assert float((kept == 0).double().mean()) == pytest.approx(0.3, abs=share)
    assert torch.equal(ones, ones[:, :1].expand_as(ones))
    assert not torch.equal(ones[0], ones[1])


def test_each_sequence_has_its_own_rate_and_a_minibatch_one_mask_of_weights() -> None:
    tuned = watched(0.4, 1.5)
    assert tuned.coordinates.shared == [0, 1]
    _, (words, _, ones) = step(tuned)
    found = torch.unique((ones[ones > 0]).round(decimals=9))
    assert len(found) > 300
    factor = words / tuned.slots.parameter("words.weight").detach()
    assert len(torch.unique(factor.round(decimals=9))) == 2


def test_a_tied_decoder_keeps_the_words_that_the_look_up_drops() -> None:
    tuned = transform(
        Scores(), metaopt.Hyperparameters(words=metaopt.interval(0.8999, 0, 0.9)), bind={"words": "words"}
    )
    seen: list[Tensor] = []
    tuned.model.decoder.register_forward_hook(lambda m, i, o: seen.append(m.weight.detach()))  # type: ignore[union-attr]
    tuned.model.words.register_forward_hook(lambda m, i, o: seen.append(m.weight.detach()))  # type: ignore[union-attr]
    tuned(sentences())
    assert (seen[0] == 0).any()
    assert torch.equal(seen[1], tuned.slots.parameter("words.weight"))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_tunes_all_of_them(method: str) -> None:
    hyper = metaopt.Hyperparameters(
        **{name: metaopt.interval(0.3, 0, 0.9) for name in BIND},
        activation=metaopt.positive(0.1),
        slowness=metaopt.positive(0.1),
    )
    tuned = transform(Language(), hyper, method, bind=BIND, per_batch=["activation", "slowness"])

    def loss(model: Any, batch: Tensor, values: Any) -> Tensor:
        scores, hidden = model(batch)
        fit = F.cross_entropy(scores[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        penalty = activation_penalty(hidden, values.activation)
        return fit + penalty + temporal_activation_penalty(hidden, values.slowness)

    def valid(model: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch)[0][:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    before = tuned.coordinates.leaf().detach().clone()
    with train(tuned, loss, valid) as tuner:
        for _ in range(3):
            tuner.train_step(sentences())
        for _ in range(2):
            tuner.valid_step(sentences())
    assert (tuned.coordinates.leaf() != before).all()


def test_a_checkpoint_goes_on_with_the_same_masks() -> None:
    def loss(model: Any, batch: Tensor, values: Any = None) -> Tensor:
        result: Tensor = model(batch).square().mean()
        return result

    x, found = sentences(), []
    with train(transform(Scores(), rates(), bind=BIND), loss, loss) as tuner:
        tuner.train_step(x)
        kept = copy.deepcopy(tuner.state_dict())
        found.append(tuner.train_step(x))
    with train(transform(Scores(), rates(), bind=BIND), loss, loss) as tuner:
        tuner.load_state_dict(kept)
        found.append(tuner.train_step(x))
    assert found[0] == found[1]


def test_activation_penalties_are_means_weighted_by_example() -> None:
    h, c = torch.randn(4, 5, 3), torch.rand(4)
    expected = torch.stack([c[b] * h[b].square().mean() for b in range(4)]).mean()
    torch.testing.assert_close(activation_penalty(h, c), expected)
    changes = torch.stack([c[b] * (h[b, 1:] - h[b, :-1]).square().mean() for b in range(4)]).mean()
    torch.testing.assert_close(temporal_activation_penalty(h, c), changes)
    swapped = temporal_activation_penalty(h.transpose(0, 1), c, batch_dim=1, time_dim=0)
    torch.testing.assert_close(swapped, changes)
    torch.testing.assert_close(activation_penalty(h, 0.3), 0.3 * h.square().mean())
    assert float(temporal_activation_penalty(h[:, :1], c)) == 0
    with pytest.raises(ResponseError, match=r"coefficients of shape \(4,\) for 5 examples along axis 0"):
        activation_penalty(h.transpose(0, 1), c)


def test_what_can_not_be_dropped_says_what_to_do() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"words": "middle.bias"}, r"whose shape is \(4,\).*two or more axes"),
        ({"words": "middle"}, "no module with a dropout rate.*there are: before, behind, network, words"),
        ({"words": "words", "connect": "words"}, "one rate has one hyperparameter"),
        ({"words": "words", "connect": "words.weight"}, "bind one of the two"),
    ]
    for bind, text in wrong:
        with pytest.raises(ResponseError, match=text):
            transform(Language(), rates(), bind=bind)
    with pytest.raises(ResponseError, match="max_norm writes on the table"):
        transform(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), rates(), bind={"words": "0"})
    with pytest.raises(ResponseError, match="at a rate of 1"):
        hyper = metaopt.Hyperparameters(words=metaopt.interval(0.2, 0, 1))
        transform(Language(), hyper, bind={"words": "words"})
    with pytest.raises(ResponseError, match="in \\[0, 1\\), got 1"):
        VariationalDropout(1)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4)])
    with pytest.raises(ResponseError, match="packed sequence drop before packing"):
        VariationalDropout()(packed)
