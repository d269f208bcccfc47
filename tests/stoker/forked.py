"""Runs the `stoker` command as often as asked, each time in a fork of one process that has loaded what every command
loads: most of what a command costs that ends with an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module

from stoker.cli import main


class Commands:
    """The process that forks. Use in `with`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, words: Sequence[str]) -> tuple[int, str]:
        """Exit code and standard error of `stoker WORDS`, with the environment that there is now."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"words": list(words), "env": dict(os.environ)}) + "\n")
        self._process.stdin.flush()
        code, said = json.loads(self._process.stdout.readline())
        return code, said

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


#: What one command or another loads when it is run.
LOADED = ("stoker.cli.commands", "stoker.local.stack", "redis.asyncio", "typer.rich_utils")


def serve() -> None:
    for name in LOADED:
        import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if child == 0:
                answers.close()
                os.environ.clear()
                os.environ.update(asked["env"])
                nothing = os.open(os.devnull, os.O_RDWR)
                for stream, to in enumerate((nothing, nothing, said.fileno())):
                    os.dup2(to, stream)
                sys.argv[1:] = asked["words"]
                # It ends as a process of its own would: by what this raises.
                main()
            _, status = os.waitpid(child, 0)
            said.seek(0)
            answers.write(json.dumps([os.waitstatus_to_exitcode(status), said.read().decode()]) + "\n")
            answers.flush()


if __name__ == "__main__":
    serve()
