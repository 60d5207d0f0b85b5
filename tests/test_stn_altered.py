"""Layers that are copied, changed or saved while a pass runs, and models that switch their modes themselves."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import metaopt
from metaopt.stn import Tuned, train, transform

WAYS = [("stn", "auto"), ("centered", "auto"), ("delta", "manual"), ("delta", "double"), ("delta", "forward")]


class Linear(nn.Linear):
    """Of another class than torch's."""


class ReLU(nn.ReLU):
    """Likewise."""


class Dropout(nn.Dropout):
    """Likewise."""


def net(linear: Any = nn.Linear, relu: Any = nn.ReLU, dropout: Any = nn.Dropout) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(linear(4, 6), relu(), dropout(0.2), linear(6, 6), relu(inplace=True), linear(6, 3))


def run(model: nn.Module, method: str = "delta", engine: str = "auto", bind: str = "2") -> tuple[Tuned, list[float]]:
    hyper = metaopt.Hyperparameters(rate=metaopt.interval(0.2, 0, 0.9))
    tuned = transform(model, hyper, method, bind={"rate": bind}, engine=engine)
    torch.manual_seed(1)
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    with train(tuned, train_loss, valid_loss, seed=2) as tuner:
        found = [step(batch) for _ in range(3) for step in (tuner.train_step, tuner.valid_step)]
    return tuned, [*found, float(hyper.rate.detach())]


def train_loss(model: Any, batch: Any, _: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def valid_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(("method", "engine"), WAYS)
def test_torchs_own_layers_compute_what_layers_of_another_class_do(method: str, engine: str) -> None:
    """Of a layer it counts what it computes, and not its class."""
    own, found = run(net(), method, engine)
    other, right = run(net(Linear, ReLU, Dropout), method, engine)
    assert found == right
    for a, b in zip(own.state_dict().values(), other.state_dict().values(), strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a, b)


def test_a_forward_of_the_users_own_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is put on a module, or on torch's class."""
    model, calls = net(), []

    def own(x: Tensor) -> Tensor:
        calls.append("module")
        return F.relu(x)

    model[1].forward = own
    run(model)
    assert model[1].forward is own
    assert calls

    def patched(self: nn.ReLU, input: Tensor) -> Tensor:  # noqa: A002
        calls.append("class")
        return F.relu(input, self.inplace)

    monkeypatch.setattr(nn.ReLU, "forward", patched)
    run(net())
    assert "class" in calls


class Counting(TorchFunctionMode):
    """A mode of the user's."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Watching(nn.Module):
    """Computes within a mode."""

    def __init__(self, mode: Counting) -> None:
        super().__init__()
        self.net, self.mode = net(), mode

    def forward(self, x: Tensor) -> Tensor:
        with self.mode:
            y: Tensor = self.net(x)
            return y


def test_a_mode_within_the_model_sees_the_functions_of_its_layers() -> None:
    mode = Counting()
    _, found = run(Watching(mode), bind="net.2")
    assert found == run(net())[1]
    assert {F.linear, F.relu, F.dropout} <= set(mode.seen)


class Teacher(nn.Module):
    """Copies itself when it is first called, as a network of targets is made."""

    def __init__(self, linear: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.net = net(linear)
        self.kept: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(copy.deepcopy(self.net).requires_grad_(False))
        with torch.no_grad():
            target = self.kept[0](x)
        y: Tensor = self.net(x) + 0.1 * target
        return y


def test_a_copy_that_is_made_while_a_pass_runs_is_a_module_as_ever() -> None:
    tuned, found = run(Teacher(nn.Linear), bind="net.2")
    assert found == run(Teacher(Linear), bind="net.2")[1]
    teacher: Any = tuned.model
    first, x = teacher.kept[0][0], torch.randn(5, 4)
    assert torch.equal(first(x), F.linear(x, first.weight, first.bias))


def test_a_model_that_failed_has_its_own_layers_again() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            self.net(x)
            raise KeyError("no such thing")

    model = Failing()
    with pytest.raises(KeyError, match="no such thing"):
        run(model, bind="net.2")
    assert all("forward" not in module.__dict__ for module in model.modules())


class Kept(nn.Module):
    """Keeps its dropout in training mode in evaluation, as Monte Carlo dropout does."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.modes = net(), []  # type: ignore[var-annotated]
        if how == "instance":
            self.net[0].eval = lambda: self.net[0]  # type: ignore[method-assign]
        self.how = how

    def train(self, mode: bool = True) -> Kept:
        super().train(mode)
        if self.how == "class":
            self.net[2].train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append([module.training for module in self.net])
        y: Tensor = self.net(x)
        return y


@pytest.mark.parametrize("how", ["class", "instance"])
def test_evaluation_is_what_a_models_own_eval_makes_it(how: str) -> None:
    model = Kept(how)
    run(model, bind="net.2")
    expected = Kept(how).eval()
    assert model.modes[-1] == [module.training for module in expected.net]
    assert any(all(modes) for modes in model.modes)


class Merged(nn.Linear):
    """An adapter that is merged into the weight in evaluation, and taken out of it again for training."""

    def __init__(self, keeps: bool) -> None:
        super().__init__(4, 3)
        self.weight.requires_grad_(False)
        self.left, self.right = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 4))
        self.keeps, self.merged, self.switched = keeps, False, ""

    def train(self, mode: bool = True) -> Merged:
        super().train(mode)
        self.switched += "t" if mode else "e"
        if mode == self.merged and not self.keeps:
            self.weight.data += (self.left @ self.right).detach() * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.merged else self.weight + self.left @ self.right, self.bias)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("method", ["stn", "centered", "delta"])
