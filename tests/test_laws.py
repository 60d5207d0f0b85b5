"""What holds for every training loop, whatever its hyperparameters are."""

from __future__ import annotations

import copy
import gc
import random
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensor

import metaopt
from metaopt.capture import program
from metaopt.checkpoints.stores import Place
from tests.oracles import unrolled
from tests.strategies import FLAGS, SCHEDULERS, Hyper, Loop, Settings, Training, loops, randn, settings

RELATIVE = 1e-9
# Loops that found something once: an optimizer without state, an eps as small as a step of finite differences, and a
# learned schedule for what a scheduler sets to numbers of its own.
PLAIN_SGD = Settings(
    "SGD", {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}, dict.fromkeys(FLAGS["SGD"], False)
)
PLAIN_ADAM = Settings(
    "AdamW",
    {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    dict.fromkeys(FLAGS["AdamW"], False),
)
STATELESS = Loop("layers", PLAIN_SGD, {"lr": "scalar"}, steps=2)
TINY = Loop("layers", PLAIN_ADAM, {"beta2": "schedule", "eps": "scalar"}, steps=2, scheduler="sequential", seed=2966)
CYCLED = Loop("layers", PLAIN_ADAM, {"beta1": "schedule"}, steps=3, scheduler="one_cycle")


class Recorded:
    """A loop that was watched in one mode, with what it left."""

    def __init__(self, loop: Loop, mode: Callable[..., Any] = metaopt.record, **options: Any) -> None:
        self.loop = loop
        self.hyper = loop.leaves()
        self.runs: list[Any] = []

        def context(optimizer: torch.optim.Optimizer) -> Any:
            self.runs.append(mode(optimizer, **options))
            return self.runs[0]

        self.training = loop.build(self.hyper)
        self.states = initial_states(self.training)
        torch.manual_seed(loop.seed)
        with context(self.training.optimizer):
            loop.run(self.training, self.hyper)

    @property
    def run(self) -> Any:
        return self.runs[0]

    def outer(self, *, second: bool = False) -> Tensor:
        return self.loop.outer(self.training.model, second=second)

    def gradient(self, outer: Any, wrt: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The hypergradient, where a hyperparameter may have taken no part."""
        with unused_is_fine():
            found: tuple[Tensor, ...] = self.run.hypergradient(outer, list(self.hyper.values()) if wrt is None else wrt)
            return found


@contextmanager
def unused_is_fine() -> Iterator[None]:
    """A loop of no steps uses no learning rate, and so on: zeros are right there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", metaopt.UnusedHyperparameterWarning)
        yield


def initial_states(training: Training) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state tensors by the weights' names."""
    state = training.optimizer.state
    return {
        name: {key: s for key, s in state[weight].items() if key != "step"}
        for name, weight in training.model.named_parameters()
        if weight in state
    }


def direct(hyper: Hyper) -> Tensor:
    """An objective of the hyperparameters alone."""
    return sum(((leaf - 0.3) ** 2).sum() for leaf in hyper.values())  # type: ignore[return-value]


def flat(tensors: Sequence[Tensor]) -> list[list[float]]:
    return [tensor.detach().reshape(-1).tolist() for tensor in tensors]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], *, relative: float = RELATIVE) -> None:
    """To some digits of the largest entry of each."""
    assert len(found) == len(expected)
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        if b.numel():
            scale = float(b.detach().abs().max())
            assert float((a - b).detach().abs().max()) <= relative * scale + 1e-13, (place, flat([a, b]))


# -- reverse = unrolled ------------------------------------------------------------------------------------------------


@given(loop=loops())
def test_reverse_is_unrolled(loop: Loop) -> None:
    """For every hyperparameter, the direct dependence included, for the initial weights and the initial state."""
    assert_reverse_is_unrolled(loop)


def test_a_learned_schedule_of_a_cycled_momentum() -> None:
    assert_reverse_is_unrolled(CYCLED)


