"""Several optimizers in one loop: all watched, the hypergradient is the bare loop's; one of them unseen, an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from metaopt.check import hypergradcheck
from metaopt.modes import versions
from tests.cases import data, mlp

Watch = Callable[[Any], AbstractContextManager[Any]]
Made = tuple[nn.Module, torch.optim.Optimizer]


def leaf(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def first(hyper: dict[str, Tensor]) -> Made:
    model = mlp(5, 6, 3)
    return model, metaopt.optim.SGD(model.parameters(), lr=hyper["lr"], momentum=0.5)


SECOND: dict[str, Callable[[Any, dict[str, Tensor]], torch.optim.Optimizer]] = {
    "plain": lambda p, hyper: torch.optim.SGD(p, lr=0.1, momentum=0.5),
    "linked": lambda p, hyper: metaopt.optim.Adam(p, lr=hyper["other"], eps=1e-2),
    "wrapped": lambda p, hyper: metaopt.wrap(torch.optim.RMSprop(p, lr=0.05, eps=1e-2)),
}


def outer(model: Callable[[Tensor], Tensor]) -> Tensor:
    _, _, x, y = data()
    return F.cross_entropy(model(x), y)


def joint(watch: Watch, hyper: dict[str, Tensor], second: str, order: int) -> nn.Module:
    """A body and a head, one loss."""
    x, y, _, _ = data()
    body, optimizer = first(hyper)
    head = mlp(3, 4, 3)
    other = SECOND[second](head.parameters(), hyper)
    both = [optimizer, other]
    with watch(both):
        for _ in range(4):
            for each in both:
                each.zero_grad()
            F.cross_entropy(head(body(x)), y).backward()
            for each in both[::order]:
                each.step()
    return nn.Sequential(body, head)


def adversarial(watch: Watch, hyper: dict[str, Tensor], second: str, order: int) -> nn.Module:
    """Two networks with a loss each, which look at each other; the second moves every other time."""
    x, y, _, _ = data()
    model, optimizer = first(hyper)
    critic = mlp(3, 4, 1)
    other = SECOND[second](critic.parameters(), hyper)

    def criticise() -> None:
        other.zero_grad()
        (critic(model(x).detach()).mean() - 1).square().backward()
        other.step()

    def train() -> None:
        optimizer.zero_grad()
        scores = model(x)
        (F.cross_entropy(scores, y) + critic(scores).mean()).backward()
        optimizer.step()

    with watch([optimizer, other]):
        for t in range(4):
            parts = [train] if t % 2 else [criticise, train]
            for part in parts[::order]:
                part()
    return nn.Sequential(model)


def closures(watch: Watch, hyper: dict[str, Tensor], second: str, order: int) -> nn.Module:
    """Each takes gradients of its own, at weights that the other has just moved."""
    x, y, _, _ = data()
    body, optimizer = first(hyper)
    head = mlp(3, 4, 3)
    other = SECOND[second](head.parameters(), hyper)
    both = [optimizer, other]

    def closure() -> Any:
        for each in both:
            each.zero_grad()
        loss = F.cross_entropy(head(body(x)), y)
        loss.backward()
        return loss

    with watch(both):
        for _ in range(3):
            for each in both[::order]:
                each.step(closure)
    return nn.Sequential(body, head)


def shared(watch: Watch, hyper: dict[str, Tensor], second: str, order: int) -> nn.Module:
    """Both train one network, each by a loss of its own (InfoGAN's), and once by the same gradient."""
    x, y, _, _ = data()
    model, optimizer = first(hyper)
    other = SECOND[second](list(model.parameters())[1:], hyper)

    def classify() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def inform() -> None:
        other.zero_grad()
        model(x).sin().square().mean().backward()
        other.step()

    with watch([optimizer, other]):
        for t in range(4):
            for part in [classify, inform if t != 2 else other.step][::order]:
                part()
    return nn.Sequential(model)


@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("loop", [joint, adversarial, closures, shared])
def test_the_hypergradient_is_the_bare_loops(loop: Any, second: str, order: int) -> None:
    hyper = {"lr": leaf(0.1)} | ({"other": leaf(0.05)} if second == "linked" else {})
    assert hypergradcheck(lambda watch: loop(watch, hyper, second, order), outer, hyper)


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
@pytest.mark.parametrize("loop", [joint, adversarial])
def test_one_that_is_not_watched_is_an_error(loop: Any, mode: Any) -> None:
    """The head got no gradient, in silence; the critic was taken for a constant."""
    hyper = {"lr": leaf(0.1)}
    with pytest.raises(metaopt.CaptureError, match=r"metaopt.record\(\[first, second\]\)"):
        runs: list[Any] = []

        def watch(both: list[torch.optim.Optimizer]) -> Any:
            runs.append(mode(both[0]))
            return runs[0]

        trained = loop(watch, hyper, "plain", 1)
        runs[0].backward(outer(trained))
        raise AssertionError("there was a hypergradient")


def test_a_probe_that_only_looks_on() -> None:
    """Trained on what the model computes, and of no use to it; unless an objective uses it."""
    hyper = {"lr": leaf(0.1)}
    x, y, _, _ = data()

    def train(watch: Watch, both: bool = False) -> tuple[nn.Module, nn.Module]:
        model, optimizer = first(hyper)
        probe = mlp(3, 4, 3)
        other = torch.optim.SGD(probe.parameters(), lr=0.1)
        with watch([optimizer, other] if both else optimizer):
            for _ in range(4):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                other.zero_grad()
                F.cross_entropy(probe(model(x).detach()), y).backward()
                other.step()
        return model, nn.Sequential(model, probe)

    assert hypergradcheck(lambda watch: train(watch)[0], outer, hyper)
    assert hypergradcheck(lambda watch: train(watch, both=True)[1], outer, hyper)
    for mode in (metaopt.record, metaopt.stream):
        runs: list[Any] = []

        def watch(optimizer: Any, mode: Any = mode, runs: list[Any] = runs) -> Any:
            runs.append(mode(optimizer))
            return runs[0]

        probe = train(watch)[1]
        with pytest.raises(metaopt.CaptureError, match="How it follows the weights was not seen"):
            runs[0].backward(outer(probe))


@pytest.mark.parametrize("how", ["no_grad", "data"])
def test_a_second_network_moved_by_hand(how: str) -> None:
    hyper = {"lr": leaf(0.1)}
    x, y, _, _ = data()

    def train(watch: Watch) -> nn.Module:
        model, optimizer = first(hyper)
        critic = mlp(3, 4, 1)
        with watch(optimizer):
            for _ in range(3):
                critic.zero_grad()
                (critic(model(x).detach()).mean() - 1).square().backward()
                for p in critic.parameters():
                    assert p.grad is not None
                    if how == "data":
                        p.data -= 0.1 * p.grad
                        continue
                    with torch.no_grad():
                        p.sub_(0.1 * p.grad)
                optimizer.zero_grad()
                scores = model(x)
                (F.cross_entropy(scores, y) + critic(scores).mean()).backward()
                optimizer.step()
        return model

    assert hypergradcheck(train, outer, hyper)


def copies(watch: Watch, hyper: dict[str, Tensor], way: str) -> nn.Module:
    """Each iteration trains a copy of a body and a head, which two optimizers own, and goes by the copy's gradients."""
    x, y, _, _ = data()
    (body, optimizer), head = first(hyper), mlp(3, 4, 3)
    other = torch.optim.SGD(head.parameters(), lr=0.1)
    with watch([optimizer, other]):
        for t in range(3):
            optimizer.zero_grad()
            other.zero_grad()
            fast = copy.deepcopy(nn.Sequential(body, head))
            made = metaopt.optim.SGD if way == "linked" else torch.optim.SGD
            inner = made(fast.parameters(), lr=hyper["other"] if way == "linked" else 0.2, momentum=0.5)

            def closure(fast: Any = fast, inner: Any = inner) -> Any:
                inner.zero_grad()
                loss = F.cross_entropy(fast(x), y) + hyper["other"] * fast[0][0].weight.square().sum()
                loss.backward()
                if way == "clipped":
                    nn.utils.clip_grad_norm_(fast.parameters(), 0.3)
                return loss

            for _ in range(2):
                if way == "closure":
                    inner.step(closure)
                else:
                    closure()
                    inner.step()
            for weight, moved in zip(body.parameters(), fast[0].parameters(), strict=True):
                if way != "resting" or t != 1:
                    weight.grad = (weight - moved).detach()
            optimizer.step()
            F.cross_entropy(head(body(x).detach()), y).backward()
            other.step()
    return nn.Sequential(body, head)


@pytest.mark.parametrize("way", ["plain", "clipped", "closure", "resting"])
def test_an_optimizer_for_copies(way: str) -> None:
    hyper = {"lr": leaf(0.3), "other": leaf(0.05)}
    assert hypergradcheck(lambda watch: copies(watch, hyper, way), outer, hyper)


@pytest.mark.parametrize("said", [False, True])
def test_a_head_that_is_made_inside_the_context(said: bool) -> None:
    hyper = {"lr": leaf(0.3)}
    x, y, _, _ = data()

    def train(watch: Watch) -> nn.Module:
        model, optimizer = first(hyper)
        with watch(optimizer):
            for _ in range(2):
                head = mlp(3, 3)
                if said:
                    head.requires_grad_(False).requires_grad_(True)
                inner = torch.optim.SGD(head.parameters(), lr=0.2)
                for _ in range(2):
                    inner.zero_grad()
                    F.cross_entropy(head(model(x)), y).backward()
                    inner.step()
                optimizer.zero_grad()
                F.cross_entropy(head(model(x)), y).backward()
                optimizer.step()
        return model

    if said:
        assert hypergradcheck(train, outer, hyper)
        return
    with pytest.raises(metaopt.CaptureError, match=r"requires_grad_\(False\)\.requires_grad_\(True\)"):
        train(metaopt.record)


@pytest.mark.filterwarnings("ignore::metaopt.HeldConstantWarning")
def test_an_optimizer_for_copies_with_hyperparameters() -> None:
    """Its step is recorded call by call, in which the rate is a number: it got a hypergradient of 0."""
    hyper = {"lr": leaf(0.3), "other": leaf(0.05)}
    with pytest.raises(metaopt.CaptureError, match="hyperparameters among its settings"):
        copies(metaopt.record, hyper, "linked")


def test_rewinding_goes_back_with_all_of_them() -> None:
    hyper = {"lr": leaf(0.1), "other": leaf(0.05)}
    x, y, _, _ = data()
    body, optimizer = first(hyper)
    head = mlp(3, 4, 3)
    other = metaopt.optim.Adam(head.parameters(), lr=hyper["other"])
    found = []
    for _ in range(2):
        with metaopt.record([optimizer, other]) as run:
            for _ in range(3):
                optimizer.zero_grad()
                other.zero_grad()
                F.cross_entropy(head(body(x)), y).backward()
                optimizer.step()
                other.step()
        found.append(run.hypergradient(outer(nn.Sequential(body, head)), list(hyper.values())))
        run.rewind()
    assert found[0] == found[1]
    assert run.steps == 3
    assert "SGD and Adam" in repr(run)


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream, metaopt.implicit])
def test_what_is_no_optimizer(mode: Any) -> None:
    model = mlp(5, 3)
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrong in (model, None, [made, model]):
        with pytest.raises(metaopt.RuleError, match=r"torch\.optim\.Optimizer"):
            mode(wrong)
    with pytest.raises(metaopt.RuleError, match="is empty"):
        mode([])
    with pytest.raises(metaopt.RuleError, match="names one of them twice"):
        mode([made, made])


