"""Which states of a recorded training are kept, where, and what is computed again.

``levels``     what is kept of each iteration, as far as the budget allows
``memory``     what that takes, now and after more steps
``stores``     where copies of states lie: in memory, in the host's memory, on disk
``restoring``  going back through iterations whose states were not kept
"""

from __future__ import annotations

__all__ = ["LEVELS", "Keeping", "Memory", "bytes_of", "store_of", "walk"]

from metaopt.checkpoints.levels import LEVELS, Keeping
from metaopt.checkpoints.memory import Memory, bytes_of
from metaopt.checkpoints.restoring import walk
from metaopt.checkpoints.stores import store_of
