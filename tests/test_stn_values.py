"""What a step of the tuner computes quickly must be what it would compute slowly."""

from __future__ import annotations

import torch

import metaopt
from metaopt.stn.coordinates import Coordinates
from metaopt.stn.randomness import _kept


def test_values_follow_a_leaf_however_it_is_set() -> None:
    hyper = metaopt.Hyperparameters(
        a=metaopt.interval(0.3, 0, 0.9),
        b=metaopt.positive([1.0, 2.0]),
        c=metaopt.interval(0.5, 0, 0.9),
        d=metaopt.real(2.0),
    )
    coordinates = Coordinates(hyper)
    values = coordinates.present(2)
    assert list(values) == ["a", "b", "c", "d"]
    for name in hyper:
        torch.testing.assert_close(values[name][1], hyper[name].detach())
    # What a loss writes into its values does not stay, and a write past the version counter is seen.
    coordinates.present(1)["a"].fill_(0.7)
    torch.testing.assert_close(coordinates.present(1)["a"], hyper["a"].detach().reshape(1))
    hyper.get_leaf("c").data.fill_(-1.0)
    torch.testing.assert_close(coordinates.present(3)["c"], hyper["c"].detach().expand(3))


def test_a_mask_is_what_a_comparison_gives() -> None:
    rates = torch.rand(6, 1, dtype=torch.float32)
    noise = torch.rand(6, 50, dtype=torch.float32)
    noise[:, 0], noise[:, 1] = rates[:, 0], torch.nextafter(rates[:, 0], torch.zeros(6, dtype=torch.float32))
    assert torch.equal(_kept(noise, rates), (noise >= rates).float())
