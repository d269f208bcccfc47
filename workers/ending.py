"""How a worker process ends that cannot go on."""

from __future__ import annotations

import logging
import os

#: The exit code of a worker that has lost a thread or a rank, or whose engine hangs (EX_SOFTWARE).
EXIT_CODE = 70


def end_process(code: int = EXIT_CODE) -> None:
    logging.shutdown()
    # Not sys.exit: it ends only its own thread, and then waits for threads that hang.
    os._exit(code)
