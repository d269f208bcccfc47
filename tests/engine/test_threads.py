"""A thread that used MLX ends next to threads whose collections free compiled functions."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import mlx.core as mx
import pytest

from engine.platform.threads import leave

#: Seconds in which a child that does not hang is done many times over.
PATIENCE = 60
CHILD = '''
import gc
import threading

import mlx.core as mx

from engine.errand import OwnThread


class Cycle:
    """A compiled function in a cycle, like a lane's."""

    def __init__(self) -> None:
        self.function = mx.custom_function(lambda x: mx.exp(x) * 2)
        self.function.vjp(lambda primals, cotangents, outputs: cotangents)
        self.compiled = mx.compile(self.run)

    def run(self, x):
        return self.function(x) + 1


def churn() -> None:
    while not ended.is_set():
        a = []
        a.append(a)


# What is here already need not be looked at: collections are quicker, and meet more often.
gc.freeze()
gc.set_threshold(20)
ended = threading.Event()
other = threading.Thread(target=churn)
other.start()
for _ in range(50):
    thread = OwnThread("loading")
    thread.run(lambda: mx.eval(Cycle().compiled(mx.zeros((3,)))))
    thread.end(60)
ended.set()
other.join()
print("all ended")
'''


def test_threads_end_while_another_collects_their_compiled_functions() -> None:
    ran = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=PATIENCE)
    assert ran.stdout == "all ended\n", ran.stderr


class InCycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_is_in_cycles_goes_before_mlx_frees_its_own_and_nothing_is_collected_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[bool, InCycle | None]] = []
    left = weakref.ref(InCycle())
    monkeypatch.setattr(mx, "clear_streams", lambda: seen.append((gc.isenabled(), left())))
    leave()
    assert seen == [(False, None)]
    assert gc.isenabled()


def test_a_thread_that_cannot_be_left_turns_collections_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "clear_streams", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        leave()
    assert gc.isenabled()