def assert_reverse_is_unrolled(loop: Loop) -> None:
    recorded = Recorded(loop)
    hyper = loop.leaves()
    oracle = unrolled(loop, hyper)
    assert_close([recorded.outer()], [oracle.outer])
    states = [s for name in recorded.states for s in recorded.states[name].values()]
    wanted = [*recorded.hyper.values(), *recorded.training.trained, *states]
    expected = [*hyper.values(), *oracle.weights.values()]
    expected += [oracle.states[name][key] for name in recorded.states for key in recorded.states[name]]
    found = recorded.gradient(recorded.outer() + direct(recorded.hyper), wanted)
    assert_close(found, oracle.gradients(expected, oracle.outer + direct(hyper)))


@given(loop=loops(loaded=True, steps=3, silent=False))
def test_the_initial_state_has_a_hypergradient(loop: Loop) -> None:
    """The law above, where it is sure to be about something."""
    loop = replace(loop, settings=loop.settings.but(lr=0.1, momentum=0.5, beta1=0.5, dampening=0.0))
    recorded = Recorded(loop)
    oracle = unrolled(loop, loop.leaves())
    names = [name for name in recorded.states if any(name == n for n in oracle.states)]
    found = recorded.gradient(recorded.outer(), [s for name in names for s in recorded.states[name].values()])
    expected = oracle.gradients([s for name in names for s in oracle.states[name].values()])
    assert any(bool(g.any()) for g in expected)
    assert_close(found, expected)


@given(chosen=settings(), data=st.data())
def test_zero_steps_give_the_direct_gradient_only(chosen: Settings, data: st.DataObject) -> None:
    loop = data.draw(loops(settings_=chosen, steps=0, hyper={"lr": "scalar", "penalty": "own"}))
    recorded = Recorded(loop)
    outer = recorded.outer()
    found = recorded.gradient(outer + direct(recorded.hyper), [*recorded.hyper.values(), *recorded.training.trained])
    expected = torch.autograd.grad(direct(recorded.hyper), list(recorded.hyper.values()))
    assert_close(found[: len(expected)], expected)
    through = torch.autograd.grad(outer, recorded.training.trained, allow_unused=True)
    weights = [torch.zeros_like(w) if g is None else g for w, g in zip(recorded.training.trained, through, strict=True)]
    assert_close(found[len(expected) :], weights)


@given(loop=loops(steps=4), kept=st.integers(0, 5))
def test_the_last_steps_are_unrolled_from_a_detached_state(loop: Loop, kept: int) -> None:
    recorded = Recorded(loop, last=kept)
    hyper = loop.leaves()
    oracle = unrolled(loop, hyper, last=kept)
    found = recorded.gradient(recorded.outer() + direct(recorded.hyper))
    assert_close(found, oracle.gradients(list(hyper.values()), oracle.outer + direct(hyper)))


@given(loop=loops(steps=4), cut=st.integers(0, 4))
def test_a_second_context_goes_on_where_the_first_one_ended(loop: Loop, cut: int) -> None:
    """The training is that of one context, and the second run knows the steps since its beginning."""
    whole = Recorded(loop)
    hyper = loop.leaves()
    training = loop.build(hyper)
    torch.manual_seed(loop.seed)
    with metaopt.record(training.optimizer):
        loop.run(training, hyper, stop=cut)
    asked = [name for name in hyper if name != "scale"]  # which is the first context's
    with metaopt.record(training.optimizer) as run:
        loop.run(training, {name: hyper[name] for name in asked}, start=cut)
    assert_same_training(training, whole.training)
    if asked:
        oracle = unrolled(loop, leaves := loop.leaves(), last=4 - cut)
        with unused_is_fine():
            found = run.hypergradient(loop.outer(training.model) + direct(hyper), [hyper[name] for name in asked])
        assert_close(found, oracle.gradients([leaves[name] for name in asked], oracle.outer + direct(leaves)))


@given(chosen=settings("SGD", momentum=0.0, lr=0.1), data=st.data())
def test_a_momentum_of_exactly_zero_has_a_derivative(chosen: Settings, data: st.DataObject) -> None:
    kinds = {"momentum": "scalar", "lr": "scalar", "weight_decay": "scalar"}
    loop = data.draw(loops(settings_=chosen, hyper=kinds, steps=4, silent=False, loaded=False))
    recorded = Recorded(loop)
    hyper = loop.leaves()
    found = recorded.gradient(recorded.outer())
    expected = unrolled(loop, hyper).gradients(list(hyper.values()))
    assert bool(expected[0].any())
    assert_close(found, expected)


