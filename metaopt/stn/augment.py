"""Augmentation of batches, as tensor operations with a strength for each example, on any device.

Every function draws the same number of random numbers whatever the strengths are. So the weights' step and the
response's, which start from the same state of the generator, see the same draws at different strengths. A strength of
zero leaves an example as it is.
"""

from __future__ import annotations

__all__ = [
    "affine",
    "brightness",
    "contrast",
    "cutout",
    "hue",
    "mixup",
    "noise",
    "saturation",
    "smoothed_cross_entropy",
]

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.errors import ResponseError

Strength = Tensor | float

# The luminance of red, green and blue (ITU-R BT.601).
LUMINANCE = (0.299, 0.587, 0.114)


def cutout(images: Tensor, holes: Strength, length: Strength, *, most: int = 8) -> Tensor:
    """Set squares to zero, at random places; a square is cut off at the border.

    Args:
        images: ``(B, C, height, width)``.
        holes: how many squares, at most ``most``; a number or ``(B,)``.
        length: their side in pixels; a number or ``(B,)``.
        most: how many places are drawn for each image.

    Returns:
        The shape of ``images``.

    Raises:
        ResponseError: if more holes are asked for than are drawn.

    References:
        DeVries and Taylor, *Improved Regularization of Convolutional Neural Networks with Cutout*, 2017.
    """
    count, side = (torch.floor(_column(s, images, 3)) for s in (holes, length))
    if float(count.max()) > most:
        raise ResponseError(f"cutout draws {most} places and is asked for {int(count.max())} holes; raise `most`.")
    _, _, height, width = images.shape
    centres = torch.rand(2, len(images), most, 1, dtype=images.dtype, device=images.device)
    rows, columns = (_span(c * n, n, side, images) for c, n in zip(centres, (height, width), strict=True))
    used = torch.arange(most, device=images.device).reshape(1, most, 1) < count
    hidden = (rows & used).unsqueeze(3) & columns.unsqueeze(2)
    return images.masked_fill(hidden.any(1).unsqueeze(1), 0.0)


def _span(centre: Tensor, size: int, side: Tensor, like: Tensor) -> Tensor:
    start = torch.floor(centre) - torch.floor(side / 2)
    positions = torch.arange(size, dtype=like.dtype, device=like.device).reshape(1, 1, size)
    return (positions >= start) & (positions < start + side)


