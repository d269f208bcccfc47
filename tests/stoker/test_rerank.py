"""Reranking: what is asked, what travels, what comes back, and whom it goes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stoker import RerankJob, RerankResult
from stoker.broker.ledger.record import Field
from stoker.cli import app
from stoker.cli import rerank as command
from stoker.client.submission import job_record
from stoker.contract import EmbedRequest, ModelCard, Usage, build, decode, encode
from stoker.contract.kinds import ABILITIES, EMBED
from stoker.errors import ConfigError, DatasetError, InvalidRequest, JobFailed, JobLost, TextTooLong, UnknownModel
from stoker.testing import FakeClient

TEXTS = ["a cold start", "a warm model", "the model is warm"]


@pytest.fixture
def client() -> FakeClient:
    return FakeClient(models={"mini": ["embed"], "bge": ["rerank"], "smol": ["generate"]})


def test_texts_come_back_by_how_well_they_answer_the_query(client: FakeClient) -> None:
    client.script.rerank([0.25, 0.75, 0.5])
    job = client.rerank("which model is warm?", TEXTS, truncate=True, prompt="judge", priority=2)
    result = job.result()
    assert isinstance(job, RerankJob)
    assert isinstance(result, RerankResult)
    assert result.scores == (0.25, 0.75, 0.5)
    assert [(ranked.index, ranked.score) for ranked in result.ranking()] == [(1, 0.75), (2, 0.5), (0, 0.25)]
    assert [ranked.index for ranked in result.ranking(1)] == [1]
    assert result.usage.worker
    (sent,) = client.sent.rerank
    assert (sent.query, sent.texts, sent.truncation, sent.prompt) == (
        "which model is warm?",
        tuple(TEXTS),
        "end",
        "judge",
    )
    assert (sent.model, sent.kind, sent.ability, client.sent.embed) == ("bge", "embed", "rerank", ())


def test_texts_with_one_score_keep_their_order() -> None:
    result = RerankResult(scores=(0.5, 0.9, 0.5, 0.9), usage=Usage())
    assert [ranked.index for ranked in result.ranking()] == [1, 3, 0, 2]
    assert result.ranking(0) == ()


def test_a_job_is_found_again_as_what_it_is(client: FakeClient) -> None:
    embeds, reranks = client.embed(TEXTS), client.rerank("a model", TEXTS)
    assert type(client.job(embeds.id)) is type(embeds)
    found = client.job(reranks.id)
    assert isinstance(found, RerankJob)
    assert found.result() == reranks.result()
    assert found.result().scores[1] > found.result().scores[0]
    with pytest.raises(InvalidRequest, match="given for a job of kind embed; it is that of a job of kind rerank"):
        client.embed(TEXTS, job_id=reranks.id)
    reranks.discard()
    with pytest.raises(JobLost):
        reranks.result()


@pytest.mark.parametrize("script", [[0.5], [[0.5]] * 3])
def test_a_script_has_a_number_for_each_text(client: FakeClient, script: Any) -> None:
    client.script.rerank(script)
    with pytest.raises(InvalidRequest, match=r"script\.rerank: scores of shape .* for 3 texts"):
        client.rerank("q", TEXTS)


def test_a_script_says_how_jobs_end_and_may_be_a_function(client: FakeClient) -> None:
    client.script.rerank(error=JobFailed("broken"))
    client.script.rerank(lambda request: [float(len(text)) for text in request.texts], times=None)
    with pytest.raises(JobFailed, match="broken"):
        client.rerank("q", TEXTS).result()
    assert (
        client.rerank("q", ["a", "bcd"]).result().scores == client.rerank("q", ["x", "yzu"]).result().scores == (1, 3)
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"query": " "}, "query: an empty text given"), ({"query": 7}, "query: 7 given; expected a text"),
     ({"query": None}, "query: None given; expected a text"), ({"texts": "one"}, "texts: one text given"),
     ({"texts": []}, "texts: "), ({"texts": ["a", ""]}, r"texts\.1: an empty text given"),
     ({"dimensions": 4}, "dimensions: no such option"), ({"dtype": "int8"}, "dtype: no such option"),
     ({"topn": 4}, "topn: no such option"),
     ({"query": "q" * 100_000, "texts": ["t"] * 100}, "the query counted with each text; at most 8000000")],
)  # fmt: skip
def test_what_cannot_be_ranked_is_refused_before_it_is_sent(
    client: FakeClient, fields: dict[str, Any], said: str
) -> None:
    given = {"query": "q", "texts": TEXTS, **fields}
    with pytest.raises(InvalidRequest, match=said):
        client.rerank(given.pop("query"), given.pop("texts"), **given)
    assert client.sent.jobs == []


def test_vectors_and_scores_are_not_asked_for_at_once() -> None:
    for name, value in (("dimensions", 4), ("dtype", "int8")):
        with pytest.raises(InvalidRequest, match=f"{name} given with query"):
            build(EmbedRequest, {"model": "m", "texts": ("a",), "query": "q", name: value})


def test_a_model_is_chosen_by_whether_it_reranks(client: FakeClient) -> None:
    assert (client.choose_model(None, "embed"), client.choose_model(None, "rerank")) == ("mini", "bge")
    with pytest.raises(UnknownModel, match=r"model 'mini' cannot rerank: it can embed; of the models warm now bge can"):
        client.rerank("q", TEXTS, model="mini")
    with pytest.raises(UnknownModel, match=r"model 'bge' cannot embed: it can rerank; of the models warm now mini can"):
        client.embed(TEXTS, model="bge")
    with pytest.raises(UnknownModel, match="model 'smol' cannot rerank: it can generate"):
        client.rerank("q", TEXTS, model="smol")
    with pytest.raises(UnknownModel, match=r"no model given, and no model that is warm now can rerank"):
        FakeClient().rerank("q", TEXTS)
    with pytest.raises(ConfigError, match="embed and rerank given for both"):
        FakeClient(models={"both": ["embed", "rerank"]})


def test_a_request_without_a_query_is_what_workers_of_earlier_releases_know() -> None:
    """And one with it they refuse by the field's name."""
    plain = EmbedRequest(model="m", texts=("a",))
    asked = EmbedRequest(model="m", texts=("a",), query="q")
    assert "query" not in encode(plain)
    assert encode(asked)["query"] == "q"
    for request in (plain, asked):
        assert decode(EmbedRequest, json.loads(json.dumps(encode(request)))) == request


