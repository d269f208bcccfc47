"""Which keys each script of the ledger names, by whose they are: what a broker in parts would have to keep together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stoker.broker import keys, ledger
from stoker.broker.ledger import discarding, vectors
from stoker.broker.ledger.transitions import Transitions
from stoker.client.requests import embed_request
from stoker.client.submission import job_record
from tests.docs.pages import code, rows

#: Kinds of keys → whose they are: the column of the page's table.
WHOSE = {
    **dict.fromkeys(("job", "result", "cancel", "stream", "vectors", "checkpoint"), "of its job"),
    **dict.fromkeys(
        ("ready", "placed", "backlog", "open", "dispatched", "turns", "pace", "sizes", "client"), "of its job's queue"
    ),
    "adapter": "of its model",
    **dict.fromkeys(("policy", "dead", "unacked"), "of the whole broker"),
    **dict.fromkeys(("vectors_unfetched", "vectors_fetched", "vectors_sizes"), "of the whole broker"),
}
QUEUE, ENDING = keys.queue("m", "embed"), ledger.success("j", {})
RECORD = job_record(embed_request("m", ["a"], {}), "j")
CALLS: dict[str, Callable[[Any], object]] = {
    "submit": lambda redis: ledger.submit(redis, "j", RECORD),
    "claim": lambda redis: ledger.claim(redis, "j", QUEUE, "token", "tag", "w"),
    "complete": lambda redis: ledger.complete(redis, "j", QUEUE, "token", ENDING),
    "abandon": lambda redis: ledger.abandon(redis, "j", QUEUE, "token", ENDING),
    "cancel": lambda redis: ledger.cancel(redis, "j", QUEUE),
    "refuse": lambda redis: ledger.refuse(redis, "j", QUEUE, ENDING),
    "recover": lambda redis: ledger.recover(redis, QUEUE, 1.0),
    "release": lambda redis: ledger.release(redis, "j", QUEUE, "token"),
    "pass_on": lambda redis: ledger.pass_on(redis, "j", QUEUE, "token", "w"),
    "recall": lambda redis: ledger.recall(redis, "j", QUEUE, "w"),
    "dead_letter": lambda redis: ledger.dead_letter(redis, "j", QUEUE, "token"),
    "out_of_memory": lambda redis: ledger.count_out_of_memory(redis, "j", QUEUE, "token"),
    "keep_part": lambda redis: ledger.keep_part(redis, "j", QUEUE, "token", "a-1", b"a"),
    "keep_manifest": lambda redis: ledger.keep_manifest(redis, "j", QUEUE, "token", "{}", ()),
    "forget_letters": ledger.forget_letters,
    "allocate": lambda redis: ledger.allocate(redis, "m", "style", "j", 1),
    "pin": lambda redis: ledger.pin(redis, "j", 1),
    "keep_vectors": lambda redis: vectors.keep(redis, "j", b"a"),
    "fetch_vectors": lambda redis: vectors.fetch("j", 1.0).on(redis),
    "prune_vectors": vectors.prune,
    "discard": lambda redis: discarding.discard("j").on(redis),
}


class Named(Exception):
    """The keys of a script, which is not run."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names


class Recorder:
    functions = None

    def evalsha(self, sha: str, count: int, *rest: Any) -> None:
        raise Named(tuple(rest[:count]))


def named(script: str) -> dict[str, set[str]]:
    """Whose → the kinds of keys that the script names."""
    with pytest.raises(Named) as stopped:
        CALLS[script](Recorder())
    found: dict[str, set[str]] = {}
    for name in stopped.value.names:
        kind = keys.kind_of(name)
        # A channel is no key: every part of a broker knows all of them.
        if kind is not None:
            found.setdefault(WHOSE[kind.name], set()).add(kind.name)
    return found


def test_every_script_is_looked_at() -> None:
    assert set(CALLS) == set(Transitions.__dataclass_fields__)


def test_the_page_lists_the_keys_of_every_script_by_whose_they_are() -> None:
    columns = ["of its job", "of its job's queue", "of its model", "of the whole broker"]
    said = {
        name: {column: set(code(cell)) for column, cell in zip(columns, row[1:], strict=True) if code(cell)}
        for row in rows("docs/scale.md", "script")
        for name in code(row[0])
    }
    assert said == {script: named(script) for script in CALLS}


@pytest.mark.parametrize("script", list(CALLS))
def test_no_script_names_keys_of_two_queues_or_two_jobs(script: str) -> None:
    """Those of one queue may lie on one part of a broker, with the records of its jobs."""
    with pytest.raises(Named) as stopped:
        CALLS[script](Recorder())
    for name in stopped.value.names:
        kind = keys.kind_of(name)
        if kind is not None and WHOSE[kind.name] == "of its job's queue":
            assert QUEUE in name
        if kind is not None and WHOSE[kind.name] == "of its job" and script != "recover":
            assert name.endswith((":j", "-j"))
