"""Ways to differentiate ``s_t = Φ_t(s_{t-1}, λ)``: one mode a file, over what capture recorded."""

from __future__ import annotations

__all__ = ["Implicit", "Recording", "Streaming", "implicit", "record", "stream"]

from metaopt.modes.implicit import Implicit, implicit
from metaopt.modes.record import Recording, record
from metaopt.modes.stream import Streaming, stream
