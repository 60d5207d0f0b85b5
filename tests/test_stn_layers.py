"""Responses of every layer: per example, nothing at zero, the same by every engine, and one for each parameter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import metaopt
from metaopt.errors import FallbackWarning, ResponseError
from metaopt.stn import Tuned, structures, transform
from metaopt.stn.layouts import NeedsGroups
from metaopt.stn.structures import Structure
from tests.stn_models import CASES, Case, at, hyperparameters, output, responding

ENGINES = ("manual", "forward", "double")
names = pytest.mark.parametrize("name", list(CASES))
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def draw(case: Case, tuned: Tuned, seed: int = 1) -> tuple[Tensor, int | None]:
    """Perturbations, and the number of groups that the case needs."""
    examples = case.shape[case.batch_dim]
    z = torch.randn(examples, tuned.coordinates.size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    z = z.to(tuned.rho)
    if not case.grouped or (tuned.model.training and has_batchnorm(tuned)):
        return z, None
    for i, part in enumerate(torch.arange(examples).tensor_split(2)):
        z[part] = z[i].clone()
    return z, 2


def has_batchnorm(tuned: Tuned) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in tuned.model.modules())


def effective(tuned: Tuned, z: Tensor) -> dict[str, Tensor]:
    """The weights of one example, written out."""
    changes = tuned.responses.changes(z)
    return {name: p.detach() + changes.get(name, 0) for name, p in tuned.model.named_parameters()}


@names
@modes
def test_no_perturbation_is_the_model_itself(name: str, training: bool) -> None:
    case = CASES[name]
    tuned, x = responding(case, training=training)
    z, groups = draw(case, tuned)
    original = copy.deepcopy(tuned.model)
    zero = torch.zeros_like(z)
    for linearised in (False, True):
        torch.manual_seed(3)
        y = output(
            tuned, x, at(tuned, zero, groups=None if groups is None else 1, linearised=linearised, response=True)
        )
        torch.manual_seed(3)
        expected = original(x)
        # Torch's own alpha dropout draws in another order, and its fused attention rounds differently.
        if training and name in ("alpha", "encoder"):
            assert y.shape == expected.shape
        elif CASES[name].exact:
            assert torch.equal(y, expected)
        else:
            torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


structured = pytest.mark.parametrize("options", [{"banks": 2}, {"rank": 2}, {"rank": 1, "banks": 2}], ids=str)


@names
@structured
def test_an_example_in_a_batch_is_the_example_alone_with_its_own_weights(name: str, options: dict[str, Any]) -> None:
    case = CASES[name]
    tuned, x = responding(case, **options)
    z, groups = draw(case, tuned)
    y = output(tuned, x, at(tuned, z, groups=groups))
    for b in range(len(z)):
        one = x.narrow(case.batch_dim, b, 1)
        alone = functional_call(tuned.model, effective(tuned, z[b]), (one,))
        torch.testing.assert_close(y.narrow(case.batch_dim, b, 1), alone, rtol=1e-9, atol=1e-10)


@names
@modes
@pytest.mark.parametrize("rank", [None, 2], ids=["rows", "rank"])
def test_engines_agree_in_value_and_gradient(name: str, training: bool, rank: int | None) -> None:
    case = CASES[name]
    tuned, x = responding(case, training=training, rank=rank)
    z, groups = draw(case, tuned)
    found = []
    for engine in ENGINES:
        tuned._engines = {True: [engine], False: [engine]}
        torch.manual_seed(3)
        y = output(tuned, x, at(tuned, z, groups=groups, linearised=True, response=True))
        found.append((y, torch.autograd.grad(y.square().sum(), list(tuned.responses.parameters()), allow_unused=True)))
    for y, gradients in found[1:]:
        torch.testing.assert_close(y, found[0][0], rtol=1e-10, atol=1e-10)
        for a, b in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-9)
    assert max(float(g.abs().max()) for g in found[0][1] if g is not None) > 0


@names
def test_the_tangent_is_the_derivative_of_the_nonlinear_response(name: str) -> None:
    case = CASES[name]
    if name in ("conv1d", "conv2d"):
        pytest.skip("a maximum may change hands within the step")
    tuned, x = responding(case)
    z, groups = draw(case, tuned)

    def curve(scale: float) -> Tensor:
        return output(tuned, x, at(tuned, scale * z, groups=groups)).detach()

    zero, one = (output(tuned, x, at(tuned, s * z, groups=groups, linearised=True)).detach() for s in (0.0, 1.0))
    h = 1e-5
    difference = (curve(h) - curve(-h)) / (2 * h)
    torch.testing.assert_close(one - zero, difference, rtol=1e-6, atol=2e-6)


@given(st.sampled_from(["mlp", "residual", "encoder", "lstm", "tied", "alpha"]), st.sampled_from([-1.0, 2.0, 10.0]))
def test_the_linearised_output_is_linear_under_dropout(name: str, scale: float) -> None:
    case = CASES[name]
    tuned, x = responding(case, training=True)
    z, _ = draw(case, tuned)

    def run(factor: float) -> Tensor:
        torch.manual_seed(7)
        return output(tuned, x, at(tuned, factor * z, linearised=True)).detach()

    torch.testing.assert_close(run(scale) - run(0), scale * (run(1) - run(0)), rtol=1e-10, atol=1e-10)


@names
def test_derivatives_by_coordinates_and_response_are_right(name: str) -> None:
    case = CASES[name]
    if case.grouped or name in ("conv1d", "conv2d", "rnn"):
        pytest.skip("kinks, or a perturbation for each group")
    tuned, x = responding(case)
    z, _ = draw(case, tuned)
    z = z.requires_grad_()
    y = output(tuned, x, at(tuned, z, response=True))
    weight = torch.randn_like(y)
    parameters = [z, *tuned.responses.parameters()]
    directions = [torch.randn_like(p) for p in parameters]
    gradients = torch.autograd.grad((y * weight).sum(), parameters)
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    h, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(sign * h * d)
            values.append(float((output(tuned, x, at(tuned, z)) * weight).sum()))
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(sign * h * d)
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@names
@modes
def test_nothing_of_the_model_is_changed_by_a_response_pass(name: str, training: bool) -> None:
    case = CASES[name]
    tuned, x = responding(case, training=training)
    z, groups = draw(case, tuned)
    before = copy.deepcopy(tuned.model.state_dict())
    kept = [(id(m), type(m), dict(m.__dict__)) for m in tuned.model.modules()]
    parameters = [id(p) for p in tuned.model.parameters()]
    output(tuned, x, at(tuned, z, groups=groups, linearised=True, response=True))
    for key, value in tuned.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert parameters == [id(p) for p in tuned.model.parameters()]
    for module, (_, kind, attributes) in zip(tuned.model.modules(), kept, strict=True):
        assert type(module) is kind
        assert set(module.__dict__) == set(attributes)
        for rate in ("p", "dropout"):
            assert module.__dict__.get(rate) is attributes.get(rate)


def test_reading_no_values_of_a_parameter_is_no_use_of_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parameter = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            assert not self.parameter.is_sparse, f"{self.parameter}"
            str(f"{self.parameter}")
            return x * self.parameter

    tuned = transform(Model(), hyperparameters())
    output(tuned, torch.randn(4, 3), at(tuned, torch.randn(4, 3), linearised=True))
    assert not tuned.fallback


@names
def test_export_round_trips(name: str) -> None:
    case = CASES[name]
    tuned, x = responding(case)
    fresh = case.build().eval()
    fresh.load_state_dict(tuned.export())
    torch.testing.assert_close(fresh(x), tuned.model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mlp", "tied", "residual", "encoder", "bare"])
def test_export_of_an_uncentred_response_is_what_it_computes(name: str) -> None:
    case = CASES[name]
    tuned, x = responding(case, method="stn")
    fresh = case.build().eval()
    fresh.load_state_dict(tuned.export())
    torch.testing.assert_close(fresh(x), tuned(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(fresh(x), tuned.model(x))


def test_each_unique_parameter_has_one_response() -> None:
    tuned, _ = responding(CASES["tied"])
    aliases = {entry.name: entry.aliases for entry in tuned.responses.entries}
    assert aliases["words.weight"] == ("words.weight", "decoder.weight")
    assert "decoder.weight" not in aliases


@pytest.mark.parametrize("name", ["mlp", "conv1d", "transposed1d", "tied"])
def test_as_many_banks_as_hyperparameters_impose_nothing(name: str) -> None:
    """A10 at its end: one bank shares a V between all responses, H banks are any Jacobian."""
    tuned, _ = responding(CASES[name], banks=3)
    wanted = {n: torch.randn(3, *tuned.slots.parameter(n).shape) for n in tuned.names}
    with torch.no_grad():
        for entry, (_, slots, _) in zip(tuned.responses.entries, tuned.responses._slots, strict=True):
            rows = tuned.responses.weight[:, entry.start : entry.stop].t()
            if entry.structure.axis is None:
                rows.copy_(wanted[entry.name].flatten(1).t())
                continue
            rows.copy_(torch.eye(3).repeat_interleave(entry.structure.rows, 0))
            for base, column in zip(tuned.responses.bases[slots], wanted[entry.name], strict=True):
                base.copy_(column)
    for key, jacobian in tuned.responses.jacobian().items():
        torch.testing.assert_close(jacobian, wanted[key])


@pytest.mark.parametrize("name", ["mlp", "conv2d", "transposed2d", "tied", "bare", "gru"])
def test_a_response_of_low_rank_has_that_rank_and_its_memory(name: str) -> None:
    tuned, _ = responding(CASES[name], rank=1)
    full, _ = responding(CASES[name])
    for entry in tuned.responses.entries:
        axis = entry.structure.axis
        if axis is None:
            continue
        for change in tuned.responses.jacobian()[entry.name]:
            assert torch.linalg.matrix_rank(change.movedim(axis, 0).flatten(1)) == 1
    numbers = [sum(p.numel() for p in t.responses.parameters()) for t in (tuned, full)]
    assert numbers[0] < numbers[1]


def test_rows_of_grouped_convolutions_are_not_mixed() -> None:
    for name, groups in (("conv1d", 2), ("transposed3d", 2), ("conv2d", 1)):
        tuned, _ = responding(CASES[name], rank=1)
        entry = next(e for e in tuned.responses.entries if e.name.endswith("weight"))
        assert entry.rank == (None if groups > 1 else 1)


def test_frozen_parameters_have_no_response() -> None:
    model = CASES["mlp"].build()
    model[0].requires_grad_(False)  # type: ignore[index]
    tuned = transform(model, hyperparameters())
    assert {e.name for e in tuned.responses.entries} == {"3.weight", "3.bias"}
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ResponseError, match="unfreeze"):
        transform(model, hyperparameters())


def test_a_sequence_as_long_as_the_batch_is_not_taken_for_it() -> None:
    case = Case(CASES["encoder"].build, (5, 5, 4), batch_dim=1)
    tuned, x = responding(case)
    z, _ = draw(case, tuned)
    y = output(tuned, x, at(tuned, z))
    for b in range(5):
        alone = functional_call(tuned.model, effective(tuned, z[b]), (x[:, b : b + 1],))
        torch.testing.assert_close(y[:, b : b + 1], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        *("bare", "vision", "queries", "language", "written", "computed", "weights", "functions", "windows"),
        *("standardised", "paths"),
    ],
)
@modes
def test_parameters_that_join_the_batch_have_one_perturbation_for_each_example(name: str, training: bool) -> None:
    tuned, x = responding(CASES[name], training=training)
    output(tuned, x, at(tuned, draw(CASES[name], tuned)[0], linearised=True))
    assert not tuned.fallback


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda x, p: x * p[: len(x)], "has examples and what it is given has none"),
        (lambda x, p: torch.cat([x, p])[len(p) :].sin(), "can't be told apart"),
        (lambda x, p: (x[x[:, 0].argsort()] * p[0]).sin()[x[:, 0].argsort().argsort()], "sorted or selected"),
        (lambda x, p: torch.stack([row * p[0] for row in x]), "depends on the batch"),
        (lambda x, p: x * p[0] + Hidden.apply(x, p * 2)[:, :1], "a custom autograd.Function"),
        (lambda x, p: x * p[0] + hidden(x, p * 2)[:, :1], "another output than at"),
        (lambda x, p: F.batch_norm(x, x.mean(0), x.var(0), p.mean(0)), "for each example alone"),
        (lambda x, p: x * F.dropout(p, 0.1)[0], "dropout"),
        (lambda x, p: x.index_add(0, torch.arange(len(x)).flip(0), (x * 0 + 1) * p[1]), "another output than at"),
        (lambda x, p: x.clone().index_put_((torch.arange(len(x)),), p[1]), "of other examples"),
        (lambda x, p: x * p.clone().view(-1).mul_(2)[0], "writes on it"),
        (lambda x, p: (x * p[0], p.norm()), "returns what was computed from it alone"),
        (lambda x, p: (x * p[0], p), "returns what was computed from it alone"),
    ],
    ids=[
        "part",
        "joined",
        "sorted",
        "loop",
        "function",
        "unseen",
        "norm",
        "dropout",
        "added",
        "put",
        "written",
        "returned",
        "itself",
    ],
)
def test_what_cannot_be_proved_per_example_takes_groups(use: Any, why: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parameter = nn.Parameter(torch.randn(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = use(x, self.parameter)
            return y

    tuned = transform(Model().eval(), hyperparameters())
    with pytest.raises(NeedsGroups, match=why):
        output(tuned, torch.randn(5, 3), at(tuned, torch.randn(5, 3)))


def hidden(x: Tensor, weight: Tensor) -> Tensor:
    """A use of a weight that torch's function modes don't show."""
    with torch._C.DisableTorchFunction():
        return x @ weight.t()


class Transposed(nn.Module):
    """A layer that is written by hand, with a part of its weight and of its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x @ self.weight.t())
        return F.linear(x, self.weight[:4], self.bias[1:]) + F.linear(y, self.weight.T[:, :])[:, :1]


