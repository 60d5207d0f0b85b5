"""Augmentation: nothing at strength zero, the same draws at any strength, and each example by its own."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.errors import ResponseError
from metaopt.stn import augment

Augmentation = Callable[[Tensor, Tensor], Tensor]
AUGMENTATIONS: dict[str, Augmentation] = {
    "holes": lambda x, s: augment.cutout(x, torch.floor(4 * s), 3),
    "length": lambda x, s: augment.cutout(x, 2, torch.floor(5 * s)),
    "brightness": augment.brightness,
    "contrast": augment.contrast,
    "saturation": augment.saturation,
    "hue": lambda x, s: augment.hue(x, 0.5 * s),
    "degrees": lambda x, s: augment.affine(x, degrees=45 * s),
    "translate": lambda x, s: augment.affine(x, translate=0.5 * s),
    "scale": lambda x, s: augment.affine(x, scale=0.5 * s),
    "shear": lambda x, s: augment.affine(x, shear=45 * s),
    "noise": augment.noise,
    "mixup": lambda x, s: augment.mixup(x, torch.rand(len(x), 2), s)[0],
}
names = pytest.mark.parametrize("name", list(AUGMENTATIONS))


def images() -> Tensor:
    return torch.rand(6, 3, 8, 10, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(torch.zeros(()))


def run(name: str, strength: Tensor, of: Tensor | None = None) -> Tensor:
    torch.manual_seed(4)
    return AUGMENTATIONS[name](images() if of is None else of, strength)


@names
def test_no_strength_changes_nothing(name: str) -> None:
    assert torch.equal(run(name, torch.zeros(6)), images())
    standardised = 4 * images() - 2  # beyond the bounds of pixels
    assert torch.equal(run(name, torch.zeros(6), standardised), standardised)


@names
def test_each_example_has_its_own_strength_and_the_same_draws(name: str) -> None:
    strength = torch.linspace(0.5, 1, 6)
    mixed = run(name, torch.where(torch.arange(6) % 2 == 0, strength, 0.0))
    full, none = run(name, strength), images()
    for b in range(6):
        torch.testing.assert_close(mixed[b], full[b] if b % 2 == 0 else none[b], rtol=1e-12, atol=1e-12)
    assert not torch.equal(full, none)


@names
def test_the_generator_moves_by_the_same_amount_at_any_strength(name: str) -> None:
    states = []
    for strength in (0.0, 0.3, 1.0):
        run(name, torch.full((6,), strength))
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_a_turned_hue_is_that_of_the_standard_library() -> None:
    x = images()
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 0, 2] = 0.3, 0.0, torch.tensor([1.0, 1.0, 0.0])
    strength = torch.linspace(0.05, 0.5, 6)
    torch.manual_seed(4)
    y = augment.hue(x, strength)
    torch.manual_seed(4)
    turns = strength * (2 * torch.rand(6, 1, 1, 1).reshape(-1) - 1)
    for b, turn in enumerate(turns.tolist()):
        for pixel, found in zip(x[b].flatten(1).t().tolist(), y[b].flatten(1).t().tolist(), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            assert found == pytest.approx(colorsys.hsv_to_rgb((h + turn) % 1, s, v), abs=1e-12)


def test_hue_is_of_colours() -> None:
    grey = images()[:, :1]
    assert torch.equal(augment.hue(grey, 0.5), grey)
    with pytest.raises(ResponseError, match="these images have 2 channels"):
        augment.hue(images()[:, :2], 0.5)


def test_cutout_hides_squares_of_the_length_asked_for() -> None:
    torch.manual_seed(0)
    hidden = augment.cutout(torch.ones(200, 1, 16, 16), 1, 4) == 0
    counts = hidden.sum((1, 2, 3))
    assert int(counts.max()) == 16
    assert int(counts.min()) >= 4  # in a corner a quarter is left
    with pytest.raises(ResponseError, match="asked for 9 holes; raise `most`"):
        augment.cutout(torch.ones(2, 1, 4, 4), 9, 2)


def test_affine_moves_as_it_says() -> None:
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 6] = 1.0
    turned = [augment.affine(x, degrees=90.0, mode="nearest") for _ in range(50)]
    distance = [((t[0, 0].nonzero() - 4).double().norm(dim=1)) for t in turned if t.sum() > 0]
    assert all(((d > 1) & (d < 3.2)).all() for d in distance)
    whole = torch.ones(300, 1, 8, 16)
    lost = 1 - augment.affine(whole, translate=0.5, mode="nearest").mean((1, 2, 3))
    assert 0.3 < float(lost.mean()) < 0.55  # 1 - (3/4)² on average


def test_smoothing_is_torchs_own_where_it_is_one_number() -> None:
    logits, targets = torch.randn(5, 4), torch.randint(4, (5,))
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3)
    torch.testing.assert_close(augment.smoothed_cross_entropy(logits, targets, 0.3), expected)
    each = torch.stack(
        [F.cross_entropy(logits[b : b + 1], targets[b : b + 1], label_smoothing=b / 10) for b in range(5)]
    )
    torch.testing.assert_close(augment.smoothed_cross_entropy(logits, targets, torch.arange(5) / 10), each.mean())


def test_smoothing_of_many_positions_is_torchs_own() -> None:
    """As logits of a language model or of pixels are: the classes are the second axis."""
    logits, targets = torch.randn(3, 4, 2, 6), torch.randint(4, (3, 2, 6))
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3)
    torch.testing.assert_close(augment.smoothed_cross_entropy(logits, targets, 0.3), expected)
    rates = [0.0, 0.2, 0.4]
    each = [
        F.cross_entropy(z[None], t[None], label_smoothing=s) for z, t, s in zip(logits, targets, rates, strict=True)
    ]
    found = augment.smoothed_cross_entropy(logits, targets, torch.tensor(rates))
    torch.testing.assert_close(found, torch.stack(each).mean())
    for wrong in (targets[:, 0], torch.rand(3, 4, 2, 6)):
        with pytest.raises(ResponseError, match="take classes"):
            augment.smoothed_cross_entropy(logits, wrong, 0.3)
    with pytest.raises(ResponseError, match="movedim"):
        augment.smoothed_cross_entropy(logits.movedim(1, -1), targets, 0.3)


def test_mixup_blends_inputs_and_targets_alike() -> None:
    x = torch.eye(6)
    a, b = augment.mixup(x, x.clone(), torch.full((6,), 0.8))
    assert torch.equal(a, b)
    torch.testing.assert_close(a.sum(1), torch.ones(6))
    assert float(a.diagonal().min()) >= 0.6
    with pytest.raises(ResponseError, match="one_hot"):
        augment.mixup(x, torch.arange(6), 0.5)
