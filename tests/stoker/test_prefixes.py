"""Pinned prefixes as clients see them: what is stored, what is refused, and what the workers' words make of it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stoker import Client
from stoker.broker import keys, prefixes
from stoker.broker.connection import connect
from stoker.cli import app
from stoker.client.pinning import Verdict
from stoker.contract import ModelCard, Presence
from stoker.contract.prefixes import LONGEST_PREFIX, MOST_PREFIXES, PinnedPrefix
from stoker.contract.presence import PrefixState, describe_prefix
from stoker.errors import InvalidRequest, StokerError
from stoker.local import backup
from stoker.settings import Settings
from stoker.testing import AsyncFakeClient, FakeClient
from tests.stoker.lost_answers import one_lost_answer

SYSTEM = [{"role": "system", "content": "You are brief."}]


class Workers:
    """A broker where one worker holds the model `m`, with a chat template, and says what a test lets it."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.redis = settings, connect(settings)
        self.card = ModelCard(model="m", architecture="llama", kinds=("generate",), context=64, parameters=1, chat=True)
        now = float(self.redis.time()[0])
        self.redis.hset(keys.MODELS, "m/1", self.card.model_copy(update={"seen": now}).model_dump_json())
        self.redis.expire(keys.MODELS, 60)

    def say(self, worker: str, **state: str) -> None:
        """Let a worker be there, and say this of all that is pinned."""
        pinned = self.pinned()
        states = [
            PrefixState(**{"model": "m", "name": name, "id": prefix.id, "tokens": 7, **state})  # type: ignore[arg-type]
            for name, prefix in pinned.items() if state
        ]  # fmt: skip
        now = float(self.redis.time()[0])
        presence = Presence(worker=worker, host="h", pid=1, device="cpu", started=now, time=now, models=(self.card,),
                            adapters={}, lanes={}, memory_bytes=0, prefixes=tuple(states))  # fmt: skip
        self.redis.set(keys.worker(worker), presence.model_dump_json(), ex=60)
        self.redis.zadd(keys.WORKERS, {worker: now})
        self.redis.expire(keys.WORKERS, 60)

    def pinned(self) -> dict[str, PinnedPrefix]:
        return prefixes.parse(self.redis.hgetall(keys.prefixes("m")))


@pytest.fixture
def workers(broker: Settings) -> Iterator[Workers]:
    made = Workers(broker)
    yield made
    made.redis.flushall()
    made.redis.close()


@pytest.fixture
def client(workers: Workers) -> Iterator[Client]:
    with Client(settings=workers.settings.model_copy(update={"client_key": "me"})) as made:
        yield made


# --- what is stored ---


@pytest.mark.integration
def test_a_pin_lies_in_the_broker_for_good_with_all_that_its_prompt_depends_on(
    client: Client, workers: Workers
) -> None:
    tools = [{"name": "look", "parameters": {}}]
    entry = client.prefixes.pin("brief", SYSTEM, model="m", adapter="style", tools=tools, template={"thinking": False})
    key = keys.prefixes("m")
    assert [workers.redis.ttl(key), keys.is_durable(key)] == [-1, True]
    (listed,) = client.prefixes.list("m")
    assert listed == entry
    assert [entry.name, entry.model, entry.prefix.client, entry.tokens] == ["brief", "m", "me", 0]
    assert entry.prefix.time > 1e9
    request = entry.prefix.request("m")
    assert [message.model_dump(exclude_none=True) for message in request.messages or ()] == SYSTEM
    assert [request.adapter, request.tools, request.template] == ["style", tuple(tools), {"thinking": False}]
    client.prefixes.pin("text", "Once upon", model="m")
    client.prefixes.pin("ids", [1, 2], model="m")
    assert [each.prefix.shown for each in client.prefixes.list("m")] == ["You are brief.", "Once upon", "2 token ids"]


@pytest.mark.integration
def test_a_pin_whose_answer_is_lost_is_pinned(client: Client, workers: Workers) -> None:
    with one_lost_answer(b"HSETNX"):
        entry = client.prefixes.pin("a", "x", model="m")
    assert workers.pinned() == {"a": entry.prefix}


