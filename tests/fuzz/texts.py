"""Training data, texts to embed, prompts and conversations: what people and their files bring."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.chaos.fleet import EMBED, GENERATE
from tests.fuzz import odd
from tests.fuzz.input import Input
from tests.fuzz.world import World, as_json

LINES: tuple[dict[str, Any], ...] = (
    {"text": "ab ab"},
    {"prompt": "ab", "completion": " ab"},
    {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ab"}]},
)
ENDS = (b"\n", b"\r\n", b"\r", b"\n\n", b"\x0b", b"\xe2\x80\xa8", b"\x00", b"")
TRAIN: dict[str, Any] = {"model": GENERATE, "steps": 1, "rank": 2, "max_length": 24, "batch_size": 2, "promote": False}


def draw(chance: random.Random, number: int) -> Input:
    return chance.choices((_file, _rows, _embedded, _prompt), (3, 2, 4, 3))[0](chance, number)


def _file(chance: random.Random, number: int) -> Input:
    """A dataset as a file."""
    data = b"".join(_line(chance) + chance.choice(ENDS) for _ in range(chance.randrange(6)))
    data = chance.choice((b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe")) + data

    def act(world: World) -> list[str]:
        path = world.own_folder(number) / "lines.jsonl"
        path.write_bytes(data)
        return world.judged(lambda: world.client.train(f"f{number}", path, **TRAIN))

    return Input(f"training lines: {odd.shown(data)}", act)


def _line(chance: random.Random) -> bytes:
    line = chance.choice(LINES)
    act = chance.randrange(6)
    if act == 0:
        return as_json(odd.spoiled(chance, line))
    if act == 1:
        return odd.spoiled_bytes(chance, json.dumps(line).encode())
    return json.dumps({"text": _text(chance)} if act == 2 else line).encode()


def _rows(chance: random.Random, number: int) -> Input:
    """A dataset as objects."""
    rows: Any = odd.spoiled(chance, [dict(line) for line in LINES], odd.value)
    return Input(
        f"training rows: {odd.shown(rows)}",
        lambda world: world.judged(lambda: world.client.train(f"f{number}", rows, **TRAIN)),
    )


def _embedded(chance: random.Random, number: int) -> Input:
    texts = [_text(chance) for _ in range(chance.randint(1, 6))]
    options: Any = {"truncation": chance.choice(("error", "end")), "dtype": chance.choice(("float32", "int8"))}
    if chance.random() < 0.3:
        options["prompt"] = _text(chance)
    return Input(
        f"texts to embed: {odd.shown(texts)}, {odd.shown(options)}",
        lambda world: world.judged(lambda: world.client.embed(texts, model=EMBED, **options)),
    )


def _prompt(chance: random.Random, number: int) -> Input:
    """A text, ids, or a conversation."""
    given: Any = chance.choice(
        (
            _text(chance),
            [chance.choice((0, 1, 5, 40, 10**6, -1, 2**31)) for _ in range(chance.randrange(5))],
            [{"role": chance.choice(("user", "tool", "system", "x y")), "content": _text(chance)} for _ in range(3)],
        )
    )
    options: Any = {"max_tokens": 5, "stop": [_text(chance)[:200]] if chance.random() < 0.3 else []}
    return Input(
        f"a prompt: {odd.shown(given)}, {odd.shown(options)}",
        lambda world: world.judged(lambda: world.client.generate(given, model=GENERATE, **options)),
    )


def _text(chance: random.Random) -> str:
    if chance.random() < 0.4:
        return chance.choice(odd.TEXTS)
    parts = [chance.choice((chr(chance.randrange(0x110000)), "ab ", "a", " ", "\n", "<s>", "́", "‍")) for _ in range(20)]
    return "".join(parts) * chance.choice((1, 1, 1, 30, 3000))
