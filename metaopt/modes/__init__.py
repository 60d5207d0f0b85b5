"""Ways to differentiate ``s_t = Φ_t(s_{t-1}, λ)``: one mode a file, over what capture recorded."""

from __future__ import annotations

__all__ = ["Recording", "Streaming", "record", "stream"]

from metaopt.modes.record import Recording, record
from metaopt.modes.stream import Streaming, stream
