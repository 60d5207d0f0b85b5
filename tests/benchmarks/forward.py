"""What forward mode costs: its engines side by side, and its memory over the length of the training.

::

    python -m tests.benchmarks.forward                               print the tables
    python -m tests.benchmarks.forward --write docs/forward-mode.md  and put them between the page's marks

Times are medians of steps, shown as ratios to the plain step's, which is measured in the same process before and after
each system. Memory is the growth of a fresh process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import metaopt
from metaopt.capture.program import Program

COLUMNS = (1, 4, 16, 64)
MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")
Step = Callable[[], None]


class Transformer(nn.Module):
    """Two encoder layers over 32 tokens, width 64, and a linear head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores for tokens of shape (batch, 32, 64)."""
        scores: Tensor = self.head(self.encoder(x).mean(1))
        return scores


def mlp() -> nn.Module:
    """The benchmark's MLP, of 269 thousand weights."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn() -> nn.Module:
    """Two strided convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


MODELS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": ("MLP 784-256-256-10, batch 128", mlp, (128, 784)),
    "cnn": ("CNN 28×28, batch 64", cnn, (64, 1, 28, 28)),
    "transformer": ("transformer, 2 layers, width 64, batch 16 of 32 tokens", Transformer, (16, 32, 64)),
}


class Problem:
    """A model under SGD with momentum; m hyperparameters: the rate, and a weight for each of m - 1 groups."""

    def __init__(self, name: str, m: int) -> None:
        torch.manual_seed(0)
        _, make, shape = MODELS[name]
        self.model = make()
        self.x, self.y = torch.randn(shape), torch.randint(0, 10, shape[:1])
        self.lr = torch.tensor(0.01, requires_grad=True)
        self.weights = torch.ones(m - 1, requires_grad=True) if m > 1 else None
        self.group = torch.arange(shape[0]) % max(m - 1, 1)

    def loss(self, scores: Tensor, weights: Tensor | None) -> Tensor:
        """The training loss."""
        if weights is None:
            return F.cross_entropy(scores, self.y)
        return (weights[self.group] * F.cross_entropy(scores, self.y, reduction="none")).mean()

    def step(self, optimizer: torch.optim.Optimizer) -> Step:
        """One step of the loop."""

        def step() -> None:
            optimizer.zero_grad()
            self.loss(self.model(self.x), self.weights).backward(inputs=list(self.model.parameters()))
            optimizer.step()

        return step

    def drop_in(self) -> torch.optim.Optimizer:
        """The optimizer with the rate linked."""
        return metaopt.optim.SGD(self.model.parameters(), lr=self.lr, momentum=0.9)


@contextmanager
def plain(name: str, m: int) -> Iterator[Step]:
    """The loop without metaopt."""
    problem = Problem(name, m)
    yield problem.step(torch.optim.SGD(problem.model.parameters(), lr=0.01, momentum=0.9))


@contextmanager
def own_graph(name: str, m: int) -> Iterator[Step]:
    """`metaopt.stream` as it is."""
    problem = Problem(name, m)
    optimizer = problem.drop_in()
    with metaopt.stream(optimizer):
        yield problem.step(optimizer)


@contextmanager
def compiled(name: str, m: int) -> Iterator[Step]:
    """`metaopt.stream`, compiled."""
    problem = Problem(name, m)
    optimizer = problem.drop_in()
    with metaopt.stream(optimizer, compile=True):
        yield problem.step(optimizer)


@contextmanager
def transposed(name: str, m: int) -> Iterator[Step]:
    """`metaopt.stream` with the engine that it falls back on."""
    with patch.object(Program, "split", lambda self, places: None), own_graph(name, m) as step:
        yield step


@contextmanager
def recorded(name: str, m: int) -> Iterator[Step]:
    """`metaopt.record` and its sweep, a step at a time."""
    problem = Problem(name, m)
    optimizer = problem.drop_in()
    step = problem.step(optimizer)

    def twenty() -> None:
        with metaopt.record(optimizer) as run:
            for _ in range(20):
                step()
        run.backward(F.cross_entropy(problem.model(problem.x), problem.y))

    yield twenty


@contextmanager
def forward_over_reverse(name: str, m: int) -> Iterator[Step]:
    """Forward mode over `torch.func.grad`, batched by `torch.func.vmap`, for a step that is given as a function.

    It is no engine of the library: it needs a forward derivative of every operation of the model, and its gradient.
    """
    problem = Problem(name, m)
    names = [key for key, _ in problem.model.named_parameters()]
    w = [p.detach().clone() for p in problem.model.parameters()]
    v = [torch.zeros_like(p) for p in w]
    hypers = [problem.lr.detach()] + ([] if problem.weights is None else [problem.weights.detach()])

    def loss(w: Sequence[Tensor], weights: Tensor | None) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # flash has no forward derivative
            scores = functional_call(problem.model, dict(zip(names, w, strict=True)), (problem.x,))
        return problem.loss(scores, weights)

    def phi(w: list[Tensor], v: list[Tensor], lr: Tensor, *rest: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        g = grad(loss)(w, rest[0] if rest else None)
        v = [0.9 * v + g for v, g in zip(v, g, strict=True)]
        return [w - lr * v for w, v in zip(w, v, strict=True)], v

    z_w, z_v = ([p.new_zeros(m, *p.shape) for p in w] for _ in range(2))
    identity = torch.eye(m)
    z_hyper = [identity[:, 0]] + ([] if problem.weights is None else [identity[:, 1:]])

    def push(z_w: list[Tensor], z_v: list[Tensor], *z_hyper: Tensor) -> Any:
        return jvp(phi, (w, v, *hypers), (z_w, z_v, *z_hyper))

    def step() -> None:
        nonlocal w, v, z_w, z_v
        columns: Any = ((None, None), (0, 0))
        (w, v), (z_w, z_v) = vmap(push, out_dims=columns)(z_w, z_v, *z_hyper)

    yield step


SYSTEMS: dict[str, Callable[[str, int], Any]] = {
    "own graph (the default)": own_graph,
    "`compile=True`": compiled,
    "transposed": transposed,
    "forward over reverse": forward_over_reverse,
    "`record` and its sweep": recorded,
}


def timed(make: Callable[[str, int], Any], name: str, m: int, repeats: int) -> float:
    """The median time of a call, after some to warm up."""
    times = []
    warm_up = 20 if make is compiled else 2
    with make(name, m) as step:
        for turn in range(repeats + warm_up):
            begin = time.perf_counter()
            step()
            if turn >= warm_up:
                times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure(name: str, m: int, repeats: int) -> dict[str, float]:
    """The time of a step over that of the plain step, which is measured before and after each system's."""
    ratios = {}
    for system, make in SYSTEMS.items():
        before = timed(plain, name, m, 5 * repeats)
        share = 20 if make is recorded else 1
        found = timed(make, name, m, repeats) / share
        ratios[system] = found / statistics.mean([before, timed(plain, name, m, 5 * repeats)])
    return ratios


