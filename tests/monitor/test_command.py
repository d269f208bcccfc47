"""How the process of the monitor ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: A monitor whose loop ends as `start` says, next to a thread of Flower's that waits for ever.
CHILD = """
import threading
from types import SimpleNamespace

from stoker.monitor import command

command.LEAVE_LIMIT = 0.1
threading.Thread(target=threading.Event().wait).start()


def start():
    {start}


loop = SimpleNamespace(run_sync=lambda leave, timeout: None, asyncio_loop=SimpleNamespace(
    add_signal_handler=lambda number, stop: None), stop=None)
command.run(SimpleNamespace(io_loop=loop, start=start, leave=None, stop=lambda: None))
"""


@pytest.mark.parametrize(
    ("start", "code"), [("pass", 0), ("raise RuntimeError('a defect')", 1)], ids=["asked", "defect"]
)
def test_a_monitor_with_a_thread_that_hangs_ends_and_says_whether_it_was_an_error(start: str, code: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CHILD.format(start=start)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == code, ended.stderr
