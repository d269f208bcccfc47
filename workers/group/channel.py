"""A socket between rank 0 and another rank: words of the plan both ways, and a sign of life each second."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

from workers.group.plan import LONGEST, Beat, NotOfThePlan, Word, read, written

#: Seconds between two signs of life, and without any after which the other side counts as lost.
BEAT_EVERY, SILENCE = 1.0, 10.0


class Channel:
    """`say` may be called by any thread, `words` is read by one."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(SILENCE)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._lock = connected, threading.Lock()
        self._closed, self._words = threading.Event(), self._read()

    def say(self, word: Word) -> None:
        """Raises `OSError` if the other side is gone, or takes nothing."""
        with self._lock:
            self._socket.sendall(written(word))

    def words(self) -> Iterator[Word]:
        """Those that nobody has read yet, until the other side closes; signs of life are left out. Raises `OSError` for
        one that was lost or is silent (`TimeoutError`), `NotOfThePlan` for one that says something else."""
        # One for all readers: behind the word that is read, more may have come already.
        return self._words

    def _read(self) -> Iterator[Word]:
        held = bytearray()
        while data := self._socket.recv(1 << 16):
            held += data
            lines: list[bytes] = []
            if b"\n" in data:
                # Else a long line would be looked through again and again.
                *lines, rest = bytes(held).split(b"\n")
                held = bytearray(rest)
            if len(held) > LONGEST:
                raise NotOfThePlan(f"a line of more than {LONGEST} bytes given.")
            for line in lines:
                word = read(line)
                if not isinstance(word, Beat):
                    yield word

    def keep_alive(self) -> None:
        """Give signs of life from now on, in a thread of its own, for as long as the other side is there."""
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_EVERY):
            try:
                self.say(Beat())
            except OSError:
                # The thread that reads sees it too, and says so.
                return

    def close(self) -> None:
        self._closed.set()
        with suppress(OSError):
            # Wakes the thread that reads; one that the other side has closed is no longer connected.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
