"""How a row's next token is drawn: by its own parameters, no matter what its neighbours ask for."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.checkpoints.loading import LoadedModel
from engine.generation import step as steps
from engine.generation.draws import Draw, penalised
from engine.generation.forward_input import ForwardInput
from engine.generation.prompt import TokenizedPrompt, check_ids
from engine.generation.row import Generation, Row
from engine.generation.sampling import sample
from engine.generation.sampling_batch import sampling_batch
from engine.generation.step import Step
from engine.models.buckets import bucket
from engine.models.key_values import KeyValues
from engine.models.llama import Llama
from engine.prefixes.memory import PrefixCache
from engine.ticket import Ticket
from stoker.contract import GenerateRequest, StreamToken
from stoker.errors import InvalidRequest

VOCABULARY = 300


def said(token: int) -> StreamToken:
    return StreamToken(index=0, token_id=token, text="", logit=0.0, logprob=0.0, probability=1.0, is_eos=False)


def request(**options: Any) -> GenerateRequest:
    return GenerateRequest(model="m", prompt="p", **options)


def drawing(uniform: float, **options: Any) -> Draw:
    return Draw(request(**options), uniform)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top-k 3": {"top_k": 3},
    "top-k 40": {"top_k": 40},
    "top-p 0.5": {"top_p": 0.5},
    "top-p 0.999": {"top_p": 0.999},
    "top-k 90, top-p 0.9": {"top_k": 90, "top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "more than the vocabulary": {"top_k": 400},
}


def test_a_row_draws_the_same_alone_and_next_to_rows_of_any_other_way() -> None:
    """What a row keeps must not hang on how many of the largest logits its neighbours need in order."""
    logits = np.random.default_rng(2).normal(0, 1, (len(WAYS), VOCABULARY)).astype(np.float32)
    for uniform in (0.3, 0.9999):
        draws = [drawing(uniform, **{"temperature": 1.0, **way}) for way in WAYS.values()]
        together = sample(mx.array(logits), draws)
        for row, draw in enumerate(draws):
            (alone,) = sample(mx.array(logits[row : row + 1]), [draw])
            assert together[row].token_id == alone.token_id, list(WAYS)[row]
            assert together[row].probability == pytest.approx(alone.probability, rel=1e-5), list(WAYS)[row]
            for other in range(len(draws)):
                pair = sample(mx.array(logits[[row, other]]), [draw, draws[other]])[0]
                assert pair.token_id == alone.token_id, (list(WAYS)[row], list(WAYS)[other])


@pytest.mark.parametrize("way", [{"top_p": 0.3}, {"top_k": 5}, {"top_k": 5, "top_p": 0.4}])
def test_what_is_kept_holds_the_mass_that_was_asked_for(way: dict[str, Any]) -> None:
    logits = np.random.default_rng(5).normal(0, 0.3, VOCABULARY).astype(np.float32)
    order = np.argsort(-logits)
    chances = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    kept = order[: way.get("top_k", VOCABULARY)]
    sums = np.cumsum(chances[kept]) / chances[kept].sum()
    kept = kept[: int(np.searchsorted(sums, way["top_p"])) + 1] if "top_p" in way else kept
    count = 20 if "top_k" in way else 600
    draws = [drawing(float(uniform), temperature=1.0, **way) for uniform in (np.arange(count) + 0.5) / count]
    picks = sample(mx.broadcast_to(mx.array(logits), (count, VOCABULARY)), draws)
    assert {pick.token_id for pick in picks} == set(kept.tolist())


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
    ],
)
def test_each_penalty_alone_makes_the_tokens_so_far_count(
    model: LoadedModel, options: dict[str, Any], counts: bool
) -> None:
    asked = GenerateRequest(model="m", prompt_ids=(5, 6), **options)
    assert penalised(asked) is counts
    row = Generation(Ticket("job", "generate"), asked, TokenizedPrompt([5, 6]), model.tokenizer, 100).rows[0]
    row.replay(said(9))
    assert row.draw().tally == ({5: 0, 6: 0, 9: 1} if counts else {})
    assert (sampling_batch([row.draw()], 61).penalties is not None) is counts


@pytest.mark.parametrize("uniform", [1.0 - 2.0**-53, 1.0 - 2.0**-25, 0.0])
def test_a_number_below_one_stays_below_one_in_32_bits(uniform: float) -> None:
    made = sampling_batch([drawing(uniform, temperature=1.0)], VOCABULARY).random
    assert made is not None
    assert 0.0 <= float(np.array(made.uniform)[0, 0]) < 1.0


def test_sizes_grow_by_a_third_or_a_half_and_what_fits_exactly_is_taken() -> None:
    assert [bucket(size) for size in range(1, 18)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24]
    assert (bucket(3, 256), bucket(257, 256), bucket(384, 256), bucket(385, 256), bucket(0)) == (256, 384, 384, 512, 1)
    for size in range(1, 5000):
        assert size <= bucket(size) <= max(size + 1, 1.5 * size)


@pytest.mark.parametrize("field", ["prompt_ids", "stop_token_ids", "logit_bias"])
def test_a_token_that_the_model_has_not_is_refused_wherever_it_stands(model: LoadedModel, field: str) -> None:
    vocabulary = model.decoder.args.vocab

    def asking(token: int) -> GenerateRequest:
        value: Any = {token: 1.0} if field == "logit_bias" else (token,)
        return GenerateRequest(model="tiny", **{"prompt_ids": (1,), field: value})

    check_ids(model, asking(vocabulary - 1))
    with pytest.raises(InvalidRequest, match=rf"{field}: token {vocabulary} given; tiny has 0 to {vocabulary - 1}"):
        check_ids(model, asking(vocabulary))


def test_what_is_kept_of_beginnings_never_passes_its_bytes(tiny_llama: Llama) -> None:
    """Of any sizes: the newest is counted before it is there."""
    sizes = [KeyValues(tiny_llama, 1, length) for length in (40, 90, 64, 33, 90)]
    limit = sizes[0].nbytes + sizes[1].nbytes
    cache = PrefixCache(limit)
    for number, kv in enumerate(sizes):
        cache.put("base", [number] * kv.capacity, kv)
        assert 0 < cache.nbytes <= limit
        assert cache.nbytes == sum(kept.nbytes for kept in cache.kept)


def test_a_pass_that_was_used_lately_stays_compiled(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "TRACES", {"decode": 2, "all": 2, "none": 0})
    made, kv = Step(model.decoder, "decode"), KeyValues(model.decoder, 3, 256)
    for length in (64, 128, 64, 192, 64):
        made(kv, ForwardInput(mx.array([[5]] * 3), mx.array([1, 1, 1]), length))
        mx.eval(kv.stored)
    assert made.traced == 3, "the one of 64 positions was never given up"


def test_nothing_behind_a_stop_string_is_shown(model: LoadedModel) -> None:
    rows = Generation(
        Ticket("job", "generate"), GenerateRequest(model="m", prompt_ids=(5,), stop=("t7",)), TokenizedPrompt([5]),
        model.tokenizer, 100,
    ).rows  # fmt: skip
    row: Row = rows[0]
    for token in (6, 7):
        row.replay(said(token))
    assert (row.finish_reason, row.stopped_by) == ("stop_string", "t7")
    assert "".join(row.texts) == "t6 "


def test_counts_of_a_job_are_those_of_all_its_completions(model: LoadedModel) -> None:
    asked = GenerateRequest(model="m", prompt_ids=(5,), n=3, max_tokens=2)
    made = Generation(Ticket("job", "generate"), asked, TokenizedPrompt([5], in_reasoning=True), model.tokenizer, 100)
    for row in made.rows:
        for token in (6, 7):
            row.replay(said(token))
    usage = made.result().usage
    assert (usage.completion_tokens, usage.reasoning_tokens) == (6, 6)
