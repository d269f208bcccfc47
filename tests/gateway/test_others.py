"""`/v1/completions`, `/v1/embeddings` and `/v1/models`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import openai
import pytest

from stoker.contract import Usage
from stoker.gateway.embeddings import Embedding, EmbeddingBody
from stoker.testing import AsyncFakeClient
from tests.gateway.conftest import CHAT, EMBED
from tests.gateway.machinery import turns_during


def test_a_prompt_is_continued_as_it_is(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate("It was a dark night.", times=None)
    made = api.completions.create(model=CHAT, prompt=["Begin:"], logprobs=2, max_tokens=4, n=2)
    assert [choice.text for choice in made.choices] == ["It was a dark"] * 2
    assert [choice.finish_reason for choice in made.choices] == ["length"] * 2
    assert made.choices[0].logprobs is not None
    assert made.choices[0].logprobs.text_offset == [0, 2, 6, 8]
    assert made.choices[0].logprobs.tokens == ["It", " was", " a", " dark"]
    sent = fake.sent.generate[0]
    assert (sent.prompt, sent.messages, sent.top_logprobs) == ("Begin:", None, 2)
    with api.completions.create(model=CHAT, prompt=[1, 2], stream=True, logprobs=0) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "It was a dark night."
    assert [chunk.choices[0].logprobs.text_offset for chunk in chunks if chunk.choices[0].logprobs] == [
        [0], [2], [6], [8], [13],
    ]  # fmt: skip
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (fake.sent.generate[1].prompt_ids, fake.sent.generate[1].max_tokens) == ((1, 2), 16)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"), ({"prompt": " "}, "prompt"), ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": {}}, "prompt"), ({"prompt": [-1]}, "prompt.0"), ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"), ({"logprobs": 21}, "logprobs"), ({"max_tokens": 0}, "max_tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_continued_is_refused_by_name(api: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(**{"model": CHAT, "prompt": "a", **fields})
    assert caught.value.param == param


def test_vectors_come_as_numbers_and_as_bytes_and_leave_the_broker(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    floats = api.embeddings.create(model=EMBED, input=["a", "b"], dimensions=4, encoding_format="float", user="team")
    # OpenAI's package asks for base64 by itself, and decodes it.
    again = api.embeddings.create(model=EMBED, input="a", dimensions=4)
    assert np.allclose(floats.data[0].embedding, again.data[0].embedding)
    assert [item.index for item in floats.data] == [0, 1]
    assert len(floats.data[1].embedding) == 4
    assert floats.data[0].embedding != floats.data[1].embedding
    assert [job.client for job in fake.sent.jobs] == ["team", "default"]
    assert not fake._memory._blobs  # noqa: SLF001  no public word says what is kept


class Embedded:
    """A job whose vectors are there."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors

    async def result(self, timeout: float | None) -> np.ndarray:
        return self._vectors

    async def usage(self, timeout: float | None) -> Usage:
        return Usage(prompt_tokens=7, completion_tokens=0)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_streams_go_on_between_the_vectors_of_a_large_answer(form: Any) -> None:
    """Written at one go, thousands of vectors hold up each stream of the gateway for seconds."""
    vectors = np.arange(600, dtype=np.float32).reshape(200, 3)
    body = EmbeddingBody(input=["a"], model=EMBED, encoding_format=form)
    unused: Any = None
    job: Any = Embedded(vectors)
    made = Embedding(unused, EMBED, body, body.options()).made(job, None)
    (answer, tokens), turns = asyncio.run(turns_during(made))
    assert turns >= len(vectors)
    said = json.loads(answer)
    assert [row["index"] for row in said["data"]] == list(range(200))
    if form == "float":
        assert said["data"][1] == {"object": "embedding", "index": 1, "embedding": [3.0, 4.0, 5.0]}
    del said["data"]
    assert said == {"object": "list", "model": EMBED, "usage": {"prompt_tokens": 7, "total_tokens": tokens}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"), ({"input": [1, 2]}, "input"), ({"input": ["a", ""]}, "input.1"),
        ({"input": {}}, "input"), ({"dimensions": 0}, "dimensions"), ({"encoding_format": "hex"}, "encoding_format"),
        ({"truncation": "start"}, "truncation"), ({"stream": True}, "stream"),
    ],
)  # fmt: skip
def test_what_cannot_be_embedded_is_refused_by_name(api: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    body = {"model": EMBED, "input": "a", **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        api.post("/embeddings", body=body, cast_to=object)
    assert caught.value.param == param


def test_models_are_those_that_are_warm_and_their_adapters(api: openai.OpenAI) -> None:
    names = [EMBED, CHAT, f"{CHAT}:house-style", f"{CHAT}:house-style@1"]
    assert [model.id for model in api.models.list()] == names
    assert [api.models.retrieve(name).id for name in names] == names
    with pytest.raises(openai.NotFoundError, match="no model of that name"):
        api.models.retrieve("other")


@pytest.mark.parametrize("name", ["other", f"{CHAT}:", f"{CHAT}:other", f"{CHAT}:house-style@9", EMBED, "a/b", ""])
def test_a_model_that_there_is_not_is_not_found(api: openai.OpenAI, fake: AsyncFakeClient, name: str) -> None:
    fake.script.generate("Yes.")
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)) as caught:
        api.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hello"}])
    assert caught.value.param == "model"
    assert caught.value.code in ("model_not_found", "invalid_value")


def test_embeddings_have_no_adapters(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no adapters"):
        api.embeddings.create(model=f"{EMBED}:house-style", input="a")
