"""Structured output: the answer parses and fits, even if the model prefers other tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation import structured
from engine.generation.structured import GrammarVocabulary
from engine.text.tokenizer import Tokenizer
from stoker.contract import GenerateRequest
from stoker.errors import InvalidRequest
from tests.engine.test_generate_lane import Driver

REQUIRED = ["kind", "count", "tags"]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["coal", "wood"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": REQUIRED,
    "additionalProperties": False,
}
CODE = r"[A-Z]{2}-[0-9]{3}"


@pytest.fixture
def driver(wordy: LoadedModel, tmp_path: Path) -> Driver:
    return Driver(wordy, AdapterPool(wordy, AdapterStore(tmp_path)), slots=6)


def ask(**options: Any) -> GenerateRequest:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "The stoker wrote:", "max_tokens": 48, **options}
    return GenerateRequest(**fields)


def test_answers_fit_schema_and_expression_among_free_ones(driver: Driver) -> None:
    hot: dict[str, Any] = {"temperature": 3.0}
    shaped = [driver.send(ask(json_schema=SCHEMA, seed=seed, n=2, **hot)) for seed in range(1)]
    coded = driver.send(ask(regex=CODE, seed=4, **hot))
    free = driver.send(ask(max_tokens=12))
    driver.run()
    for sent in shaped:
        for completion in sent.result.completions:
            assert completion.finish_reason in ("stop", "grammar")
            found = json.loads(completion.text)
            assert sorted(found) == sorted(REQUIRED)
            assert found["kind"] in ("coal", "wood")
            assert 0 <= found["count"] <= 99
            assert len(found["tags"]) <= 2
    assert re.fullmatch(CODE, coded.result.text)
    alone = driver.send(ask(max_tokens=12))
    driver.run()
    assert free.ids == alone.ids
    driver.assert_empty()


def test_a_grammar_that_another_rank_let_through_is_compiled_without_another_trial(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = GrammarVocabulary(smollm2.tokenizer)
    asked, trials = ask(json_schema=SCHEMA), list[str]()
    tried = vocabulary.grammar(asked)
    monkeypatch.setattr(structured, "try_to_compile", trials.append)
    passed = vocabulary.grammar(asked, passed=True)
    assert tried is not None
    assert passed is not None
    assert passed.mask().tolist() == tried.mask().tolist()
    assert not trials
    vocabulary.grammar(asked)
    assert len(trials) == 1


def test_the_grammar_goes_on_where_a_stream_was_broken_off(driver: Driver) -> None:
    request = ask(json_schema=SCHEMA, temperature=2.0, seed=8)
    whole = driver.send(request)
    driver.run()
    for split in (1, len(whole.tokens) - 2):
        again = driver.send(request, whole.tokens[:split])
        driver.run()
        assert again.result.text == whole.result.text
        assert [token.index for token in again.tokens] == list(range(split, len(whole.tokens)))


def chain(link: Any, length: int) -> dict[str, Any]:
    """A schema whose definitions refer to one another, each by `link`."""
    links = {f"d{index}": link({"$ref": f"#/$defs/d{index + 1}"}) for index in range(length)}
    return {"$defs": {**links, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "additionalProperties": False}
LEGAL: dict[str, dict[str, Any]] = {
    "recursion that may end": {"json_schema": {"$defs": {"n": NODE}, "$ref": "#/$defs/n"}},
    "400 optional fields": {
        "json_schema": {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(400)}}
    },
    "3000 values": {"json_schema": {"enum": [f"value {number}" for number in range(3000)]}},
    "long counts": {"regex": "a{10000}"},
    "states without end": {"regex": "(a|b)*a(a|b){300}"},
    "a very long string": {"json_schema": {"type": "string", "maxLength": 2**32 - 1}},
    "a very long array": {"json_schema": {"type": "array", "minItems": 10**7}},
}
#: What would take seconds, gigabytes, or the process, or cannot be.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"json_schema": {"type": "furnace"}}, "json_schema: .*furnace"),
    "open bracket": ({"regex": "[a-"}, r"regex: \[a- given; "),
    "huge count": ({"regex": "a{4294967295}"}, "given; the grammar takes too much: .*too many expressions"),
    "counts of counts": ({"regex": "((((a{100}){100}){100}){100})"}, "too many expressions"),
    "ambiguous counts": ({"regex": "(a?){500}a{500}"}, "too many expressions"),
    "count beyond order": ({"regex": "a{5,2}"}, "the start must be <= the end"),
    "a last backslash": ({"regex": "[a-z]\\"}, r"regex: \[a-z\]\\ given; "),
    "look-ahead": ({"regex": "a(?=b)"}, r"look-ahead.*is not supported in 'a\(\?=b\)'\.$"),
    "back-reference": ({"regex": r"(a)\1"}, "backreferences are not supported"),
    "deep parentheses": ({"regex": "(" * 8000 + "a" + ")" * 8000}, "regex: "),
    "nothing matches": ({"regex": r"a[^\x00-\U0010FFFF]"}, "no text fits"),
    "huge count in a pattern": ({"json_schema": {"type": "string", "pattern": "^a{4294967295}$"}}, "too many expr"),
    "large multiple": ({"json_schema": {"type": "integer", "multipleOf": 123_456_789}}, "more than 2 s of computing"),
    "10,000 fields": (
        {"json_schema": {"type": "object", "properties": {f"k{n}": {} for n in range(10_000)}}}, "to compile"
    ),
    "40,000 values": ({"json_schema": {"enum": [f"value {n}" for n in range(40_000)]}}, "too big"),
    "a chain of 10,000": ({"json_schema": chain(lambda to: {"allOf": [to]}, 10_000)}, "to compile"),
    "only itself": ({"json_schema": {"$ref": "#"}}, "no text fits"),
    "itself for ever": (
        {"json_schema": {"$defs": {"n": {**NODE, "required": ["next"]}}, "$ref": "#/$defs/n"}}, "Too many items"
    ),
    "itself and more": ({"json_schema": {"allOf": [{"$ref": "#"}, {"type": "object"}]}}, "circular references"),
    "elsewhere": ({"json_schema": {"$ref": "http://x/y"}}, "http://x/y"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_grammar_that_cannot_be_or_takes_too_much_is_refused_before_it_waits(driver: Driver, name: str) -> None:
    options, why = REFUSED[name]
    with pytest.raises(InvalidRequest, match=why):
        driver.send(ask(**options))
    driver.assert_empty()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"regex": "["}, "regex: [ given; unclosed character class in '['."),
        ({"regex": "a\nb("}, "regex: a\ufffdb( given; unclosed group."),
        ({"json_schema": {"pattern": "*"}}, """json_schema: {"pattern": "*"} given; repetition operator missing"""),
        ({"regex": "x" * 5000 + "["}, f"regex: {'x' * 97}… given; unclosed character class in 'xxx"),
        ({"regex": "a\\"}, "regex: a\\ given; 2(1): lexer error"),
    ],
)
def test_what_is_wrong_with_a_grammar_is_one_line(driver: Driver, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        driver.send(ask(**options))
    words = str(raised.value)
    assert words.startswith(said)
    assert len(words) < 400
    assert "\n" not in words


@pytest.mark.slow
def test_legal_grammars_are_taken_however_long_their_answers_may_get(driver: Driver) -> None:
    sent = {name: driver.send(ask(**options, temperature=2.0, max_tokens=8)) for name, options in LEGAL.items()}
    driver.run()
    for name, one in sent.items():
        assert one.result.finish_reason in ("length", "stop", "grammar"), name
    driver.assert_empty()


def test_a_grammar_that_passes_a_limit_in_the_middle_ends_its_own_request(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose trials all went well."""
    monkeypatch.setattr(structured, "TRIED", 0)
    free = driver.send(ask(max_tokens=12))
    driver.run()
    neighbour = driver.send(ask(max_tokens=12))
    bad = driver.send(ask(regex="a{4294967295}", n=2))
    driver.run()
    with pytest.raises(InvalidRequest, match=r"regex: the grammar takes too much: .*too many expressions"):
        bad.ticket.result(0)
    assert neighbour.ids == free.ids
    driver.assert_empty()


