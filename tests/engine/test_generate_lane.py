"""Continuous batching: in every batch, a request's tokens are those that it would get alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from engine.adapters.lora import LoraWeights
from engine.adapters.peft import CONFIG_FILE
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel, load
from engine.generation import lane as lane_module
from engine.generation.beyond import BeyondMemory
from engine.generation.lane import GenerateLane
from engine.generation.limits import LaneLimits
from engine.generation.prompt import TokenizedPrompt
from engine.generation.row import Generation
from engine.generation.structured import Grammar
from engine.models.llama import Llama
from engine.prefixes.shelf import Shelf
from engine.text.tokenizer import Manners, Tokenizer
from engine.ticket import Ticket
from engine.warm import WarmModels
from stoker.contract import ChatMessage, GenerateRequest, GenerateResult, StreamToken
from stoker.errors import (
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    ModelError,
    StokerError,
    TextTooLong,
    UnknownAdapter,
    WorkerUnavailable,
)
from tests.engine import tiny
from tests.engine.oracle import Oracle
from tests.thorough import quick

SLOTS = 3
#: Tokens of a prompt that a stream waits for at most, as the tests set it.
CHUNK = 64


@pytest.fixture
def model(tiny_llama: Llama) -> LoadedModel:
    """Without an end token: how long an answer gets must not hang on random weights."""
    return tiny.loaded(tiny_llama, eos_ids=[])


@dataclass
class Sent:
    ticket: Ticket[Any]
    tokens: list[StreamToken] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def result(self) -> GenerateResult:
        found = self.ticket.result(0)
        assert isinstance(found, GenerateResult)
        return found


class Driver:
    """Runs a lane as the engine does, and keeps what each job gets."""

    def __init__(
        self, model: LoadedModel, pool: AdapterPool, slots: int = SLOTS, shelf: Shelf | None = None, **limits: Any
    ) -> None:
        self.lane = GenerateLane(
            model, pool, LaneLimits(**{"slots": slots, "compiled": "none", "lookup": False, **limits}), shelf
        )
        self._pool = pool
        self.sent: dict[str, Sent] = {}
        self.lookahead = True
        #: Of the pass that was read last.
        self.rows = 0

    def send(self, request: GenerateRequest, published: list[StreamToken] | None = None) -> Sent:
        ticket: Ticket[Any] = Ticket(f"job-{len(self.sent)}", "generate")
        self.lane.admit(self.lane.prepare(ticket, request, published))
        self.sent[ticket.job_id] = Sent(ticket)
        return self.sent[ticket.job_id]

    def step(self) -> None:
        self.lane.drop_stopped()
        if not self.lane.busy:
            return
        output = self.lane.run(lookahead=self.lookahead)
        self.rows = output.rows
        for ticket, entry in output.entries:
            assert isinstance(entry, StreamToken)
            self.sent[ticket.job_id].tokens.append(entry)
        for ticket, value in output.ended:
            ticket.resolve(value)

    def run(self) -> None:
        for _ in range(5000):
            if not self.lane.busy:
                return
            self.step()
        raise AssertionError("the lane does not come to an end")

    def assert_empty(self) -> None:
        """Every place was given back: in the cache, and in the adapters' use."""
        assert not self.lane.busy
        assert not self.lane.held
        assert self._pool.in_use == 0
        assert self.lane.batch.in_flight is None


def apart(driver: Driver) -> Driver:
    """Its prompts have passes of their own, as those of a model that runs through mlx-lm's file."""
    driver.lane.step.mixes = False
    return driver


def request(prompt: list[int], **options: Any) -> GenerateRequest:
    return GenerateRequest(**{"model": "tiny", "prompt": tiny.text(prompt), "max_tokens": 12, **options})


def long(number: int) -> list[int]:
    """A prompt that an answer of a few tokens brings to where its row needs more memory."""
    return [3 + number, 4] * 121


def random_options(random: np.random.Generator, number: int) -> dict[str, Any]:
    """Any sampler, any adapter, some stops."""
    options: dict[str, Any] = {"adapter": [None, "one", "two"][random.integers(3)]}
    if random.random() < 0.6:
        options |= {"temperature": 0.9, "top_k": int(random.choice([0, 8])), "seed": number}
        options |= {"top_p": float(random.choice([0.9, 1.0])), "min_p": float(random.choice([0.0, 0.05]))}
    if random.random() < 0.4:
        options |= {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    if random.random() < 0.2:
        options["logit_bias"] = {7: 3.0, 9: -100.0}
    if random.random() < 0.2:
        options["stop"] = ["t4", "5 t1"]
    if random.random() < 0.2:
        options["n"] = 2
    return options


def random_requests(seed: int, count: int) -> list[GenerateRequest]:
    random = np.random.default_rng(seed)
    shared = random.integers(3, 61, 40).tolist()
    found = []
    for number in range(count):
        length = int(random.choice([1, 5, 40, CHUNK, 2 * CHUNK + 30]))
        prompt = random.integers(3, 61, length).tolist()
        if random.random() < 0.4:
            prompt = shared + prompt
        found.append(request(prompt, max_tokens=int(random.integers(1, 16)), **random_options(random, number)))
    return found


CHECKPOINTS = Path(__file__).parents[1] / "goldens" / "architectures"

#: What a lane may be given: memory for all or for few, chunks of any length.
MODES: list[dict[str, Any]] = [{}, {"kv_bytes": 700_000}, {"stall": 1e-9, "slots": 5}]


#: Each mode meets each order of priorities twice in `make test`, and four times in `make test-slow`.
SEEDS = quick(*range(14), of=range(50))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_request_gets_the_same_tokens_alone_and_in_any_traffic(
    ending: LoadedModel, pool: AdapterPool, seed: int
) -> None:
    """Requests arrive and are cancelled at random moments; more of them than there are slots, and some end early. Each
    gets what it gets alone, and what an oracle that shares no code of the lane says."""
    check_traffic(ending, pool, seed, **MODES[seed % 3])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(12))