def test_two_contexts_at_once_are_refused() -> None:
    one, two = (metaopt.optim.SGD(mlp(5, 3).parameters(), lr=leaf(0.1)) for _ in range(2))
    with metaopt.stream(one), pytest.raises(metaopt.CaptureError, match="another context"), metaopt.record(two):
        pass
    with metaopt.record(two):
        pass


WAYS: list[dict[str, Any]] = [{"budget": 4096}, {"compile": "aot_eager"}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("second", ["linked", "wrapped"])
@pytest.mark.parametrize("loop", [joint, closures, shared])
@pytest.mark.filterwarnings("ignore::metaopt.MetaoptWarning")
def test_the_cost_dial_changes_nothing(
    loop: Any, second: str, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "ENOUGH", 1)
    monkeypatch.setattr(versions, "AGAIN", 1)
    found = []
    for options in ({}, way):
        hyper = {"lr": leaf(0.1)} | ({"other": leaf(0.05)} if second == "linked" else {})
        runs: list[Any] = []

        def watch(both: list[torch.optim.Optimizer], runs: list[Any] = runs, options: Any = options) -> Any:
            runs.append(metaopt.record(both, **options))
            return runs[0]

        trained = loop(watch, hyper, second, 1)
        found.append(runs[0].hypergradient(outer(trained), list(hyper.values())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_one_that_steps_watched_weights_unseen_is_named(mode: Any) -> None:
    """So is the optimizer that another one keeps inside (SAM's), whose step is the one that counts."""
    model = mlp(5, 3)
    optimizer, inner = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with (
        pytest.raises(metaopt.CaptureError, match=r"Name both, `metaopt\.record\(\[first, second\]\)`"),
        mode(optimizer),
    ):
        model(torch.ones(2, 5)).sum().backward()
        inner.step()


def test_a_hypergradient_lies_in_memory_as_its_leaf_does() -> None:
    """Torch's fused optimizers on a CPU take no notice of strides, and moved other entries than they should."""
    moved = []
    for fused in (False, True):
        torch.manual_seed(0)
        leaf = torch.randn(3, 4).requires_grad_()
        outer, w = torch.optim.SGD([leaf], lr=0.1, fused=fused), torch.randn(4, 3).requires_grad_()
        inner, x = torch.optim.SGD([w], lr=0.1), torch.randn(5, 4)
        with metaopt.record(inner) as run:
            for _ in range(2):
                inner.zero_grad()
                ((x @ w).square().mean() + (w * (leaf.t().contiguous() @ torch.ones(3, 3))).sum()).backward()
                inner.step()
        run.backward((x @ w).square().sum())
        assert leaf.grad is not None
        assert leaf.grad.stride() == leaf.stride()
        outer.step()
        moved.append(leaf.detach())
    torch.testing.assert_close(moved[0], moved[1])