@pytest.mark.parametrize(
    ("regex", "answer"),
    [
        ("(?x)\n  coal   # or wood / peat\n  / [0-9]{0}\n", "coal/"),
        ("a\nb\\\nc\td", "a\nb\nc\td"),
        (r"C:\\[/]\/\\/", r"C:\//\/"),
    ],
    ids=["with a comment", "with ends of lines", "with slashes"],
)
def test_an_expression_is_read_as_it_was_written(driver: Driver, regex: str, answer: str) -> None:
    assert re.fullmatch(regex, answer)
    sent = driver.send(ask(regex=regex, temperature=3.0))
    driver.run()
    assert sent.result.text == answer


def test_of_several_end_tokens_each_ends_an_answer_in_a_grammar(smollm2: LoadedModel) -> None:
    ends = sorted({2, 0} | smollm2.tokenizer.eos_ids)
    tokenizer = Tokenizer(smollm2.tokenizer.inner, eos_ids=ends)
    grammar = GrammarVocabulary(tokenizer).grammar(ask(regex="a*"))
    assert grammar is not None
    bits = np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")
    assert [bool(bits[end]) for end in ends] == [True] * len(ends)
    letter = tokenizer.encode("a")[0]
    assert bits[letter]
    for end in ends:
        again = grammar.copy()
        again.accept(letter)
        again.accept(end)
        assert again.complete
