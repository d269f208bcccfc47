"""The `stoker` command. Errors of `stoker.errors` end it with one line and their exit code (docs/cli.md).

The commands are imported when one is run: `stoker --version` answers at once, and without the `cli` extra.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any

import stoker
from stoker.errors import ConfigError, StokerError

if TYPE_CHECKING:
    from stoker.cli.commands import app

INTERRUPTED = 130


def __getattr__(name: str) -> Any:
    """`app`: the command tree."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from stoker.cli.commands import app
    except ModuleNotFoundError as error:
        # typer brings rich along, so only typer can be missing.
        if error.name != "typer":
            raise
        raise ConfigError("typer is missing, which the command needs: pip install 'stoker[cli]'.") from None
    return app


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"stoker {stoker.__version__}")
        return
    # A command that is asked to end cleans up as after Ctrl-C.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        sys.modules[__name__].app(prog_name="stoker")
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
