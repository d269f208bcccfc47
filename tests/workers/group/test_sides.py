"""Rank 0 and another rank, each against a socket that the test holds: no MLX group, no process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from engine.adapters.lora import LoraWeights, same
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import load
from engine.generation.followed import Admission, Answer, LentAdapter
from engine.generation.limits import LaneLimits
from engine.training.ranks import ALONE
from stoker.contract import GenerateRequest
from stoker.errors import ConfigError, JobFailed, WorkerUnavailable
from stoker.settings import load_settings
from tests.conftest import wait_until
from tests.engine import shared_model, tiny
from tests.engine.test_leading import Leading, cancels, mixed
from workers.group import channel, follower, leader, meeting
from workers.group.channel import Channel
from workers.group.follower import Follower
from workers.group.leader import Leader
from workers.group.meeting import Address
from workers.group.plan import (
    Admit,
    Advance,
    Done,
    Drop,
    End,
    Forget,
    Hello,
    Holds,
    Keep,
    Lend,
    Measured,
    Open,
    Stop,
    Turn,
    Word,
    written,
)
from workers.group.starting import LOOPBACK, Place

NO_PLAN: Any = SimpleNamespace()


class Started:
    stopped = False

    @contextmanager
    def starting(self) -> Iterator[Place]:
        yield Place(0, 2, "ring", LOOPBACK)

    def stop(self) -> None:
        self.stopped = True


class Meeting:
    """A leader and, in the test's hands, what another rank says to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        monkeypatch.setattr(meeting, "meet", lambda *_: None)
        monkeypatch.setattr(leader, "text_of_rank_0", self._announced)
        monkeypatch.setattr(leader, "LOOK_EVERY", 0.01)
        self.started, self.ends, self.wakes = Started(), list[int](), list[bool]()
        self.settings = load_settings(**settings)
        self.leader = Leader(self.settings, 2, self.started, self.ends.append)
        self.leader.woken = lambda: self.wakes.append(self.leader.ready)
        self._address: list[Address] = []
        self._errors: list[BaseException] = []
        self.sockets: list[socket.socket] = []

    def _announced(self, ranks: object, text: str) -> str:
        self._address.append(Address.read(text))
        return text

    def join(self, **changes: Any) -> Channel:
        """Another rank has come; raises what rank 0 says of it."""
        joining = threading.Thread(target=self._join)
        joining.start()
        other = self.connection()
        other.say(self.hello(**changes))
        joining.join()
        if self._errors:
            raise self._errors[0]
        return other

    def _join(self) -> None:
        try:
            self.leader.join()
        except ConfigError as error:
            self._errors.append(error)

    def hello(self, **changes: Any) -> Hello:
        (address,) = self._address
        known = meeting.introduction(self.settings, address.secret, 1).model_dump()
        return Hello(**{**known, **changes})

    def connection(self) -> Channel:
        address: Address = wait_until(lambda: next(iter(self._address), None), "rank 0 listens")
        self.sockets.append(address.connect())
        return Channel(self.sockets[-1])

    def close(self) -> None:
        self.leader.close()
        for each in self.sockets:
            each.close()


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meeting]:
    made = Meeting(monkeypatch)
    yield made
    made.close()


def hears(other: Channel) -> Word:
    return next(other.words())


def test_a_rank_that_is_not_alike_is_refused_and_hears_why(met: Meeting) -> None:
    with pytest.raises(
        ConfigError, match=r"rank 1 on .*: MLX 0\.1 given; rank 0 has .* Install the same version of mlx"
    ):
        met.join(mlx="0.1")
    assert met.started.stopped


def test_a_connection_without_the_secret_is_of_no_rank(met: Meeting) -> None:
    joining = threading.Thread(target=met.leader.join)
    joining.start()
    for wrong in (lambda: met.hello(secret="guessed"), lambda: Holds(models={})):
        stranger = met.connection()
        stranger.say(wrong())
        with pytest.raises(StopIteration):
            hears(stranger)
        assert joining.is_alive()
    met.connection().say(met.hello())
    joining.join()
    assert met.leader.ready


