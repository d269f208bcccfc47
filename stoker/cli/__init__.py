"""The `stoker` command. Errors of `stoker.errors` end it with one line and their exit code (docs/cli.md).

The commands are imported when one is run: `stoker --version` answers at once, and without the `cli` extra.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import stoker
from stoker.cli import edge
from stoker.errors import ConfigError
from stoker.local.interrupts import end_at_once, end_cleanly

if TYPE_CHECKING:
    from stoker.cli.commands import app


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
        raise ConfigError("typer is missing, which the command needs: pip install '.[cli]', from a checkout.") from None
    return app


def main() -> None:
    end_at_once()
    edge.open_streams()
    sys.exit(edge.run(_command))


def _command() -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"stoker {stoker.__version__}")
        return
    command = sys.modules[__name__].app
    end_cleanly()
    command(prog_name="stoker")


__all__ = ["app", "main"]
