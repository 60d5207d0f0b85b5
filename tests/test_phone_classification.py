"""The second tutorial does what it says, and does it by the hypergradient: without it, or negated, nothing is learnt.

The gates hold on the planted data in the default run; on a recorded voice, where it is cached, among the slow tests.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import metaopt

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))
speech = importlib.import_module("speech")
phones = importlib.import_module("phones")
training = importlib.import_module("phone_training")
tutorial = importlib.import_module("02_phone_classification")

SMALL = training.Settings(epochs=5, hidden=32, every=3, hyper_lr=1e-2, val_batch=200)


@pytest.fixture(autouse=True)
def _cpu() -> Iterator[None]:
    """The tutorial runs on the CPU, whatever --device says."""
    with torch.device("cpu"):
        yield


@pytest.fixture(scope="module")
def problem() -> Any:
    """The embedded data, in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    made = phones.make_problem(speech.load_speech(data="planted"))
    torch.set_default_dtype(before)
    return made


# -- the hypergradient

STEPS = 25


def hypergradient(problem: Any, start: Any, context: Any) -> Tensor:
    """By metaopt: dE/d(ρ, η, μ) after some minibatches with constant hyperparameters."""
    hyper = [torch.tensor(value, requires_grad=True) for value in start]
    network = training.make_network(problem, SMALL, seed=3)
    optimizer = metaopt.optim.SGD(network.parameters(), lr=hyper[1], momentum=hyper[2])
    with context(optimizer) as run:
        for batch in next(training.batches(problem, SMALL, seed=3))[:STEPS]:
            optimizer.zero_grad()
            training.training_loss(network, batch, hyper[0]).backward()
            optimizer.step()
    assert run.steps == STEPS
    return torch.stack(run.hypergradient(F.cross_entropy(network(problem.val.x)[0], problem.val.y), wrt=hyper))


