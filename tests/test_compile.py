"""Compiled derivatives are the derivatives, of every loop of the table; what can't be compiled is said."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from metaopt.capture import compiled, program
from metaopt.capture.compiled import Compiled
from metaopt.capture.segment import nudged
from metaopt.modes import versions
from metaopt.modes.pullback import PullBack
from tests.cases import CASES, Case
from tests.optimizer_table import ROWS, Row
from tests.test_cases import watched

# Loops whose steps can't be written as aten calls, and why; all others are compiled.
EAGER = {
    "samples_of_distributions": "draws random numbers",  # a binomial's, which depend on its parameters
    "backward_of_results_that_is_no_derivative": "is an autograd.Function",
    "backward_that_does_not_take_gradients_as_they_are": "is an autograd.Function",
    "backward_that_the_loop_does_not_call": "is an autograd.Function",
    "backward_that_has_no_derivative": "is an autograd.Function",
    "backward_that_is_no_derivative": "is an autograd.Function",
    "custom_function": "is an autograd.Function",
    "functions_whose_flags_change": "is an autograd.Function",
    "kept_aside": "is an autograd.Function",
    "function_of_two_values_one_of_which_is_computed_from_the_other": "is an autograd.Function",
    "gradient_hooks": "gradient hooks run Python code",
    "hooks_of_modules_that_change_gradients": "gradient hooks run Python code",
    "hooks_on_weights_that_move_within_a_step": "gradient hooks run Python code",
    "numpy_index_shuffled_in_place": "neither a tensor nor a number",
    "fake_quantized": "neither a tensor nor a number",
    "transcripts": "too many to compile",
}
# Here it depends on whether an index, or a count of steps, is the same in all steps that share a program.
SOMETIMES = {"writes_through_views_and_data", "adversary_made_in_the_loop"}
# Forwards, tracing takes longer than all else: every fourth loop, unless slow tests are asked for.
FORWARDS = [
    pytest.param(case, id=str(case), marks=() if place % 4 == 0 else pytest.mark.slow)
    for place, case in enumerate(CASES)
]


@pytest.fixture(autouse=True)
def _from_the_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of steps, and nothing known from other tests."""
    monkeypatch.setattr(versions, "ENOUGH", 1)
    monkeypatch.setattr(versions, "AGAIN", 1)
    monkeypatch.setattr(versions, "_known", type(versions._known)())
    monkeypatch.setattr("metaopt.capture.compiled._said", set())


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiled code returns is used, and not what it is compared with."""
    monkeypatch.setattr(Compiled, "is_due", lambda self: False)


def gradients(mode: Any, case: Case, backend: bool | str) -> tuple[dict[str, Tensor | None], str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run, trained, hyper = watched(mode, case, compile=backend)
        run.backward(trained.outer)
    said = " ".join(str(w.message) for w in caught if issubclass(w.category, metaopt.FallbackWarning))
    return {name: leaf.grad for name, leaf in hyper.items()}, said


def is_compiled(mode: Any, case: Case) -> None:
    expected, _ = gradients(metaopt.record, case, False)
    found, said = gradients(mode, case, "aot_eager")
    if str(case) not in SOMETIMES:
        assert EAGER.get(str(case), "") in said
        assert str(case) in EAGER or not said
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_compiled_pull_back_is_the_pull_back(case: Case) -> None:
    is_compiled(metaopt.record, case)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", FORWARDS)
def test_a_compiled_push_is_the_push(case: Case) -> None:
    is_compiled(metaopt.stream, case)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_rule_is_compiled(row: Row) -> None:
    """By one graph for all steps, also where the count of steps decides what is computed (RAdam)."""

    def train(**options: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        weight, lr = nn.Parameter(torch.randn(3, 3)), torch.tensor(0.02, requires_grad=True)
        optimizer = getattr(metaopt.optim, row.bare.__name__)([weight], lr=lr)
        with metaopt.record(optimizer, **options) as run:
            for _ in range(9):
                optimizer.zero_grad()
                (torch.randn(4, 3) @ weight - 1).square().sum().backward()
                optimizer.step()
        return run.hypergradient(weight.square().sum(), lr)

    with warnings.catch_warnings():
        warnings.simplefilter("error", metaopt.FallbackWarning)
        close(train(compile="aot_eager"), train())
    assert any(known.versions for known in versions._known.values())


# -- one loop, by every part of the machinery ------------------------------------------------------------------------


class Trained:
    """A dozen steps of Adam with dropout, a schedule, and weights for slices of the examples."""

    def __init__(self, mode: Any = metaopt.record, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.lr = torch.tensor(0.05, requires_grad=True)
        self.beta2 = torch.tensor(0.9, requires_grad=True)
        self.weights = torch.ones(24, requires_grad=True)
        x, y = torch.randn(24, 5), torch.randint(3, (24,))
        optimizer = metaopt.optim.Adam(self.model.parameters(), lr=self.lr, betas=(0.8, self.beta2), eps=1e-3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        with mode(optimizer, **options) as self.run:
            for t in range(12):
                i = slice(8 * (t % 3), 8 * (t % 3) + 8)
                optimizer.zero_grad()
                (self.weights[i] * F.cross_entropy(self.model(x[i]), y[i], reduction="none")).mean().backward()
                optimizer.step()
                scheduler.step()
        self.model.eval()
        self.outer = F.cross_entropy(self.model(x), y)

    def gradients(self, **options: Any) -> tuple[Tensor, ...]:
        return self.run.hypergradient(self.outer, [self.lr, self.beta2, self.weights], **options)


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], rtol: float = 1e-9) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same() -> None:
    close(Trained(compile=True).gradients(), Trained().gradients())


@pytest.mark.usefixtures("unchecked")
def test_random_numbers_are_drawn_again_and_the_generator_is_left_alone() -> None:
    trained = Trained(compile="aot_eager")
    before = torch.get_rng_state()
    close(trained.gradients(), Trained().gradients())
    trained.gradients()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_the_look_at_rounding_leaves_the_generator_alone(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions._TOLERANCE, torch.float64, 0.0)
    bare = Trained(lambda optimizer: contextlib.nullcontext())
    trained = Trained(mode, compile="aot_eager")
    assert all(map(torch.equal, trained.model.parameters(), bare.model.parameters()))
    before = torch.get_rng_state()
    trained.gradients()
    assert torch.equal(before, torch.get_rng_state())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    built: list[Any] = []
    build = compiled.build

    def counting(*given: Any) -> Compiled:
        built.append(given)
        return build(*given)

    monkeypatch.setattr(versions, "build", counting)
    return built


def test_a_program_is_compiled_once_for_all_runs_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "ENOUGH", 8)
    monkeypatch.setattr(versions, "AGAIN", 2)
    program._known.clear()  # what other tests compiled
    built = counted(monkeypatch)
    for _ in range(3):
        trained = Trained(compile="aot_eager")
        trained.gradients()
        trained.gradients()
    assert len(trained.run.programs) == 2  # the first step has its rate before the scheduler moved it, and is met once
    # Once to see what it reads, once to use it; the last step's adjoint, of the weights alone, is not worth another.
    assert len(built) == 2


@pytest.mark.usefixtures("unchecked")
def test_the_last_step_runs_by_the_others_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adjoint lacks that of the optimizer's state, which is zero."""
    monkeypatch.setattr(versions, "ENOUGH", 8)
    monkeypatch.setattr(versions, "AGAIN", 2)
    Trained(compile="aot_eager").gradients()
    by_autograd: list[Any] = []
    pull_back = PullBack.gradients

    def counting(*given: Any) -> Any:
        by_autograd.append(given)
        return pull_back(*given)

    monkeypatch.setattr(PullBack, "gradients", counting)
    found = Trained(compile="aot_eager").gradients()
    assert len(by_autograd) == 1  # the first step
    close(found, Trained().gradients())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", [2, 3])
