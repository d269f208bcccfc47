"""`stoker generate FILE -o OUT` with a client in memory: a line for each request, once, also after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from stoker.cli import app
from stoker.cli import generate as generate_command
from stoker.contract import GenerateRequest, GenerateResult
from stoker.contract.requests import LOWEST_PRIORITY
from stoker.errors import BrokerUnavailable, DatasetError, InvalidRequest, JobError, StokerError, UnknownModel
from stoker.files import output as output_module
from stoker.files.output import partial_path, state_path
from stoker.files.requests import RequestFile
from stoker.testing import FakeClient


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeClient:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output_module, "SAFE_EVERY", 0.0)
    made = FakeClient(models={"m": ["generate"]})
    monkeypatch.setattr(generate_command, "connect", lambda url: made)
    return made


def run(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", *words], input=stdin)


def refused(*words: str, error: type[StokerError] = InvalidRequest) -> str:
    """What the command says as it ends."""
    done = run(*words)
    assert type(done.exception) is error, done.output
    return str(done.exception)


def write(*lines: Any) -> None:
    """in.jsonl"""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    Path("in.jsonl").write_text(text + "\n")


def read(name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text("utf-8").split("\n") if line]


def echo(client: FakeClient, times: int | None = None) -> None:
    client.script.generate(lambda request: shown(request), times=times)


def shown(request: GenerateRequest) -> str:
    return request.prompt or " ".join(message.content or "" for message in request.messages or ())


def test_each_request_of_a_file_has_its_line_with_the_answer_and_its_own_id(client: FakeClient) -> None:
    message = {"role": "user", "content": "wie schön\u2028"}
    write({"prompt": "a", "id": 7}, "", {"messages": [message], "custom_id": "x", "max_tokens": 3}, {"prompt": "c"})
    echo(client)
    done = run("in.jsonl", "-o", "out.jsonl", "--max-tokens", "9")
    assert (done.exit_code, done.stdout) == (0, "out.jsonl: 3 answers to 3 requests\n")
    lines = read()
    assert [{name: line[name] for name in line if name != "result"} for line in lines] == [
        {"line": 1, "id": 7},
        {"line": 3, "custom_id": "x"},
        {"line": 4},
    ]
    assert [line["result"]["text"] for line in lines] == ["a", "wie schön\u2028", "c"]
    assert [GenerateResult.model_validate_json(json.dumps(line["result"])).model for line in lines] == ["m"] * 3
    assert [request.max_tokens for request in client.sent.generate] == [9, 3, 9]
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "out.jsonl"]


def test_the_requests_of_a_file_are_served_last_unless_it_is_said(client: FakeClient) -> None:
    write({"prompt": "a"}, {"prompt": "b", "priority": 3})
    echo(client)
    run("in.jsonl", "-o", "out.jsonl")
    run("in.jsonl", "-o", "two.jsonl", "--priority", "4")
    run("a text", "--raw")
    assert [request.priority for request in client.sent.generate] == [LOWEST_PRIORITY, 3, 4, 3, 5]


WRONG = {
    "{": ("DatasetError", "in.jsonl, line 2: not JSON"),
    "[" * 100_000: ("DatasetError", "line 2: "),
    "[1]": ("InvalidRequest", "[1] given; expected an object"),
    '{"prompt": 3}': ("InvalidRequest", "prompt: "),
    '{"prompt": "a", "max_tokens": -1}': ("InvalidRequest", "max_tokens: "),
    '{"prompt": "a", "max_token": 3}': ("InvalidRequest", "did you mean max_tokens?"),
    '{"prompt": "a", "prompt": "b"}': ("DatasetError", 'the field "prompt" is there twice; name each once'),
    '{"id": 1}': ("InvalidRequest", "no prompt given"),
    '{"id": [1], "prompt": "a"}': ("InvalidRequest", "id: [1] given; expected a text or a whole number"),
    '{"id": true, "prompt": "a"}': ("InvalidRequest", "id: true given; expected a text or a whole number"),
    '{"id": 1, "custom_id": 2, "prompt": "a"}': ("InvalidRequest", "at most one of them"),
    '{"prompt": "a", "max_tokens": true}': ("InvalidRequest", "max_tokens: true given; expected a number."),
    '{"prompt": "a", "n": null}': ("InvalidRequest", "n: null given; expected a whole number."),
    '{"prompt": "a", "ignore_eos": "no way"}': (
        "InvalidRequest",
        'ignore_eos: "no way" given; expected true or false.',
    ),
    '{"prompt": "a", "stop": ["x", null]}': ("InvalidRequest", "stop.1: null given; expected a text."),
    '{"prompt": "a", "json_schema": ["x", true]}': (
        "InvalidRequest",
        'json_schema: ["x", true] given; expected an object',
    ),
    '{"prompt": "a", "max token": 3}': ("InvalidRequest", '"max token": no such option'),
    '{"prompt": {"a": true}}': ("InvalidRequest", 'prompt: {"a": true} given; expected a text, a list of token ids'),
    '{"prompt": "a", "model": false}': ("InvalidRequest", "model: false given; expected a name, or null for the only"),
    '{"prompt": "a", "seed": [true]}': ("InvalidRequest", "seed: [true] given; expected a whole number."),
    '{"messages": [{"role": "user", "content": true}]}': ("InvalidRequest", "content: true given; expected a text."),
    '{"prompt": "a", "adapter": "none"}': ("UnknownAdapter", "none"),
    '{"prompt": "a", "model": "none"}': ("UnknownModel", "none"),
}


@pytest.mark.parametrize("line", WRONG, ids=range(len(WRONG)))
def test_a_line_that_is_wrong_has_its_error_and_the_others_their_answers(client: FakeClient, line: str) -> None:
    write({"prompt": "a"}, line, {"prompt": "c"})
    echo(client)
    done = run("in.jsonl", "-o", "out.jsonl")
    assert done.stdout == "out.jsonl: 2 answers to 3 requests\n"
    assert type(done.exception) is JobError
    said = str(done.exception)
    assert said.startswith("1 of 3 requests have no answer; their lines in out.jsonl say why")
    first, second, third = read()
    assert (first["result"]["text"], third["result"]["text"]) == ("a", "c")
    name, message = WRONG[line]
    assert second["line"] == 2
    assert second["error"]["type"] == name
    assert message in second["error"]["message"]
    assert "result" not in second


def test_a_seed_is_that_of_each_request_and_without_one_each_draws_its_own(client: FakeClient) -> None:
    echo(client)
    write({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "seed": 9})
    assert run("in.jsonl", "-o", "out.jsonl", "--seed", "6").exit_code == 0
    assert sorted(request.seed for request in client.sent.generate) == [6, 6, 9]
    assert run("in.jsonl", "-o", "other.jsonl").exit_code == 0
    drawn = [request.seed for request in client.sent.generate[3:]]
    assert len(set(drawn)) == 3


def test_an_id_with_half_a_surrogate_pair_comes_back_as_it_was(client: FakeClient) -> None:
    write('{"prompt": "a", "id": "\\ud800é"}')
    echo(client)
    run("in.jsonl", "-o", "out.jsonl")
    assert read()[0]["id"] == "\ud800é"


def test_a_file_that_was_interrupted_goes_on_behind_its_last_answer(client: FakeClient) -> None:
    write(*({"prompt": f"{number}"} if number != 1 else "{" for number in range(10)))
    words = ("in.jsonl", "-o", "out.jsonl", "--in-flight", "2", "--stop", "!")
    echo(client, times=5)
    client.script.generate(error=BrokerUnavailable("away"), times=2)
    refused(*words, error=BrokerUnavailable)
    assert not Path("out.jsonl").exists()
    echo(client)
    sent = len(client.sent.generate)
    done = run(*words, "--json", "--priority", "8")
    said = json.loads(done.stdout)
    assert (said["rows"], said["resumed"], said["errors"]) == (10, 6, 1), "errors of both runs count"
    assert [line["line"] for line in read()] == list(range(1, 11))
    assert [line["result"]["text"] for line in read() if "result" in line] == [*"0", *"23456789"]
    assert [request.prompt for request in client.sent.generate[sent:]] == list("6789")
    assert "is there already" in refused(*words)


def meanwhile(monkeypatch: pytest.MonkeyPatch, write: Callable[[], object]) -> None:
    """What another program does to the file once its requests were counted; the first time."""
    survey = RequestFile.survey

    def surveyed(source: RequestFile) -> tuple[int, str]:
        found = survey(source)
        monkeypatch.setattr(RequestFile, "survey", survey)
        write()
        return found

    monkeypatch.setattr(RequestFile, "survey", surveyed)


def test_answers_are_kept_though_their_file_grows_meanwhile(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"prompt": text} for text in "abc"]
    write(*lines)
    echo(client)
    meanwhile(monkeypatch, lambda: write(*lines, {"prompt": "late"}))
    said = refused("in.jsonl", "-o", "out.jsonl", error=DatasetError)
    assert "it has more than the 3 rows that were counted. Those are done" in said
    write(*lines)
    assert run("in.jsonl", "-o", "out.jsonl").exit_code == 0
    assert [line["result"]["text"] for line in read()] == list("abc")
    assert [request.prompt for request in client.sent.generate] == list("abc"), "each once"


@pytest.mark.parametrize("left", ["a", "axc"])
def test_of_a_file_that_changes_meanwhile_nothing_is_kept(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    write(*({"prompt": text} for text in "abc"))
    echo(client)
    meanwhile(monkeypatch, lambda: write(*({"prompt": text} for text in left)))
    assert "its 3 rows have changed" in refused("in.jsonl", "-o", "out.jsonl", error=DatasetError)
    write(*({"prompt": text} for text in "abc"))
    assert run("in.jsonl", "-o", "out.jsonl").exit_code == 0
    assert [line["result"]["text"] for line in read()] == list("abc")


def test_another_input_or_other_options_do_not_go_on_behind_the_first(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    write({"prompt": "a"}, {"prompt": "b"})
    echo(client, times=1)
    client.script.generate(error=BrokerUnavailable("away"))
    words = ("in.jsonl", "-o", "out.jsonl", "--in-flight", "1")
    refused(*words, error=BrokerUnavailable)
    for more, differing in ((("--max-tokens", "3"), "max_tokens"), (("--chat",), "chat"), (("--seed", "1"), "seed")):
        assert f"with another {differing}. Give the same, or pass --overwrite" in refused(*words, *more)
    with monkeypatch.context() as later:
        # The only model that is warm by now.
        later.setattr(client, "choose_model", lambda model, ability: "another")
        assert "with another model. Give the same" in refused(*words)
    write({"prompt": "a"}, {"prompt": "c"})
    assert "with another input" in refused(*words)
    echo(client)
    assert run(*words, "--overwrite").exit_code == 0
    assert [line["result"]["text"] for line in read()] == ["a", "c"]


def test_an_interrupted_run_is_begun_anew_where_that_is_asked_and_nothing_is_to_be_replaced(client: FakeClient) -> None:
    write({"prompt": "a"}, {"prompt": "b"})
    client.script.generate("of the adapter before", times=1)
    client.script.generate(error=BrokerUnavailable("away"), times=1)
    words = ("in.jsonl", "-o", "out.jsonl", "--in-flight", "1", "--overwrite")
    refused(*words, error=BrokerUnavailable)
    echo(client)
    assert run(*words).exit_code == 0
    assert [line["result"]["text"] for line in read()] == ["a", "b"]


def test_an_interrupted_run_that_replaces_a_file_goes_on_when_it_is_given_again(client: FakeClient) -> None:
    write({"prompt": "a"}, {"prompt": "b"})
    Path("out.jsonl").write_text("old\n")
    client.script.generate("first", times=1)
    client.script.generate(error=BrokerUnavailable("away"), times=1)
    words = ("in.jsonl", "-o", "out.jsonl", "--in-flight", "1", "--overwrite")
    refused(*words, error=BrokerUnavailable)
    assert Path("out.jsonl").read_text() == "old\n"
    echo(client)
    assert run(*words).exit_code == 0
    assert [line["result"]["text"] for line in read()] == ["first", "b"]


def test_options_that_are_wrong_and_files_that_cannot_be_leave_nothing_behind(client: FakeClient) -> None:
    write({"prompt": "a"})
    for words, said in (
        (("in.jsonl", "-o", "out.txt"), "it has to end in .jsonl"),
        (("in.jsonl", "-o", "none/out.jsonl"), "no folder"),
        (("in.jsonl", "-o", "out.jsonl", "--max-tokens", "0"), "max_tokens"),
        (("in.jsonl", "-o", "out.jsonl", "--in-flight", "0"), "in_flight"),
        (("in.jsonl", "-o", "out.jsonl", "--priority", "10"), "priority"),
        (("in.jsonl",), "name a file for the answers to its requests with --output"),
    ):
        assert said in refused(*words)
    assert "cannot be read" in str(run("none.jsonl", "-o", "out.jsonl").exception)
    refused("in.jsonl", "-o", "out.jsonl", "--model", "none", error=UnknownModel)
    Path("in.jsonl").write_text("\n \n")
    assert "no request in it" in str(run("in.jsonl", "-o", "out.jsonl").exception)
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]
    assert not client.sent.jobs


@pytest.mark.parametrize("source", ["out.jsonl", "out.jsonl.partial", "out.jsonl.partial.json", "link.jsonl"])
def test_an_output_is_never_written_over_its_own_input(client: FakeClient, source: str) -> None:
    write({"prompt": "a"})
    Path("in.jsonl").rename("out.jsonl" if source == "link.jsonl" else source)
    Path("link.jsonl").symlink_to("out.jsonl")
    before = Path(source).read_bytes()
    assert f"out.jsonl given, which would be written over its input {source}" in refused(
        source, "-o", "out.jsonl", "--overwrite"
    )
    assert Path(source).read_bytes() == before
    assert not client.sent.jobs


def test_a_prompt_of_a_file_is_continued_as_it_is_and_with_chat_a_message(client: FakeClient) -> None:
    write({"prompt": "a", "max_tokens": 3}, {"prompt": [1]}, {"messages": [{"role": "system", "content": "b"}]})
    echo(client)
    run("in.jsonl", "-o", "raw.jsonl")
    run("in.jsonl", "-o", "chat.jsonl", "--chat")
    raw, chat = client.sent.generate[:3], client.sent.generate[3:]
    assert [request.prompt for request in raw] == ["a", None, None]
    assert [[message.role for message in request.messages or ()] for request in chat] == [["user"], [], ["system"]]
    assert {request.prompt_ids for request in (raw[1], chat[1])} == {(1,)}
    assert (raw[0].max_tokens, chat[0].max_tokens) == (3, 3), "its own options hold in both"


def test_requests_may_come_from_standard_input(client: FakeClient) -> None:
    echo(client)
    assert run("-", "-o", "out.jsonl", stdin='{"prompt": "a"}\n{"prompt": "b"}\n').exit_code == 0
    assert [line["result"]["text"] for line in read()] == ["a", "b"]


def test_a_disk_that_takes_no_more_ends_the_command_and_cancels_what_is_under_way(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        if path == partial_path(Path("out.jsonl")):
            raise OSError(28, "No space left on device")

    write(*({"prompt": f"{number}"} for number in range(9)))
    echo(client)
    monkeypatch.setattr(output_module, "flush", full)
    said = refused("in.jsonl", "-o", "out.jsonl", "--in-flight", "3")
    assert "cannot be written (No space left on device); the first 0 of its 9 rows are safe" in said
    assert [client.job(job.job_id).status().value for job in client.sent.jobs] == ["done", "cancelled", "cancelled"]


def test_a_record_that_another_program_wrote_is_not_believed(client: FakeClient) -> None:
    write({"prompt": "a"}, {"prompt": "b"})
    echo(client)
    for spoiled in ("{", "[]", '{"job": [], "done": 1, "bytes": 1}', '{"job": {}, "done": "x", "bytes": 1}', "{}"):
        partial_path(Path("out.jsonl")).write_text("xxxx\n")
        state_path(Path("out.jsonl")).write_text(spoiled)
        assert run("in.jsonl", "-o", "out.jsonl", "--overwrite").exit_code == 0
        assert [line["result"]["text"] for line in read()] == ["a", "b"]
