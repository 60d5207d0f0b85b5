"""Phone classification as a problem: frames in their windows, split by diphone, and a secondary target."""

from __future__ import annotations

__all__ = ["CONTEXT", "Part", "Problem", "half_means", "make_problem", "windows"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from recordings import Recording, Speech
from torch import Tensor

CONTEXT = 3  # frames on each side of the one to be classified
SHARES = (0.70, 0.15)  # of the diphones, to train and to validate on; the others test


class Part(NamedTuple):
    """Frames: each in its window of `2 * CONTEXT + 1`, and the index of its phone."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Problem:
    """Frames to train, validate and test on, no diphone in two of them.

    Args:
        train: the training frames.
        secondary: their secondary targets; there are none for the other frames.
        val: the validation frames.
        test: the test frames.
        phones: the names of the classes.
    """

    train: Part
    secondary: Tensor
    val: Part
    test: Part
    phones: Sequence[str]

    @property
    def chance(self) -> float:
        """The accuracy of always saying the phone that is the most frequent in training, in percent."""
        commonest = torch.bincount(self.train.y).argmax()
        return 100 * (self.test.y == commonest).double().mean().item()


def make_problem(speech: Speech, *, seed: int = 0) -> Problem:
    """Split the recordings by diphone, and make windows of frames in units of the training frames' spread.

    The secondary target of a frame is the mean, over its half of its recording, of the frames in the middle of the
    windows: what its phone sounds like in this context, without the noise. A window ends where its recording does.

    Args:
        speech: the recordings.
        seed: of the split.
    """
    diphones = sorted({recording.diphone for recording in speech.recordings})
    order = np.random.default_rng(seed).permutation(len(diphones))
    cuts = np.cumsum([round(share * len(diphones)) for share in SHARES])
    sides = [{diphones[i] for i in part} for part in np.split(order, cuts)]
    train, val, test = ([r for r in speech.recordings if r.diphone in side] for side in sides)
    frames = np.concatenate([recording.frames for recording in train])
    mean, spread = frames.mean(0), frames.std(0)
    phones = speech.phones

    def scaled(recordings: list[Recording]) -> list[Recording]:
        return [r._replace(frames=(r.frames - mean) / spread) for r in recordings]

    train, val, test = scaled(train), scaled(val), scaled(test)
    secondary = np.concatenate([half_means(recording) for recording in train])
    return Problem(
        part_of(train, phones), as_floats(secondary), part_of(val, phones), part_of(test, phones), tuple(phones)
    )


def part_of(recordings: list[Recording], phones: list[str]) -> Part:
    """The windows and the labels of some recordings."""
    index = {phone: i for i, phone in enumerate(phones)}
    labels = [
        np.where(np.arange(len(r.frames)) < r.middle, index[r.left], index[r.right]).astype(np.int64)
        for r in recordings
    ]
    x = np.concatenate([windows(recording.frames) for recording in recordings])
    return Part(as_floats(x), torch.from_numpy(np.concatenate(labels)))


def windows(frames: np.ndarray) -> np.ndarray:
    """Each frame with its neighbours, one window a row; the first and the last frame stand in for what is beyond."""
    places = np.arange(len(frames))[:, None] + np.arange(-CONTEXT, CONTEXT + 1)
    return frames[places.clip(0, len(frames) - 1)].reshape(len(frames), -1)


def half_means(recording: Recording) -> np.ndarray:
    """For each frame the mean over its phone's part of the recording."""
    halves = np.split(recording.frames, [recording.middle])
    return np.concatenate([np.broadcast_to(half.mean(0), half.shape) for half in halves if len(half)])


def as_floats(array: np.ndarray) -> Tensor:
    """In the default floating-point type."""
    return torch.from_numpy(array).to(torch.get_default_dtype())