@pytest.mark.integration
def test_a_prefix_whose_unpinning_has_no_answer_is_unpinned_and_no_error(client: Client, workers: Workers) -> None:
    client.prefixes.pin("a", "x", model="m")
    with one_lost_answer(b"HDEL"):
        client.prefixes.unpin("a", "m")
    assert workers.pinned() == {}


@pytest.mark.integration
def test_each_change_is_another_and_unpinning_leaves_the_rest(client: Client, workers: Workers) -> None:
    marks = set()
    for change in (
        lambda: client.prefixes.pin("a", "x", model="m"), lambda: client.prefixes.pin("b", "y", model="m"),
        lambda: client.prefixes.pin("c", "z", model="m"),
        lambda: client.prefixes.unpin("a", "m"), lambda: client.prefixes.unpin("c", "m"),
    ):  # fmt: skip
        change()
        marks.add(workers.redis.hget(keys.prefixes("m"), prefixes.CHANGED))
    assert len(marks) == 5, "one that is like an earlier one would not be seen by a worker"
    assert [entry.name for entry in client.prefixes.list("m")] == ["b"]
    with pytest.raises(InvalidRequest, match=r"prefix: 'a' given; m has: b\."):
        client.prefixes.unpin("a", "m")


@pytest.mark.integration
def test_what_another_program_wrote_is_left_out_and_a_wrong_type_is_one_error(client: Client, workers: Workers) -> None:
    client.prefixes.pin("a", "x", model="m")
    workers.redis.hset(keys.prefixes("m"), mapping={"b": "garbage", "Ü": "{}", "c": "[]"})
    assert [entry.name for entry in client.prefixes.list("m")] == ["a"]
    with pytest.raises(InvalidRequest, match="'b' given, which is taken"):
        client.prefixes.pin("b", "x", model="m")
    assert workers.redis.hget(keys.prefixes("m"), "b") == b"garbage"
    workers.redis.delete(keys.prefixes("m"))
    workers.redis.set(keys.prefixes("m"), "x", ex=60)
    for call in (
        lambda: client.prefixes.list("m"),
        lambda: client.prefixes.pin("a", "x", model="m"),
        lambda: client.prefixes.unpin("a", "m"),
    ):
        with pytest.raises(StokerError, match="stoker:prefixes:m"):
            call()


@pytest.mark.integration
def test_a_backup_has_the_pins(client: Client, workers: Workers, tmp_path: Path) -> None:
    entry = client.prefixes.pin("a", "x", model="m")
    settings = workers.settings.model_copy(update={"home": tmp_path / "home"})
    backup.backup(settings, workers.redis, tmp_path / "b.tar.gz")
    workers.redis.delete(keys.prefixes("m"))
    assert backup.restore(settings, workers.redis, tmp_path / "b.tar.gz").keys == 1
    assert client.prefixes.list("m") == [entry]


# --- what is refused, by either client ---


def real(request: pytest.FixtureRequest) -> Client:
    made: Client = request.getfixturevalue("client")
    return made


def fake(request: pytest.FixtureRequest) -> FakeClient:
    return FakeClient(models={"m": ["generate"], "e": ["embed"]})


BOTH = pytest.mark.parametrize("make", [pytest.param(real, marks=pytest.mark.integration), fake])
Make = Callable[[pytest.FixtureRequest], Any]


@BOTH
def test_a_name_is_pinned_once(make: Make, request: pytest.FixtureRequest) -> None:
    client = make(request)
    first = client.prefixes.pin("a", "x", model="m")
    with pytest.raises(InvalidRequest, match="'a' given, which is taken"):
        client.prefixes.pin("a", "y", model="m")
    assert [entry.prefix for entry in client.prefixes.list("m")] == [first.prefix]
    client.prefixes.unpin("a", "m")
    assert client.prefixes.list("m") == []
    client.prefixes.pin("a", "y", model="m")


