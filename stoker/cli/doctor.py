"""`stoker doctor`: what this machine has and lacks, with a remedy for each."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import typer

from stoker.cli.options import Json, Url, print_json
from stoker.errors import ConfigError
from stoker.local.checks import Check, check_compiler, of_machine
from stoker.settings import load_settings

#: Characters of an engine that cannot be asked, from the end of what it said.
SAID = 300


def doctor(as_json: Json = False, url: Url = None) -> None:
    """Check this machine, with a remedy for each fault. Exit code 1 if something that a worker needs is missing."""
    checks = machine_checks(url)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            print(check.text)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def machine_checks(url: str | None) -> list[Check]:
    """Of Python, the disk, the broker and the engine."""
    return [*of_machine(load_settings(url=url)), *_of_engine()]


def _of_engine() -> list[Check]:
    """Checks of the engine, made in another process: this one must not import MLX."""
    from stoker.local.stack import require_workers

    try:
        require_workers()
    except ConfigError as error:
        return [Check("engine", False, str(error), "a client needs no engine; a worker does")]
    done = subprocess.run([sys.executable, "-m", "workers.doctor"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip()[-SAID:]
        return [Check("engine", False, f"it cannot be asked: {said}", "make venv installs what it needs")]
    return [*(Check(**found) for found in json.loads(done.stdout)), check_compiler()]