@pytest.mark.parametrize("linearised", [False, True])
def test_views_of_weights_are_not_made_for_each_example(linearised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed weight took its memory times the batch."""
    tuned, x, z = transform(Transposed(), hyperparameters()), torch.randn(6, 3), torch.randn(6, 3)
    monkeypatch.setattr("metaopt.stn.passes.LARGEST", 0)
    output(tuned, x, at(tuned, z, linearised=linearised))
    assert not tuned.fallback


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return hidden(x, weight)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[None, None]:
        return None, None


class Beside(nn.Module):
    """A layer whose weight is also used where it can't be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + hidden(x, self.layer.weight)


def test_a_use_of_weights_that_cannot_be_seen_is_an_error() -> None:
    tuned = transform(Beside().eval(), hyperparameters())
    with pytest.raises(ResponseError, match="can't be seen"):
        output(tuned, torch.randn(3, 3), at(tuned, torch.randn(3, 3)))


class Scaled(nn.Module):
    """A layer of the user's own, with a rule of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


@structures.register
def _scaled(module: Scaled) -> dict[str, Structure]:
    return {"weight": metaopt.stn.along(module.weight, 0)}


def test_a_layer_of_ones_own_can_be_registered() -> None:
    tuned = transform(Scaled(), hyperparameters())
    assert not tuned.fallback
    assert output(tuned, torch.randn(4, 3), at(tuned, torch.randn(4, 3))).shape == (4, 2)


def test_a_model_without_forward_mode_falls_back_and_says_so() -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.mark_dirty(x)
            return x.sign_()

        @staticmethod
        def backward(ctx: object, *gradients: Tensor) -> Tensor:
            return gradients[0]

    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = Straight.apply(self.layer(x))
            return y

    tuned = transform(nn.Sequential(nn.Identity(), Signs()), hyperparameters())
    with torch.no_grad():
        tuned.responses.weight.normal_()
    x, z = torch.randn(4, 3), torch.randn(4, 3)
    named = pytest.warns(
        FallbackWarning, match="'1', of type `Signs`, can't be linearised by forward-mode AD.*two back"
    )
    with pytest.warns(FallbackWarning, match=r"`Sequential` can't be linearised by hand.*Straight.*in place"), named:
        y = output(tuned, x, at(tuned, z, linearised=True))
    # The straight-through gradient is what training sees, and so what the response must see.
    expected = output(tuned, x, at(tuned, torch.zeros_like(z), linearised=True))
    layer = tuned.model.get_submodule("1.layer")
    linear = transform(layer, hyperparameters())
    linear.responses.load_state_dict(tuned.responses.state_dict())
    change = output(linear, x, at(linear, z)) - layer(x)
    torch.testing.assert_close(y - expected, change)
