"""Whether a client calls the ledger's functions, or sends its scripts.

A broker makes a function once, and a script at each call. Redis before 7.0 has no functions, a user of the broker may
be forbidden to call them, and after a restart without its file a broker has lost them: then the script does the same.
"""

from __future__ import annotations

import time

#: Seconds until a broker that had no function is asked for it again: a worker may have loaded it meanwhile. That costs
#: a round trip, a script instead of a function 0.2 ms of the broker at each call.
AGAIN = 5.0


class Functions:
    """What one client knows of its broker. `loads`: whether it loads the ledger's library, as a worker does. Others
    wait for a worker to do that: who may load a library may replace what others run with their own rights."""

    def __init__(self, *, loads: bool = False) -> None:
        self.loads = loads
        self._refused: float | None = None

    def called(self) -> bool:
        """Whether to call a function now."""
        return self._refused is None or time.monotonic() - self._refused >= AGAIN

    def refuse(self) -> None:
        """The broker had no function, or did not take the library."""
        self._refused = time.monotonic()
