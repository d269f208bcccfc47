"""Rerankers in the layout of their real folders, against the scores that sentence-transformers and their cards give."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import LoadedModel, load
from engine.checkpoints.prospect import prospect
from engine.checkpoints.verifying import verify
from engine.embedding.forward import Forward, PackedForward, PaddedForward
from engine.embedding.lane import EmbedLane
from engine.embedding.rerank_lane import RerankLane, paired, sigmoid
from engine.models.rerank_files import RerankFiles
from engine.text.pairs import QwenForms, TemplateForms, pair_lengths
from engine.ticket import Ticket
from engine.weights import safetensors
from stoker.contract import EmbedRequest
from stoker.errors import InvalidRequest, ModelError, TextTooLong
from tests.thorough import in_turn

GOLDENS = Path(__file__).parents[1] / "goldens"
SAID = json.loads((GOLDENS / "rerankers.json").read_text())
QUERIES, TEXTS = SAID["queries"], SAID["texts"]
FOLDERS = (
    "bge-reranker",
    "ms-marco",
    "modernbert",
    "modernbert-mean",
    "qwen3-judge",
    "qwen3-classifier",
    "Qwen3-Reranker-tiny",
    "distilbert",
    "camembert",
    "electra",
    "albert",
    "mxbai-rerank",
    "deberta-v2",
    "mpnet",
    "qwen2-classifier",
)
FORWARDS: dict[str, Callable[[LoadedModel], Forward]] = {
    "packed": lambda model: PackedForward(model, 2),
    "padded": PaddedForward,
}


@functools.cache
def opened(name: str) -> LoadedModel:
    return load(name.lower(), [str(GOLDENS / "rerankers" / name)])


def scored(model: LoadedModel, query: str, texts: list[str], forward: Forward | None = None, **options: Any) -> Any:
    """The scores of one job."""
    lane = RerankLane(model, forward=forward)
    ticket: Ticket[Any] = Ticket("j", "embed")
    fields = {"truncation": "end", "normalize": False, **options}
    lane.admit(lane.prepare(ticket, EmbedRequest(model=model.name, query=query, texts=tuple(texts), **fields), None))
    while lane.busy:
        for ended, found in lane.run().ended:
            ended.resolve(found)
    return ticket.result(0).vectors[:, 0]


def queries_of(name: str) -> list[str]:
    """The last one leaves a decoder no room for a text: sentence-transformers scores what is left of the query."""
    return list(QUERIES[: 2 if "qwen" in name.lower() else 3])


@pytest.mark.parametrize(("name", "forward"), in_turn(list(FOLDERS), list(FORWARDS)))
def test_scores_are_those_of_the_reference(name: str, forward: str) -> None:
    """Of all texts in one batch, the longest cut."""
    model, said = opened(name), SAID["checkpoints"][name]
    queries = queries_of(name)
    found = np.concatenate([scored(model, query, TEXTS, FORWARDS[forward](model)) for query in queries])
    assert np.abs(found - said["scores"][: len(found)]).max() < 1e-4
    if "instructed" in said:
        instructed = np.concatenate([scored(model, query, TEXTS, prompt="query") for query in queries])
        assert np.abs(instructed - said["instructed"][: len(instructed)]).max() < 1e-4


@pytest.mark.parametrize("name", FOLDERS)
def test_pairs_are_put_together_and_cut_as_by_the_reference(name: str) -> None:
    model, said = opened(name), SAID["checkpoints"][name]
    assert model.context == inspect(model.path).context
    assert model.pairing is not None
    pairs = [(query, text) for query in queries_of(name) for text in TEXTS]
    vocabulary = model.encoder.args.vocab
    cuts = 0
    for (query, text), ids in zip(pairs, said["token_ids"], strict=False):
        (found,) = model.pairing.encode(query, [text], None)
        if len(found) > model.context:
            found = model.pairing.cut(query, text, None, model.context)
            cuts += 1
        assert [index % vocabulary for index in found] == ids
    assert cuts


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_inspected_verified_and_offered_as_it_is_loaded(name: str) -> None:
    path, model = GOLDENS / "rerankers" / name, opened(name)
    seen = inspect(path)
    assert (seen.kind, seen.reranks, seen.supported) == ("embed", True, True)
    assert verify(path).inspection.reranks
    card = model.card(("embed",))
    assert (card.abilities, card.dim, card.chat) == (("rerank",), 1, False)
    offered = prospect(model.name, [str(path)]).card
    assert (offered.abilities, offered.dim, offered.context) == (card.abilities, card.dim, card.context)


def test_a_pair_alone_has_the_score_that_it_has_among_the_pairs_of_other_jobs() -> None:
    model = opened("ms-marco")
    lane, tickets = RerankLane(model), []
    for query in QUERIES:
        ticket: Ticket[Any] = Ticket(query[:9], "embed")
        request = EmbedRequest(model="it", query=query, texts=tuple(TEXTS), truncation="end", normalize=False)
        lane.admit(lane.prepare(ticket, request, None))
        tickets.append(ticket)
    output = lane.run()
    assert output.rows > len(TEXTS), "pairs of several jobs share a step"
    while output.ended or lane.busy:
        for ended, found in output.ended:
            ended.resolve(found)
        output = lane.run()
    together = np.concatenate([ticket.result(0).vectors[:, 0] for ticket in tickets])
    alone = np.concatenate([scored(model, query, [text]) for query in QUERIES for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-5


def test_the_query_and_the_text_have_token_types_of_their_own() -> None:
    """Of BERT; `[SEP]` within a text ends no query."""
    model = opened("ms-marco")
    assert model.pairing is not None
    ((query, text),) = [model.pairing.encode("the [SEP]", ["the [SEP] the"], None) * 2]
    vocabulary, separator = model.encoder.args.vocab, model.tokenizer.encode("")[-1]
    assert query == text
    types = [index // vocabulary for index in query]
    assert types == [0] * types.index(1) + [1] * (len(types) - types.index(1))
    assert [index % vocabulary for index in query].count(separator) == 4
    block = np.array([query], dtype=np.int32)
    assert model.encoder.token_ids(block).max() < vocabulary
    position_ids = model.encoder.position_ids(block)[0]
    assert [int(index) for index in position_ids % 56] == list(range(len(query)))
    assert [int(index) for index in position_ids // 56] == types


def test_scores_are_put_between_0_and_1_unless_the_files_or_the_request_say_otherwise() -> None:
    bge, marco = opened("bge-reranker"), opened("ms-marco")
    raw = scored(bge, QUERIES[0], TEXTS)
    assert np.abs(scored(bge, QUERIES[0], TEXTS, normalize=None) - 1 / (1 + np.exp(-raw))).max() < 1e-6
    assert np.array_equal(scored(marco, QUERIES[0], TEXTS, normalize=None), scored(marco, QUERIES[0], TEXTS))
    assert scored(marco, QUERIES[0], TEXTS, normalize=True).max() < 1
    assert sigmoid(np.array([-1e30, 0, 1e30], dtype=np.float32)).tolist() == [0.0, 0.5, 1.0]


def test_a_pair_that_is_too_long_is_an_error_that_names_its_text_or_its_query() -> None:
    model = opened("bge-reranker")
    with pytest.raises(TextTooLong, match=r"^texts\.4: 69 tokens given with the query; bge-reranker takes 64\. "):
        scored(model, QUERIES[0], TEXTS, truncation="error")
    with pytest.raises(TextTooLong, match=r"^query: \d+ tokens given .* the model takes 192, and leaves no room"):
        scored(opened("qwen3-judge"), QUERIES[2], TEXTS)


class _Deaf:
    """Cannot encode what has an x in it."""

    instructs = False

    def encode(self, query: str, texts: Sequence[str], instruction: str | None) -> list[list[int]]:
        if "x" in query + "".join(texts):
            raise RuntimeError("no x")
        return [[1] * len(text) for text in texts]

    def cut(self, query: str, text: str, instruction: str | None, longest: int) -> list[int]:
        raise AssertionError("nothing is too long")


@pytest.mark.parametrize(
    ("query", "texts", "said"),
    [("x", ["a", "b"], r"^query: the tokenizer cannot encode it \(no x\)"),
     ("a", ["b", "c", "x"], r"^texts\.2: the tokenizer cannot encode it"),
     ("a", ["b", "c", "\u200b"], r"^texts\.2: m sees no token of it")],
)  # fmt: skip
def test_what_cannot_be_encoded_is_named(query: str, texts: list[str], said: str) -> None:
    deaf = _Deaf()
    if "no token" in said:
        deaf.encode = lambda query, texts, instruction: [[1], [1], []]  # type: ignore[method-assign]
    with pytest.raises(InvalidRequest, match=said):
        paired(deaf, EmbedRequest(model="m", query=query, texts=tuple(texts)), query, None, 9)


def test_what_the_tokenizer_says_itself_of_a_text_is_said_of_that_text() -> None:
    def encode(query: str, texts: Sequence[str], instruction: str | None) -> list[list[int]]:
        if any(len(text) > 2 for text in texts):
            raise InvalidRequest("a text of 3 characters.")
        if len(texts) > 2:
            raise RuntimeError("too many at once")
        return [[1] for _ in texts]

    deaf = _Deaf()
    deaf.encode = encode  # type: ignore[method-assign]
    for texts, said in (
        (("a", "abc"), r"^texts\.1: a text of 3 characters\.$"),
        (("a", "b", "c"), r"^texts: the tokenizer cannot encode them \(too many at once\)$"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            paired(deaf, EmbedRequest(model="m", query="q", texts=texts), "q", None, 9)


@pytest.mark.parametrize(
    ("first", "second", "room", "kept"),
    [(3, 4, 8, (3, 4)), (3, 9, 8, (3, 5)), (9, 3, 8, (5, 3)), (9, 5, 8, (4, 4)), (9, 9, 9, (4, 5)), (9, 8, 9, (5, 4)),
     (4, 9, 9, (4, 5)), (5, 9, 9, (4, 5)), (2, 2, 0, (0, 0))],
)  # fmt: skip
def test_of_two_texts_the_longer_one_is_cut_first(first: int, second: int, room: int, kept: tuple[int, int]) -> None:
    assert pair_lengths(first, second, room) == kept


def test_a_model_that_reranks_does_not_embed_and_one_that_embeds_does_not_rerank() -> None:
    reranker, embedder = opened("bge-reranker"), load("mini", [str(GOLDENS / "vectors" / "xlm-roberta")])
    ticket: Ticket[Any] = Ticket("j", "embed")
    with pytest.raises(InvalidRequest, match=r"^query: missing; bge-reranker scores texts .* makes no vectors"):
        RerankLane(reranker).prepare(ticket, EmbedRequest(model="bge-reranker", texts=("a",)), None)
    with pytest.raises(InvalidRequest, match=r"^query: given, and mini makes vectors: .*docs/rerank\.md"):
        EmbedLane(embedder).prepare(ticket, EmbedRequest(model="mini", texts=("a",), query="b"), None)
    with pytest.raises(InvalidRequest, match=r"^prompt: given, and bge-reranker takes no instruction\."):
        scored(reranker, "a", ["b"], prompt="judge")
    for model in (reranker, opened("Qwen3-Reranker-tiny")):
        with pytest.raises(ModelError, match="neither generates nor trains"):
            _ = model.decoder


Changes = Mapping[str, Mapping[str, Any]]


def copied(tmp_path: Path, name: str, files: Changes, called: str = "model") -> Path:
    """A copy of the folder `name` with other fields in its files; None takes a field out."""
    shutil.copytree(GOLDENS / "rerankers" / name, tmp_path / called)
    for file, change in files.items():
        path = tmp_path / called / f"{file}.json"
        content = {**json.loads(path.read_text()), **change}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return tmp_path / called


@pytest.mark.parametrize(
    ("name", "files", "cause"),
    [("bge-reranker", {"config": {"id2label": {"0": "a", "1": "b"}}}, "2 labels"),
     ("bge-reranker", {"config": {"id2label": None}}, "2 labels"),
     ("bge-reranker", {"config": {"model_type": "nomic_bert"}}, 'cross-encoder of model_type "nomic_bert"'),
     ("bge-reranker", {"config": {"auto_map": {"AutoModel": "own.Own"}}}, "auto_map"),
     ("ms-marco", {"config": {"type_vocab_size": 1}}, "shape"),
     ("ms-marco", {"config": {"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}}, 'activation_fn "torch.nn'),
     ("ms-marco", {"config": {"own": 1}}, "the field own = 1"),
     ("modernbert", {"config": {"classifier_activation": "relu"}}, 'classifier_activation = "relu"'),
     ("modernbert", {"config": {"classifier_pooling": "max"}}, 'classifier_pooling = "max"'),
     ("modernbert", {"config": {"classifier_bias": True}}, "head.dense.bias"),
     ("modernbert", {"config_sentence_transformers": {"model_type": "SparseEncoder"}}, 'model_type = "SparseEncoder"'),
     ("modernbert", {"config_sentence_transformers": {"prompts": {"a": "b: "}, "default_prompt_name": "a"}},
      'default_prompt_name "a" is not supported for a cross-encoder'),
     ("modernbert", {"sentence_bert_config": {"transformer_task": "fill-mask"}}, 'transformer_task = "fill-mask"'),
     ("qwen3-judge", {"1_LogitScore/config": {"true_token_id": 400}}, "token 400 that scores are read from is none"),
     ("qwen3-judge", {"1_LogitScore/config": {"true_token_id": "yes"}}, 'true_token_id is "yes"'),
     ("qwen3-judge", {"1_LogitScore/config": {"module_input_name": "scores"}}, 'module_input_name = "scores"'),
     ("Qwen3-Reranker-tiny", {"config": {"classifier_from_token": "yes"}}, 'classifier_from_token "yes" is not a list'),
     ("Qwen3-Reranker-tiny", {"config": {"classifier_from_token": ["no", "jawohl"]}}, "no token 'jawohl'")],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, name: str, files: Changes, cause: str) -> None:
    path = copied(tmp_path, name, files)
    with pytest.raises(ModelError, match=cause):
        load("it", [str(path)])
    if name == "modernbert":
        with pytest.raises(ModelError, match=cause):
            verify(path)


def test_a_judge_without_its_head_is_damaged(tmp_path: Path) -> None:
    path = copied(tmp_path, "qwen3-judge", {})
    arrays = {name: each for name, each in safetensors.read_folder(path).items() if name != "lm_head.weight"}
    safetensors.write(path / "model.safetensors", arrays)
    with pytest.raises(ModelError, match=r"'lm_head\.weight' is missing"):
        load("it", [str(path)])


def test_a_qwen3_reranker_is_known_by_its_name_or_its_config_and_generates_otherwise(tmp_path: Path) -> None:
    plain = copied(tmp_path, "Qwen3-Reranker-tiny", {}, "other")
    assert load("it", [str(plain)]).kind == inspect(plain).kind == "generate"
    hub = tmp_path / "models--Qwen--Qwen3-Reranker-0.6B" / "snapshots" / "0123"
    shutil.copytree(plain, hub)
    stated = copied(tmp_path, "Qwen3-Reranker-tiny", {"config": {"classifier_from_token": ["no", "yes"]}}, "stated")
    wanted = scored(opened("Qwen3-Reranker-tiny"), QUERIES[0], TEXTS[:2])
    for path in (hub, stated):
        assert np.array_equal(scored(load("it", [str(path)]), QUERIES[0], TEXTS[:2]), wanted)


def test_a_judge_that_names_no_token_for_no_has_the_logit_of_yes(tmp_path: Path) -> None:
    alone = [{"1_LogitScore/config": {"true_token_id": token, "false_token_id": None}} for token in (300, 301)]
    paths = [copied(tmp_path, "qwen3-judge", files, str(number)) for number, files in enumerate(alone)]
    yes, no = (scored(load("it", [str(path)]), QUERIES[0], TEXTS) for path in paths)
    assert np.abs(yes - no - scored(opened("qwen3-judge"), QUERIES[0], TEXTS)).max() < 1e-4


def test_a_template_without_the_roles_of_a_pair_is_refused_and_so_is_none(tmp_path: Path) -> None:
    path = copied(tmp_path, "qwen3-judge", {})
    (path / "chat_template.jinja").write_text("{% for message in messages %}{{ message.role }}{% endfor %}")
    with pytest.raises(ModelError, match="takes no messages of the roles query and document"):
        load("it", [str(path)])
    (path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="it has no chat template"):
        load("it", [str(path)])


def test_a_template_that_is_tried_once_says_what_it_makes_of_every_pair() -> None:
    forms = TemplateForms(SAID["template"], {})
    assert forms.fits
    assert forms.instructs
    plain, instructed = forms.form(None), forms.form("{{ 7 }} taste")
    assert (plain.before.count("the query"), instructed.before.count("judge by {{ 7 }} taste")) == (1, 1)
    assert (
        (plain.between, plain.behind)
        == (instructed.between, instructed.behind)
        == ("<text>: ", "<|im_end|>\n<|im_start|>answer")
    )
    refusing = "{% for m in messages %}{% if m.role != 'query' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    assert not TemplateForms(refusing, {}).fits
    untold = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    assert not TemplateForms(untold, {}).instructs


def test_the_instruction_of_a_request_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    model = opened("Qwen3-Reranker-tiny")
    assert model.pairing is not None
    (own,), (instructed,) = (model.pairing.encode("a", ["b"], asked) for asked in (None, "sort by taste"))
    text = model.tokenizer.decode(instructed, skip_special=False)
    assert "<Instruct>: sort by taste\n<Query>: a\n<Document>: b<|im_end|>" in text
    assert QwenForms().form(None).before in model.tokenizer.decode(own, skip_special=False)
    path = copied(tmp_path, "qwen3-judge", {"config_sentence_transformers": {"default_prompt_name": "query"}})
    found = scored(load("it", [str(path)]), QUERIES[0], TEXTS)
    assert np.abs(found - SAID["checkpoints"]["qwen3-judge"]["instructed"][: len(TEXTS)]).max() < 1e-4


def test_an_embedding_folder_is_no_reranker() -> None:
    for path in (GOLDENS / "vectors").iterdir():
        assert RerankFiles.of(path, json.loads((path / "config.json").read_text())) is None
        assert not inspect(path).reranks


def with_head(tmp_path: Path, name: str, kind: str, head: Mapping[str, mx.array]) -> Path:
    """A copy of a model without one, as what its config.json then calls it."""
    source, path = GOLDENS / "architectures" / name, tmp_path / "model"
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": [f"{kind}ForSequenceClassification"], "id2label": {"0": "score"}}
    (path / "config.json").write_text(json.dumps(config))
    safetensors.write(path / "model.safetensors", {**safetensors.read_folder(source), **head})
    assert inspect(path).reranks
    assert verify(path).inspection.reranks
    return path


def test_a_qwen2_with_one_label_scores_by_its_last_token(tmp_path: Path) -> None:
    """The oracle is the decoder, which generates without the head."""
    generating = load("it", [str(GOLDENS / "architectures" / "qwen2-tied")])
    score = mx.random.normal((1, generating.llama.args.dim), key=mx.random.key(4))
    model = load("it", [str(with_head(tmp_path, "qwen2-tied", "Qwen2", {"score.weight": score}))])
    assert model.pairing is not None
    query, texts = "heat", ["the heat", "a b"]
    for text, found in zip(texts, scored(model, query, texts), strict=True):
        (tokens,) = model.pairing.encode(query, [text], None)
        last = np.array(generating.decoder(mx.array([tokens])))[0, -1]
        assert abs(found - float(last @ np.array(score)[0])) < 1e-4


def test_an_mpnet_with_one_label_scores_by_its_first_token(tmp_path: Path) -> None:
    """The oracle is the encoder, which embeds without the head: two layers, with a tanh between."""
    embedding = load("it", [str(GOLDENS / "architectures" / "mpnet")])
    first, second, bias = (mx.random.normal(shape, key=mx.random.key(4)) for shape in ((32, 32), (1, 32), (32,)))
    head = {
        "classifier.dense.weight": first, "classifier.dense.bias": bias, "classifier.out_proj.weight": second,
        "classifier.out_proj.bias": bias[:1],
    }  # fmt: skip
    model = load("it", [str(with_head(tmp_path, "mpnet", "MPNet", head))])
    assert model.pairing is not None
    (tokens,) = model.pairing.encode("heat", ["the heat"], None)
    state = embedding.encoder(mx.array([tokens]))[0, 0]
    wanted = mx.tanh(state @ first.T + bias) @ second[0] + bias[0]
    assert abs(scored(model, "heat", ["the heat"])[0] - wanted.item()) < 1e-4
