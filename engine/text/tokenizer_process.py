"""What tries a `tokenizer.json` for `engine.text.trial`: a bad one ends the process that reads it or uses it.

`engine.platform.child` loads it; it imports nothing of Stoker. The file is a program by another name: replacements may
make gigabytes of a letter, and a damaged table of characters is read beyond its end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

#: Parts of a normalizer, a pre-tokenizer or a decoder; real ones have up to ten.
MAX_PARTS = 64
#: Characters that replacements may make of one, one after another. Unicode's own forms make 18 of U+FDFA.
MAX_GROWTH = 256
#: Characters of a word that a WordPiece vocabulary looks up; the time grows with their third power. Real ones have 100.
MAX_WORD = 512
#: Tokens of a character (a byte each), and of none.
MAX_TOKENS, MAX_AROUND = 16, 64
#: Every character that Unicode has given out is in these planes.
_CHARACTERS = (range(0x20, 0xD800), range(0xE000, 0x32000), range(0xE0000, 0xE0200))
_AT_ONCE = 4
_TEXTS = (
    "", "a", "The quick brown fox didn't jump; it's 3.14159 km!\r\n\tdef f(x): return x ** 2  # \ufdfa e\u0301",
    "日本語 العربية हिन्दी 👩\u200d👩\u200d👧 " * 20, "a" * 5_000, "a" * 5_000 + "!", " " * 5_000 + "x", "\n" * 5_000,
    "0" * 5_000, "é!" * 2_500, "日" * 2_000, "👍🏽" * 1_000, "\u0301" * 2_000, "ab " * 2_000, "\x00\ufffd\u200b" * 500,
)  # fmt: skip


class Refused(Exception):
    """Why the file is not used."""


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    """{"refused": why, or nothing}."""
    try:
        tokenizer = Tokenizer.from_file(request["path"])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        check_parts(tokenizer)
        check_characters(tokenizer)
        check_texts(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the package's own panics are no Exception
        return {"refused": str(error)[:500] or type(error).__name__}
    return {"refused": ""}


def check_parts(tokenizer: Tokenizer) -> None:
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        parts = list(every(state(getattr(tokenizer, name))))
        if len(parts) > MAX_PARTS:
            raise Refused(f"its {name} has {len(parts)} parts; at most {MAX_PARTS} are allowed")
        growth = 1
        for part in parts:
            growth *= max(1, *(len(str(part.get(key, ""))) for key in ("content", "prepend", "replacement")))
        if growth > MAX_GROWTH:
            raise Refused(f"the replacements of its {name} make up to {growth} characters of one; {MAX_GROWTH} may be")
    longest = getattr(tokenizer.model, "max_input_chars_per_word", 0)
    if longest > MAX_WORD:
        raise Refused(f"max_input_chars_per_word is {longest}; at most {MAX_WORD} is allowed")
    if getattr(tokenizer.model, "dropout", None):
        raise Refused("dropout gives a text other tokens each time, which is for training; set it to null")


def state(part: Any) -> Any:
    """What a part of a tokenizer says of itself."""
    return None if part is None else json.loads(part.__getstate__())


def every(part: Any) -> Iterator[dict[str, Any]]:
    """A part and all within it."""
    if isinstance(part, dict):
        if "type" in part:
            yield part
        for value in part.values():
            yield from every(value)
    elif isinstance(part, list):
        for value in part:
            yield from every(value)


def check_characters(tokenizer: Tokenizer) -> None:
    """Every character by itself and next to others, where the file says what becomes of them."""
    normalizer = tokenizer.normalizer
    if not any(part["type"] in ("Precompiled", "Replace") for part in every(state(normalizer))):
        return
    for characters in _CHARACTERS:
        for start in range(characters.start, characters.stop, _AT_ONCE):
            made = normalizer.normalize_str("".join(map(chr, range(start, start + _AT_ONCE))))
            if len(made) > _AT_ONCE * MAX_GROWTH:
                raise Refused(f"its normalizer makes {len(made)} characters of U+{start:04X} and its neighbours")


def check_texts(tokenizer: Tokenizer) -> None:
    for text in _TEXTS:
        ids: Sequence[int] = tokenizer.encode(text).ids
        if len(ids) > MAX_TOKENS * len(text) + MAX_AROUND:
            raise Refused(f"it makes {len(ids)} tokens of {len(text)} characters")
        tokenizer.decode(ids[:1_000])
