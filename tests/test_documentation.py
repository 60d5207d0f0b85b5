"""The code in the pages runs as it stands there."""

from __future__ import annotations

import re
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import metaopt

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> str:
    return "\n\n".join(separate(page))


def separate(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_extending(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    exec(compile(blocks("docs/extending.md"), "docs/extending.md", "exec"), {"__name__": "extending"})
    assert "tensor(" in capsys.readouterr().out


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    exec(compile(blocks("README.md"), "README.md", "exec"), {"__name__": "readme"})
    wrong, right = map(float, re.findall(r"labels (0\.\d+), of right ones (0\.\d+)", capsys.readouterr().out)[0])
    assert wrong < 0.45
    assert right > 0.55


def test_the_first_page_has_the_readmes_example() -> None:
    assert blocks("docs/index.md") == blocks("README.md")


def test_checking() -> None:
    exec(compile(blocks("docs/checking.md"), "docs/checking.md", "exec"), {"__name__": "checking"})


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_thresholds_for_clipping(kind: str) -> None:
    """They are torch's functions, and followed; torch's own are not, and the warning names the page."""
    names: dict[str, Any] = {"__name__": "gotchas"}
    exec(compile(blocks("docs/gotchas.md"), "docs/gotchas.md", "exec"), names)
    theirs = getattr(torch.nn.utils, f"clip_grad_{kind}_")
    limit = torch.tensor(0.3, requires_grad=True)

    def train(watch: Any, clip: Any = names[f"clip_by_{kind}_"]) -> torch.nn.Module:
        torch.manual_seed(0)
        model, x = torch.nn.Linear(4, 2), torch.randn(9, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watch(optimizer):
            for _ in range(2):
                optimizer.zero_grad()
                (model(x) - x[:, :2]).square().sum().backward()
                clip(model.parameters(), limit)
                optimizer.step()
        return model

    with pytest.warns(metaopt.HeldConstantWarning, match="A threshold for clipping"):
        clipped = train(metaopt.record, theirs)
    torch.testing.assert_close(list(train(metaopt.record).parameters()), list(clipped.parameters()))
    outer = lambda model: model.weight.square().sum()  # noqa: E731
    assert metaopt.check.hypergradcheck(train, outer, {"limit": limit})


def test_coming_from() -> None:
    torch.set_default_dtype(torch.float32)
    names: dict[str, object] = {"__name__": "coming_from"}
    for block in separate("docs/coming-from.md"):
        missing = [name for name in re.findall(r"^import (\w+)$", block, re.MULTILINE) if not find_spec(name)]
        if not missing:
            exec(compile(block, "docs/coming-from.md", "exec"), names)
    assert isinstance(names["lr"], torch.Tensor)
    assert names["lr"].grad is not None


def test_best_responses() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    names = {"__name__": "stn"}
    exec(compile(blocks("docs/stn.md"), "docs/stn.md", "exec"), names)
    assert all(torch.isfinite(value).all() for value in names["plain"].values())  # type: ignore[attr-defined]
    assert len(names["hyper"].history["rate"]) > 0  # type: ignore[attr-defined]


PUBLIC = [metaopt, metaopt.check, metaopt.optim, metaopt.rules, metaopt.stn]


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_tab_completion_shows_what_is_public(module: types.ModuleType) -> None:
    assert set(module.__all__) == {name for name in dir(module) if not name.startswith("__")}
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module: types.ModuleType) -> None:
    page = (ROOT / "docs/api/index.md").read_text()
    whole = re.findall(r"^::: (.*)\n    options:\n      show_root_heading: false", page, re.MULTILINE)
    if module.__name__ in whole:
        return
    known = {line.rpartition(".")[2] for line in re.findall(r"^::: (.*)$", page, re.MULTILINE)}
    errors = set(metaopt.errors.__all__)
    assert set(module.__all__) - known - errors <= {"errors", "check", "stn"}


def test_public_objects_say_what_they_are() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(3, 1))
    hyper = metaopt.Hyperparameters(rate=metaopt.interval(0.2, 0, 0.9))
    optimizer = metaopt.optim.SGD(model.parameters(), lr=0.1)
    assert "not entered" in repr(metaopt.record(optimizer))
    assert repr(metaopt.rules.rule_of(optimizer)) == "Rule(SGD: lr, momentum, dampening, weight_decay)"
    tuned = metaopt.stn.transform(model, hyper, bind={"rate": "0"})
    loss = lambda model, batch, values=None: model(batch).square().mean()  # noqa: E731
    with metaopt.stn.train(tuned, loss, loss) as tuner:
        tuner.train_step(torch.ones(4, 3))
        assert repr(tuner) == "Tuner('delta': 1 training steps, 0 steps left out)"
