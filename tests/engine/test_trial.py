"""A tokenizer.json that would end the process that reads or uses it is refused, and what a text provokes is its own."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from engine.text import trial
from engine.text.tokenizer import Tokenizer
from engine.text.trial import Trials, read_tokenizer
from stoker.errors import InvalidRequest, ModelError

WORDS = json.loads((Path(__file__).parents[1] / "goldens" / "text" / "folders.json").read_text())["bases"]["words"]


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def charsmap(table: bytes) -> dict[str, Any]:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}}


def template(pieces: int) -> dict[str, Any]:
    text = {"Sequence": {"id": "A", "type_id": 0}}
    both = [text, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": [text] * pieces, "pair": both, "special_tokens": {}}


def split(pattern: str) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (sequence(*[replace("a", "a" * 1000)] * 4), "make up to 1000000000000 characters of one"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 1000}}, "make up to 1000 characters of one"),
        (sequence(*[{"type": "Lowercase"}] * 100), "normalizer has 101 parts; at most 64"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(?=a)|"}, "content": "aa"}}, None),
        ({"decoder": {**replace("a", "b" * 1000)}}, "replacements of its decoder"),
        ({"post_processor": template(100_000)}, "makes 100000 tokens of 1 characters"),
        (charsmap(b""), "precompiled_charsmap"),
        (charsmap((8).to_bytes(4, "little") + b"\xff" * 8 + b"x" * 40), "index out of bounds"),
        (charsmap(b"\xff\xff\xff\x7f" + b"x" * 40), "tokenizer.json: "),
        (charsmap(b"\xff\xff\xff\xff" + b"x" * 40), "tokenizer.json: "),
        (split("(a+)+$"), "retry-limit-in-match over"),
        (split("(("), "unmatched parenthesis"),
        ({"model": {**WORDS["model"], "max_input_chars_per_word": 10**9}}, "max_input_chars_per_word is 1000000000"),
        ({"model": {**WORDS["model"], "vocab": 3}}, "tokenizer.json: "),
    ],
)
def test_what_would_end_the_process_is_refused_by_its_file(
    tmp_path: Path, changes: dict[str, Any], why: str | None
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**WORDS, **changes}))
    if why is None:
        assert read_tokenizer(path).encode("a").ids
        return
    with pytest.raises(ModelError, match=why) as caught:
        read_tokenizer(path)
    assert str(path) in str(caught.value)


def test_what_was_tried_is_not_tried_again_under_any_name_and_what_was_refused_is() -> None:
    asked, answers = list[str](), {"right.json": "", "wrong.json": "no"}

    def answer(request: dict[str, str], seconds: float) -> dict[str, str]:
        asked.append(request["path"])
        return {"refused": answers[request["path"]]}

    process: Any = SimpleNamespace(ask=answer)
    trials = Trials(process)
    for _ in range(2):
        assert trials.refusal(Path("right.json"), b"right") == ""
        assert trials.refusal(Path("wrong.json"), b"wrong") == "no"
    assert trials.refusal(Path("again.json"), b"right") == ""
    assert asked == ["right.json", "wrong.json", "wrong.json"]


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    deep = '{"type":"Sequence","normalizers":[' * 50_000 + '{"type":"Lowercase"}' + "]}" * 50_000
    path.write_text(json.dumps({**WORDS, "normalizer": "DEEP"}).replace('"DEEP"', deep))
    with pytest.raises(ModelError, match="recursion limit"):
        read_tokenizer(path)


def test_a_trial_without_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a vocabulary that takes many times as long as it may: the system counts in steps of milliseconds."""
    path = tmp_path / "tokenizer.json"
    model = {**WORDS["model"], "vocab": {**WORDS["model"]["vocab"], **{f"word {n}": 1000 + n for n in range(100_000)}}}
    path.write_text(json.dumps({**WORDS, "model": model}))
    monkeypatch.setattr(trial, "SECONDS", 0.001)
    with pytest.raises(ModelError, match=r"takes more than 0\.001 s or 4 GB"):
        read_tokenizer(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "tokenizer.json")
    with pytest.raises(ModelError, match=r"neither a file nor a link to one"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_a_file_beyond_all_bounds_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(WORDS))
    monkeypatch.setattr(trial, "MAX_BYTES", 10)
    with pytest.raises(ModelError, match="more than 10 bytes"):
        read_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "call",
    [
        lambda tokenizer, text: tokenizer.encode(text),
        lambda tokenizer, text: tokenizer.encode_batch(["x", text]),
        lambda tokenizer, text: tokenizer.encode_cut(text, 9),
        lambda tokenizer, text: tokenizer.encode_spans(text, special=True),
    ],
)
def test_what_the_package_gives_up_on_is_an_error_of_the_text(call: Callable[[Tokenizer, str], object]) -> None:
    """As a worker would meet it, had the trial not found it: a panic is no `Exception`, and would end the thread."""
    inner = tokenizers.Tokenizer(models.WordLevel({"x": 0, "?": 1}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(b+)+$"), "isolated")
    tokenizer = Tokenizer(inner)
    assert tokenizer.encode("x") == [0]
    with pytest.raises(InvalidRequest, match="the model's tokenizer fails on the text: Onig"):
        call(tokenizer, "b" * 3000 + "!")
    assert tokenizer.encode("x") == [0]


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(KeyboardInterrupt), trial.no_panic():
        raise KeyboardInterrupt