def test_the_same_holds_for_compiled_passes(ending: LoadedModel, pool: AdapterPool, seed: int) -> None:
    """As on a GPU: everything padded to buckets, prompts in groups. The CPU back-end runs g++ for long."""
    check_traffic(ending, pool, seed, compiled=["all", "decode"][seed % 2], **MODES[seed % 3])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("seed", quick(*range(3), of=range(12)))
def test_a_trace_serves_every_pass_that_has_its_key(ending: LoadedModel, pool: AdapterPool, seed: int) -> None:
    """The quick form: padded to buckets, prompts in groups, and a pass that finds a trace gets what that one keeps."""
    check_traffic(ending, pool, seed, compiled=["all", "decode"][seed % 2], **MODES[seed % 3])


def check_traffic(
    model: LoadedModel, pool: AdapterPool, seed: int, held: dict[str, LoraWeights] | None = None, **limits: Any
) -> None:
    """`held`: the adapters "one" and "two" of the pool, where they are not `tiny.adapters(model)`. Half the seeds have
    requests of several priorities: rows rest, change places and make way."""
    requests = random_requests(seed, 4)
    if seed % 4 in (1, 2):
        priorities = np.random.default_rng(seed).choice([2, 5, 9], len(requests)).tolist()
        requests = [one.model_copy(update={"priority": at}) for one, at in zip(requests, priorities, strict=True)]
    alone = []
    for one in requests:
        driver = Driver(model, pool, slots=1)
        alone.append(driver.send(one))
        driver.run()

    random, driver, cancelled = np.random.default_rng(seed), Driver(model, pool, **limits), set()
    waiting = list(enumerate(requests))
    sent: dict[int, Sent] = {}
    while waiting or driver.lane.busy:
        driver.lookahead = random.random() < 0.8
        while waiting and random.random() < 0.4:
            number, one = waiting.pop(0)
            sent[number] = driver.send(one)
        if sent and random.random() < 0.05:
            victim = int(random.choice(list(sent)))
            if not sent[victim].ticket.done:
                sent[victim].ticket.cancel()
                cancelled.add(victim)
        driver.step()
    driver.assert_empty()

    oracle = Oracle(model, held or tiny.adapters(model))
    for number, wanted in enumerate(alone):
        found = sent[number]
        for completion in range(requests[number].n):
            tokens = [token for token in found.tokens if token.completion == completion]
            oracle.check(requests[number], completion, tokens)
        if number in cancelled:
            assert_same(found, wanted, partial=True)
            with pytest.raises(JobCancelled):
                found.ticket.result(0)
        else:
            assert_same(found, wanted)
            assert [token.index for token in found.tokens] == list(range(len(found.tokens)))
            ours, theirs = found.result.model_dump(), wanted.result.model_dump()
            assert {**ours, "usage": None} == {**theirs, "usage": None}
            for answer in found.result.completions:
                oracle.check_result(requests[number], answer)
    assert len(cancelled) < len(requests)


def assert_same(found: Sent, wanted: Sent, *, partial: bool = False) -> None:
    for completion in range(2):
        ours, theirs = ([t for t in sent.tokens if t.completion == completion] for sent in (found, wanted))
        if partial:
            theirs = theirs[: len(ours)]
        assert [token.token_id for token in ours] == [token.token_id for token in theirs]
        assert np.allclose([t.logprob for t in ours], [t.logprob for t in theirs], atol=1e-4)


