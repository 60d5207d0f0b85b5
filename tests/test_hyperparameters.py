"""Hyperparameters: values in their domains, leaves that any optimizer moves, and a module like any other."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from metaopt.errors import DomainError
from metaopt.hyperparameters import (
    Hyperparameters,
    box,
    interval,
    l1_box,
    nonnegative,
    positive,
    real,
    simplex,
)

pytestmark = pytest.mark.filterwarnings("error")

dtypes = st.sampled_from([torch.float32, torch.float64])


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def make() -> Hyperparameters:
    return Hyperparameters(
        lr=positive(0.1),
        momentum=interval(0.9, 0, 1),
        mixture=simplex([0.2, 0.3, 0.5]),
        weights=l1_box(torch.full((10,), 0.2), radius=2.0),
        penalty=box(0.0, 0, None),
        shift=torch.tensor([0.5, -0.5]),
    )


TRANSFORMED = ["lr", "momentum", "mixture"]
DIRECT = ["weights", "penalty", "shift"]


def test_values_are_read_anew_from_their_leaves() -> None:
    hyper = make()
    for name in TRANSFORMED:
        value = getattr(hyper, name)
        assert value is not getattr(hyper, name)
        assert value.grad_fn is not None
        assert torch.equal(value._metaopt_source(), value)
    for name in DIRECT:
        assert getattr(hyper, name) is getattr(hyper, name)
        assert isinstance(getattr(hyper, name), Parameter)
        assert not hasattr(getattr(hyper, name), "_metaopt_source")


def test_a_source_follows_its_leaf() -> None:
    hyper = make()
    source = hyper.lr._metaopt_source  # type: ignore[attr-defined]
    hyper.set(lr=0.2)
    torch.testing.assert_close(source(), torch.tensor(0.2))


def test_each_graph_is_its_own() -> None:
    hyper = make()
    hyper.lr.backward()
    hyper.lr.backward()
    leaf = dict(hyper.named_parameters())["lr"]
    assert leaf.grad is not None
    assert leaf.grad.item() == pytest.approx(0.2)


def test_it_reads_like_a_mapping() -> None:
    hyper = make()
    names = [*TRANSFORMED, *DIRECT]
    assert list(hyper) == list(hyper.keys()) == [name for name, _ in hyper.items()] == names
    assert len(hyper) == 6
    assert "lr" in hyper
    assert "training" not in hyper
    assert hyper["penalty"] is hyper.penalty
    for name, value, entry in zip(names, hyper.values(), dict(hyper).values(), strict=True):
        assert torch.equal(value, entry)
        assert torch.equal(value, hyper[name])
    with pytest.raises(KeyError, match=r"no hyperparameter 'lrr'; there are: lr, momentum"):
        hyper["lrr"]
    with pytest.raises(AttributeError, match="lrr"):
        hyper.lrr  # noqa: B018


def test_leaves_are_parameters_under_the_plain_names() -> None:
    hyper = make()
    assert [name for name, _ in hyper.named_parameters()] == [*TRANSFORMED, *DIRECT]
    assert set(hyper.state_dict()) == {*TRANSFORMED, *DIRECT, "_extra_state"}
    assert all(leaf.requires_grad for leaf in hyper.parameters())


def test_set_writes_on_the_same_leaves() -> None:
    hyper = make()
    leaves = list(hyper.parameters())
    hyper.set(lr=0.2, weights=0.1)
    hyper["momentum"] = 0.5
    hyper.shift = [1.0, 2.0]
    assert all(before is after for before, after in zip(leaves, hyper.parameters(), strict=True))
    torch.testing.assert_close(hyper.lr, torch.tensor(0.2), rtol=1e-15, atol=0)
    assert torch.equal(hyper.weights, torch.full((10,), 0.1))
    torch.testing.assert_close(hyper.momentum, torch.tensor(0.5))
    assert hyper.shift.tolist() == [1.0, 2.0]


def test_set_keeps_float64_under_a_float32_default() -> None:
    hyper = make()
    torch.set_default_dtype(torch.float32)
    hyper.set(lr=0.3, shift=[0.1, 0.3])
    assert hyper.lr.item() == pytest.approx(0.3, rel=1e-15)
    assert hyper.shift.tolist() == [0.1, 0.3]


def test_set_refuses_all_or_nothing() -> None:
    hyper = make()
    with pytest.raises(DomainError, match="hyperparameter 'momentum': interval"):
        hyper.set(lr=0.5, momentum=2.0)
    with pytest.raises(DomainError, match=r"shape is \(10,\), which \(3,\)"):
        hyper.set(lr=0.5, weights=torch.zeros(3))
    with pytest.raises(KeyError, match="lrr"):
        hyper.set(lr=0.5, lrr=0.5)
    torch.testing.assert_close(hyper.lr, torch.tensor(0.1))


@pytest.mark.parametrize("name", ["train", "values", "history", "training", "not a name"])
def test_names_of_the_module_are_taken(name: str) -> None:
    with pytest.raises(DomainError, match="choose another name"):
        Hyperparameters(**{name: 0.1})


def test_an_error_names_its_hyperparameter() -> None:
    with pytest.raises(DomainError, match="hyperparameter 'shift'"):
        Hyperparameters(shift=math.nan)


def test_a_spec_can_be_used_twice() -> None:
    spec = box(0.5, 0, 1)
    hyper = Hyperparameters(a=spec, b=spec)
    hyper.set(a=0.1)
    assert hyper.b.item() == 0.5


def test_a_hyperparameter_can_be_deleted() -> None:
    hyper = make()
    del hyper.lr
    assert "lr" not in hyper
    assert not hasattr(hyper, "lr")


def test_repr_names_kinds_bounds_and_values() -> None:
    assert repr(make()) == (
        "Hyperparameters(\n"
        "  (lr): positive, 0.1\n"
        "  (momentum): interval(0, 1), 0.9\n"
        "  (mixture): simplex, shape (3,), [0.2, 0.3, 0.5]\n"
        "  (weights): l1_box(radius=2, 0, 1), shape (10,), mean 0.2, from 0.2 to 0.2\n"
        "  (penalty): box(0, inf), 0\n"
        "  (shift): real, shape (2,), [0.5, -0.5]\n"
        ")"
    )
    assert repr(Hyperparameters()) == "Hyperparameters()"
    assert repr(Hyperparameters(a=torch.empty(0, 2))) == "Hyperparameters(\n  (a): real, shape (0, 2), []\n)"
    assert repr(l1_box(torch.zeros(3), 1)) == "Constrained(l1_box(radius=1, 0, 1), shape (3,))"


def test_a_value_used_in_a_loss_reaches_its_leaf() -> None:
    hyper = make()
    loss: Tensor = sum((value.sum() for value in hyper.values()), torch.zeros(()))
    loss.backward()
    assert all(leaf.grad is not None for leaf in hyper.parameters())


# Projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projected_adam_is_feasible_at_each_step_and_keeps_its_moments(dtype: torch.dtype) -> None:
    hyper = make().to(dtype)
    plain = make().to(dtype)
    optimizer = torch.optim.Adam(hyper.parameters(), lr=0.3)
    by_hand = torch.optim.Adam(plain.parameters(), lr=0.3)
    hyper.attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    weights = hyper.weights
    for _ in range(20):
        for leaf, other in zip(hyper.parameters(), plain.parameters(), strict=True):
            leaf.grad = torch.randn(leaf.shape, generator=generator, dtype=dtype)
            other.grad = leaf.grad.clone()
        optimizer.step()
        by_hand.step()
        assert plain.project_() is plain
        assert hyper.weights is weights
        assert ((weights >= 0) & (weights <= 1)).all()
        assert weights.sum().item() <= 2 * (1 + 10 * torch.finfo(dtype).eps)
        assert hyper.penalty >= 0
        for leaf, other in zip(hyper.parameters(), plain.parameters(), strict=True):
            assert torch.equal(leaf, other)
            assert torch.equal(optimizer.state[leaf]["exp_avg"], by_hand.state[other]["exp_avg"])


def test_projection_leaves_transformed_and_real_leaves_alone() -> None:
    hyper = make()
    with torch.no_grad():
        for leaf in hyper.parameters():
            leaf.fill_(-100.0)
    version = hyper.weights._version
    hyper.project_()
    assert hyper.weights._version > version
    for name, leaf in hyper.named_parameters():
        assert (leaf == (0.0 if name in ("weights", "penalty") else -100.0)).all()


def test_attach_ends_with_its_handle() -> None:
    hyper = Hyperparameters(penalty=nonnegative(0.5))
    optimizer = torch.optim.SGD(hyper.parameters(), lr=1.0)
    hyper.penalty.grad = torch.tensor(1.0)
    with hyper.attach(optimizer):
        optimizer.step()
        assert hyper.penalty == 0
    optimizer.step()
    assert hyper.penalty == -1


def test_attach_refuses_an_optimizer_of_others() -> None:
    with pytest.raises(DomainError, match="needs the hyper-optimizer"):
        make().attach(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0))
    with pytest.raises(DomainError, match="and this is a Hyperparameters"):
        make().attach(make())  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "bad"), [("weights", math.inf), ("penalty", math.nan)])
def test_projection_names_a_leaf_that_diverged(name: str, bad: float) -> None:
    hyper = make()
    with torch.no_grad():
        hyper[name].fill_(bad)
    with pytest.raises(DomainError, match=f"'{name}' can't be projected.*diverged"):
        hyper.project_()


def test_a_state_is_loaded_in_the_domains_that_it_was_saved_in() -> None:
    """A leaf says nothing without its domain: another value would be there, in silence."""
    saved = Hyperparameters(rate=positive(0.1), weights=box(0.5, 0, 1)).state_dict()
    for other in (interval(0.1, 0, 1), real(0.1)):
        hyper = Hyperparameters(rate=other, weights=box(0.5, 0, 1))
        with pytest.raises(
            DomainError, match=r"'rate' is in .* and was saved in another domain.*new.set\(rate=old.rate\)"
        ):
            hyper.load_state_dict(saved)
        assert hyper.rate.item() == pytest.approx(0.1)  # nothing was loaded
    with pytest.raises(DomainError, match="is in positive"):
        Hyperparameters(rate=positive(0.1)).load_state_dict(Hyperparameters(rate=0.1).state_dict())
    wider = Hyperparameters(rate=positive(0.2), weights=box(0.7, 0, 2))  # a leaf that is the value
    wider.load_state_dict(saved)
    assert wider.weights.item() == 0.5
    assert not wider.history
    nested = torch.nn.ModuleDict({"hyper": Hyperparameters(rate=interval(0.1, 0, 1))})
    with pytest.raises(DomainError, match="in another domain"):
        nested.load_state_dict(torch.nn.ModuleDict({"hyper": Hyperparameters(rate=positive(0.1))}).state_dict())
    earlier = {key: value for key, value in saved.items() if key != "_extra_state"} | {"_extra_state": {}}
    Hyperparameters(rate=positive(0.2), weights=box(0.7, 0, 1)).load_state_dict(earlier)
