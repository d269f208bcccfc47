"""The running batch by itself: rows that leave and come again while a pass is under way; the pace of prompts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import mlx.core as mx
import pytest

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation.batch import Batch
from engine.generation.prefill import LEAST, MOST, PrefillPacer
from engine.generation.prompt import TokenizedPrompt
from engine.generation.row import Generation, Row
from engine.generation.step import Step
from engine.models.key_values import KeyValues
from engine.ticket import Ticket
from stoker.contract import GenerateRequest


@pytest.fixture
def batch(model: LoadedModel, tmp_path: Path) -> Batch:
    return Batch(model.decoder, AdapterPool(model, AdapterStore(tmp_path)), Step(model.decoder, "none"))


def row_of(model: LoadedModel, token: int, max_tokens: int = 20) -> Row:
    request = GenerateRequest(model="tiny", prompt_ids=(token,), ignore_eos=True, max_tokens=max_tokens)
    row = Generation(Ticket("job", "generate"), request, TokenizedPrompt([token]), model.tokenizer, 64).rows[0]
    row.tokens.append(token + 1)
    row.adapter, row.cached = 0, 1
    return row


def seat(batch: Batch, model: LoadedModel, row: Row) -> None:
    source = KeyValues(model.decoder, 1, 8)
    source.keys = [mx.ones_like(array) for array in source.keys]
    batch.join(row, source, 0)


def test_a_pass_gives_nothing_to_a_row_that_left_and_came_again(batch: Batch, model: LoadedModel) -> None:
    """It was put back and prefilled anew: what the pass of its earlier stay chose is void."""
    stays, leaves = row_of(model, 3), row_of(model, 7)
    for row in (stays, leaves):
        seat(batch, model, row)
    assert batch.launch()
    pending = batch.in_flight
    assert pending is not None
    batch.leave(leaves)
    leaves.cached = 1
    seat(batch, model, leaves)
    assert [row for row, _ in batch.read(pending).rows] == [stays]
    stays.tokens.append(9)
    assert batch.launch()
    again = batch.in_flight
    assert again is not None
    assert [row for row, _ in batch.read(again).rows] == [stays, leaves]


def test_a_row_that_came_again_is_not_taken_for_one_whose_token_is_on_its_way(batch: Batch, model: LoadedModel) -> None:
    row = row_of(model, 3)
    seat(batch, model, row_of(model, 7))
    seat(batch, model, row)
    assert batch.launch()
    assert batch.ahead(batch.in_flight) == [1, 1]
    batch.leave(row)
    seat(batch, model, row)
    assert batch.ahead(batch.in_flight) == [1, 0]


def test_no_pass_is_launched_for_rows_that_end_with_the_one_under_way(batch: Batch, model: LoadedModel) -> None:
    row = row_of(model, 3, max_tokens=2)
    seat(batch, model, row)
    assert batch.launch()
    assert not batch.launch(), "the token that is on its way is its last"


def test_the_pace_grows_on_whole_chunks_that_were_fast_alone() -> None:
    pacer = PrefillPacer(128)
    pacer.note(128, 0.1, 1.0)
    assert pacer.tokens == 256
    for short in (1, 40, 179):  # the end of a prompt says nothing of how long a whole chunk takes
        pacer.note(short, 0.001, 1.0)
        assert pacer.tokens == 256
    pacer.note(180, 0.1, 1.0)
    assert pacer.tokens == 512


def test_the_pace_holds_where_a_chunk_takes_most_of_its_time_and_halves_beyond() -> None:
    pacer = PrefillPacer(256)
    pacer.note(256, 0.61, 1.0)
    assert pacer.tokens == 256
    pacer.note(10, 1.01, 1.0)
    assert pacer.tokens == 128
    for _ in range(20):
        pacer.note(pacer.tokens, 2.0 * pacer.tokens / LEAST, 1.0)
    assert pacer.tokens == LEAST
    for _ in range(20):
        pacer.note(pacer.tokens, 0.0, 1.0)
    assert pacer.tokens == MOST


def paces(seconds: Callable[[int], float], chunks: int = 200) -> list[int]:
    """The sizes of so many chunks of a long prompt that take `seconds(tokens)` each, where 5 ms are allowed."""
    pacer, found = PrefillPacer(128), []
    for _ in range(chunks):
        found.append(pacer.tokens)
        pacer.note(pacer.tokens, seconds(pacer.tokens), 0.005)
    return found


def test_the_pace_is_not_halved_where_a_shorter_chunk_takes_as_long() -> None:
    """On a GPU: the launches of a pass take 8 ms, and each token a microsecond or two."""
    found = paces(lambda tokens: 0.008 + 2e-6 * tokens)
    # Of four times as many as 256 the whole takes a fifth longer; twice as many again would take a fifth longer still.
    assert set(found[10:64]) == {1024}, found
    # What others take is tried again now and then.
    assert found.count(1024) > 0.8 * len(found)


def test_two_halves_that_save_little_each_are_not_worth_four_chunks() -> None:
    """On a GPU where a pass of few tokens takes a little less: a quarter of 128 takes four fifths of the time."""
    found = paces(lambda tokens: 0.008 if tokens <= 32 else 0.009 if tokens <= 64 else 0.010 + 1e-6 * tokens)
    assert found[:5] == [128, 64, 32, 128, 256], found
    assert sum(tokens >= 128 for tokens in found) > 0.9 * len(found)


def test_one_slow_chunk_among_others_of_its_size_does_not_count_for_all() -> None:
    def next_after(*chunks: tuple[int, float]) -> int:
        pacer = PrefillPacer(128)
        for tokens, seconds in chunks:
            pacer.tokens = tokens
            pacer.note(tokens, seconds, 0.005)
        return pacer.tokens

    assert next_after((32, 0.008), (64, 0.0092)) == 32
    assert next_after((32, 0.008), (64, 0.0083), (64, 0.0092)) == 128
    # And what was slow once is not for long.
    assert next_after((32, 0.05), (64, 0.01)) == 128
    assert next_after((32, 0.05), (32, 0.006), (64, 0.01)) == 32


def test_a_size_that_was_slow_by_chance_does_not_lead_to_four_times_as_many() -> None:
    pacer = PrefillPacer(128)
    pacer.note(128, 0.010, 0.005)
    pacer.tokens = 32
    pacer.note(32, 0.1, 0.005)
    assert pacer.tokens == 64


def test_the_end_of_a_prompt_that_takes_as_long_as_a_whole_chunk_halves_none() -> None:
    pacer, chunks = PrefillPacer(128), []
    for _ in range(20):
        left, count = 128, 0
        while left:
            tokens = min(left, pacer.tokens)
            pacer.note(tokens, 0.008, 0.005)
            left, count = left - tokens, count + 1
        chunks.append(count)
    assert chunks[5:] == [1] * 15, chunks


def test_the_pace_falls_to_the_least_where_a_shorter_chunk_is_too_long_and_saves_a_fifth() -> None:
    """On a CPU: the pass under way takes 25 ms, one over the weights as long as 48 tokens, each of them half a ms."""
    found = paces(lambda tokens: 0.025 + 0.0005 * (48 + tokens))
    assert found[:3] == [128, 64, LEAST]
    assert found.count(LEAST) > 0.9 * len(found)


def test_the_pace_of_a_moment_in_which_all_was_slow_is_left_again() -> None:
    """While all chunks take as long, many tokens go at once; what that taught is forgotten."""
    made = count()
    found = paces(lambda tokens: 0.05 if next(made) < 30 else 0.001 + 0.0001 * tokens)
    assert found[29] == MOST
    assert set(found[120:]) == {LEAST}, found


def test_a_few_slow_chunks_teach_nothing() -> None:
    slow = iter([0.0, 0.1, 0.0, 0.1] + [0.0] * 200)
    found = paces(lambda tokens: 0.001 + 0.0001 * tokens + next(slow))
    assert found[:3] == [4 * LEAST, 2 * LEAST, LEAST]
    assert set(found[3:]) == {LEAST}, found
