"""A cable between two hosts of a test, which can be cut. Without MLX: a rank imports this before it boots its BLAS."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack, suppress

#: Characters in which a connection through a cable says first which port is meant.
_PORT = 5
#: Seconds in which a port has to be there.
PATIENCE = 60.0


class Cable:
    """What lies between two hosts, both on loopback: `port` leads to the port that a connection names first
    (`through_cable`), `port_to` gives one that leads to a certain port."""

    def __init__(self) -> None:
        self._broken, self._leaving = threading.Event(), ExitStack()
        self.port = self._leads(None)

    def port_to(self, target: int) -> int:
        return self._leads(target)

    def cut(self) -> None:
        """From now on nothing comes through, and neither side hears of that."""
        self._broken.set()

    def _leads(self, target: int | None) -> int:
        listener = self._leaving.enter_context(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=self._accept, args=(listener, target), daemon=True).start()
        return int(listener.getsockname()[1])

    def _accept(self, listener: socket.socket, target: int | None) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                self._leaving.callback(near.close)
                threading.Thread(target=self._join, args=(near, target), daemon=True).start()

    def _join(self, near: socket.socket, target: int | None) -> None:
        with suppress(OSError):
            port = int(near.recv(_PORT, socket.MSG_WAITALL)) if target is None else target
            # Who connects may be there before the one who listens.
            far = _reached(port)
            self._leaving.callback(far.close)
            threading.Thread(target=self._carry, args=(far, near), daemon=True).start()
            self._carry(near, far)

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self._broken.is_set():
                    return
                sink.sendall(data)
        if self._broken.is_set():
            return
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._leaving.close()


def _reached(port: int) -> socket.socket:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def through_cable(cable: int, port: int) -> socket.socket:
    """A connection to `port` by the cable's own port."""
    connected = socket.create_connection(("127.0.0.1", cable))
    connected.sendall(f"{port:{_PORT}}".encode())
    return connected