def test_a_card_of_an_earlier_release_is_of_a_model_that_embeds() -> None:
    fields = {"model": "m", "architecture": "bert", "kinds": ("embed",), "context": 512, "parameters": 1}
    assert ModelCard.model_validate(fields).abilities == ("embed",)
    assert ModelCard.model_validate({**fields, "reranks": True}).abilities == ("rerank",)
    assert ModelCard.model_validate({**fields, "kinds": ("generate", "train")}).abilities == ("generate", "train")
    assert ABILITIES["rerank"] is EMBED


def test_the_record_says_what_is_asked_for_where_its_kind_does_not() -> None:
    asked = EmbedRequest(model="m", texts=("a",), query="q")
    record = job_record(asked, "job")
    assert (record[Field.KIND], record[Field.ABILITY], record[Field.QUEUE]) == ("embed", "rerank", "stoker.m.embed")
    assert Field.ABILITY not in job_record(EmbedRequest(model="m", texts=("a",)), "job")


@pytest.fixture
def shell(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    monkeypatch.setattr(command, "connect", lambda url: client)
    return client


def run(*words: str, stdin: str | None = None) -> str:
    done = CliRunner().invoke(app, ["rerank", *words], input=stdin, catch_exceptions=False, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_the_command_shows_the_best_first(shell: FakeClient) -> None:
    shell.script.rerank([0.25, 0.75, 0.5], times=None)
    assert run("which?", *TEXTS, "--top", "2").splitlines() == [
        "  0.7500      1  a warm model", "  0.5000      2  the model is warm"
    ]  # fmt: skip
    shown = json.loads(run("which?", *TEXTS, "--json", "--truncate", "--no-normalize", "--prompt", "judge"))
    assert shown[0] == {"index": 1, "score": 0.75, "text": "a warm model"}
    assert [one["index"] for one in shown] == [1, 2, 0]
    sent = shell.sent.rerank[-1]
    assert (sent.truncation, sent.normalize, sent.prompt) == ("end", False, "judge")


@pytest.mark.parametrize("end", ["", ".txt"])
def test_one_text_that_is_too_long_for_a_name_is_ranked(shell: FakeClient, end: str) -> None:
    shell.script.rerank([0.5])
    text = "a warm model " * 400 + end
    assert json.loads(run("q", text, "--json")) == [{"index": 0, "score": 0.5, "text": text}]


def test_the_command_reads_a_file_of_any_length_in_jobs(
    shell: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "BATCH_TEXTS", 2)
    shell.script.rerank(lambda request: [float(text.split()[1]) for text in request.texts], times=None)
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"body": f"text {number % 7}"}) + "\n" for number in range(15)))
    best = json.loads(run("q", str(lines), "--field", "body", "--top", "3", "--json"))
    assert [(one["index"], one["score"]) for one in best] == [(6, 6.0), (13, 6.0), (5, 5.0)]
    assert [len(sent.texts) for sent in shell.sent.rerank] == [2] * 7 + [1]
    (tmp_path / "texts.txt").write_text("text 1\n\ntext 2\n")
    assert run("q", str(tmp_path / "texts.txt")).splitlines()[0].endswith("1  text 2")
    assert run("q", "-", stdin="text 3\ntext 4").splitlines()[0].endswith("1  text 4")


def test_an_error_names_the_text_among_all_and_the_other_jobs_are_cancelled(
    shell: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "BATCH_TEXTS", 2)
    shell.script.rerank()
    shell.script.rerank(error=TextTooLong("texts.1: 700 tokens given with the query; bge takes 512."))
    shell.script.rerank(hangs=True)
    with pytest.raises(TextTooLong, match=r"^texts\.3: 700 tokens"):
        run("q", "a", "b", "c", "d", "e")
    assert [shell.job(job.job_id).status() for job in shell.sent.jobs] == ["done", "failed", "cancelled"]


@pytest.mark.parametrize(
    ("words", "stdin", "said"),
    [(("q", "-", "a"), "b", "'-' given with others"), (("q", "a", "--field", "body"), None, "field: given without a"),
     (("q", "-"), "", "no text in it"), (("q", "a", "--model", "mini"), None, "cannot rerank")],
)  # fmt: skip
def test_what_is_wrong_on_the_command_line_is_said(
    shell: FakeClient, words: tuple[str, ...], stdin: str | None, said: str
) -> None:
    with pytest.raises((InvalidRequest, UnknownModel, DatasetError), match=said):
        run(*words, stdin=stdin)
