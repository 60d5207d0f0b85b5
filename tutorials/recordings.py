"""What recorded speech is, for the tutorial: frames of sound, and the phone that each belongs to."""

from __future__ import annotations

__all__ = ["CHANNELS", "Recording", "Speech"]

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CHANNELS = 17  # log energy and 16 cepstral coefficients


class Recording(NamedTuple):
    """One recorded diphone, from the middle of a phone to the middle of the next.

    Args:
        left: the phone of the frames before `middle`.
        right: the phone of the others.
        middle: where the one becomes the other.
        frames: shape `(n, CHANNELS)`, in the order of time.
    """

    left: str
    right: str
    middle: int
    frames: np.ndarray

    @property
    def diphone(self) -> str:
        """Its name; all recordings of one diphone stay on one side of a split."""
        return f"{self.left}-{self.right}"


@dataclass(frozen=True)
class Speech:
    """One speaker's recordings.

    Args:
        name: what to call the speaker in the output.
        recordings: of diphones, some perhaps more than once.
        source: where they came from, or why they stand in for others.
    """

    name: str
    recordings: tuple[Recording, ...]
    source: str

    @property
    def phones(self) -> list[str]:
        """The phones that occur, in alphabetical order."""
        return sorted({phone for recording in self.recordings for phone in (recording.left, recording.right)})