def test_a_rank_that_was_faster_than_rank_0_has_said_what_it_holds(met: Meeting) -> None:
    """All that it says while rank 0 waits for others comes at once."""
    joining = threading.Thread(target=met.leader.join)
    joining.start()
    met.connection()
    met.sockets[-1].sendall(written(met.hello()) + written(Holds(models={"a": "other"})))
    joining.join()
    with pytest.raises(ConfigError, match="weights other given"):
        met.leader.hold({"a": "own"})


def test_other_weights_are_refused_at_the_start(met: Meeting) -> None:
    other = met.join()
    other.say(Holds(models={"a": "other"}))
    with pytest.raises(ConfigError, match="rank 1: weights other given of model a; rank 0 has weights own"):
        met.leader.hold({"a": "own"})
    assert "weights other given" in hears(other).why  # type: ignore[union-attr]
    assert not met.ends


def test_a_model_that_came_later_is_trained_by_rank_0_alone(met: Meeting) -> None:
    met.join().say(Holds(models={"a": "own"}))
    met.leader.hold({"a": "own"})
    assert met.leader.of("a") is met.leader
    assert met.leader.of("b") is ALONE


def test_rank_0_is_ready_again_when_the_other_has_done_its_turn(met: Meeting) -> None:
    other = met.join()
    met.leader.advance("run")
    assert hears(other) == Advance(number=1, run="run")
    assert not met.leader.ready
    other.say(Done(number=1, witness="same"))
    wait_until(lambda: met.wakes[-1:] == [True], "the engine is woken")
    met.leader.advanced("run", "same")
    met.leader.check("run")
    met.leader.end("run")
    assert hears(other) == End(number=2, run="run")


def test_a_turn_that_made_something_else_on_another_rank_fails_its_run_alone(met: Meeting) -> None:
    other = met.join()
    met.leader.advance("run")
    other.say(Done(number=1, witness="theirs"))
    met.leader.advanced("run", "ours")
    met.leader.check("another")
    with pytest.raises(JobFailed, match=r"rank 1 on .* made theirs of a step, and rank 0 ours"):
        met.leader.check("run")
    met.leader.end("run")
    other.say(Done(number=2))
    met.leader.check("run")
    assert not met.ends


def test_runs_that_take_turns_are_each_held_to_what_the_others_made_of_it(met: Meeting) -> None:
    """Also where another run had its turn, or its end, between a turn and the next of the same run."""
    other = met.join()
    for number, (run, theirs) in enumerate((("one", "theirs"), ("two", "ours"), ("three", "ours")), 1):
        met.leader.check(run)
        met.leader.advance(run)
        other.say(Done(number=number, witness=theirs))
        met.leader.advanced(run, "ours")
    met.leader.end("three")
    other.say(Done(number=4))
    met.leader.check("two")
    with pytest.raises(JobFailed, match=r"rank 1 on .* made theirs of a step, and rank 0 ours"):
        met.leader.check("one")


def test_what_a_rank_says_of_other_commands_is_not_what_it_made_of_a_turn(met: Meeting) -> None:
    other = met.join()
    met.leader.advance("run")
    other.say(Done(number=1, witness="ours"))
    met.leader.advanced("run", "ours")
    met.leader.drop("a", [1])
    other.say(Done(number=2))
    met.leader.check("run")


def test_the_others_give_their_parts_of_a_run_that_is_kept_and_not_when_the_group_ends(met: Meeting) -> None:
    other = met.join()
    met.leader.keep("run")
    assert hears(other) == Keep(number=1, run="run")
    other.say(Done(number=1))
    wait_until(lambda: met.leader.ready, "rank 0 has heard it")
    met.leader.close()
    with pytest.raises(WorkerUnavailable, match="the group is ending"):
        met.leader.keep("run")


def test_a_rank_that_dies_ends_the_worker_as_a_crash(met: Meeting) -> None:
    met.join().close()
    wait_until(lambda: met.ends == [70], "the process ends")