def test_greedy_tokens_are_those_of_the_whole_forward_pass(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    prompt = [3, 1, 4, 1, 5]
    sent = driver.send(request(prompt, max_tokens=20))
    driver.run()
    tokens = list(prompt)
    for token in sent.tokens:
        logits = np.array(model.decoder.logits(model.decoder(mx.array([tokens])))[0, -1])
        assert token.token_id == int(logits.argmax())
        assert token.logit == pytest.approx(float(logits.max()), abs=1e-4)
        tokens.append(token.token_id)


def test_a_request_ends_at_its_length_and_says_so(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    sent = driver.send(request([3, 1, 4], max_tokens=1))
    driver.run()
    (token,) = sent.tokens
    assert (token.index, token.finish_reason, token.is_eos) == (0, "length", False)
    assert sent.result.finish_reason == "length"
    assert sent.result.text == tiny.text(sent.ids)
    assert (sent.result.usage.prompt_tokens, sent.result.usage.completion_tokens) == (3, 1)


def test_a_request_ends_at_an_end_token_which_has_no_text(tiny_llama: Llama, tmp_path: Path) -> None:
    free = tiny.loaded(tiny_llama, eos_ids=[])
    driver = Driver(free, AdapterPool(free, AdapterStore(tmp_path)))
    unended = driver.send(request([3, 1, 4], max_tokens=8))
    driver.run()
    end = unended.ids[3]
    first = unended.ids.index(end)
    model = tiny.loaded(tiny_llama, eos_ids=[end])
    driver = Driver(model, AdapterPool(model, AdapterStore(tmp_path)))
    sent = driver.send(request([3, 1, 4], max_tokens=8))
    driver.run()
    assert sent.ids == unended.ids[: first + 1]
    assert (sent.tokens[-1].is_eos, sent.tokens[-1].finish_reason, sent.tokens[-1].text) == (True, "stop", "")
    assert sent.result.text == tiny.text(unended.ids[:first])
    driver.assert_empty()


def test_more_requests_than_slots_wait_in_order_of_arrival(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool, slots=1)
    sent = [driver.send(request([3, place], max_tokens=2)) for place in range(4)]
    ended: list[int] = []
    while driver.lane.busy:
        driver.step()
        assert len(driver.lane.batch.rows) <= 1
        ended += [place for place, one in enumerate(sent) if one.ticket.done and place not in ended]
    assert ended == [0, 1, 2, 3]
    driver.assert_empty()


def test_a_long_prompt_does_not_hold_up_running_streams(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool, stall=1e-9)
    short = driver.send(request([3, 1], max_tokens=20))
    while len(short.tokens) < 2:
        driver.step()
    long = driver.send(request([3] * 900, max_tokens=2))
    for _ in range(3):
        before = len(short.tokens)
        driver.step()
        assert len(short.tokens) == before + 1
        assert not long.tokens
    driver.run()
    assert len(long.tokens) == 2


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_stopped_request_ends_wherever_it_is_and_frees_its_place(
    model: LoadedModel, pool: AdapterPool, steps: int
) -> None:
    driver = Driver(model, pool, slots=1)
    running = driver.send(request([3] * (CHUNK + 1), max_tokens=500, adapter="one"))
    waiting = driver.send(request([4], max_tokens=500))
    for _ in range(steps):
        driver.step()
    running.ticket.cancel()
    waiting.ticket.cancel(WorkerUnavailable("the worker is stopping"))
    driver.step()
    with pytest.raises(JobCancelled):
        running.ticket.result(0)
    with pytest.raises(WorkerUnavailable):
        waiting.ticket.result(0)
    driver.assert_empty()


def test_an_answer_ends_where_the_context_does(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    fits = driver.send(request([3] * 1000, max_tokens=24))
    cut = driver.send(request([3] * 1020, max_tokens=24))
    driver.run()
    assert (len(fits.tokens), fits.result.finish_reason) == (24, "length")
    assert (len(cut.tokens), cut.result.finish_reason) == (4, "context")
    with pytest.raises(TextTooLong, match="1024 tokens given; tiny takes 1024 together with the answer"):
        driver.send(request([3] * 1024))


def test_an_answer_ends_where_the_memory_of_its_worker_does(model: LoadedModel, pool: AdapterPool) -> None:
    """A row that is alone could take more, and nobody could make way for it."""
    driver = Driver(model, pool, kv_bytes=700_000)
    most = driver.lane.budget.most_tokens
    assert 30 < most < 1000
    cut = driver.send(request([3] * (most - 4), max_tokens=24))
    driver.run()
    assert (len(cut.tokens), cut.result.finish_reason) == (4, "context")


def test_an_answer_that_ended_on_a_worker_with_less_memory_is_not_gone_on_with(
    model: LoadedModel, pool: AdapterPool
) -> None:
    """That one died between the last token and the result. Its other completion goes on behind its own tokens."""
    asked = request([3, 1, 4], max_tokens=8, n=2, temperature=0.9, seed=7)
    whole = Driver(model, pool)
    wanted = whole.send(asked)
    whole.run()
    first, second = ([token for token in wanted.tokens if token.completion == number][:4] for number in (0, 1))
    published = [*first[:3], first[3].model_copy(update={"finish_reason": "context"}), *second[:2]]
    driver = Driver(model, pool)
    resumed = driver.send(asked, published)
    driver.run()
    assert [one.finish_reason for one in resumed.result.completions] == ["context", "length"]
    assert [list(one.token_ids) for one in resumed.result.completions] == [
        [token.token_id for token in first], list(wanted.result.completions[1].token_ids)
    ]  # fmt: skip
    assert [token.index for token in resumed.tokens] == list(range(6, 12)), "behind all that both had published"


def test_an_answer_that_has_more_than_its_next_worker_has_memory_for_ends_with_a_token(
    model: LoadedModel, pool: AdapterPool
) -> None:
    """Those who read along wait for one that says why it is the last. Part of a stop string is held till then."""
    plain = request([3, 1, 4], max_tokens=300, temperature=0.9, seed=7)
    whole = Driver(model, pool)
    wanted = whole.send(plain)
    whole.run()
    less = Driver(model, pool, kv_bytes=130_000)
    many = less.lane.budget.most_tokens + 10
    assert 30 < many < 290
    held = tiny.text([*wanted.ids[many - 5 : many + 5], 60, 60])
    resumed = less.send(plain.model_copy(update={"stop": (held,)}), wanted.tokens[:many])
    less.run()
    (last,) = resumed.tokens
    assert (last.index, last.token_id, last.finish_reason) == (many, wanted.ids[many], "context")
    assert resumed.result.finish_reason == "context"
    assert resumed.result.text == "".join(token.text for token in wanted.tokens[: many + 1])
    assert last.text == tiny.text(wanted.ids[many - 5 : many + 1])


def test_an_answer_that_ended_on_a_worker_with_less_memory_keeps_what_was_held_back(
    model: LoadedModel, pool: AdapterPool
) -> None:
    whole = Driver(model, pool)
    wanted = whole.send(request([3, 1, 4], max_tokens=8))
    whole.run()
    held = tiny.text([*wanted.ids[:4], 60, 60])
    published = [*wanted.tokens[:3], wanted.tokens[3].model_copy(update={"finish_reason": "context"})]
    resumed = Driver(model, pool).send(request([3, 1, 4], max_tokens=8, stop=held), published)
    assert resumed.result.text == tiny.text(wanted.ids[:4])


def test_an_unknown_adapter_is_refused_before_it_waits(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    with pytest.raises(UnknownAdapter, match="tiny has: one, two"):
        driver.send(request([3], adapter="three"))
    driver.assert_empty()


def test_a_damaged_adapter_fails_the_job_that_asked_for_it_alone(
    model: LoadedModel, tmp_path: Path, pool: AdapterPool
) -> None:
    (tmp_path / "tiny/one/1" / CONFIG_FILE).write_text("{")
    driver = Driver(model, AdapterPool(model, AdapterStore(tmp_path)))
    damaged, other, base = (driver.send(request([3, 4], adapter=name)) for name in ("one", "two", None))
    driver.run()
    with pytest.raises(ModelError, match="not readable as JSON"):
        damaged.ticket.result(0)
    assert len(other.result.token_ids) == len(base.result.token_ids) == 12
    driver.assert_empty()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_serve_on_a_base_of_16_bits(tmp_path: Path, dtype: str) -> None:
    """Also on the CPU, where MLX gathers matrices of float32 alone."""
    base = load("base", [str(CHECKPOINTS / "qwen2-untied")], dtype=dtype)
    store = AdapterStore(tmp_path)
    store.write("base", "one", tiny.adapter(base, 2, 0), {})
    driver = Driver(base, AdapterPool(base, store))
    adapted, bare = (driver.send(request([3, 4], adapter=name)) for name in ("one", None))
    driver.run()
    assert len(adapted.result.token_ids) == len(bare.result.token_ids) == 12
    assert adapted.result.token_ids != bare.result.token_ids
    driver.assert_empty()


def test_a_request_keeps_the_version_of_its_adapter(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    before = driver.send(request([3, 1, 4], adapter="one"))
    driver.run()
    held = driver.send(request([3, 1, 4], adapter="one"))
    driver.step()
    pool.save("one", tiny.adapter(model, 7, 9), {})
    fresh = driver.send(request([3, 1, 4], adapter="one"))
    driver.run()
    assert held.ids == before.ids
    assert fresh.ids != before.ids
    driver.assert_empty()


def test_a_lane_that_fails_ends_every_job_and_starts_clean(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    wanted = driver.send(request([3, 1, 4]))
    driver.run()
    failing = [driver.send(request([3, 1, 4], adapter="one")) for _ in range(5)]
    driver.step()
    driver.lane.fail_all(MemoryError("no more"))
    for one in failing:
        with pytest.raises(MemoryError):
            one.ticket.result(0)
    driver.assert_empty()
    again = driver.send(request([3, 1, 4]))
    driver.run()
    assert again.ids == wanted.ids


def test_a_prompt_that_has_no_tokens_is_refused(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A normalizer may drop every character of a text that is not blank."""
    driver = Driver(model, pool)
    monkeypatch.setattr(model.tokenizer, "encode", lambda text, special=True: [])
    with pytest.raises(InvalidRequest, match="no token"):
        driver.send(request([3]))


def test_token_ids_are_continued_as_they_are(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    text = driver.send(request([3, 1, 4]))
    ids = driver.send(GenerateRequest(model="tiny", prompt_ids=(3, 1, 4), max_tokens=12))
    driver.run()
    assert ids.ids == text.ids
    last = driver.send(request([3], max_tokens=1, stop_token_ids=[60], logit_bias={60: 50.0}))
    driver.run()
    assert (last.ids, last.result.stopped_by) == ([60], 60), "the last token is one, too"
    for name, value in {"prompt_ids": (61,), "stop_token_ids": (99,), "logit_bias": {61: 1.0}}.items():
        options: Any = {"model": "tiny", **({} if name == "prompt_ids" else {"prompt": "t3"}), name: value}
        with pytest.raises(InvalidRequest, match=f"{name}: token .* given; tiny has 0 to 60"):
            driver.send(GenerateRequest(**options))


def test_messages_are_written_by_the_models_template(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    chat = (ChatMessage(role="user", content="t3 t1"), ChatMessage(role="assistant", content="t4"))
    with pytest.raises(InvalidRequest, match="tiny has no chat template"):
        driver.send(GenerateRequest(model="tiny", messages=chat))
    model.tokenizer.templates["default"] = (
        "{% for message in messages %}t9 {{ message.content }} {% endfor %}"
        "{% for tool in tools or [] %}t7 {% endfor %}{% if warm %}t5{% endif %}"
    )
    plain = driver.send(GenerateRequest(model="tiny", messages=chat, max_tokens=4))
    tools = driver.send(
        GenerateRequest(model="tiny", messages=chat, tools=({},), template={"warm": True}, max_tokens=4)
    )
    wanted = [driver.send(request(ids, max_tokens=4)) for ids in ([9, 3, 1, 9, 4], [9, 3, 1, 9, 4, 7, 5])]
    driver.run()
    assert [plain.ids, tools.ids] == [one.ids for one in wanted]
    assert plain.result.usage.prompt_tokens == 5


def test_a_template_writes_the_date_on_which_its_job_was_sent(model: LoadedModel, pool: AdapterPool) -> None:
    """One that goes on behind midnight would have another prompt, and go on with other tokens."""
    lane = Driver(model, pool).lane
    model.tokenizer.templates["default"] = "t{{ strftime_now('%d') | int }}"
    chat = GenerateRequest(model="tiny", messages=(ChatMessage(role="user", content="x"),))
    sent = datetime(2026, 3, 7, 23, 59, 59).timestamp()
    for seconds, wanted in ((sent, 7), (sent + 2, 8)):
        assert lane.prepare(Ticket("job", chat.kind, sent=seconds), chat, None).prompt == [wanted]


def test_what_the_model_wants_before_a_text_stands_there_once(model: LoadedModel, pool: AdapterPool) -> None:
    """A template writes it itself, by its name; a prompt gets it."""
    driver = Driver(model, pool)
    model.tokenizer.manners = Manners({"bos_token": "t1"})
    model.tokenizer.inner.post_processor = TemplateProcessing(single="t1 $A", special_tokens=[("t1", 1)])
    model.tokenizer.templates["default"] = "{{ bos_token }} {{ messages[0].content }}"
    asked: list[dict[str, Any]] = [
        {"messages": (ChatMessage(role="user", content="t3"),)}, {"prompt": "t3"}, {"prompt_ids": (1, 3)}
    ]  # fmt: skip
    sent = [driver.send(GenerateRequest(model="tiny", max_tokens=4, **one)) for one in asked]
    driver.run()
    assert [one.result.usage.prompt_tokens for one in sent] == [2, 2, 2]
    assert sent[0].ids == sent[1].ids == sent[2].ids


def test_an_answer_whose_template_begins_its_reasoning_says_so_with_each_first_token(
    model: LoadedModel, pool: AdapterPool
) -> None:
    driver, tokenizer = Driver(model, pool), model.tokenizer
    user, bare = ChatMessage(role="user", content="t3 t1"), "{{ messages[-1].content }}"
    marked = ChatMessage(role="user", content="t3 <think>")

    def sent(template: str, *messages: ChatMessage, **fields: Any) -> Sent:
        tokenizer.templates["default"] = template
        return driver.send(GenerateRequest(model="tiny", messages=messages, max_tokens=3, **fields))

    begun = sent(f"{bare} t9 <think>\n", user, n=2, tools=({"name": "weather"},))
    others = [
        sent(f"{bare} t9 <think>\n\n</think>\n\n", user),
        sent(f"{bare} <think> t9", user),
        sent(bare, marked),
        driver.send(request([3], max_tokens=3)),
    ]
    own = [sent(f"{bare} t9 <think>", marked), sent(bare, ChatMessage(role="assistant", content="<think>"))]
    own.append(driver.send(GenerateRequest(model="tiny", prompt="t3 <think>\n", max_tokens=3)))
    driver.run()
    assert [token.in_reasoning for token in begun.tokens] == [token.index < 2 for token in begun.tokens]
    assert [one.in_reasoning for one in begun.result.completions] == [True, True]
    assert begun.result.functions == ("weather",)
    assert begun.result.usage.reasoning_tokens == begun.result.usage.completion_tokens == 6
    for one in others:
        assert not any(token.in_reasoning for token in one.tokens)
        assert (one.result.in_reasoning, one.result.usage.reasoning_tokens) == (False, 0)
    assert all(one.result.in_reasoning for one in own)


def test_an_answer_under_a_grammar_is_no_reasoning(model: LoadedModel) -> None:
    for grammar in (None, Mock(spec=Grammar)):
        prompt, ticket = TokenizedPrompt([3], in_reasoning=True), Ticket[Any]("job", "generate")
        made = Generation(ticket, request([3]), prompt, model.tokenizer, 100, grammar)
        assert made.in_reasoning == (grammar is None)


def test_a_stop_string_may_be_or_hold_a_special_token(model: LoadedModel, pool: AdapterPool) -> None:
    inner = model.tokenizer.inner
    inner.add_special_tokens(["t9"])
    special = replace(model, tokenizer=Tokenizer(inner, eos_ids=(tiny.EOS,)))
    assert special.tokenizer.special_ids == {9}
    driver = Driver(special, pool)
    always = {"logit_bias": {9: 100.0}, "max_tokens": 3}
    alone = driver.send(request([3, 1, 4], stop=["t9"], **always))
    twice = driver.send(request([3, 1, 4], stop=["t9t9"], **always))
    never = driver.send(request([3, 1, 4], stop=["t9!"], **always))
    driver.run()
    found = [
        (one.ids, one.result.text, one.result.finish_reason, one.result.stopped_by) for one in (alone, twice, never)
    ]
    assert found == [
        ([9], "", "stop_string", "t9"), ([9, 9], "", "stop_string", "t9t9"), ([9, 9, 9], "", "length", None)
    ]  # fmt: skip
    driver.assert_empty()


def test_an_answer_ends_before_its_stop_string_across_tokens(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    free = driver.send(request([3, 1, 4], max_tokens=12))
    driver.run()
    whole = free.result.text
    stop = whole[
        len(tiny.text(free.ids[:3])) - 1 : len(tiny.text(free.ids[:5])) - 1
    ]  # from within one to within another
    first = whole.index(stop)
    sent = driver.send(request([3, 1, 4], max_tokens=12, stop=[stop, "never"]))
    driver.run()
    assert sent.result.text == whole[:first] == "".join(token.text for token in sent.tokens)
    assert (sent.result.finish_reason, sent.result.stopped_by) == ("stop_string", stop)
    assert sent.ids == free.ids[: len(sent.ids)]
    driver.assert_empty()


def test_what_a_stop_string_held_back_is_given_out_at_the_end(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    free = driver.send(request([3, 1, 4]))
    driver.run()
    whole = free.result.text
    sent = driver.send(request([3, 1, 4], stop=[f"{whole[-6:]} and no further"]))
    driver.run()
    assert sent.result.text == whole == "".join(token.text for token in sent.tokens)
    assert sent.result.finish_reason == "length"


@pytest.mark.parametrize("why", [JobCancelled("cancelled"), DeadlineExceeded("late")], ids=["cancelled", "late"])
def test_a_stream_that_is_stopped_has_every_token_and_nothing_of_what_may_become_a_stop_string(
    model: LoadedModel, pool: AdapterPool, why: StokerError
) -> None:
    """What would have come next decides what that is, and never comes."""
    driver = Driver(model, pool)
    free = driver.send(request([3, 1, 4], max_tokens=12))
    driver.run()
    certain = tiny.text(free.ids[:2])
    held = tiny.text(free.ids[:6]).removeprefix(certain)
    sent = driver.send(request([3, 1, 4], max_tokens=12, stop=[f"{held} and no further"]))
    while len(sent.tokens) < 4:
        driver.step()
    sent.ticket.cancel(why)
    driver.step()
    with pytest.raises(type(why)):
        sent.ticket.result(0)
    assert sent.ids == free.ids[: len(sent.ids)]
    assert "".join(token.text for token in sent.tokens) == certain
    driver.assert_empty()


def test_a_stop_token_ends_and_an_end_token_may_be_ignored(tiny_llama: Llama, pool: AdapterPool) -> None:
    free = Driver(tiny.loaded(tiny_llama, eos_ids=[]), pool)
    unended = free.send(request([3, 1, 4], max_tokens=8))
    free.run()
    end = unended.ids[3]
    first = unended.ids.index(end)
    driver = Driver(tiny.loaded(tiny_llama, eos_ids=[end]), pool)
    ignored = driver.send(request([3, 1, 4], max_tokens=8, ignore_eos=True))
    stopped = driver.send(request([3, 1, 4], max_tokens=8, ignore_eos=True, stop_token_ids=[end]))
    driver.run()
    assert ignored.ids == unended.ids
    assert stopped.ids == unended.ids[: first + 1]
    assert (stopped.result.finish_reason, stopped.result.stopped_by) == ("stop_token", end)
    assert stopped.result.text == tiny.text(stopped.ids[:-1]), "a token that stops has no text"
    assert not stopped.tokens[-1].is_eos


def test_several_completions_of_one_prompt_are_what_each_would_be_alone(model: LoadedModel, pool: AdapterPool) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 9}
    driver = Driver(model, pool)
    three = driver.send(request([3, 1, 4], n=3, **options))
    driver.run()
    assert [token.index for token in three.tokens] == list(range(27))
    texts = [completion.token_ids for completion in three.result.completions]
    assert len(set(texts)) == 3
    for number, ids in enumerate(texts):
        assert [token.token_id for token in three.tokens if token.completion == number] == list(ids)
    alone = driver.send(request([3, 1, 4], **options))
    driver.run()
    assert alone.result.token_ids == texts[0]
    assert three.result.usage.completion_tokens == 27
    driver.assert_empty()


def test_a_shared_beginning_goes_through_the_model_once(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    system = np.random.default_rng(0).integers(3, 61, 90).tolist()
    first = driver.send(request([*system, 5], max_tokens=3))
    driver.run()
    again = driver.send(request([*system, 7, 8], max_tokens=8))
    adapted = driver.send(request([*system, 7, 8], max_tokens=3, adapter="one"))
    driver.run()
    fresh = Driver(model, pool)
    wanted = fresh.send(request([*system, 7, 8], max_tokens=8))
    fresh.run()
    assert again.ids == wanted.ids
    assert [sent.result.usage.cached_tokens for sent in (first, again, adapted)] == [0, 90, 0]


@pytest.mark.parametrize(
    ("on_cpu", "shared", "found"), [(True, 16, 16), (True, 15, 0), (False, 32, 32), (False, 31, 0)]
)
def test_a_beginning_is_shared_from_a_length_on_at_which_it_pays_on_the_device(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch, on_cpu: bool, shared: int, found: int
) -> None:
    monkeypatch.setattr(lane_module, "on_cpu", lambda: on_cpu)
    driver, cached = Driver(model, pool), []
    for number in range(2):
        beginning = [3 + index for index in range(shared)]
        sent = driver.send(request([*beginning, 50 + number, 7], max_tokens=1))
        driver.run()
        cached.append(sent.result.usage.cached_tokens)
    assert cached == [0, found]


@pytest.mark.parametrize("slots", [1, 3])
def test_cached_tokens_are_those_that_a_job_found_and_not_what_it_left_itself(
    model: LoadedModel, pool: AdapterPool, slots: int
) -> None:
    """With one slot the second completion begins after the first, and finds the whole prompt."""
    driver = Driver(model, pool, slots=slots)
    prompt = np.random.default_rng(0).integers(3, 61, 90).tolist()
    first = driver.send(request(prompt, n=3, max_tokens=2, temperature=1.0))
    driver.run()
    again = driver.send(request([*prompt[:60], 7], n=3, max_tokens=2, temperature=1.0))
    driver.run()
    assert [sent.result.usage.cached_tokens for sent in (first, again)] == [0, 60]


def test_a_row_that_was_put_back_counts_nothing_of_its_own_as_cached(model: LoadedModel, pool: AdapterPool) -> None:
    ticket: Ticket[Any] = Ticket("job", "generate")
    prompt = TokenizedPrompt([3, 1, 4])
    generation = Generation(ticket, request([3, 1, 4]), prompt, model.tokenizer, 100)
    for found in (2, 5, 0):
        generation.note_cached(found)
    assert generation.cached_tokens == 2
    resumed = Generation(ticket, request([3, 1, 4]), prompt, model.tokenizer, 100)
    resumed.note_cached(7)
    assert resumed.cached_tokens == 3, "of the prompt"


def test_the_time_to_the_first_token_is_that_of_a_jobs_first_row(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(1.0)
    monkeypatch.setattr(Ticket, "run_seconds", property(lambda ticket: next(seconds)))
    driver = Driver(model, pool)
    sent = driver.send(request([3, 1, 4], n=3, max_tokens=4, temperature=1.0))
    driver.run()
    usage = sent.result.usage
    assert (usage.first_token_seconds, usage.run_seconds) == (1.0, 2.0)


def test_a_prefix_serves_one_version_of_an_adapter_alone(model: LoadedModel, pool: AdapterPool) -> None:
    """The keys and values of a prompt are the adapter's too: those of an older version would be silently wrong."""
    pool.save("one", tiny.adapter(model, 3, 99), {})
    prompt = list(range(3, 53))
    driver = Driver(model, pool)
    cached = []
    for adapter in ("one@1", "one@2", None, "two", "one@1", "one@2", None):
        sent = driver.send(request(prompt, adapter=adapter, max_tokens=4))
        driver.run()
        cached.append(sent.result.usage.cached_tokens)
        fresh = Driver(model, pool)
        exact = fresh.send(request(prompt, adapter=adapter, max_tokens=4))
        fresh.run()
        assert sent.ids == exact.ids, adapter
    assert cached == [0, 0, 0, 0, 49, 49, 49]


@pytest.mark.parametrize("kv_bytes", [64 << 20, 300_000])
def test_prompts_that_share_beginnings_at_many_places_get_the_tokens_of_none(
    model: LoadedModel, pool: AdapterPool, kv_bytes: int
) -> None:
    """Each finds what the longest shared beginning has, in pieces of several prompts before it; with little room, what
    is left of that."""
    random, driver = np.random.default_rng(5), Driver(model, pool, slots=1, kv_bytes=kv_bytes)
    prompts: list[list[int]] = [random.integers(3, 61, 120).tolist()]
    for _ in range(24):
        begun = prompts[random.integers(0, len(prompts))]
        prompts.append([*begun[: random.integers(20, len(begun) + 1)], *random.integers(3, 61, 8).tolist()])
    for number, prompt in enumerate(prompts):
        asked = request(prompt, max_tokens=3, temperature=0.8, seed=number)
        sent = driver.send(asked)
        driver.run()
        fresh = Driver(model, pool, slots=1, prefix_share=0.0)
        exact = fresh.send(asked)
        fresh.run()
        assert sent.ids == exact.ids
        longest = max((_shared(prompt[:-1], other) for other in prompts[:number]), default=0)
        found = sent.result.usage.cached_tokens
        assert found == longest if kv_bytes > 1 << 20 else found <= longest
        assert driver.lane.prefixes.nbytes <= kv_bytes // 4
    driver.assert_empty()


def _shared(left: list[int], right: list[int]) -> int:
    length = min(len(left), len(right))
    return next((at for at in range(length) if left[at] != right[at]), length)


def test_prefixes_that_were_not_used_for_long_go_first(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool, kv_bytes=400_000)
    prompts = [np.random.default_rng(seed).integers(3, 61, 60).tolist() for seed in range(12)]
    for prompt in prompts:
        driver.send(request(prompt, max_tokens=1))
        driver.run()
        assert driver.lane.prefixes.nbytes <= 100_000
        assert driver.lane.kv_bytes <= 400_000
    assert 0 < len(driver.lane.prefixes) < 12
    last = driver.send(request([*prompts[-1], 3], max_tokens=1))
    first = driver.send(request([*prompts[0], 3], max_tokens=1))
    driver.run()
    assert (last.result.usage.cached_tokens, first.result.usage.cached_tokens) == (60, 0)


def test_rows_that_memory_has_no_room_for_are_put_back_and_lose_no_token(model: LoadedModel, pool: AdapterPool) -> None:
    requests = [request(long(n), max_tokens=30, temperature=0.8, seed=n, adapter="one") for n in range(4)]
    roomy = Driver(model, pool, slots=4)
    wanted = [roomy.send(one) for one in requests]
    roomy.run()
    tight = Driver(model, pool, slots=4, kv_bytes=330_000)
    found = [tight.send(one) for one in requests]
    while tight.lane.busy:
        tight.step()
        assert tight.lane.kv_bytes <= 330_000
    assert tight.lane.preempted > 0
    assert [one.ids for one in found] == [one.ids for one in wanted]
    assert [[token.index for token in one.tokens] for one in found] == [list(range(30))] * 4
    tight.assert_empty()


def test_a_step_says_how_many_rows_its_pass_had_and_the_lane_how_full_it_is(
    model: LoadedModel, pool: AdapterPool
) -> None:
    driver = Driver(model, pool, slots=4, kv_bytes=1_000_000)
    for number in range(3):
        driver.send(request([3 + number, 4], max_tokens=6))
    rows, taken = [], []
    while driver.lane.busy:
        rows.append(driver.lane.run().rows)
        taken.append(driver.lane.load.kv_bytes)
    assert max(rows) == 3
    assert max(taken) > 0
    load = driver.lane.load
    assert (load.kv_limit, load.preempted, load.traced) == (1_000_000, 0, driver.lane.step.traced)


def test_the_rows_that_came_last_are_the_ones_put_back(model: LoadedModel, pool: AdapterPool) -> None:
    """Those that came first have waited longest, and are nearest to their end."""
    tight = Driver(model, pool, slots=4, kv_bytes=330_000)
    sent = [tight.send(request(long(n), max_tokens=30)) for n in range(4)]
    lane, batched = tight.lane, set[int]()
    while lane.busy:
        before = lane.preempted
        tight.step()
        here = {sent.index(tight.sent[row.ticket.job_id]) for row in lane.batch.rows}
        if lane.preempted > before:
            gone = {place for place in batched - here if not sent[place].ticket.done}
            assert min(gone) > max(here), "one that came later stayed"
        batched = here
    assert lane.preempted > 0
    assert [len(one.tokens) for one in sent] == [30] * 4


def test_a_row_that_was_put_back_goes_before_those_that_came_later(model: LoadedModel, pool: AdapterPool) -> None:
    tight = Driver(model, pool, slots=4, kv_bytes=330_000)
    sent = [tight.send(request(long(n), max_tokens=30)) for n in range(6)]
    order = [one.ticket for one in sent]
    while not tight.lane.preempted:
        tight.step()
    assert len(tight.lane.waiting) >= 3
    while tight.lane.busy:
        waiting = [order.index(row.ticket) for row in tight.lane.waiting]
        assert waiting == sorted(waiting)
        tight.step()
        # Also where a group of prompts comes and nothing is seated.
        assert tight.lane.kv_bytes <= 330_000
    tight.assert_empty()


def test_prompts_of_a_group_are_read_where_each_ends(model: LoadedModel, pool: AdapterPool) -> None:
    """As on a GPU, where prompts of any length go through the model together; nothing is compiled here."""
    prompts = [[3 + (9 * number + at) % 50 for at in range(length)] for number, length in enumerate((5, 40, 2, 17))]
    asked = [request(prompt, max_tokens=4) for prompt in prompts]
    alone = Driver(model, pool, slots=4)
    wanted = []
    for one in asked:
        wanted.append(alone.send(one))
        alone.run()
    together = Driver(model, pool, slots=4)
    together.lane.step.prompt_buckets = True
    found = [together.send(one) for one in asked]
    together.step()
    assert len(together.lane.batch.rows) == 4, "one pass"
    together.run()
    assert [one.ids for one in found] == [one.ids for one in wanted]


def test_tokens_of_the_prompt_count_for_no_presence_nor_frequency(model: LoadedModel, pool: AdapterPool) -> None:
    """Also where the pass ahead counts a token that the host has not seen."""
    prompt = list(range(3, 61)) * 2
    driver = Driver(model, pool)
    free = driver.send(request(prompt, max_tokens=1))
    penalised = driver.send(request(prompt, max_tokens=6, presence_penalty=50.0))
    driver.run()
    assert penalised.ids[0] == free.ids[0], "nothing that could be said had been said"
    assert len(set(penalised.ids)) == 6


def test_a_prompt_that_memory_can_never_hold_is_refused(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool, kv_bytes=100_000)
    with pytest.raises(InvalidRequest, match=r"memory for keys and values holds \d+ of tiny.*STOKER_KV_CACHE"):
        driver.send(request([3] * 500))


def test_a_worker_says_how_many_tokens_of_a_prompt_its_memory_holds(model: LoadedModel, tmp_path: Path) -> None:
    warm = WarmModels(AdapterStore(tmp_path), tmp_path, LaneLimits(kv_bytes=100_000), 1 << 20, 0.2)
    for _ in warm.hold(model):
        pass
    (card,) = warm.cards
    lane = warm.lanes["tiny", "generate"]
    assert isinstance(lane, GenerateLane)

    def prepared(length: int) -> Generation:
        ticket: Ticket[GenerateResult] = Ticket("one", "generate")
        return lane.prepare(ticket, request([3] * length), None)

    assert len(prepared(card.kv_tokens - 1).prompt) == card.kv_tokens - 1 > 0
    with pytest.raises(BeyondMemory) as error:
        prepared(card.kv_tokens)
    assert error.value.tokens == card.kv_tokens


def test_loading_an_adapter_changes_no_running_request(model: LoadedModel, pool: AdapterPool) -> None:
    driver = Driver(model, pool)
    wanted = driver.send(request([3, 1, 4], adapter="one", max_tokens=20))
    driver.run()
    running = driver.send(request([3, 1, 4], adapter="one", max_tokens=20))
    for number in range(6):
        driver.step()
        pool.save(f"more-{number}", tiny.adapter(model, 3 + number, number), {})
    driver.run()
    assert running.ids == wanted.ids
