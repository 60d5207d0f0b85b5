"""Functions of torch that are written in Python: who is shown them while a pass runs; and what modules keep."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaopt.stn.attributes import Attributes
from metaopt.stn.passes import Pass


class Names(TorchFunctionMode):
    """Notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A tensor of a class of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func is F.dropout:
            result.mark = "own"
        return result


def test_a_pass_is_handed_what_torch_would_hand_it(device: torch.device) -> None:
    shown: list[Any] = []

    class Noting(Pass):
        def plain(self, func: Any, args: Any, kwargs: Any) -> Any:
            shown.append(func)
            return super().plain(func, args, kwargs)

    theirs, x = F.handle_torch_function, torch.randn(3, 4, device=device)  # type: ignore[attr-defined]
    outer, inner = Names(), Names()
    with outer, Noting({}, {}, {}):
        assert F.handle_torch_function is not theirs  # type: ignore[attr-defined]
        y = F.relu6(x)
        with inner:
            F.celu(x)
        with torch._C.DisableTorchFunction():
            F.elu(x)
    assert F.handle_torch_function is theirs  # type: ignore[attr-defined]
    torch.testing.assert_close(y, x.clamp(0, 6))
    # Each is shown what is called within it, from the innermost to the outermost.
    assert F.relu6 in shown
    assert F.celu in shown
    assert F.elu not in shown
    assert "relu6" in outer.seen
    assert "celu" in inner.seen
    assert "celu" in outer.seen
    assert "relu6" not in inner.seen
    assert "elu" not in outer.seen


def test_a_tensor_of_a_class_of_its_own_is_asked_as_ever(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device).as_subclass(Own)
    with Pass({}, {}, {}):
        y = F.dropout(x, 0.5, training=False)
        z = F.relu6(x)
    assert type(z) is Own
    assert type(y) is Own


def test_other_threads_call_functions_as_ever(device: torch.device) -> None:
    x, found = torch.randn(3, 4, device=device), []
    names = Names()

    def call() -> None:
        F.relu6(x)
        with names:
            F.celu(x)
        found.append(F.relu6(x.as_subclass(Own)))

    with Pass({}, {}, {}):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert "celu" in names.seen
    assert "relu6" not in names.seen
    assert type(found[0]) is Own


def test_attributes_are_what_they_were() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    first, last = model[0], model[2]
    first.state = state = torch.zeros(2)
    attributes = Attributes(list(model.modules()))
    before = attributes.now()
    assert attributes.after(before) is before
    first.state = torch.ones(2)
    assert attributes.after(before) is not before
    first.extra, last.p = 1, 0.25  # type: ignore[assignment]
    model[1].running_mean = torch.ones(2)
    model[1].register_buffer("new", torch.ones(2))
    after = attributes.now()
    mean = model[1]._buffers["running_mean"]
    attributes.back(before)
    assert first.state is state
    assert not hasattr(first, "extra")
    assert last.p == 0.5
    assert model[1]._buffers["running_mean"] is not mean
    assert "new" not in model[1]._buffers
    attributes.back(after)
    assert first.extra == 1
    assert last.p == 0.25
    assert model[1]._buffers["running_mean"] is mean
    del first.extra, first.state
    attributes.back(before)
    assert first.state is state