# -- the algebra of objectives -----------------------------------------------------------------------------------------


@given(loop=loops(), a=st.floats(-3, 3, width=16), b=st.floats(-3, 3, width=16))
def test_a_hypergradient_is_linear_in_the_objective(loop: Loop, a: float, b: float) -> None:
    recorded = Recorded(loop)
    first, second = (recorded.outer(second=flag) + direct(recorded.hyper) for flag in (False, True))
    one, other = recorded.gradient(first), recorded.gradient(second)
    both = recorded.gradient(a * first + b * second)
    scale = 1 + max(float(g.abs().max()) for g in (*one, *other) if g.numel())
    for x, y, z in zip(one, other, both, strict=True):
        assert torch.all((a * x + b * y - z).abs() <= 1e-11 * scale)


@given(loop=loops())
def test_a_list_of_objectives_is_their_sum(loop: Loop) -> None:
    recorded = Recorded(loop)
    first, second = recorded.outer() + direct(recorded.hyper), recorded.outer(second=True)
    assert_close(recorded.gradient([first, second]), recorded.gradient(first + second), relative=1e-11)
    functions = [first, lambda: recorded.outer(second=True)]
    assert_close(recorded.gradient(functions), recorded.gradient(first + second), relative=1e-11)


@given(loop=loops())
def test_a_jacobian_has_the_hypergradients_as_rows(loop: Loop) -> None:
    recorded = Recorded(loop)
    objectives = [recorded.outer(), recorded.outer(second=True) + direct(recorded.hyper), 2 * recorded.outer()]
    objectives = objectives if loop.steps else [objective + direct(recorded.hyper) for objective in objectives]
    wanted = [*recorded.hyper.values(), *recorded.training.trained]
    with unused_is_fine():
        jacobian = recorded.run.jacobian(objectives, wanted)
    rows = [recorded.gradient(objective, wanted) for objective in objectives]
    for place, found in enumerate(jacobian):
        assert found.shape == (3, *wanted[place].shape)
        assert_close(list(found), [row[place] for row in rows])


def test_what_can_not_be_batched_is_taken_row_by_row() -> None:
    """A product with a sparse matrix, in the loop and before it: the Jacobian ended in an error of torch's."""
    torch.manual_seed(0)
    examples = torch.randn(6, 4).relu().to_sparse()
    lr, theta = torch.tensor(0.1, requires_grad=True), torch.rand(4, 1, requires_grad=True)

    def rows(mode: Any, find: Callable[..., Sequence[Tensor]]) -> Sequence[Tensor]:
        target, weights = torch.zeros(4, 1, requires_grad=True), torch.sparse.mm(examples, theta)
        optimizer = metaopt.optim.SGD([target], lr=lr, momentum=0.9)
        with mode(optimizer) as run:
            for _ in range(3):
                optimizer.zero_grad()
                (weights * (torch.sparse.mm(examples, target) - 1) ** 2).sum().backward()
                optimizer.step()
        return find(run, [target.square().sum(), target[0, 0] + theta.sum()])

    def singly(run: Any, objectives: Sequence[Tensor]) -> list[Tensor]:
        found = [run.hypergradient(objective, [lr, theta]) for objective in objectives]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    expected = rows(metaopt.record, singly)
    assert_close(rows(metaopt.record, lambda run, objectives: run.jacobian(objectives, [lr, theta])), expected)
    assert_close(rows(metaopt.stream, singly), expected)


# -- the training is left alone ----------------------------------------------------------------------------------------