def peak(steps: int, m: int) -> int:
    """Bytes that a fresh process grew by while streaming so many steps of a small MLP."""
    code = f"from tests.benchmarks.forward import grow; print(grow({steps}, {m}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def grow(steps: int, m: int) -> int:
    """The growth of this process's peak memory over a training of so many steps, after 50 to warm up."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    lr, weights = torch.tensor(0.01, requires_grad=True), torch.ones(m - 1, requires_grad=True)
    optimizer = metaopt.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    group = torch.arange(32) % (m - 1)
    with metaopt.stream(optimizer):
        for t in range(steps + 50):
            if t == 50:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            x, y = torch.randn(32, 256), torch.randint(0, 10, (32,))
            optimizer.zero_grad()
            (weights[group] * F.cross_entropy(model(x), y, reduction="none")).mean().backward()
            optimizer.step()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def tables(names: Sequence[str], columns: Sequence[int], repeats: int, lengths: Sequence[int]) -> Iterator[str]:
    """The page's tables, line by line."""
    yield f"torch {torch.__version__}, one thread of a CPU, float32; medians of {repeats}, ratios to the plain step."
    yield ""
    for name in names:
        results = {m: measure(name, m, repeats) for m in columns}
        yield f"| {MODELS[name][0]} | " + " | ".join(f"m = {m}" for m in columns) + " |"
        yield "|---" * (1 + len(columns)) + "|"
        for system in SYSTEMS:
            yield f"| {system} | " + " | ".join(f"{results[m][system]:.1f}×" for m in columns) + " |"
        yield ""
    if lengths:
        size = 4 * 2 * (256 * 128 + 128 + 128 * 10 + 10)
        yield f"Growth of the process after the first 50 steps, m = 8, where m · |s| is {8 * size / 2**20:.1f} MiB:"
        yield ""
        yield "| T | " + " | ".join(f"{t:,}" for t in lengths) + " |"
        yield "|---" * (1 + len(lengths)) + "|"
        yield "| MiB | " + " | ".join(f"{peak(t, 8) / 2**20:.1f}" for t in lengths) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--columns", nargs="*", type=int, default=list(COLUMNS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--lengths", nargs="*", type=int, default=[100, 10_000])
    parser.add_argument("--write", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for line in tables(chosen.models, chosen.columns, chosen.repeats, chosen.lengths):
        print(line, flush=True)
        lines.append(line)
    if chosen.write is not None:
        before, rest = chosen.write.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        chosen.write.write_text("\n".join([f"{before}{MARKS[0]}", *lines, f"{MARKS[1]}{after}"]))


if __name__ == "__main__":
    main()