@BOTH
def test_there_are_so_many_of_a_model_and_no_more(make: Make, request: pytest.FixtureRequest) -> None:
    client = make(request)
    for number in range(MOST_PREFIXES):
        client.prefixes.pin(f"p{number}", "x", model="m")
    with pytest.raises(InvalidRequest, match=f"m has {MOST_PREFIXES}; at most {MOST_PREFIXES} may be pinned"):
        client.prefixes.pin("another", "x", model="m")


@BOTH
@pytest.mark.parametrize(
    ("name", "prompt", "options", "said"),
    [
        ("../x", "x", {}, "name: '../x' given"),
        (":changed", "x", {}, "name: ':changed' given"),
        ("a", "", {}, "an empty text given"),
        ("a", "x" * LONGEST_PREFIX, {}, f"given as JSON; at most {LONGEST_PREFIX}"),
        ("a", "x", {"tools": [{}]}, "tools given without messages"),
        ("a", "x", {"adapter": "../x"}, "adapter"),
        ("a", [{"role": 3}], {}, "role"),
        ("a", None, {}, "no prompt given"),
        ("a", "x", {"timeout": "10"}, "timeout: '10' given"),
        ("a", "x", {"timeout": math.nan}, "timeout: nan given"),
    ],
)
def test_what_can_be_no_prefix_is_refused_before_it_is_stored(
    make: Make, request: pytest.FixtureRequest, name: str, prompt: Any, options: dict[str, Any], said: str
) -> None:
    client = make(request)
    with pytest.raises(InvalidRequest, match=said):
        client.prefixes.pin(name, prompt, model="m", **options)
    assert client.prefixes.list("m") == []


def test_the_client_in_memory_says_that_its_worker_has_all_ready() -> None:
    with FakeClient() as client:
        entry = client.prefixes.pin("a", SYSTEM)
        assert [state.state for state in entry.workers.values()] == ["ready"]
        assert client.prefixes.list()[0].prefix.client == client.settings.client_key
    assert asyncio.run(pinned_async()) == ["a"]


async def pinned_async() -> list[str]:
    async with AsyncFakeClient() as client:
        await client.prefixes.pin("a", "x")
        return [entry.name for entry in await client.prefixes.list()]


# --- what workers say ---


def holding(name: str, *states: PrefixState, kinds: tuple[str, ...] = ("generate",)) -> Presence:
    card = ModelCard(model="m", architecture="a", kinds=kinds, context=1, parameters=1)
    return Presence(worker=name, host="h", pid=1, device="cpu", started=0, time=0, models=(card,), adapters={},
                    lanes={}, memory_bytes=0, prefixes=states)  # fmt: skip


def state(state: str, why: str = "", pin: str = "1") -> PrefixState:
    return PrefixState(model="m", name="a", id=pin, state=state, why=why)


def test_a_verdict_waits_for_every_worker_that_holds_the_model() -> None:
    verdict = Verdict("m", "1", 100.0)
    one, two = holding("one", state("waiting")), holding("two", state("ready", pin="an older one"))
    assert not verdict.heard([one, two])
    assert verdict.heard([one, holding("three", kinds=("embed",))])
    assert verdict.heard([])
    assert Verdict("m", "1", 0.0).heard([one, two]), "a worker of an earlier release says nothing"
    assert not Verdict("m", "1", None).heard([one, two]), "without a limit"


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        ([state("refused", "too long")], "too long"),
        ([state("refused", "too long"), state("waiting")], None),
        ([state("refused", "x"), state("refused", "y")], "x"),
        ([], None),
    ],
)
def test_only_what_every_worker_refuses_is_refused(said: list[PrefixState], refusal: str | None) -> None:
    verdict = Verdict("m", "1", 100.0)
    verdict.heard([holding(str(number), each) for number, each in enumerate(said)])
    assert verdict.refusal == refusal