def test_an_infinite_derivative_of_what_the_objective_does_not_read_is_no_matter(bad: int) -> None:
    """Zeros stood for the adjoint of a buffer that an earlier objective read, and times infinity gave no number."""

    def gradients(bad: int, compile: bool | str = "aot_eager") -> list[Tensor]:  # noqa: A002 as torch's
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        trace, weight = torch.zeros(1), torch.tensor(1.0, requires_grad=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with metaopt.record(optimizer, compile=compile) as run:
            for step in range(4):
                optimizer.zero_grad()
                (weight * model(torch.ones(2, 3)).square()).mean().backward()
                optimizer.step()
                with torch.no_grad():
                    spread = (model.weight - model.weight).square().sum() + float(step != bad)
                    trace.mul_(0.5).add_(spread.sqrt() + model.bias)
        outers = [lambda: model(torch.ones(1, 3)).sum(), lambda: (model(torch.ones(1, 3)) + trace).sum()]
        return [run.hypergradient(outer, weight)[0] for outer in (outers if bad > 3 else outers[:1])]

    gradients(bad=9)
    torch.testing.assert_close(gradients(bad), gradients(bad, compile=False))


def test_graphs_are_of_use_after_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a derivative that was given states reads does not decide which values are kept for one that may have all."""
    monkeypatch.setattr("metaopt.capture.program._known", type(program._known)())
    for _ in range(2):
        Trained(compile="aot_eager").gradients()
    for _ in range(2):
        trained = Trained(compile="aot_eager", keep="graphs")
        close(trained.gradients(), Trained().gradients())
    of_states, *_, of_graphs = [
        [str(node.target) for node in version.graph.module.graph.nodes]
        for known in versions._known.values()
        for version in known.versions.values()
    ]
    assert of_graphs.count("aten.tanh.default") < of_states.count("aten.tanh.default")
    assert any(segment.known for segment in trained.run._keeping.segments)


def test_few_steps_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "ENOUGH", 13)
    built = counted(monkeypatch)
    Trained(compile=True).gradients()
    assert not built


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(lambda g: 1.01 * g, id="factor"),
        pytest.param(lambda g: -g, id="sign"),
        pytest.param(lambda g: None, id="missing"),
        pytest.param(lambda g: torch.nan * g, id="no-number"),
        pytest.param(lambda g: torch.cat([g[:1], 0 * g[1:]]) if g.dim() else 0 * g, id="entries"),
    ],
)
def test_a_wrong_compiler_is_found_out(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Compiled.__call__

    def wrong(self: Compiled, given: Any) -> list[Tensor | None]:
        first, *others = call(self, given)
        return [None if first is None else mistake(first), *others]

    monkeypatch.setattr(Compiled, "__call__", wrong)
    expected = Trained().gradients()
    with pytest.warns(metaopt.FallbackWarning, match="another than its own"):
        close(Trained(compile="aot_eager").gradients(), expected)


@pytest.mark.parametrize("mode", [metaopt.record, metaopt.stream])
def test_gradients_that_are_all_rounding_are_no_bug_of_the_compiler(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of attention's key bias: what moves the last digit of the state moves the derivative as much."""
    call = Compiled.__call__

    def rounded(self: Compiled, given: Any) -> list[Tensor | None]:
        given.values = [nudged(v, 7) for v in given.values]
        return call(self, given)

    monkeypatch.setattr(Compiled, "__call__", rounded)
    torch.manual_seed(0)
    model, lr = nn.Linear(5, 3), torch.tensor(0.05, requires_grad=True)
    shift = nn.Parameter(torch.randn(()))  # no cross entropy sees it
    x, y = torch.randn(24, 5), torch.randint(3, (24,))
    optimizer = metaopt.optim.Adam([*model.parameters(), shift], lr=lr)
    with mode(optimizer, compile="aot_eager") as run:
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy((model(x) + shift).log_softmax(1) + shift, y).backward()
            optimizer.step()
    run.backward(F.cross_entropy(model(x), y) + shift.square())


def test_a_missing_compiler_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.compile", fail)
    with pytest.warns(metaopt.FallbackWarning, match="needs a C\\+\\+ compiler") as caught:
        close(Trained(compile=True).gradients(), Trained().gradients())
    assert len(caught) == 1


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_change_get_a_version_each() -> None:
    def train(**options: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        lr = torch.tensor(0.1, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
        with metaopt.record(optimizer, **options) as run:
            for t in range(10):
                optimizer.zero_grad()
                model(torch.randn(4 + t % 2, 3)).square().mean().backward()
                optimizer.step()
        return run.hypergradient(model(torch.ones(2, 3)).sum(), lr)

    close(train(compile="aot_eager"), train())


def test_a_mask_of_the_data_is_not_compiled() -> None:
    """How many values it picks is not known from the structure."""

    def train(**options: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        lr = torch.tensor(0.1, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        with metaopt.record(optimizer, **options) as run:
            for _ in range(10):
                x = torch.randn(8, 3)
                optimizer.zero_grad()
                model(x)[x[:, :1] > 0].square().mean().backward()
                optimizer.step()
        return run.hypergradient(model(torch.ones(2, 3)).sum(), lr)

    with pytest.warns(metaopt.FallbackWarning, match="depends on what the tensors hold"):
        close(train(compile="aot_eager"), train())


def test_only_what_is_known_by_name_compiles() -> None:
    with pytest.raises(ValueError, match="inductor, aot_eager"):
        metaopt.record(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1), compile="nvfuser")


def test_a_jacobian_is_left_to_autograd() -> None:
    trained = Trained(compile="aot_eager")
    (found,) = trained.run.jacobian([trained.outer, 2 * trained.outer], trained.lr)
    torch.testing.assert_close(found[1], 2 * trained.gradients()[0], rtol=1e-9, atol=0)


@pytest.mark.usefixtures("unchecked")
def test_weights_picked_by_whole_numbers_are_compiled() -> None:
    """The shape of what they pick is known, which that of what a mask picks is not."""

    def train(**options: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        weights = torch.ones(10, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        with metaopt.record(optimizer, **options) as run:
            for _ in range(10):
                i = torch.randint(10, (4,))
                optimizer.zero_grad()
                (weights[i] * model(torch.randn(4, 3)).squeeze().square()).mean().backward()
                optimizer.step()
        return run.hypergradient(model(torch.ones(2, 3)).sum(), weights)

    close(train(compile="aot_eager"), train())
    assert any(known.versions for known in versions._known.values())


def test_a_step_that_draws_and_is_cut_by_a_number_is_left_to_autograd() -> None:
    """Its first trial run, which notes what it draws, fails already."""

    def train(**options: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        model = nn.Linear(3, 12)
        lr = torch.tensor(0.1, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
        with metaopt.record(optimizer, **options) as run:
            for t in range(10):
                optimizer.zero_grad()
                F.dropout(model(torch.randn(4, 3)), 0.5)[:, t : t + 2].square().mean().backward()
                optimizer.step()
        return run.hypergradient(model(torch.ones(2, 3)).sum(), lr)

    with pytest.warns(metaopt.FallbackWarning, match="a Python number that differs from step to step"):
        close(train(compile="aot_eager"), train())


def test_rounding_that_a_step_amplifies_is_no_wrong_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """From zeros, Adam's first step divides by ``|g| + eps``, and here g is little but rounding."""
    call = Compiled.__call__

    def rounds_otherwise(self: Compiled, given: Any) -> list[Tensor | None]:
        given.values = [nudged(value, 7) for value in given.values]
        return call(self, given)

    monkeypatch.setattr(Compiled, "is_due", lambda self: True)
    monkeypatch.setattr(Compiled, "__call__", rounds_otherwise)
    torch.manual_seed(0)
    x, true = torch.randn(64, 20), torch.randn(20)
    y = x @ true
    weight = nn.Parameter(nudged(true, 3))
    lr = torch.tensor(0.01, requires_grad=True)
    optimizer = metaopt.optim.Adam([weight], lr=lr)
    with warnings.catch_warnings():
        warnings.simplefilter("error", metaopt.FallbackWarning)
        with metaopt.record(optimizer, compile="aot_eager") as run:
            for _ in range(2):
                optimizer.zero_grad()
                (x @ weight - y).square().mean().backward()
                optimizer.step()
        run.backward(weight.sum())
