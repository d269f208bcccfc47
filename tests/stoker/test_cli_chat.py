"""A conversation on a terminal: what is part of it, and what is forgotten, when an answer fails or is broken off."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from stoker.cli import app, chat, inputs, options
from stoker.contract import StreamToken
from stoker.errors import BrokerUnavailable, InvalidRequest, OutOfMemory, StokerError, TextTooLong, UnknownModel
from stoker.local.interrupts import AskedToEnd, end_cleanly
from tests.stoker.test_cli import RESULT, FakeClient, FakeJob, asked, run

__all__ = ["asked"]


class Refusing(FakeClient):
    """Answers one question with the error `refuses`."""

    refuses: BaseException | None = None
    #: What was asked, in order.
    prompts: list[list[tuple[str, str]]]
    seeds: list[int | None]

    def __init__(self) -> None:
        self.prompts, self.seeds = [], []

    def generate(self, prompt: Any, **options: Any) -> FakeJob:
        self.prompts.append([(message["role"], message["content"]) for message in prompt])
        self.seeds.append(options["seed"])
        error, self.refuses = self.refuses, None
        if error is not None:
            raise error
        return super().generate(prompt, **options)

    def choose_model(self, model: str | None, kind: str) -> str:
        if model == "nope":
            raise UnknownModel("model 'nope' given.")
        return super().choose_model(model, kind)


@pytest.fixture
def client() -> Refusing:
    return Refusing()


@pytest.fixture
def talk(client: Refusing) -> chat.Conversation:
    return chat.Conversation(client, "m", {"max_tokens": 5})  # type: ignore[arg-type]


ANSWER = ("assistant", "one two")


@pytest.mark.parametrize(
    ("error", "said"),
    [(InvalidRequest("no role is so."), "no role is so."), (TextTooLong("70 tokens given"), "/clear forgets it")],
)
def test_a_message_that_cannot_be_answered_is_forgotten_and_the_conversation_goes_on(
    client: Refusing, talk: chat.Conversation, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    talk.take("Hello")
    client.refuses = error
    talk.take("what is refused")
    assert said in capsys.readouterr().err.replace("\n", " ")
    talk.take("Bye")
    assert client.prompts[-1] == [("user", "Hello"), ANSWER, ("user", "Bye")]


def _breaks(_: FakeJob) -> Iterator[StreamToken]:
    yield StreamToken(index=0, token_id=1, text="half", logit=0, logprob=0, probability=1)
    raise OutOfMemory("no room for the answer.")


def test_an_answer_that_fails_takes_no_conversation_with_it_on_a_terminal(
    client: Refusing,
    talk: chat.Conversation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(chat, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    talk.take("Hello")
    with monkeypatch.context() as patched:
        patched.setattr(FakeJob, "stream", _breaks)
        talk.take("what breaks off")
    client.refuses = BrokerUnavailable("no broker answers.")
    talk.take("what is not sent")
    out, err = capsys.readouterr()
    assert out == "one two\nhalf\n"
    assert err.replace("\n", " ") == "no room for the answer. no broker answers. "
    talk.take("Bye")
    assert client.prompts[-1] == [("user", "Hello"), ANSWER, ("user", "Bye")]


def test_an_answer_that_fails_ends_what_a_program_has_written(
    talk: chat.Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: False)))
    monkeypatch.setattr(FakeJob, "stream", _breaks)
    with pytest.raises(OutOfMemory):
        talk.take("Hello")


def test_what_was_said_until_ctrl_c_is_part_of_the_conversation(
    client: Refusing, talk: chat.Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(_: FakeJob) -> Iterator[StreamToken]:
        yield StreamToken(index=0, token_id=1, text="one", logit=0, logprob=0, probability=1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FakeJob, "stream", stream)
        talk.take("Hello")
    talk.take("Go on")
    assert client.prompts[-1] == [("user", "Hello"), ("assistant", "one"), ("user", "Go on")]


def test_ctrl_c_stops_a_message_that_is_on_its_way_and_not_the_conversation(
    client: Refusing, talk: chat.Conversation
) -> None:
    """A full queue, or a broker that is away, keeps it there for long."""
    talk.take("Hello")
    client.refuses = KeyboardInterrupt()
    try:
        talk.take("what is not sent")
    except KeyboardInterrupt:
        pytest.fail("the conversation has ended")
    talk.take("Bye")
    assert client.prompts[-1][:2] == [("user", "Hello"), ANSWER]
    assert client.prompts[-1][-1] == ("user", "Bye")
    client.refuses = AskedToEnd()
    with pytest.raises(AskedToEnd):
        talk.take("what ends the program")


def test_another_try_takes_the_last_answer_back_and_has_a_new_seed(
    client: Refusing, talk: chat.Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.take("/retry")
    assert "nothing to answer yet" in capsys.readouterr().err
    talk.seed = 7
    talk.take("Hello")
    talk.take("/retry")
    assert client.prompts == [[("user", "Hello")]] * 2
    assert client.seeds == [7, 8]


def test_a_conversation_with_a_seed_is_the_same_each_time_and_its_answers_have_seeds_of_their_own(
    client: Refusing, talk: chat.Conversation
) -> None:
    talk.seed = 7
    for said in ("Hello", "And you?", "Well."):
        talk.take(said)
    assert client.seeds == [7, 8, 9]


@pytest.mark.parametrize(
    ("refuses", "said", "code"),
    [
        (None, "Hello\n", 0),
        (InvalidRequest("no role is so."), "Hello\nAnd you?\n", 2),
        (None, "/model nope\nHello\n", UnknownModel.exit_code),
    ],
)
def test_a_program_learns_by_the_exit_code_that_something_was_refused_though_the_conversation_went_on(
    client: Refusing, monkeypatch: pytest.MonkeyPatch, refuses: StokerError | None, said: str, code: int
) -> None:
    monkeypatch.setattr(chat, "connect", lambda url: client)
    client.refuses = refuses
    done = CliRunner().invoke(app, ["chat"], input=said)
    assert (done.exit_code, done.stdout) == (code, "one two\n")


def test_the_systems_message_comes_first_and_goes_with_an_empty_one(client: Refusing, talk: chat.Conversation) -> None:
    talk.take("/system Be brief.")
    talk.take("Hello")
    talk.take("/system")
    talk.take("Bye")
    assert client.prompts == [
        [("system", "Be brief."), ("user", "Hello")],
        [("user", "Hello"), ANSWER, ("user", "Bye")],
    ]


def test_an_adapter_is_used_until_another_is_named_or_none(client: Refusing, talk: chat.Conversation) -> None:
    used = []
    for line in ("/adapter style", "/adapter other", "/adapter"):
        talk.take(line)
        talk.take("Hello")
        used.append(client.asked["adapter"])
    assert used == ["style", "other", None]


def test_a_model_that_nobody_serves_is_said_and_the_one_before_stays(
    client: Refusing, talk: chat.Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.take("/model nope")
    assert "'nope' given" in capsys.readouterr().err
    talk.take("Hello")
    assert client.asked["model"] == "m"
    assert talk.described() == "m, no adapter"


def test_empty_lines_are_no_messages_and_nothing_is_read_behind_the_end(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "lines", lambda: iter(["", "  ", "Hello", "", "/exit", "never"]))
    assert run("chat").count("one two") == 1
    assert asked["prompt"] == [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("at", ["an answer", "the prompt"])
def test_what_ends_a_program_is_no_ctrl_c(
    client: Refusing, talk: chat.Conversation, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """SIGTERM, or a terminal that closes: `timeout 60 stoker chat` ends."""

    def ends(*_: object) -> Iterator[Any]:
        yield from ()
        raise AskedToEnd

    monkeypatch.setattr(FakeJob, "stream", ends)
    monkeypatch.setattr(inputs, "lines", ends)
    with pytest.raises(AskedToEnd):
        talk.take("Hello") if at == "an answer" else list(chat.lines_said())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_interrupts_and_those_that_end_a_program_say_so(number: signal.Signals) -> None:
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    end_cleanly()
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(number)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert isinstance(caught.value, AskedToEnd) == (number != signal.SIGINT)


NASTY = "Hi\tyou\n\x1b]52;c;cm0K\x07\x1b[2J\r\x9b1m\u202eé"
HARMLESS = "Hi\tyou\n\ufffd]52;c;cm0K\ufffd\ufffd[2J\ufffd1m\ufffdé"


@pytest.mark.parametrize("words", [("generate", "hello"), ("generate", "hello", "--n", "2"), ("chat",)])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_models_text_does_not_drive_the_terminal_and_goes_into_a_pipe_as_it_is(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], terminal: bool
) -> None:
    """Escape sequences write the clipboard, clear the screen and set its title."""
    made = RESULT.model_copy(update={"text": NASTY})
    token = StreamToken(index=0, token_id=1, text=NASTY, logit=0, logprob=0, probability=1)
    monkeypatch.setattr(FakeJob, "stream", lambda _: iter([token]))
    monkeypatch.setattr(FakeJob, "result", lambda _: made)
    monkeypatch.setattr(options, "is_terminal", lambda: terminal)
    shown = CliRunner().invoke(app, words, input="hello\n", catch_exceptions=False).stdout_bytes.decode()
    assert (HARMLESS if terminal else NASTY) in shown
    assert (NASTY in shown) is not terminal
