"""Precisions and kernels: float32, autocast, compiled models, and the kernels that have no second derivative."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt
from tests.cases import Attention, Conv, Recurrent, Tied, mlp


def sequence(model: nn.Module, dtype: torch.dtype) -> Tensor:
    """The hypergradient of Adam's rate, for a model of sequences in evaluation mode (no dropout)."""
    torch.manual_seed(2)
    x, y = torch.randint(0, 11, (12, 5)), torch.randint(0, 11, (12, 5))
    model.to(dtype).eval()
    lr = torch.tensor(0.02, dtype=dtype, requires_grad=True)
    optimizer = metaopt.optim.Adam(model.parameters(), lr=lr, eps=0.01)
    with metaopt.record(optimizer, verify="all") as run:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x).transpose(1, 2), y).backward()
            optimizer.step()
    run.backward(F.cross_entropy(model(x).transpose(1, 2), y))
    assert lr.grad is not None
    return lr.grad.double()


@pytest.mark.parametrize("make", [Tied, Recurrent, Attention], ids=lambda m: m.__name__)
def test_float32_agrees_with_float64(make: type[nn.Module]) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(3)
        results.append(sequence(make(), dtype))
    assert results[0].item() == pytest.approx(results[1].item(), rel=1e-3)


def test_float32_convolution_agrees_with_float64() -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(2)
        x, y = torch.randn(12, 1, 6, 6).to(dtype), torch.randint(0, 3, (12,))
        model = Conv().to(dtype)
        for module in model.modules():
            if isinstance(module, (nn.Dropout, nn.Dropout2d, nn.AlphaDropout)):
                module.p = 0.0
        lr = torch.tensor(0.1, dtype=dtype, requires_grad=True)
        optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        with metaopt.record(optimizer, verify="all") as run:
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        model.eval()
        run.backward(F.cross_entropy(model(x), y))
        assert lr.grad is not None
        results.append(lr.grad.double())
    assert results[0].item() == pytest.approx(results[1].item(), rel=1e-3)


def loop(model: nn.Module, autocast: bool = False) -> tuple[Tensor, metaopt.Recording]:
    torch.manual_seed(2)
    x, y = torch.randn(16, 5, dtype=torch.float32), torch.randint(0, 3, (16,))
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    with metaopt.record(optimizer, verify="all") as run:
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    run.backward(F.cross_entropy(model(x), y))
    assert lr.grad is not None
    return lr.grad, run


def test_autocast_bfloat16() -> None:
    plain, _ = loop(mlp(5, 6, 3).float())
    cast, run = loop(mlp(5, 6, 3).float(), autocast=True)
    assert cast != plain
    assert cast.item() == pytest.approx(plain.item(), rel=0.05)
    assert "autocast" in str(run.programs[0])


@pytest.mark.skipif(
    "compile_wrapper" not in inspect.getsource(torch._dynamo.eval_frame), reason="such calls are not told in this torch"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_runs_eagerly_and_says_so_once() -> None:
    expected, _ = loop(mlp(5, 6, 3).float())
    model = torch.compile(mlp(5, 6, 3).float(), backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, _ = loop(model)  # type: ignore[arg-type]
    eager = [w for w in caught if issubclass(w.category, metaopt.EagerWarning)]
    assert len(eager) == 1
    assert eager[0].filename == __file__
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_random_operator_of_torch_has_its_generator_kept() -> None:
    from metaopt.capture.surroundings import _RANDOM

    tagged = set()
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        overloads = packet.overloads() if hasattr(packet, "overloads") else []
        if any(torch.Tag.nondeterministic_seeded in getattr(packet, o).tags for o in overloads):
            tagged.add(name.strip("_"))
    assert len(tagged) > 30
    assert not [name for name in sorted(tagged) if not _RANDOM.search(name)]


def test_programs_are_shared_and_printed() -> None:
    _, run = loop(mlp(5, 6, 3).float())
    assert len(run.programs) == 1  # the first step, which makes the momentum buffers, is a step from zeros
    text = str(run.programs[0])
    for word in ("linear", "tanh", "cross_entropy", "inner_gradient", "sgd_update"):
        assert word in text
    assert run.programs[0].graph.nodes
    assert "1 program," in repr(run)
