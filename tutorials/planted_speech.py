"""Speech that nobody spoke: planted data in the form of `recordings`, for where no voice can be had."""

from __future__ import annotations

__all__ = ["planted"]

import numpy as np
from recordings import CHANNELS, Recording, Speech

PHONES = 20
SHARE = 0.9  # of the possible diphones that are recorded
NOISE, COLOUR, ALLOPHONE = 1.0, 0.7, 0.6


def planted(source: str = "synthetic, embedded", *, seed: int = 0) -> Speech:
    """Frames that glide from the target of one phone to the target of the next.

    Each phone has a target, a point in the space of the frames. In each diphone a phone is displaced a little, by its
    neighbour (coarticulation) and at random (an allophone), so that frames of one diphone resemble each other more than
    frames of one phone do, and the displacement is there to be learnt from a secondary target. On top lies noise whose
    neighbouring frames are correlated. About a fifth of the frames can't be told by a window of seven.

    Args:
        source: what the data are to be called.
        seed: of all of it.
    """
    random = np.random.default_rng(seed)
    targets = random.normal(size=(PHONES, CHANNELS))
    names = [f"p{i:02}" for i in range(PHONES)]
    recordings = []
    for left in range(PHONES):
        for right in range(PHONES):
            if random.random() > SHARE:
                continue
            lengths = random.integers(4, 9, 2)
            places = np.arange(lengths.sum()) - lengths[0] + 0.5
            mix = 1 / (1 + np.exp(-places))[:, None]
            first, second = targets[[left, right]] + ALLOPHONE * random.normal(size=(2, CHANNELS))
            frames = (1 - mix) * first + mix * second + coloured(random, len(places))
            recordings.append(Recording(names[left], names[right], int(lengths[0]), frames))
    return Speech("planted", tuple(recordings), source)


def coloured(random: np.random.Generator, length: int) -> np.ndarray:
    """Noise of a standard deviation, each frame correlated with the one before."""
    noise = NOISE * random.normal(size=(length, CHANNELS))
    for t in range(1, length):
        noise[t] = COLOUR * noise[t - 1] + (1 - COLOUR**2) ** 0.5 * noise[t]
    return noise
