"""Draw what each augmentation of `metaopt.stn.augment` does at rising strengths; the figure is in the documentation.

python tutorials/stn_augmentations.py results/augmentations.png
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor

from metaopt.stn import augment

AUGMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cutout": lambda x, s: augment.cutout(x, torch.floor(3.99 * s), 24),
    "brightness": augment.brightness,
    "contrast": augment.contrast,
    "saturation": augment.saturation,
    "hue": lambda x, s: augment.hue(x, 0.5 * s),
    "rotation": lambda x, s: augment.affine(x, degrees=45 * s),
    "shift": lambda x, s: augment.affine(x, translate=0.5 * s),
    "scale": lambda x, s: augment.affine(x, scale=0.5 * s),
    "shear": lambda x, s: augment.affine(x, shear=45 * s),
    "noise": lambda x, s: augment.noise(x, 0.3 * s).clamp(0, 1),
}


def main(path: Path) -> None:
    """A row for each strength, a column for each augmentation."""
    from matplotlib.figure import Figure

    picture = torch.tensor(load_sample_image("flower.jpg")[:, 106:533]).permute(2, 0, 1) / 255
    picture = torch.nn.functional.interpolate(picture.unsqueeze(0), (96, 96), mode="area")
    strengths = torch.linspace(0, 1, 4)
    figure = Figure(figsize=(11.5, 5), layout="constrained")
    axes = figure.subplots(len(strengths), len(AUGMENTATIONS))
    for column, (name, apply) in enumerate(AUGMENTATIONS.items()):
        for row, strength in enumerate(strengths):
            torch.manual_seed(column)
            axes[row][column].imshow(apply(picture, strength.reshape(1))[0].permute(1, 2, 0))
            axes[row][column].set_axis_off()
        axes[0][column].set_title(name, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/augmentations.png"))
