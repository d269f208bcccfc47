# Generated from stoker/client/_async/fake_client.py by `make format`: edit that file.
"""The client for users' own tests: everything of the real one, without a broker and a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from stoker.client._sync.client import Client
from stoker.client._sync.memory_link import MemoryLink
from stoker.client.in_memory.memory import Memory
from stoker.client.in_memory.script import Script
from stoker.client.in_memory.sent import Sent
from stoker.settings import Settings, load_settings


class FakeClient(Client):
    """An `Client` that works in memory, for tests. `script` says what the jobs make; `sent` has what was sent.

    `models`: model → what it can do (`embed` or `rerank`; `generate`, `train`, `adapters`); without: the two models of
    a worker that was started without options. `adapters`: names that generation may ask for from the start.
    `may_load`: what `models.load` may make warm besides, in the form of `models`. `clock`: seconds, by which the
    deadlines of jobs that hang pass; without: real ones. Requests, options, results, tokens and errors are the real
    ones, and wrong input is refused as by the real client.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, Iterable[str]] | None = None,
        adapters: Iterable[str] = (),
        may_load: Mapping[str, Iterable[str]] | None = None,
        key: str | None = None,
        settings: Settings | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._memory = Memory(settings or load_settings(client_key=key), models, adapters, may_load, clock)
        super().__init__(link=MemoryLink(self._memory))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {len(self.sent.jobs)} jobs sent>"

    @property
    def script(self) -> Script:
        """What the jobs to come make."""
        return self._memory.script

    @property
    def sent(self) -> Sent:
        """What was sent, in order: the requests of each kind (`sent.generate[0].max_tokens`), and `sent.jobs`, which
        have the id, the bytes of the input and the client's key too."""
        return self._memory.sent