def test_an_adapter_that_is_merged_in_evaluation_says_what_to_do(method: str, verify: bool) -> None:
    """It stayed merged in training, with the adapter added once more or not at all."""
    torch.manual_seed(0)
    model = Merged(keeps=False)
    before, hyper = model.weight.clone(), metaopt.Hyperparameters(weight=metaopt.positive(0.1))
    tuned = transform(model, hyper, method, verify=verify)
    x = torch.randn(5, 4)
    with train(tuned, lambda m, b, v: (v.weight[:, None] * m(b).square()).mean(), lambda m, b: m(b).mean()) as tuner:
        with pytest.raises(metaopt.ResponseError, match="merge an adapter"):
            for _ in range(3):
                tuner.train_step(x)
            tuner.valid_step(x)
        assert torch.equal(model.weight, before)
        assert not model.merged
        assert model.training


def test_a_model_is_switched_back_as_a_loop_does_it() -> None:
    """Its modes were set, and its own `train` was not called."""
    model = Merged(keeps=True)
    tuned = transform(model, metaopt.Hyperparameters(weight=metaopt.positive(0.1)), verify=False)
    x = torch.randn(5, 4)
    with train(tuned, lambda m, b, v: (v.weight[:, None] * m(b).square()).mean(), lambda m, b: m(b).mean()) as tuner:
        tuner.train_step(x)
        model.switched = ""
        tuner.valid_step(x)
        tuner.valid_step(x)
    assert model.switched == "etet"


class Hostile(nn.Module):
    """Does something to its layers while it runs."""

    def __init__(self, linear: Any = nn.Linear, relu: Any = nn.ReLU) -> None:
        super().__init__()
        self.net = net(linear, relu)


class Cloned(Hostile):
    """Computes with other weights by a shallow copy of a layer, as meta-learning does."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.net[0]
        clone = layer.__new__(type(layer))
        clone.__dict__ = layer.__dict__.copy()
        own: dict[str, Any] = layer._parameters
        clone._parameters = {name: 2 * p for name, p in own.items()}
        y: Tensor = self.net[1:](clone(x))
        return y


class Hooked(Hostile):
    """A shallow copy that has a hook."""

    def forward(self, x: Tensor) -> Tensor:
        clone = copy.copy(self.net[0])
        own: dict[str, Any] = clone._parameters
        clone._parameters = {name: 2 * p for name, p in own.items()}
        clone._forward_hooks = {}
        clone._forward_pre_hooks = {0: lambda *_: None}
        y: Tensor = self.net[1:](clone(x))
        return y


class Tripled(Linear):
    """Another layer."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 3 * super().forward(input)


