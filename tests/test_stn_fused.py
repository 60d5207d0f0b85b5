"""The default optimizer of a best response takes torch's steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_post_hook

from metaopt.stn.fused import FusedSGD


def parameters(device: torch.device, count: int = 3) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(4, 3), (5,), (2, 3, 2)][:count]
    return [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]


def gradients(like: list[nn.Parameter], seed: int, missing: set[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(like):
        p.grad = None if i in missing else torch.randn(p.shape, generator=generator).to(p.device)


@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    decay=st.sampled_from([0.0, 0.1]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    missing=st.lists(st.sets(st.integers(0, 2), max_size=3), min_size=1, max_size=4),
)
def test_steps_are_those_of_torch(
    device: torch.device, momentum: float, decay: float, nesterov: bool, maximize: bool, missing: list[set[int]]
) -> None:
    ours, theirs = parameters(device), parameters(device)
    settings: dict[str, Any] = {"weight_decay": decay, "nesterov": nesterov and momentum > 0, "maximize": maximize}
    optimizer = FusedSGD(ours, 0.1, momentum, **settings)
    reference = SGD(theirs, lr=0.1, momentum=momentum, foreach=False, **settings)
    for seed, without in enumerate(missing):
        for given_ in (ours, theirs):
            gradients(given_, seed, without)
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q)


def test_layouts_are_those_of_the_parameters(device: torch.device) -> None:
    """The kernel goes through memory as it lies, and so must the momentum that it is given."""
    plain, turned = nn.Parameter(torch.randn(3, 5, device=device)), nn.Parameter(torch.randn(5, 3, device=device).t())
    with torch.no_grad():
        turned.copy_(plain)
    for p in (plain, turned):
        optimizer = FusedSGD([p], lr=0.1, momentum=0.9)
        for _ in range(3):
            p.grad = None
            (p.sin() * torch.arange(15.0, device=device).reshape(3, 5)).sum().backward()
            optimizer.step()
    torch.testing.assert_close(plain, turned)


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("case", ["moved", "sparse memory", "turned gradient", "expanded gradient"])
def test_what_lies_in_memory_in_another_order_is_taken_as_it_is(device: torch.device, case: str, seen: bool) -> None:
    """The kernel takes one entry for another there, silently."""
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        whole = torch.randn(2, 3, 2, 8, device=device)
        p = nn.Parameter(whole[..., ::2] if case == "sparse memory" else whole[..., :4].clone())
        factors = torch.arange(48.0, device=device).reshape(p.shape) / 48
        optimizer: SGD = FusedSGD([p], 0.1, 0.9) if ours else SGD([p], 0.1, 0.9, foreach=False)
        if seen:
            optimizer.register_step_post_hook(lambda *_: None)
        for _ in range(3):
            optimizer.zero_grad()
            (p.sin() * factors).sum().backward()
            assert p.grad is not None
            if case == "turned gradient":
                p.grad = p.grad.clone(memory_format=torch.channels_last)
            if case == "expanded gradient":
                p.grad = torch.ones((), device=device).expand_as(p)
            optimizer.step()
            if case == "moved":
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        found.append(p.detach())
        assert optimizer.param_groups[0]["fused"] == (True if ours else None)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("overflow", [None, 0.0, 1.0])
def test_scaled_gradients_are_torchs_matter(device: torch.device, overflow: float | None) -> None:
    (p,) = parameters(device, 1)
    start, optimizer = p.detach().clone(), FusedSGD([p], 0.1, 0.9)
    p.grad = torch.full_like(p, 8.0)
    scaled: Any = optimizer
    scaled.grad_scale = torch.tensor(4.0, dtype=torch.float32, device=device)
    if overflow is not None:
        scaled.found_inf = torch.tensor(overflow, dtype=torch.float32, device=device)
    optimizer.step()
    torch.testing.assert_close(p.detach(), start if overflow else start - 0.2)


def test_parameters_that_come_later_may_be_unused_at_first(device: torch.device) -> None:
    found = []
    for ours in (True, False):
        given_ = parameters(device)
        optimizer: SGD = FusedSGD(given_[:1], 0.1, 0.9) if ours else SGD(given_[:1], 0.1, 0.9, foreach=False)
        for seed, missing in enumerate(({1, 2}, {2}, {0}, set[int]())):
            gradients(given_, seed, missing)
            if seed == 1:
                optimizer.add_param_group({"params": given_[1:], "lr": 0.05})
            optimizer.step()
        found.append([p.detach() for p in given_])
    torch.testing.assert_close(*found)


def test_a_parameter_that_goes_to_another_group_keeps_its_momentum(device: torch.device) -> None:
    found = []
    for ours in (True, False):
        given_ = parameters(device)
        optimizer: SGD = FusedSGD(given_, 0.1, 0.9) if ours else SGD(given_, 0.1, 0.9, foreach=False)
        for seed in range(4):
            gradients(given_, seed, set())
            if seed == 2:
                optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()], "lr": 0.05})
            optimizer.step()
        found.append([p.detach() for p in given_])
    torch.testing.assert_close(*found)


def test_settings_are_named(device: torch.device) -> None:
    """Torch has another one in the fourth place."""
    with pytest.raises(TypeError, match="positional"):
        FusedSGD(parameters(device), 0.1, 0.9, 0.5)  # type: ignore[call-arg]


def test_a_momentum_that_is_dampened_begins_as_torchs(device: torch.device) -> None:
    found = []
    for kind, settings in ((FusedSGD, {}), (SGD, {"foreach": False})):
        (p,) = parameters(device, 1)
        optimizer = kind([{"params": [p], "momentum": 0.9, "dampening": 0.5}], lr=0.1, **settings)
        for seed in range(3):
            gradients([p], seed, set())
            optimizer.step()
        found.append(p.detach())
    torch.testing.assert_close(*found)


def test_hooks_closures_schedules_and_profilers_see_the_steps(device: torch.device) -> None:
    (p,) = parameters(device, 1)
    optimizer = FusedSGD([p], lr=1.0, momentum=0.5)
    seen: list[str] = []
    gradients([p], 0, set())

    def before_step(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert args == (optimizer,)
        assert not kwargs
        seen.append("before")

    handles = [
        optimizer.register_step_pre_hook(before_step),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
    ]
    optimizer.step()
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == ["before", "after"]
    shared = register_optimizer_step_post_hook(lambda *_: seen.append("shared"))
    try:
        optimizer.step()
    finally:
        shared.remove()
    assert seen[2:] == ["shared"]

    def loss() -> Any:
        optimizer.zero_grad()
        value = p.square().sum()
        value.backward()
        return value.item()

    before = p.square().sum().item()
    assert optimizer.step(loss) == pytest.approx(before)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.0)
    optimizer.step()
    schedule.step()
    still = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, still)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any("Optimizer.step" in event.key for event in profile.key_averages())


def test_states_go_to_and_from_torchs_own(device: torch.device) -> None:
    ours, theirs = parameters(device), parameters(device)
    optimizer, reference = FusedSGD(ours, lr=0.1, momentum=0.9), SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    for seed in range(4):
        for given_ in (ours, theirs):
            gradients(given_, seed, set())
        optimizer.step()
        reference.step()
        if seed == 1:
            states = copy.deepcopy((optimizer.state_dict(), reference.state_dict()))
            reference.load_state_dict(states[0])
            fused = states[1]
            fused["param_groups"][0]["fused"] = True
            optimizer.load_state_dict(fused)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_a_sparse_gradient_and_a_rate_that_is_a_tensor_are_torchs_matter(device: torch.device) -> None:
    (p,) = parameters(device, 1)
    optimizer, start = FusedSGD([p], lr=0.1, momentum=0.9), p.detach().clone()
    gradient: Tensor = torch.ones(4, 3, device=device)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device=device)
    p.grad = gradient
    optimizer.step()
    torch.testing.assert_close(p.detach(), start - 0.5)
    p.grad = gradient.to_sparse()
    with pytest.raises(RuntimeError, match=r"(?i)sparse"):
        optimizer.step()
