"""Hypergradients while the training goes on, and what the contexts show of themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from tests.cases import data, mlp


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    teacher = torch.randn(10, 4)
    x = torch.randn(300, 10)
    y = (x @ teacher).argmax(1)
    return x[:200], y[:200], x[200:], y[200:]


def real_time(sign: float) -> tuple[metaopt.Hyperparameters, float, metaopt.Streaming]:
    """Real-time optimisation of the rate and the momentum from zero; `sign` turns the hypergradient."""
    x, y, x_val, y_val = problem()
    model = mlp(10, 16, 4)
    hyper = metaopt.Hyperparameters(lr=metaopt.box(0.0, 0, None), momentum=metaopt.box(0.0, 0, 0.9999))
    hyper_optimizer = torch.optim.Adam(hyper.parameters(), lr=5e-3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=hyper.lr, momentum=hyper.momentum)
    torch.manual_seed(1)
    with metaopt.stream(optimizer) as run:
        for t in range(200):
            i = torch.randint(0, 200, (32,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
            if t % 5 == 4:
                hyper_optimizer.zero_grad()
                run.backward(F.cross_entropy(model(x_val), y_val))
                for leaf in hyper.parameters():
                    assert leaf.grad is not None
                    leaf.grad *= sign
                hyper_optimizer.step()
                hyper.project_()
                assert hyper.lr >= 0
                assert 0 <= hyper.momentum <= 0.9999
    return hyper, (model(x_val).argmax(1) == y_val).double().mean().item(), run


def test_a_null_teacher_learns_and_its_negation_does_not() -> None:
    hyper, accuracy, run = real_time(1.0)
    assert hyper.lr > 0.05
    assert accuracy > 0.7
    assert run.steps == 200
    hyper, accuracy, _ = real_time(-1.0)
    assert hyper.lr == 0
    assert accuracy < 0.5


def test_the_tangents_are_not_reset_by_a_hyper_step() -> None:
    def trained(reset: bool) -> Tensor:
        x, y, x_val, y_val = data()
        model = mlp(5, 6, 3)
        lr = torch.tensor(0.1, requires_grad=True)
        hyper_optimizer = torch.optim.SGD([lr], lr=0.01)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
        with metaopt.stream(optimizer) as run:
            for _ in range(6):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                hyper_optimizer.zero_grad()
                run.backward(F.cross_entropy(model(x_val), y_val))
                hyper_optimizer.step()
                if reset:
                    run.reset_tangents()
        return lr.detach()

    assert trained(True) != trained(False)


def test_the_memory_of_forward_mode_does_not_grow() -> None:
    x, y, _, _ = data()
    model = mlp(5, 6, 3)
    hyper = metaopt.Hyperparameters(lr=metaopt.positive(0.01))
    optimizer = metaopt.optim.SGD(model.parameters(), lr=hyper.lr, momentum=0.5)
    sizes = []
    with metaopt.stream(optimizer) as run:
        for t in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            hyper.lr = 0.01 + 1e-4 * t
            sizes.append((len(run._tangents), len(run._recent), len(run._loop.tape.externals)))
    assert sizes[20] == sizes[-1]


def test_many_hyperparameters_are_told_of_the_other_mode() -> None:
    model = nn.Linear(5, 3)
    weights = torch.ones(1200, requires_grad=True)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(1200, 5)
    seen = pytest.warns(metaopt.MetaoptWarning, match=r"metaopt\.record")
    with seen, metaopt.stream(optimizer, chunk=100):
        (weights * model(x).sum(1)).mean().backward()
        optimizer.step()


def test_chunks_give_the_same_number() -> None:
    gradients = []
    for chunk in (None, 1, 5):
        x, y, x_val, y_val = data()
        model = mlp(5, 6, 3)
        weights = torch.ones(12, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with metaopt.stream(optimizer, chunk=chunk) as run:
            for _ in range(3):
                optimizer.zero_grad()
                (weights * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
                optimizer.step()
        gradients.append(run.hypergradient(F.cross_entropy(model(x_val), y_val), wrt=weights)[0])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-12, atol=0)


def test_forward_mode_refuses_the_initial_weights_and_bad_options() -> None:
    x, y, _, _ = data()
    model = mlp(5, 6, 3)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    with metaopt.stream(optimizer) as run:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with pytest.raises(metaopt.SweepError, match="every weight"):
        run.hypergradient(F.cross_entropy(model(x), y), wrt=model.parameters())
    with pytest.raises(ValueError, match="chunk"):
        metaopt.stream(optimizer, chunk=0)
    with pytest.raises(ValueError, match="discount"):
        metaopt.stream(optimizer, discount=2.0)


def test_an_objective_of_an_earlier_step_and_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    x, y, x_val, y_val = data()
    gradients = []
    for steps in (6, 4):
        model = mlp(5, 6, 3)
        lr = torch.tensor(0.1, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        with metaopt.record(optimizer, progress=True) as run:
            for t in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if t == 3:
                    outer = F.cross_entropy(model(x_val), y_val)
        run.backward(outer)
        gradients.append(lr.grad)
    assert gradients[0] == gradients[1]
    assert "reverse sweep" in capsys.readouterr().err