class Swapped(Hostile):
    """Gives a layer another class for a while."""

    def forward(self, x: Tensor) -> Tensor:
        kind = type(self.net[0])
        self.net[0].__class__ = Tripled
        try:
            y: Tensor = self.net(x)
            return y
        finally:
            self.net[0].__class__ = kind


class Shadowed(Hostile):
    """Puts a tensor in the way of a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.net[0]
        layer.__dict__["weight"] = 2 * layer._parameters["weight"]
        try:
            y: Tensor = self.net(x)
            return y
        finally:
            del layer.__dict__["weight"]


class Patched(Hostile):
    """Changes what a layer computes when it is first called."""

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.net[4]
        if not hasattr(layer, "before"):
            layer.before = before = layer.forward
            layer.forward = lambda x: 3 * before(x)
        y: Tensor = self.net(x)
        return y


class Saved(Hostile):
    """Saves itself while it runs."""

    def forward(self, x: Tensor) -> Tensor:
        file = io.BytesIO()
        with torch.no_grad(), torch._C.DisableTorchFunction():
            torch.save(self.net[4], file)
            file.seek(0)
            kept = torch.load(file, weights_only=False)
        y: Tensor = self.net[5](kept(self.net[:4](x)))
        return y


HOSTILE = (Cloned, Hooked, Swapped, Shadowed, Patched, Saved)


@pytest.mark.parametrize("method", ["centered", "delta"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_layer_that_is_copied_or_changed_while_a_pass_runs_computes_what_it_does(kind: Any, method: str) -> None:
    tuned, found = run(kind(), method, bind="net.2")
    assert found == run(kind(Linear, ReLU), method, bind="net.2")[1]
    assert found != run(net(), method)[1] or kind is Saved
    left = [m for m in tuned.modules() if "forward" in m.__dict__]
    assert left == ([tuned.model.net[4]] if kind is Patched else [])  # type: ignore[index]


def test_another_threads_modes_stay_its_own() -> None:
    """A thread with as many modes as the pass has."""

    class Threaded(nn.Module):
        def __init__(self, relu: Any) -> None:
            super().__init__()
            self.net, self.mode = net(relu=relu), Counting()

        def forward(self, x: Tensor) -> Tensor:
            found: list[Tensor] = []

            def work(y: Tensor) -> None:
                with self.mode:
                    found.append(self.net[1](y))

            thread = threading.Thread(target=work, args=(self.net[0](x),))
            thread.start()
            thread.join()
            y: Tensor = self.net[2:](found[0])
            return y

    model = Threaded(nn.ReLU)
    assert run(model, "centered", bind="net.2")[1] == run(Threaded(ReLU), "centered", bind="net.2")[1]
    assert F.relu in model.mode.seen


def test_a_layer_compiled_in_one_graph_is_traced() -> None:
    class Compiled(Hostile):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.compile(self.net[4], backend="eager", fullgraph=True)(self.net[:4](x))
            return self.net[5](y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # among them torch's own, while it compiles
        found = [run(Compiled(relu=relu), "centered", bind="net.2")[1] for relu in (nn.ReLU, ReLU)]
    assert found[0] == found[1]


def test_a_tuned_model_is_saved_whole() -> None:
    tuned, _ = run(net())
    file = io.BytesIO()
    torch.save(tuned, file)
    file.seek(0)
    x = torch.randn(5, 4)
    tuned.eval()
    assert torch.equal(torch.load(file, weights_only=False).eval()(x), tuned(x))
