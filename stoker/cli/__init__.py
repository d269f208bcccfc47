"""The `stoker` command. Errors of `stoker.errors` end it with one line and their exit code (docs/cli.md)."""

from __future__ import annotations

import sys

from stoker.cli.app import app
from stoker.errors import StokerError

INTERRUPTED = 130


def main() -> None:
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


__all__ = ["app", "main"]
