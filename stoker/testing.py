"""For tests of programs that use Stoker: clients that work in memory, without a broker, a worker or a model.

    client = FakeClient()
    client.script.generate("It was a dark night.")
    assert client.generate("Begin:", max_tokens=16).result().text == "It was a dark night."
    assert client.sent.generate[0].max_tokens == 16

Jobs can be awaited, streamed, cancelled, listed and found again. See docs/testing.md.
"""

from __future__ import annotations

from stoker.client._async.fake_client import AsyncFakeClient
from stoker.client._sync.fake_client import FakeClient
from stoker.client.in_memory.script import NotScripted, Script
from stoker.client.in_memory.sent import Sent, SentJob

__all__ = ["AsyncFakeClient", "FakeClient", "NotScripted", "Script", "Sent", "SentJob"]