def assert_same_training(found: Training, expected: Training) -> None:
    """Weights, buffers, gradients, optimizer state and param groups, bit for bit."""
    for (name, a), b in zip(found.model.state_dict().items(), expected.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for p, q in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            assert torch.equal(p.grad, q.grad)
    one, other = found.optimizer.state_dict(), expected.optimizer.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for key, state in one["state"].items():
        assert state.keys() == other["state"][key].keys()
        for name, value in state.items():
            theirs = other["state"][key][name]
            assert torch.equal(value, theirs) if isinstance(value, Tensor) else value == theirs, name


@given(loop=loops())
@example(loop=STATELESS)
def test_watching_changes_no_bit(loop: Loop) -> None:
    """The watched loop is the bare loop, and a bare loop with torch's own optimizer."""
    hyper = loop.leaves()
    bare = loop.train(hyper)
    random_state = torch.get_rng_state()
    recorded = Recorded(loop)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_training(recorded.training, bare)
    assert all(leaf.grad is None for leaf in recorded.hyper.values())
    for leaf, other in zip(recorded.hyper.values(), loop.leaves().values(), strict=True):
        assert torch.equal(leaf, other)
    if "schedule" not in loop.hyper.values():
        numbers: dict[str, Any] = {
            n: h.item() if n.split(".")[0] in loop.settings.numbers else h for n, h in hyper.items()
        }
        plain = loop.train(numbers, library=torch.optim)
        for a, b in zip(recorded.training.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(a, b)


@given(loop=loops())
def test_verification_accuses_no_honest_loop(loop: Loop) -> None:
    program._known.clear()  # programs are shared between runs, and their derivatives checked once
    Recorded(loop, verify="all")


def test_verification_knows_when_an_eps_is_tiny() -> None:
    program._known.clear()
    Recorded(TINY, verify="all")


def test_verification_knows_when_a_difference_leaves_the_domain() -> None:
    """Second moments of very different sizes: a finite difference takes the least of them below 0, under the root."""
    for seed in range(30):
        weight = nn.Parameter(randn(seed, 6))
        scales = 10 ** (-2.5 * torch.linspace(0, 1, 6))
        beta2 = torch.tensor(0.999, requires_grad=True)
        optimizer = metaopt.optim.Adam([weight], lr=0.01, betas=(0.9, beta2))
        program._known.clear()
        with metaopt.record(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                ((scales * weight) ** 2).sum().backward()
                optimizer.step()


@given(loop=loops(silent=False), before=st.booleans())
def test_the_loop_puts_no_gradient_into_a_hyperparameter(loop: Loop, before: bool) -> None:
    hyper = loop.leaves()
    marks = [torch.ones_like(leaf) if before else None for leaf in hyper.values()]
    for leaf, mark in zip(hyper.values(), marks, strict=True):
        leaf.grad = mark
    loop.train(hyper, metaopt.record)
    for leaf, mark in zip(hyper.values(), marks, strict=True):
        assert leaf.grad is mark
        assert mark is None or torch.equal(mark, torch.ones_like(mark))


@given(loop=loops())
def test_a_sweep_changes_no_bit(loop: Loop) -> None:
    recorded = Recorded(loop)
    outer = recorded.outer() + direct(recorded.hyper)
    bare = loop.train(loop.leaves())
    bare.model.eval()
    random_state = torch.get_rng_state()
    with unused_is_fine():
        recorded.run.backward(outer)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_training(recorded.training, bare)


@given(loop=loops(), steps=st.integers(1, 4))
def test_backward_accumulates_into_the_hyperparameters_alone(loop: Loop, steps: int) -> None:
    loop = replace(loop, steps=steps)
    recorded = Recorded(loop)
    outer = recorded.outer() + direct(recorded.hyper)
    grads = [None if w.grad is None else (w.grad, w.grad.clone()) for w in recorded.training.trained]
    once = recorded.gradient(outer)
    recorded.run.backward(outer, retain=True)
    assert_close([leaf.grad for leaf in recorded.hyper.values()], once, relative=1e-12)  # type: ignore[misc]
    recorded.run.backward(outer)
    assert_close([leaf.grad for leaf in recorded.hyper.values()], [2 * g for g in once], relative=1e-12)  # type: ignore[misc]
    for weight, before in zip(recorded.training.trained, grads, strict=True):
        assert (weight.grad is None) == (before is None)
        if before is not None:
            assert weight.grad is before[0]
            assert torch.equal(before[0], before[1])
    with pytest.raises(metaopt.SweepError, match="freed"):
        recorded.run.backward(outer)


@given(loop=loops())
@example(loop=STATELESS)
def test_rewinding_goes_back_to_the_first_bit(loop: Loop) -> None:
    """Weights, buffers, gradients, optimizer, param groups and generators; the loop then gives the same numbers."""
    hyper = loop.leaves()
    training, fresh = loop.build(hyper), loop.build(hyper)
    for made in (training, fresh):
        made.model.train()
    torch.manual_seed(loop.seed)
    random.seed(loop.seed)
    numpy.random.seed(loop.seed)
    schedule = None if training.scheduler is None else copy.deepcopy(training.scheduler.state_dict())
    generators = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    results = []
    for _ in range(2):
        with metaopt.record(training.optimizer) as run:
            loop.run(training, hyper)
            drawn = random.random(), numpy.random.rand(), torch.rand(()).item()
        outer = loop.outer(training.model)
        with unused_is_fine():
            found = run.hypergradient(outer + direct(hyper), list(hyper.values()))
        results.append((outer.item(), flat(list(training.model.state_dict().values())), flat(found), drawn))
        run.rewind()
        training.model.train()
        assert_same_training(training, fresh)
        assert torch.equal(torch.get_rng_state(), generators[0])
        assert (random.getstate(), str(numpy.random.get_state())) == generators[1:]
        if training.scheduler is not None and schedule is not None:
            training.scheduler.load_state_dict(copy.deepcopy(schedule))
    assert results[0] == results[1]


@pytest.mark.parametrize("hyper_step", ["after rewinding", "before rewinding"])
@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "one_cycle"])
def test_the_next_hyper_iteration_has_the_schedule_of_the_moved_hyperparameter(scheduler: str, hyper_step: str) -> None:
    """Backward, hyper-step, rewind, and the same loop again with a new scheduler."""
    weight = nn.Parameter(torch.ones(3))
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = metaopt.optim.SGD([weight], lr=lr)
    found = []
    for _ in range(3):
        numbers = []
        with metaopt.record(optimizer) as run:
            present = SCHEDULERS[scheduler](optimizer)
            for _ in range(4):
                optimizer.zero_grad()
                (weight**2).sum().backward()
                optimizer.step()
                numbers.append(optimizer.param_groups[0]["lr"])
                present.step()
        run.backward((weight**2).sum())
        found.append(numbers)
        if hyper_step == "after rewinding":
            run.rewind()
        with torch.no_grad():
            lr.mul_(2)
        if hyper_step == "before rewinding":
            run.rewind()
    assert found[1] == pytest.approx([2 * number for number in found[0]])
    assert found[2] == pytest.approx([4 * number for number in found[0]])


# -- closed forms ------------------------------------------------------------------------------------------------------


def quadratic(seed: int, steps: int, momentum: float = 0.0) -> tuple[Any, ...]:
    """``w ← w - η (H w - b)``, recorded; ``E = ½‖w‖² + b·c``."""
    half = randn(seed, 4, 4)
    matrix = half @ half.T / 8 + 0.1 * torch.eye(4)
    start, b = randn(seed + 1, 4), randn(seed + 2, 4).requires_grad_()
    lr = torch.tensor(0.2, requires_grad=True)
    weight = nn.Parameter(start.clone())
    optimizer = metaopt.optim.SGD([weight], lr=lr, momentum=momentum)
    with metaopt.record(optimizer) as run:
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * weight @ matrix @ weight - b @ weight).backward()
            optimizer.step()
    c = torch.arange(4.0)
    found = run.hypergradient(0.5 * (weight**2).sum() + b @ c, [lr, b, weight])
    return matrix, start, b.detach(), c, weight.detach(), found