def test_a_rank_that_ends_with_an_error_ends_the_worker(met: Meeting, caplog: pytest.LogCaptureFixture) -> None:
    other = met.join()
    other.say(Holds(models={}))
    other.say(Stop(why="OutOfMemory: too large"))
    wait_until(lambda: met.ends == [70], "the process ends")
    assert "ended: OutOfMemory: too large" in caplog.text


def test_what_a_rank_cannot_load_is_the_error_of_the_start(met: Meeting) -> None:
    other = met.join()
    other.say(Stop(why="ModelError: 6 heads over 4 ranks given"))
    other.close()
    with pytest.raises(ConfigError, match=r"rank 1 on .*: ModelError: 6 heads over 4 ranks given"):
        met.leader.hold({"a": "own"})
    assert not met.ends


@pytest.mark.parametrize("first", ["rank 0", "rank 1"])
def test_ranks_that_choose_the_same_tokens_go_on_and_one_that_chooses_others_ends_the_group_by_name(
    met: Meeting, caplog: pytest.LogCaptureFixture, first: str
) -> None:
    other = met.join()
    words = other.words()
    for number, theirs in ((1, "same"), (2, "theirs")):
        met.leader.turn("a", lookahead=True)
        assert next(words) == Turn(number=number, model="a", lookahead=True)
        assert not met.ends
        if first == "rank 0":
            met.leader.turned("same")
            other.say(Done(number=number, witness=theirs))
        else:
            other.say(Done(number=number, witness=theirs))
            wait_until(lambda: met.leader.ready, "rank 0 has heard it")
            met.leader.turned("same")
    wait_until(lambda: met.ends == [70], "the process ends")
    assert "rank 1 on" in caplog.text
    assert "chose other tokens than rank 0" in caplog.text


def test_the_others_hear_of_a_lane_in_the_order_in_which_rank_0_says_it(met: Meeting) -> None:
    words, limits = met.join().words(), LaneLimits(slots=3, kv_bytes=5, prefix_share=0.5, stall=0.25, lookup=True)
    request = GenerateRequest(model="a", prompt_ids=(1, 2))
    answers = (Answer(tokens=(), finish_reason=None),)
    admission = Admission(number=1, submitted=0.1, request=request, prompt=(3,), answers=answers)
    met.leader.open("a", limits)
    met.leader.measured(0.1 + 0.2)
    met.leader.admit("a", admission)
    met.leader.drop("a", [1])
    met.leader.forget("a", ("style", 2))
    assert [next(words) for _ in range(5)] == [
        Open(number=1, model="a", slots=3, kv_bytes=5, prefix_share=0.5, stall=0.25, lookup=True),
        Measured(seconds=0.1 + 0.2),
        Admit(number=2, model="a", admission=admission),
        Drop(number=3, model="a", jobs=(1,)),
        Forget(number=4, model="a", name="style", version=2),
    ]


def test_a_rank_that_gives_no_sign_of_life_ends_the_worker(met: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "SILENCE", 0.2)
    other = met.join()
    wait_until(lambda: met.ends == [70], "the process ends")
    other.close()


def test_signs_of_life_are_enough(met: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "BEAT_EVERY", 0.02)
    monkeypatch.setattr(channel, "SILENCE", 0.5)
    began = time.monotonic()
    met.join().keep_alive()
    wait_until(lambda: time.monotonic() - began > 1.2, "twice the silence has passed")
    assert not met.ends


def test_a_rank_that_lives_and_does_nothing_has_the_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    met = Meeting(monkeypatch, step_limit=0.05)
    other = met.join()
    other.keep_alive()
    met.leader.advance("run")
    wait_until(lambda: met.ends == [70], "the process ends")
    with pytest.raises(WorkerUnavailable, match="the group is ending"):
        met.leader.advance("run")
    met.close()
    other.close()


def test_a_rank_that_mlx_has_lost_ends_the_worker_and_fails_no_job(met: Meeting) -> None:
    met.join()
    with pytest.raises(WorkerUnavailable, match="connection to a peer was lost"):
        met.leader.lose("connection to a peer was lost")
    assert met.ends == [70]


