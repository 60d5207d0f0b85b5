"""Torch's forward mode, opened without the warnings of its own imports."""

from __future__ import annotations

__all__ = ["dual_level"]

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch.autograd import forward_ad

_opened = False


@contextmanager
def dual_level() -> Iterator[None]:
    """``torch.autograd.forward_ad.dual_level``; the first one imports parts of torch that use deprecated ones."""
    global _opened
    if not _opened:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)  # which it became in later versions
            importlib.import_module("torch._decomp")
            importlib.import_module("torch._decomp.decompositions_for_jvp")
            _opened = True
    with forward_ad.dual_level():
        yield
