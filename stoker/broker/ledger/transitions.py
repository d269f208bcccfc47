"""Every transition of the ledger: its text, the parts that stand before it, and the library of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stoker.broker.ledger.script import Body, Library, LuaScript, text

#: What the transitions share, in the order in which each part needs the ones before.
_PARTS = ("common", "names", "record", "prelude", "sizes", "ending", "vectors", "owned")
#: Each part costs, because a broker makes the functions of a script anew at every call.
_NAMES, _KEPT = ("common", "names"), ("common", "vectors")
_WAITING, _ENDING = (*_NAMES, "record", "prelude", "sizes"), (*_NAMES, "record", "sizes", "ending")
_BOTH, _OWNED = (*_WAITING, "ending"), (*_NAMES, "record", "sizes", "owned")


@dataclass(frozen=True)
class Transitions:
    submit: LuaScript
    claim: LuaScript
    complete: LuaScript
    abandon: LuaScript
    cancel: LuaScript
    refuse: LuaScript
    recover: LuaScript
    pass_on: LuaScript
    recall: LuaScript
    # What moves no job needs no more than the names.
    release: LuaScript
    dead_letter: LuaScript
    out_of_memory: LuaScript
    # They look at their owner, and count bytes.
    keep_part: LuaScript
    keep_manifest: LuaScript
    forget_letters: LuaScript
    # These know nothing of queues.
    allocate: LuaScript
    pin: LuaScript
    keep_vectors: LuaScript
    fetch_vectors: LuaScript
    prune_vectors: LuaScript
    discard: LuaScript


#: Each transition with the parts before it. Those of `_MAKE_ROOM` leave a broker with less to keep.
_BEHIND = {
    "submit": (*_WAITING, "vectors"),
    "claim": _BOTH,
    "complete": _ENDING,
    "abandon": _ENDING,
    "cancel": _BOTH,
    "refuse": _BOTH,
    "recover": _WAITING,
    "pass_on": _WAITING,
    "recall": _NAMES,
    "release": _NAMES,
    "dead_letter": _NAMES,
    "out_of_memory": _NAMES,
    "keep_part": _OWNED,
    "keep_manifest": _OWNED,
    "forget_letters": _NAMES,
    "allocate": (),
    "pin": (),
    "keep_vectors": _KEPT,
    "fetch_vectors": _KEPT,
    "prune_vectors": _KEPT,
    "discard": _KEPT,
}
_MAKE_ROOM = (
    "complete",
    "abandon",
    "cancel",
    "refuse",
    "recover",
    "pass_on",
    "recall",
    "release",
    "dead_letter",
    "forget_letters",
    "fetch_vectors",
    "prune_vectors",
    "discard",
)


def made(edit: Callable[[str], str] = str) -> tuple[Library, Transitions]:
    """`edit`: what a test changes in their text, the library's and the scripts'."""
    bodies = {name: Body(text(name), parts, name in _MAKE_ROOM) for name, parts in _BEHIND.items()}
    library = Library([edit(text(part)) for part in _PARTS], bodies)
    scripts = {name: LuaScript(edit(body.script()), library, name) for name, body in bodies.items()}
    return library, Transitions(**scripts)


LIBRARY, TRANSITIONS = made()
