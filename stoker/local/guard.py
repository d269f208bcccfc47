"""Run a command that must not outlive the process that asked for it: `python guard.py GRACE COMMAND…`.

The asker holds the other end of this process's standard input. When it closes that end, or dies in any way
(`kill -9` included), the pipe ends, and the command gets SIGTERM and, GRACE seconds later, SIGKILL. A pipe does this on
every Unix; a parent-death signal exists on Linux alone. Standard library only: it starts in milliseconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(grace: float, command: list[str]) -> int:
    """Returns the command's exit code."""
    asked = threading.Event()
    # Handlers first: a signal that comes between the two would end this process and leave the child.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.set())
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_await_end_of_input, args=(asked,), daemon=True).start()
    while child.poll() is None:
        if asked.wait(0.1):
            return _end(child, grace)
    return child.returncode


def _await_end_of_input(asked: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    asked.set()


def _end(child: subprocess.Popen[bytes], grace: float) -> int:
    child.terminate()
    try:
        return child.wait(grace)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
