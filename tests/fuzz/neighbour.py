"""The stream next to it all: the same request again and again, which must get the same tokens each time."""

from __future__ import annotations

import threading
import time

from stoker.client import GenerateJob
from stoker.errors import BrokerUnavailable, StokerError
from tests.chaos.fleet import GENERATE
from tests.fuzz.world import World

#: Of each stream.
TOKENS = 400
#: Seconds that a client tries for until the broker takes its job: another input may have spoiled what jobs share.
TRIES = 60.0
#: Seconds without a token.
SILENCE = 60.0


class Neighbour:
    """Streams in a thread of its own until `stop`. `wrong` says what was not as it had been."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.wrong: list[str] = []
        self.streams = 0
        #: Set while a stream has begun and has not ended.
        self.flowing = threading.Event()
        self._may_begin, self._over, self._idle = threading.Event(), threading.Event(), threading.Event()
        self._right = self._stream()
        self._may_begin.set()
        self._thread = threading.Thread(target=self._run, name="neighbour", daemon=True)
        self._thread.start()

    def rest(self) -> None:
        """Let the stream under way come to its end, and begin no other."""
        self._may_begin.clear()
        if not self._idle.wait(2 * SILENCE):
            self.wrong.append("the stream next to it all does not end")

    def go_on(self) -> None:
        self._may_begin.set()

    def stop(self) -> None:
        self._over.set()
        self._may_begin.set()
        self._thread.join(2 * SILENCE)

    def _run(self) -> None:
        while not self._over.is_set():
            if not self._may_begin.is_set():
                self._idle.set()
                self._may_begin.wait()
                self._idle.clear()
                continue
            try:
                made = self._stream()
            except StokerError as error:
                self.wrong.append(f"the stream next to it all: {type(error).__name__}: {error}")
                continue
            self.streams += 1
            if made != self._right:
                same = next((at for at, (a, b) in enumerate(zip(made, self._right, strict=False)) if a != b), len(made))
                self.wrong.append(f"the stream next to it all is another from token {same} on, of {len(made)}")
        self._idle.set()

    def _stream(self) -> list[tuple[int, str]]:
        job, tokens = self._sent(), []
        try:
            for token in job.stream(timeout=SILENCE, cancel_on_close=False):
                self.flowing.set()
                tokens.append((token.token_id, token.text))
            result = job.result(SILENCE)
        finally:
            self.flowing.clear()
        if [token for token, _ in tokens] != list(result.token_ids):
            self.wrong.append("the stream next to it all has other tokens than its result")
        return tokens

    def _sent(self) -> GenerateJob:
        end = time.monotonic() + TRIES
        while True:
            try:
                return self._world.client.generate(
                    "ab ab", model=GENERATE, max_tokens=TOKENS, temperature=0.8, top_k=40, seed=11, priority=0
                )
            except BrokerUnavailable:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