def brightness(images: Tensor, strength: Strength, *, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Tensor:
    """Multiply by a factor uniform in ``[max(0, 1 - s), 1 + s]``.

    Args:
        images: ``(B, C, height, width)``.
        strength: ``s``, a number or ``(B,)``.
        bounds: to which pixels are clamped; None for none, as for standardised images.
    """
    return _moved(images, strength, images * _factor(images, strength), bounds)


def contrast(images: Tensor, strength: Strength, *, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Tensor:
    """Blend with the image's mean luminance: ``f x + (1 - f) mean``, ``f`` uniform in ``[max(0, 1 - s), 1 + s]``.

    Args:
        images: ``(B, 1 or 3, height, width)``.
        strength: ``s``, a number or ``(B,)``.
        bounds: to which pixels are clamped.
    """
    factor = _factor(images, strength)
    mixed = factor * images + (1 - factor) * _grey(images).mean((2, 3), keepdim=True)
    return _moved(images, strength, mixed, bounds)


def saturation(images: Tensor, strength: Strength, *, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Tensor:
    """Blend with the grey image: ``f x + (1 - f) grey``, ``f`` uniform in ``[max(0, 1 - s), 1 + s]``.

    Args:
        images: ``(B, 1 or 3, height, width)``; grey images stay as they are.
        strength: ``s``, a number or ``(B,)``.
        bounds: to which pixels are clamped.
    """
    factor = _factor(images, strength)
    return _moved(images, strength, factor * images + (1 - factor) * _grey(images), bounds)


def hue(images: Tensor, strength: Strength, *, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Tensor:
    """Turn the hue by a share of the colour circle that is uniform in ``[-s, s]``; value and chroma stay.

    Args:
        images: ``(B, 1 or 3, height, width)``; grey images stay as they are.
        strength: ``s`` in [0, 0.5], a number or ``(B,)``; at 0.5 every hue is as likely.
        bounds: to which pixels are clamped.

    Raises:
        ResponseError: if there are neither one nor three channels.

    References:
        Smith, *Color Gamut Transform Pairs*, 1978 (the hexagonal model, HSV).
    """
    share = _column(strength, images, 4)
    turn = share * (2 * torch.rand(len(images), 1, 1, 1, dtype=images.dtype, device=images.device) - 1)
    if images.shape[1] not in (1, 3):
        raise ResponseError(f"a hue is of red, green and blue, and these images have {images.shape[1]} channels.")
    if images.shape[1] == 1:
        return images
    sector, value, chroma = _hexagon(images)
    place = (torch.tensor([5, 3, 1]).to(images).reshape(1, 3, 1, 1) + sector + 6 * turn) % 6
    turned = value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)
    return _moved(images, strength, turned, bounds)


def _hexagon(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue as a number in [0, 6), value and chroma, each ``(B, 1, height, width)``."""
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    width = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    after_red, after_green, after_blue = (green - blue) / width, (blue - red) / width + 2, (red - green) / width + 4
    sector = torch.where(red == value, after_red, torch.where(green == value, after_green, after_blue))
    return sector % 6, value, chroma


def affine(
    images: Tensor,
    *,
    degrees: Strength = 0.0,
    translate: Strength = 0.0,
    scale: Strength = 0.0,
    shear: Strength = 0.0,
    mode: str = "bilinear",
) -> Tensor:
    """Rotate, shift, scale and shear, each by an amount uniform in a range around none.

    Args:
        images: ``(B, C, height, width)``; what comes from outside is zero.
        degrees: the largest angle, a number or ``(B,)``.
        translate: the largest shift, as a share of height and of width.
        scale: ``s`` for a factor in ``[1 - s, 1 + s]``, less than 1.
        shear: the largest angle of shear, along the width, in degrees.
        mode: of ``grid_sample``.

    Returns:
        The shape of ``images``.
    """
    draws = 2 * torch.rand(5, len(images), dtype=images.dtype, device=images.device) - 1
    angle, slant = (_column(s, images, 1) * d * math.pi / 180 for s, d in zip((degrees, shear), draws[:2], strict=True))
    factor = 1 + _column(scale, images, 1) * draws[2]
    shift = _column(translate, images, 1)
    height, width = images.shape[-2:]
    # The grid says where each pixel of the result comes from, in units of half the height and half the width.
    cos, sin, aspect = torch.cos(angle) / factor, torch.sin(angle) / factor, height / width
    slope = torch.tan(slant)
    first = torch.stack([cos, (sin + slope * cos) * aspect, -2 * shift * draws[3]], -1)
    second = torch.stack([-sin / aspect, cos - slope * sin, -2 * shift * draws[4]], -1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode=mode, align_corners=False)
    still = sum(_column(s, images, 4).expand(len(images), 1, 1, 1).abs() for s in (degrees, translate, scale, shear))
    # Where nothing is asked for, not even rounding may change a pixel.
    return torch.where(torch.as_tensor(still) == 0, images, moved)


def noise(inputs: Tensor, deviation: Strength) -> Tensor:
    """Add Gaussian noise.

    Args:
        inputs: ``(B, ...)``.
        deviation: its standard deviation, a number or ``(B,)``.
    """
    return inputs + _column(deviation, inputs, inputs.ndim) * torch.randn_like(inputs)


def mixup(inputs: Tensor, targets: Tensor, strength: Strength) -> tuple[Tensor, Tensor]:
    """Blend each example with another one of the batch, inputs and targets alike.

    ``x ← (1 - m) x + m x'`` with ``m`` uniform in ``[0, s / 2]``: a share that is scaled, and not drawn from a Beta
    distribution of a tuned shape, since that takes a number of draws that depends on the shape.

    Args:
        inputs: ``(B, ...)``.
        targets: ``(B, ...)`` of floats: regression targets, or probabilities of classes.
        strength: ``s`` in [0, 1], a number or ``(B,)``.

    References:
        After Zhang et al., *mixup: Beyond Empirical Risk Minimization*, 2018.
    """
    if not targets.is_floating_point():
        raise ResponseError("mixup blends targets, and these are whole numbers; use `F.one_hot(targets).float()`.")
    order = torch.randperm(len(inputs), device=inputs.device)
    share = _column(strength, inputs, 1) * torch.rand(len(inputs), dtype=inputs.dtype, device=inputs.device) / 2

    def blend(x: Tensor) -> Tensor:
        m = _column(share, x, x.ndim)
        return (1 - m) * x + m * x[order]

    return blend(inputs), blend(targets)


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: Strength) -> Tensor:
    """Cross entropy with labels smoothed by an amount for each example, averaged over the batch.

    Args:
        logits: ``(B, classes, ...)``, as for ``F.cross_entropy``.
        targets: ``(B, ...)``, the classes.
        smoothing: ``s`` in [0, 1], a number or ``(B,)``: the share of the uniform distribution.

    Raises:
        ResponseError: if the targets are no classes, one for each position of the logits.

    References:
        Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*, 2016, Sec. 7.
    """
    shape = (*logits.shape[:1], *logits.shape[2:])
    if logits.ndim < 2 or targets.is_floating_point() or targets.shape != shape:
        raise ResponseError(
            f"logits of shape {tuple(logits.shape)}, (B, classes, ...), take classes, whole numbers, of "
            f"shape {tuple(shape)}, and these are {targets.dtype} of shape {tuple(targets.shape)}. If the classes are "
            "the last axis, `logits.movedim(-1, 1)`."
        )
    logs = F.log_softmax(logits, 1)
    share = _column(smoothing, logits, targets.ndim)
    return -((1 - share) * logs.gather(1, targets.unsqueeze(1)).squeeze(1) + share * logs.mean(1)).mean()


def _column(strength: Strength, like: Tensor, ndim: int) -> Tensor:
    """A strength in a shape that multiplies a batch; constant, of its type and on its device."""
    if not like.is_floating_point():
        raise ResponseError(
            f"augmentations compute with floats, and this batch is of {like.dtype}; convert it, `images.float() / 255`."
        )
    value = torch.as_tensor(strength, dtype=like.dtype, device=like.device).detach()
    return value.reshape(-1, *(1,) * (ndim - 1))


def _factor(images: Tensor, strength: Strength) -> Tensor:
    s = _column(strength, images, 4)
    low = (1 - s).clamp(min=0)
    return low + (1 + s - low) * torch.rand(len(images), 1, 1, 1, dtype=images.dtype, device=images.device)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device)
    return (images * weights.reshape(1, 3, 1, 1)).sum(1, keepdim=True)


def _moved(images: Tensor, strength: Strength, moved: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    # Where nothing is asked for, neither rounding nor a bound may change a pixel.
    return torch.where(_column(strength, images, 4) == 0, images, moved if bounds is None else moved.clamp(*bounds))
