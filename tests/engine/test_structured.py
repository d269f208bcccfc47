"""Structured output: whatever a model would rather say, the answer parses and fits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.loading import LoadedModel
from stoker.contract import GenerateRequest
from stoker.errors import InvalidRequest
from tests.engine.test_generate_lane import Driver

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["coal", "wood"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["kind", "count", "tags"],
    "additionalProperties": False,
}
CODE = r"[A-Z]{2}-[0-9]{3}"


@pytest.fixture
def driver(smollm2: LoadedModel, tmp_path: Path) -> Driver:
    return Driver(smollm2, AdapterPool(smollm2, AdapterStore(tmp_path)), slots=6)


def ask(**options: Any) -> GenerateRequest:
    fields: dict[str, Any] = {"model": "smollm2", "prompt": "The stoker wrote:", "max_tokens": 48, **options}
    return GenerateRequest(**fields)


def test_answers_fit_schema_and_expression_beside_free_ones(driver: Driver) -> None:
    hot: dict[str, Any] = {"temperature": 3.0}
    shaped = [driver.send(ask(json_schema=SCHEMA, seed=seed, n=2, **hot)) for seed in range(1)]
    coded = driver.send(ask(regex=CODE, seed=4, **hot))
    free = driver.send(ask(max_tokens=12))
    driver.run()
    for sent in shaped:
        for completion in sent.result.completions:
            assert completion.finish_reason in ("stop", "grammar")
            found = json.loads(completion.text)
            assert found.keys() == set(SCHEMA["required"])
            assert found["kind"] in ("coal", "wood")
            assert 0 <= found["count"] <= 99
            assert len(found["tags"]) <= 2
    assert re.fullmatch(CODE, coded.result.text)
    alone = driver.send(ask(max_tokens=12))
    driver.run()
    assert free.ids == alone.ids
    driver.assert_empty()


def test_the_grammar_goes_on_where_a_stream_was_broken_off(driver: Driver) -> None:
    request = ask(json_schema=SCHEMA, temperature=2.0, seed=8)
    whole = driver.send(request)
    driver.run()
    for split in (1, len(whole.tokens) - 2):
        again = driver.send(request, whole.tokens[:split])
        driver.run()
        assert again.result.text == whole.result.text
        assert [token.index for token in again.tokens] == list(range(split, len(whole.tokens)))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"json_schema": {"type": "furnace"}}, "json_schema: .*furnace"),
        ({"regex": "[a-"}, r"regex: \[a- given; "),
    ],
)
def test_a_grammar_that_cannot_be_is_refused_before_it_waits(driver: Driver, options: Any, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        driver.send(ask(**options))