@given(seed=st.integers(0, 1000))
def test_one_step_includes_its_own_derivative(seed: int) -> None:
    """T = 1 is all ``B_1``: a sweep that ends a step early gives the direct derivative only."""
    matrix, start, b, c, end, found = quadratic(seed, steps=1)
    expected = (-end @ (matrix @ start - b), 0.2 * end + c, end - 0.2 * matrix @ end)
    assert_close(found, expected, relative=1e-12)


@given(seed=st.integers(0, 1000), steps=st.integers(1, 6))
def test_gradient_descent_on_a_quadratic_has_a_closed_form(seed: int, steps: int) -> None:
    """``w_T = w* + (I - ηH)ᵀ (w₀ - w*)`` with ``w* = H⁻¹ b``."""
    matrix, start, b, c, end, found = quadratic(seed, steps)
    best = torch.linalg.solve(matrix, b)
    contraction = torch.eye(4) - 0.2 * matrix
    power = torch.linalg.matrix_power(contraction, steps)
    speed = -steps * matrix @ torch.linalg.matrix_power(contraction, steps - 1) @ (start - best)
    in_b = torch.linalg.solve(matrix, (torch.eye(4) - power) @ end)
    assert_close([end], [best + power @ (start - best)])
    assert_close(found, (end @ speed, in_b + c, power @ end))