def test_pauses_grow_to_a_second() -> None:
    verdict = Verdict("m", "1", 100.0)
    pauses = [verdict.pause() for _ in range(20)]
    assert pauses == sorted(pauses)
    assert [pauses[0] < 0.1, pauses[-1]] == [True, 1.0]


@pytest.mark.integration
def test_what_all_workers_refuse_is_taken_back_and_raised_in_their_words(
    client: Client, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers.say("w")
    say = {"state": "refused", "why": "3 tokens given"}

    def spoken(verdict: Verdict) -> float:
        """The worker says its word between two looks."""
        workers.say("w", **say)
        return 0.001

    monkeypatch.setattr(Verdict, "pause", spoken)
    with pytest.raises(InvalidRequest, match="prefix 'a': 3 tokens given"):
        client.prefixes.pin("a", "x")
    assert workers.pinned() == {}
    say = {"state": "waiting", "why": ""}
    entry = client.prefixes.pin("a", "x")
    assert [entry.tokens, [each.state for each in entry.workers.values()]] == [7, ["waiting"]]
    workers.say("w", state="ready")
    (listed,) = client.prefixes.list()
    assert {name: each.state for name, each in listed.workers.items()} == {"w": "ready"}


# --- the command ---


class Command:
    def __init__(self, workers: Workers) -> None:
        self._url, self._workers = str(workers.settings.url), workers

    def __call__(self, *words: str, fails: bool = False, given: str = "") -> str:
        done = CliRunner().invoke(app, ["prefix", *words, "--model", "m", "--url", self._url], input=given.encode())
        assert bool(done.exception) == fails, done.output
        return str(done.exception) if fails else done.stdout


@pytest.fixture
def command(workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("STOKER_HOME", str(tmp_path))
    return Command(workers)


@pytest.mark.integration
def test_a_text_is_a_system_message_where_the_model_takes_messages(command: Command, workers: Workers) -> None:
    said = command("pin", "brief", "You are brief.")
    assert "brief  (m)" in said
    assert "'You are brief.'" in said
    command("pin", "raw", "Once upon", "--raw", "--adapter", "style")
    command("pin", "read", "-", given="From a pipe.")
    pinned = workers.pinned()
    assert pinned["brief"].messages == tuple(SYSTEM)
    assert [pinned["raw"].prompt, pinned["raw"].adapter] == ["Once upon", "style"]
    assert pinned["read"].messages == ({"role": "system", "content": "From a pipe."},)


@pytest.mark.integration
def test_messages_come_from_a_file(command: Command, workers: Workers, tmp_path: Path) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([*SYSTEM, {"role": "user", "content": "Hi"}]))
    command("pin", "a", "--messages", str(file))
    assert len(workers.pinned()["a"].messages or ()) == 2
    file.write_text("{}")
    assert "expected a list of messages" in command("pin", "b", "--messages", str(file), fails=True)
    for words in ((), ("x", "--messages", str(file))):
        assert "give a TEXT, or --messages FILE" in command("pin", "b", *words, fails=True)


@pytest.mark.integration
def test_the_list_says_how_far_each_worker_is(command: Command, workers: Workers) -> None:
    assert command("list") == ""
    command("pin", "brief", "You are brief.")
    assert "tokens not known yet" in command("list")
    workers.say("w@h/1", state="refused", why="too long")
    said = command("list", "--model", "m")
    assert "7 tokens" in said
    assert "  w@h/1: refused: too long\n" in said
    (plain,) = json.loads(command("list", "--json"))
    assert [plain["name"], plain["workers"]["w@h/1"]["state"], plain["tokens"]] == ["brief", "refused", 7]
    status = CliRunner().invoke(app, ["status", "--url", str(workers.settings.url)]).stdout
    assert "pinned prefix brief: refused: too long" in status
    assert command("unpin", "brief") == "brief: unpinned\n"
    assert "m has: none" in command("unpin", "brief", fails=True)


def test_a_state_is_said_with_its_reason() -> None:
    assert describe_prefix(state("ready")) == "ready"
    assert describe_prefix(state("ready", "in memory alone")) == "ready: in memory alone"
