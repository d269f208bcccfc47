"""The `stoker` command. Errors of `stoker.errors` end it with one line and their exit code (docs/cli.md)."""

from __future__ import annotations

import signal
import sys
from typing import Any

from stoker.cli.app import app
from stoker.errors import StokerError

INTERRUPTED = 130


def main() -> None:
    # A command that is told to end cleans up as after Ctrl-C.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        app(prog_name="stoker")
    except StokerError as error:
        print(f"stoker: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone (`stoker … | head`): that is its right.
        sys.stderr.close()
        sys.exit(0)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


__all__ = ["app", "main"]