@given(seed=st.integers(0, 1000), steps=st.integers(1, 6))
def test_momentum_on_a_quadratic_is_a_linear_recursion(seed: int, steps: int) -> None:
    """``(w, v) ← M (w, v) + (-η, 1) ⊗ (-b)``: the derivative in ``w₀`` is a power of M."""
    matrix, _, _, _, end, found = quadratic(seed, steps, momentum=0.7)
    eye = torch.eye(4)
    first = torch.cat([eye - 0.2 * matrix, matrix])  # torch's first buffer is the gradient itself
    later = torch.cat([torch.cat([eye - 0.2 * matrix, -0.2 * 0.7 * eye], 1), torch.cat([matrix, 0.7 * eye], 1)])
    flow = torch.linalg.matrix_power(later, steps - 1) @ first
    assert_close(found[2:], [flow[:4].T @ end])


# -- memory ------------------------------------------------------------------------------------------------------------


class Token:
    """Stands in a graph for what an operation saved for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunction():  # not a part of the loop
            self.tensor = tensor.detach()  # else the graph would hold itself


def alive() -> tuple[int, int, int]:
    """The living tensors, the bytes of their memory, and those of them that have a graph."""
    gc.collect()
    # Dynamo's caches, where another test compiled something, hold fake tensors, which have no memory.
    objects = gc.get_objects()
    tensors = [x for x in objects if issubclass(type(x), Tensor) and not issubclass(type(x), FakeTensor)]
    tensors = [x for x in tensors if torch._C._has_storage(x)]  # an undefined one of torch's has none
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    places = sum(x.nbytes for x in objects if type(x) is Place)  # copies of states, which are no tensors
    return len(tensors), sum(memory.values()) + places, sum(x.grad_fn is not None for x in tensors)


def long_run(steps: int, **options: Any) -> tuple[metaopt.Recording, tuple[int, int, int], int, int]:
    """Momentum SGD: the run, what it keeps alive, the number of saved tensors that are, and ``|s|`` in bytes."""
    before = alive()
    model = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40))
    x = randn(1, 8, 40)
    lr = torch.tensor(0.01, requires_grad=True)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    tokens: weakref.WeakSet[Token] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Token:
        tokens.add(token := Token(tensor))
        return token

    with metaopt.record(optimizer, **options) as run:
        for _ in range(steps):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda token: token.tensor):
                optimizer.zero_grad()
                metric = (model(x) - x).abs().mean()  # has a graph, and nobody calls backward on it
                loss = (model(x) - x).pow(2).mean()
            loss.backward()
            optimizer.step()
        del metric, loss
    gc.collect()
    state = 2 * sum(w.numel() * w.element_size() for w in model.parameters())
    after = alive()
    return run, (after[0] - before[0], after[1] - before[1], after[2] - before[2]), len(tokens), state


@pytest.mark.parametrize("verify", ["first", "never"])
def test_memory_is_states_and_not_graphs(verify: str) -> None:
    run, short, tokens, state = long_run(20, verify=verify)
    assert tokens == 0
    assert short[2] == 0
    del run
    run, long, tokens, _ = long_run(40, verify=verify)
    assert run.steps == 40
    assert tokens == 0
    assert long[2] == 0
    per_step = (long[1] - short[1]) / 20
    assert state <= per_step <= 1.02 * state + 64, (per_step, state)
    assert (long[0] - short[0]) / 20 <= 1


def test_truncation_keeps_the_last_states_only() -> None:
    _, short, _, state = long_run(20, last=5)
    _, long, _, _ = long_run(40, last=5)
    assert long[1] - short[1] <= state / 10


def test_a_sweep_frees_what_was_recorded() -> None:
    run, held, _, state = long_run(20)
    weights = [w for group in run._loop.optimizer.param_groups for w in group["params"]]
    before = alive()
    run.backward(sum((w**2).sum() for w in weights))
    assert before[1] - alive()[1] >= 18 * state
    assert held[1] >= 20 * state