def test_the_others_hear_when_the_worker_stops_and_nothing_is_lost(met: Meeting) -> None:
    other = met.join()
    met.leader.close()
    assert hears(other) == Stop()
    assert met.started.stopped
    met.leader.end("run")
    assert not met.ends


class Following:
    """A rank behind the first one, and what the test says to it as rank 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loads: Callable[[], Any]) -> None:
        self._server = socket.create_server((LOOPBACK, 0))
        self.address = Address(LOOPBACK, self._server.getsockname()[1], 1 << 30, "secret")
        self.kills: list[int] = []
        monkeypatch.setattr(meeting, "meet", lambda *_: None)
        monkeypatch.setattr(meeting.os, "kill", lambda pid, number: self.kills.append(pid))  # type: ignore[attr-defined]
        monkeypatch.setattr(follower, "text_of_rank_0", lambda ranks: self.address.written)
        self.ends: list[int] = []
        place = Place(1, 2, "ring", LOOPBACK)
        self._follower = Follower(load_settings(), place, lambda shard: loads(), self.ends.append)
        self._errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.channel = Channel(self._server.accept()[0])
        self.words = self.channel.words()

    def _run(self) -> None:
        try:
            self._follower.run()
        except Exception as error:
            self._errors.append(error)

    def over(self) -> None:
        """It has ended; raises with what."""
        self.thread.join()
        self.channel.close()
        self._server.close()
        if self._errors:
            raise self._errors[0]


def _models() -> Any:
    return {"a": SimpleNamespace(digest="aa", decoder=None)}


@pytest.fixture
def following(monkeypatch: pytest.MonkeyPatch) -> Following:
    return Following(monkeypatch, _models)


def test_a_rank_makes_the_turns_of_a_lane_as_rank_0_says_and_answers_each_with_what_it_chose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    leading = Leading(tmp_path)
    mixed(leading)
    cancels(leading)
    leading.finish()
    folder = shared_model.write(tmp_path / "model")
    following = Following(monkeypatch, lambda: {"tiny": load("tiny", [str(folder)])})
    assert isinstance(next(following.words), Hello)
    assert isinstance(next(following.words), Holds)
    for seconds in leading.notes.seconds:
        following.channel.say(Measured(seconds=seconds))
    number, made, found = 0, list[str](), list[str]()
    for said, *given in leading.notes.words:
        if said == "turned":
            made += given
            continue
        number += 1
        following.channel.say(word_of(number, said, *given))
        answer = next(following.words)
        assert isinstance(answer, Done)
        assert answer.number == number
        found += [answer.witness] if said == "turn" else []
    assert found == made
    following.channel.say(Stop())
    following.over()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_rank_serves_the_adapter_that_rank_0_has_though_its_disk_has_another_of_that_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: bool
) -> None:
    """Its host may have served by itself: all ranks would choose the same tokens, of two adapters mixed."""
    folder = shared_model.write(tmp_path / "model")
    model = load("tiny", [str(folder)])
    weights, others = tiny.adapter(model, 2, 1), tiny.adapter(model, 2, 2)
    store = AdapterStore(load_settings().adapters)
    mx.eval([each.matrices for each in (weights, others)])
    store.write("tiny", "style", others, {})
    if damaged:
        (store.folder("tiny", "style", 1) / "adapter_model.safetensors").write_bytes(b"none")
    store.write("tiny", "style", weights, {})
    lends(monkeypatch, folder, weights)
    assert all(
        same(store.read("tiny", "style", version, model.linear_shapes).matrices, weights.matrices) for version in (1, 2)
    )
    (aside,) = store.folder("tiny", "style", 1).parent.glob("*-*")
    assert f"style@1 of tiny: files here were others than rank 0 has; they are in {aside}" in caplog.text


def test_a_rank_forgets_the_version_that_rank_0_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, dropped = shared_model.write(tmp_path / "model"), list[tuple[str, int]]()
    weights = tiny.adapter(load("tiny", [str(folder)]), 2, 1)
    mx.eval(weights.matrices)
    monkeypatch.setattr(AdapterPool, "drop", lambda _, name, version: dropped.append((name, version)))
    lends(monkeypatch, folder, weights, Forget(number=4, model="tiny", name="style", version=1))
    # What is lent takes the place of what was there.
    assert dropped == [("style", 1), ("style", 2), ("style", 1)]


def lends(monkeypatch: pytest.MonkeyPatch, folder: Path, weights: LoraWeights, *words: Word) -> None:
    """Rank 0 lends two versions, and says what is numbered 4 and on; the other rank does all of it."""
    monkeypatch.setattr(LentAdapter, "receive", lambda *_: weights)
    following = Following(monkeypatch, lambda: {"tiny": load("tiny", [str(folder)])})
    assert [type(next(following.words)) for _ in range(2)] == [Hello, Holds]
    for second in range(200):
        # Its warm-up goes by them.
        following.channel.say(Measured(seconds=float(second)))
    following.channel.say(word_of(1, "open", LaneLimits()))
    for number, version in enumerate((1, 2), 2):
        lent = LentAdapter.of("style", version, weights)
        following.channel.say(Lend(number=number, model="tiny", adapter=lent))
    for word in words:
        following.channel.say(word)
    assert [next(following.words) for _ in range(3 + len(words))] == [
        Done(number=number) for number in range(1, 4 + len(words))
    ]
    following.channel.say(Stop())
    following.over()


def word_of(number: int, said: str, given: Any) -> Word:
    if said == "open":
        return Open.of(number, "tiny", given)
    if said == "admit":
        return Admit(number=number, model="tiny", admission=given)
    if said == "drop":
        return Drop(number=number, model="tiny", jobs=tuple(given))
    return Turn(number=number, model="tiny", lookahead=given)


def test_a_rank_says_who_it_is_then_what_it_holds_and_ends_when_it_is_over(following: Following) -> None:
    said = next(following.words)
    assert isinstance(said, Hello)
    assert (said.rank, said.secret) == (1, "secret")
    assert next(following.words) == Holds(models={"a": "aa"})
    following.channel.say(Stop())
    following.over()
    assert not following.ends


def test_a_rank_that_is_refused_says_why(following: Following) -> None:
    following.channel.say(Stop(why="rank 1: MLX 0.1 given"))
    with pytest.raises(ConfigError, match=r"rank 0 has ended the group: rank 1: MLX 0\.1 given"):
        following.over()


def test_a_rank_answers_each_command_by_its_number(following: Following) -> None:
    next(following.words), next(following.words)
    following.channel.say(End(number=7, run="never begun"))
    assert next(following.words) == Done(number=7)
    following.channel.say(Stop())
    following.over()


def test_a_rank_that_fails_says_so_before_it_ends(following: Following) -> None:
    next(following.words), next(following.words)
    following.channel.say(Advance(number=1, run="never begun"))
    assert next(following.words) == Stop(why="KeyError: 'never begun'")
    with pytest.raises(KeyError):
        following.over()


def test_a_rank_whose_model_cannot_be_read_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise ConfigError("no such model")

    following = Following(monkeypatch, fails)
    next(following.words)
    assert next(following.words) == Stop(why="ConfigError: no such model")
    with pytest.raises(ConfigError):
        following.over()


def test_a_rank_ends_with_rank_0(following: Following) -> None:
    following.channel.close()
    wait_until(lambda: following.ends == [70], "the process ends")
    assert not following.kills


def test_a_rank_ends_when_rank_0_gives_no_sign_of_life_and_ends_that_too_if_it_is_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "SILENCE", 0.2)
    following = Following(monkeypatch, _models)
    wait_until(lambda: following.ends == [70], "the process ends")
    assert following.kills == [1 << 30]
    Address("10.0.0.1", 1, 1 << 30, "").kill()
    assert len(following.kills) == 1


def test_the_address_says_all_that_is_needed(tmp_path: Path) -> None:
    address = Address("10.0.0.1", 5, 6, "s")
    assert Address.read(address.written) == address
