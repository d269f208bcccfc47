"""Whether a run diverges."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Losses that a new one is compared with; fewer than `_ENOUGH` say nothing.
WINDOW, _ENOUGH = 16, 8
#: Nats. A loss near 0 may double, and double again, by chance.
_LEAST_RISE = 1.0
#: A run may be rolled back this often; each time its learning rate is multiplied by `RATE_FACTOR`.
MAX_ROLLBACKS = 2
RATE_FACTOR = 0.5


def divergence(loss: float, norm: float, recent: Sequence[float], spike: float) -> str | None:
    """What is wrong with a step of this loss and gradient norm, or None.

    It diverges if either is no finite number, or if the loss is above `spike` times the mean of the last 16 steps and
    more than 1 nat above it. `spike` 0: only the first.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"loss {loss:g}, gradient norm {norm:g}"
    if not spike or len(recent) < _ENOUGH:
        return None
    usual = sum(recent) / len(recent)
    if loss > spike * usual and loss > usual + _LEAST_RISE:
        return f"loss {loss:.3f}, over {spike:g} times the {usual:.3f} of the steps before"
    return None


def overflow(held_out: float) -> str | None:
    """What is wrong with a step behind which the held-out loss is this, or None: the next loss would be as bad."""
    return None if math.isfinite(held_out) else f"held-out loss {held_out:g}"
