"""Stopping: running jobs get the grace time, then go back to the queue; nothing is lost.

Training goes back at once: it may last for hours, and nobody watches it token by token.
"""

from __future__ import annotations

import logging
import threading

from workers.runtime import Runtime
from workers.transport import restore_on_close

log = logging.getLogger(__name__)


def begin(runtime: Runtime) -> None:
    """Called when the worker was told to stop (SIGTERM, SIGINT)."""
    restore_on_close()
    runtime.hand_back({"train"})
    timer = threading.Timer(runtime.settings.grace, runtime.hand_back, [{"train", "generate", "embed"}])
    timer.daemon = True
    timer.start()
    log.info("draining: running jobs have %.0f s", runtime.settings.grace)