class ByHand:
    """The recursion of the paper, without metaopt: ``z_v' = μ z_v + H z_w + b``, ``z_w' = z_w - η z_v' - [η] v'``."""

    def __init__(self, problem: Any, settings: Any, seed: int) -> None:
        self.network = training.make_network(problem, settings, seed)
        self.w = torch.cat([p.detach().flatten() for p in self.network.parameters()])
        self.v = torch.zeros_like(self.w)
        self.z_w, self.z_v = torch.zeros(2, 3, len(self.w))

    def predict(self, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(self.network.named_parameters())
        parts = w.split([p.numel() for p in named.values()])
        weights = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        return functional_call(self.network, weights, (x,))

    def step(self, batch: Any, rho: float, lr: float, momentum: float) -> None:
        w, weight = self.w.clone().requires_grad_(), torch.tensor(rho, requires_grad=True)
        logits, secondary = self.predict(w, batch.x)
        loss = F.cross_entropy(logits, batch.y) + weight / 2 * ((secondary - batch.secondary) ** 2).mean()
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        u = torch.zeros_like(g, requires_grad=True)
        (by_rho,) = torch.autograd.grad(torch.autograd.grad(g, weight, u, create_graph=True)[0], u)
        hessian_z = torch.stack([torch.autograd.grad(g, w, z, retain_graph=True)[0] for z in self.z_w])
        direct = torch.stack([by_rho, torch.zeros_like(u), self.v]).detach()
        self.z_v = momentum * self.z_v + hessian_z + direct
        self.v = momentum * self.v + g.detach()
        self.z_w = self.z_w - lr * self.z_v
        self.z_w[1] -= self.v
        self.w = self.w - lr * self.v

    def hypergradient(self, x: Tensor, y: Tensor) -> Tensor:
        w = self.w.clone().requires_grad_()
        return self.z_w @ torch.autograd.grad(F.cross_entropy(self.predict(w, x)[0], y), w)[0]


@pytest.mark.parametrize("start", [tutorial.INFORMED, tutorial.NULL], ids=["informed", "null"])
def test_forward_mode_is_reverse_mode_is_the_recursion_by_hand(problem: Any, start: Any) -> None:
    by_hand = ByHand(problem, SMALL, seed=3)
    for batch in next(training.batches(problem, SMALL, seed=3))[:STEPS]:
        by_hand.step(batch, *start)
    expected = by_hand.hypergradient(*problem.val)
    assert expected[1] != 0
    for context in (metaopt.stream, metaopt.record):
        torch.testing.assert_close(hypergradient(problem, start, context), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("start", [tutorial.INFORMED, tutorial.NULL], ids=["informed", "null"])
def test_real_time_is_the_papers_algorithm_by_hand(problem: Any, start: Any) -> None:
    """Hyperparameters that move, by projected Adam, and tangents that live through it."""
    settings = replace(SMALL, epochs=1)
    by_hand, sampler = ByHand(problem, settings, seed=5), torch.Generator().manual_seed(5)
    leaf = torch.tensor(start, requires_grad=True)
    adam = torch.optim.Adam([leaf], lr=settings.hyper_lr)
    schedule = []
    for t, batch in enumerate(next(training.batches(problem, settings, seed=5)), 1):
        by_hand.step(batch, *leaf.tolist())
        if t % settings.every == 0:
            schedule.append(leaf.tolist())
            i = torch.randint(len(problem.val.y), (settings.val_batch,), generator=sampler)
            leaf.grad = by_hand.hypergradient(problem.val.x[i], problem.val.y[i])
            adam.step()
            with torch.no_grad():
                leaf.copy_(torch.stack([leaf[0].clamp(min=0), leaf[1].clamp(min=0), leaf[2].clamp(0, 0.9999)]))
    schedule.append(leaf.tolist())
    found = tutorial.real_time(problem, start, settings, seed=5).schedule
    assert len(found) == 11
    np.testing.assert_allclose(found, schedule, rtol=1e-7, atol=1e-9)


# -- real time


def negated(run: metaopt.Streaming, hyper: metaopt.Hyperparameters) -> None:
    for leaf in hyper.parameters():
        assert leaf.grad is not None
        leaf.grad.neg_()


def is_untrained(problem: Any, result: Any, settings: Any = SMALL, seed: int = 0) -> bool:
    """Whether it stands, after every epoch, where it began."""
    untouched = training.evaluate(training.make_network(problem, settings, seed), problem)
    return all(epoch == untouched for epoch in result.epochs)


def check_null_teacher(problem: Any, settings: Any, seed: int) -> None:
    vanilla = training.fixed(problem, tutorial.VANILLA, settings, seed=seed)
    taught = tutorial.real_time(problem, tutorial.NULL, settings, seed=seed)
    assert taught.schedule[0] == (0, 0, 0)
    assert taught.best.test_accuracy >= 0.8 * vanilla.best.test_accuracy

    still = training.fixed(problem, tutorial.NULL, settings, seed=seed)
    wrong = tutorial.real_time(problem, tutorial.NULL, settings, seed=seed, watch=negated)
    for control in (still, wrong):
        assert is_untrained(problem, control, settings, seed)
        assert control.best.test_accuracy < 15
    assert set(wrong.schedule) == {(0, 0, 0)}


def test_a_null_teacher_teaches_and_without_the_hypergradient_nothing_is_learnt(problem: Any) -> None:
    check_null_teacher(problem, SMALL, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("voice", ["ked", "kal"])
def test_a_null_teacher_teaches_on_recorded_speech(voice: str) -> None:
    torch.set_default_dtype(torch.float32)
    try:
        recorded = speech.load_voice(voice, fetch=False)
    except speech.MissingDataError as missing:
        pytest.skip(str(missing))
    check_null_teacher(phones.make_problem(recorded, seed=1), tutorial.DEFAULT, seed=1)


def test_every_step_is_projected(problem: Any) -> None:
    bold = replace(SMALL, epochs=2, hyper_lr=0.05)
    schedule = np.array(tutorial.real_time(problem, tutorial.INFORMED, bold, seed=0, watch=negated).schedule)
    assert (schedule >= 0).all()
    assert (schedule[:, 1:] == 0).any()

    def faster(run: metaopt.Streaming, hyper: metaopt.Hyperparameters) -> None:
        for name, leaf in hyper.named_parameters():
            leaf.grad = torch.full_like(leaf, -1.0 if name == "momentum" else 0.0)

    start = training.Setting(0.0, 1e-4, 0.5)
    bolder = replace(bold, epochs=1, hyper_lr=0.2)
    schedule = np.array(tutorial.real_time(problem, start, bolder, seed=0, watch=faster).schedule)
    assert schedule[-1, 2] == 0.9999
    assert (schedule[:, :2] == [0.0, 1e-4]).all()


def test_tangents_outlive_the_hyper_steps(problem: Any) -> None:
    def reset(run: metaopt.Streaming, hyper: metaopt.Hyperparameters) -> None:
        run.reset_tangents()

    once = replace(SMALL, epochs=1)
    kept = tutorial.real_time(problem, tutorial.INFORMED, once, seed=0).schedule
    lost = tutorial.real_time(problem, tutorial.INFORMED, once, seed=0, watch=reset).schedule
    assert kept[:2] == lost[:2]  # nothing had been reset before the first hyper-step
    assert all(ours != theirs for ours, theirs in zip(kept[2:], lost[2:], strict=True))


def test_the_memory_does_not_depend_on_the_number_of_steps(problem: Any) -> None:
    alive, tangents = [], []

    def weigh(run: metaopt.Streaming, hyper: metaopt.Hyperparameters) -> None:
        gc.collect()
        alive.append(sum(x.nbytes for x in gc.get_objects() if type(x) is Tensor and x.device.type == "cpu"))
        tangents.append(sum(z.nbytes for z in run._carried.tangents.values()))

    tutorial.real_time(problem, tutorial.INFORMED, replace(SMALL, every=30, epochs=6), seed=0, watch=weigh)
    state = 2 * sum(p.nbytes for p in training.make_network(problem, SMALL, seed=0).parameters())
    assert tangents == [3 * state] * 6  # weights and momentum buffers, a tangent for each of ρ, η and μ
    assert max(alive[2:]) <= alive[2] + state / 10


def test_a_run_without_hyper_steps_is_plain_training_bit_for_bit(problem: Any) -> None:
    settings = replace(SMALL, epochs=2, every=10**6)
    watched = tutorial.real_time(problem, tutorial.INFORMED, settings, seed=2)
    assert watched.epochs == training.fixed(problem, tutorial.INFORMED, settings, seed=2).epochs
    assert watched.schedule == [tutorial.INFORMED]
