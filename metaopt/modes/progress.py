"""Progress bars for long work."""

from __future__ import annotations

__all__ = ["progressing"]

from collections.abc import Iterable, Iterator
from typing import TypeVar

from metaopt.errors import require

T = TypeVar("T")


def progressing(items: Iterable[T], count: int | None, show: bool, label: str) -> Iterator[T]:
    """The items, under a progress bar if ``show``."""
    if not show:
        yield from items
        return
    tqdm = require("tqdm", "progress", "a progress bar").tqdm
    yield from tqdm(items, total=count, desc=label, unit="step", leave=False)
