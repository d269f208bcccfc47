"""What ranks say to each other, and what has to be alike on all of them."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.generation.followed import Admission
from engine.generation.prompt import TokenizedPrompt
from engine.generation.row import Generation
from engine.ticket import Ticket
from stoker.contract import GenerateRequest, GenerateResult
from stoker.contract.requests import MAX_PROMPT_IDS
from stoker.errors import ConfigError
from stoker.settings import load_settings
from tests.engine import tiny
from workers.group import meeting
from workers.group.channel import Channel
from workers.group.plan import LONGEST, Admit, Advance, Beat, Done, Hello, NotOfThePlan, Stop, Word, read, written
from workers.group.starting import LOOPBACK, free_ports, place_of, place_of_group


def hello(rank: int = 1, **changes: object) -> Hello:
    known = meeting.introduction(load_settings(), "secret", rank).model_dump()
    return Hello(**{**known, "host": "two", **changes})


@pytest.mark.parametrize("word", [hello(), Advance(number=3, run="a"), Done(number=3, witness="x"), Stop(why="so")])
def test_a_word_is_a_line_and_is_read_as_it_was_written(word: Word) -> None:
    line = written(word)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert read(line) == word


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"", "expected JSON"),
        (b"\xff", "expected JSON"),
        (b"[]", "[] given; expected an object"),
        (b"{}", "{} given; expected an object"),
        (b'{"said": "dance"}', "{'said': 'dance'} given; expected an object whose 'said' is one of 'hello', "),
        (b'{"said": "advance", "number": -1, "run": "a"}', "advance.number: -1 given; expected at least 0"),
        (b'{"said": "advance", "number": 1, "run": "a", "more": 1}', "advance.more: no such field"),
        (b'{"said": "done", "number": 1.5}', "done.number: 1.5 given; expected a whole number"),
        (b'{"said": "end", "number": 1}', "end.run: missing; it has to be given"),
    ],
)
def test_what_is_no_word_of_the_plan_is_shown_and_refused_in_words_of_stokers(line: bytes, why: str) -> None:
    with pytest.raises(NotOfThePlan, match=f"given; a word of plan 6 is needed {re.escape(f'({why}')}"):
        read(line)


def test_a_word_that_nobody_would_read_is_not_written() -> None:
    # Letters that JSON writes as six each.
    with pytest.raises(NotOfThePlan, match=f"{LONGEST} are allowed"):
        written(Advance.model_construct(number=1, run="x" * LONGEST))


def test_a_text_of_more_tokens_than_a_client_may_send_as_ids_reaches_the_other_ranks() -> None:
    request, ids = GenerateRequest(model="long", prompt="a long text"), list(range(MAX_PROMPT_IDS + 1))
    ticket: Ticket[GenerateResult] = Ticket("one", request.kind)
    work = Generation(ticket, request, TokenizedPrompt(ids), tiny.tokenizer(8), context=2 * len(ids))
    word = read(written(Admit(number=1, model="long", admission=Admission.of(1, work))))
    assert isinstance(word, Admit)
    assert list(word.admission.prompt) == ids


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and what it is connected to."""
    with socket.create_server((LOOPBACK, 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        channel = Channel(server.accept()[0])
    with theirs:
        yield channel, theirs
        channel.close()


def test_words_come_out_of_a_socket_one_by_one_and_signs_of_life_do_not(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    words: list[Word] = [Advance(number=1, run="a"), Beat(), Done(number=1)]
    sent = b"".join(written(word) for word in words)
    theirs.sendall(sent[:9])
    theirs.sendall(sent[9:])
    theirs.shutdown(socket.SHUT_WR)
    assert list(channel.words()) == [words[0], words[2]]


def test_what_came_together_with_a_word_is_there_for_the_next_reader(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    words: list[Word] = [Advance(number=1, run="a"), Done(number=1), Advance(number=2, run="b")]
    sent = b"".join(written(word) for word in words)
    theirs.sendall(sent[:-9])
    assert next(channel.words()) == words[0]
    theirs.sendall(sent[-9:])
    theirs.shutdown(socket.SHUT_WR)
    assert list(channel.words()) == words[1:]


def test_a_line_without_end_is_not_kept(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    feeding = threading.Thread(target=theirs.sendall, args=(b"x" * (LONGEST + 2),))
    feeding.start()
    with pytest.raises(NotOfThePlan, match="a line of more than"):
        next(channel.words())
    feeding.join()


@pytest.mark.parametrize(
    ("field", "given", "said"),
    [
        ("stoker", "0.0.1", "rank 1 on two: Stoker 0.0.1 given; rank 0 has"),
        ("mlx", "0.1.0", "MLX 0.1.0 given; rank 0 has"),
        ("plan", 1, "the plan's version 1 given; rank 0 has 6"),
        ("device", "gpu", "the device gpu given; rank 0 has cpu"),
        ("precision", "float16", "the precision float16 given"),
        ("shard", True, "STOKER_SHARD True given; rank 0 has False. Set it alike on every host."),
    ],
)
def test_a_rank_that_is_not_alike_is_named_with_what_is_given_and_needed(field: str, given: object, said: str) -> None:
    (found,) = meeting.differences(hello(0), [hello(1, **{field: given})])
    assert said in found


def test_ranks_that_are_alike_fit_together_and_one_that_came_twice_does_not() -> None:
    assert not list(meeting.differences(hello(0), [hello(2), hello(1)]))
    assert list(meeting.differences(hello(0), [hello(1), hello(1)])) == [
        "ranks: [1, 1] given; [1, 2] are needed. Start each rank once."
    ]


def test_a_model_that_a_rank_lacks_or_has_with_other_weights_is_named() -> None:
    own = {"a": "aa", "b": "bb", "c": "cc"}
    lacking, other = meeting.missing_models(2, own, {"a": "aa", "c": "dd", "d": "dd"})
    assert lacking.startswith("rank 2: none given of model b; rank 0 has weights bb.")
    assert other.startswith("rank 2: weights dd given of model c; rank 0 has weights cc.")


def test_the_place_in_a_group_is_what_mlx_says(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["10.0.0.1:5000", "10.1.0.1:5000"], ["10.0.0.2:5000"]]))
    place = place_of({"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)})
    assert (place.rank, place.size, place.backend, place.host) == (1, 2, "ring", "10.0.0.1")
    place = place_of({"MLX_RANK": "0", "MLX_WORLD_SIZE": "4", "NCCL_HOST_IP": "10.0.0.9"})
    assert (place.size, place.backend, place.host) == (4, "nccl", "10.0.0.9")


def test_a_single_host_is_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text("")
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    assert place_of_group(load_settings(group="g")) is None
    assert place_of_group(load_settings()) is None


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MLX_RANK": "x", "MLX_HOSTFILE": "/nowhere"},
        {"MLX_RANK": "0", "MLX_HOSTFILE": "/nowhere"},
        {"MLX_RANK": "0", "MLX_WORLD_SIZE": "2"},
    ],
)
def test_a_group_that_mlx_did_not_start_is_refused_with_how_to_start_it(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"mlx\.launch --hostfile hosts\.json -- stoker worker --group NAME"):
        place_of(environment)


def test_a_rank_beyond_the_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="MLX_RANK: 2 given; the group has the ranks 0 to 1"):
        place_of({"MLX_RANK": "2", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "10.0.0.9"})


def test_one_rank_has_nobody_to_share_a_model_with() -> None:
    with pytest.raises(ConfigError, match=r"STOKER_SHARD given, and one rank; .* Give --group-size 2, or --group"):
        place_of_group(load_settings(shard=True))


def test_free_ports_are_different() -> None:
    assert len(set(free_ports(8))) == 8
