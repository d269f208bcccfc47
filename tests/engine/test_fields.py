"""What a field of a model's files asks for is computed, or refused by its name; which of two files counts is fixed."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from engine.checkpoints.loading import load
from engine.embedding.forward import Tokens, Vectors
from engine.embedding.lane import EmbedLane
from engine.embedding.tokenizing import named
from engine.engine import Engine
from engine.models.allowed import TABLES
from engine.models.bridge import blocks, network
from engine.models.bridge.gguf_keys import Keys, scaling
from engine.models.bridge.linears import Pass
from engine.models.bridge.slots import KvSlot, SlotShape, StateSlot, shapes_of
from engine.models.gemma3 import Gemma3Args
from engine.models.mistral import MistralArgs
from engine.models.rerank_files import RerankFiles
from engine.models.sentence import EmbeddingSpec
from engine.text.ends import ends
from engine.text.special_tokens import SpecialTokens
from engine.text.tokenizer import Tokenizer
from engine.ticket import Ticket
from stoker.contract import EmbedRequest, GenerateRequest
from stoker.errors import InvalidRequest, ModelError, WorkerUnavailable
from tests.engine import test_gguf_text as gguf_text
from tests.engine.test_sentence_files import ARGS, sentence_folder

GOLDENS = Path(__file__).parents[1] / "goldens"
BASES = GOLDENS / "architectures"
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
POST_NORM = ("bert", "mpnet", "xlm-roberta", "roberta")

#: What each of these would compute otherwise than the code here, and does nothing of the sort.
OTHERWISE: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (DECODERS, {"rope_interleaved": True}),
    (DECODERS, {"rope_traditional": True}),
    (DECODERS, {"attention_bias": True}),
    (DECODERS, {"mlp_bias": True}),
    (DECODERS, {"partial_rotary_factor": 0.5}),
    (DECODERS, {"is_causal": False}),
    (DECODERS, {"use_bidirectional_attention": True}),
    (DECODERS, {"hidden_act": "gelu"}),
    (("qwen2", "qwen3"), {"use_mrope": True}),
    (POST_NORM, {"hidden_act": "relu"}),
    (POST_NORM, {"hidden_act": "gelu_new"}),
    (POST_NORM, {"chunk_size_feed_forward": 2}),
    ((*POST_NORM, "modernbert", "nomic_bert", "gte"), {"is_decoder": True}),
    (("bert", "xlm-roberta", "roberta"), {"position_embedding_type": "relative_key"}),
    (("mpnet",), {"relative_attention_num_buckets": 64}),
    (("modernbert",), {"hidden_activation": "relu"}),
    (("gemma3_text",), {"attn_logit_softcapping": 50.0}),
    (("gemma3_text",), {"hidden_activation": "gelu"}),
    (("nomic_bert",), {"prenorm": True}),
    (("nomic_bert",), {"rotary_emb_interleaved": True}),
    (("nomic_bert",), {"rotary_emb_fraction": 0.5}),
    (("nomic_bert",), {"qkv_proj_bias": True}),
    (("nomic_bert",), {"rotary_scaling_factor": 2.0}),
    ((*DECODERS, *POST_NORM), {"is_encoder_decoder": True}),
    ((*DECODERS, *POST_NORM), {"add_cross_attention": True}),
    ((*DECODERS, *POST_NORM), {"pruned_heads": {"0": [1]}}),
    ((*DECODERS, *POST_NORM), {"auto_map": {"AutoModel": "own.Own"}}),
]


@pytest.mark.parametrize(("architectures", "field"), OTHERWISE, ids=lambda value: str(value)[:40])
def test_a_field_that_asks_for_another_computation_is_refused_in_every_architecture(
    architectures: tuple[str, ...], field: dict[str, Any]
) -> None:
    for architecture in architectures:
        TABLES[architecture].check(dict.fromkeys(field), "config.json")
        with pytest.raises(ModelError, match=rf"config\.json: {next(iter(field))} = "):
            TABLES[architecture].check(field, "config.json")


GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 4,
    "vocab_size": 9, "use_bidirectional_attention": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "full", "sliding"),
    [
        ({}, (1e6, 1.0), (1e4, 1.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, (1e6, 8.0), (1e4, 1.0)),
        ({"rope_theta": 5e5, "rope_local_base_freq": 3e4}, (5e5, 1.0), (3e4, 1.0)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7e5, "rope_type": "linear", "factor": 4.0},
                              "sliding_attention": {"rope_theta": 2e4}}}, (7e5, 4.0), (2e4, 1.0)),
    ],
)  # fmt: skip
def test_gemma_scales_the_layers_that_see_all_alone(
    fields: dict[str, Any], full: tuple[float, float], sliding: tuple[float, float]
) -> None:
    assert Gemma3Args.from_config(GEMMA | fields).ropes == {False: full, True: sliding}


def test_a_mistral_without_a_word_of_its_window_has_the_usual_one_and_null_is_none() -> None:
    config = {key: value for key, value in json.loads((BASES / "mistral" / "config.json").read_text()).items()
              if key not in ("sliding_window", "layer_types")}  # fmt: skip
    assert MistralArgs.from_config(config).window == 4096
    assert MistralArgs.from_config({**config, "sliding_window": None}).window is None
    assert MistralArgs.from_config({**config, "sliding_window": 7}).window == 7


# Embedding and reranking


@pytest.mark.parametrize("default", ["query", "document"])
def test_the_prompts_that_every_model_has_are_empty_where_the_files_have_none(tmp_path: Path, default: str) -> None:
    files = {"config_sentence_transformers.json": {"default_prompt_name": default}}
    spec = EmbeddingSpec.from_folder(sentence_folder(tmp_path, files), ARGS)
    assert (spec.prompts, spec.default_prompt) == ({default: ""}, default)


SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(
    ("own", "config", "older", "sigmoid"),
    [
        (None, None, None, True),
        (IDENTITY, SIGMOID, SIGMOID, False),
        (SIGMOID, IDENTITY, IDENTITY, True),
        (None, IDENTITY, SIGMOID, False),
        (None, SIGMOID, IDENTITY, True),
        (None, None, IDENTITY, False),
    ],
)
def test_the_first_of_the_files_that_names_an_activation_counts(
    tmp_path: Path, own: str | None, config: str | None, older: str | None, sigmoid: bool
) -> None:
    shutil.copytree(GOLDENS / "rerankers" / "modernbert", tmp_path / "m")
    path = tmp_path / "m" / "config_sentence_transformers.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**said, "activation_fn": own}))
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    fields |= {"sentence_transformers": {"activation_fn": config}, "sbert_ce_default_activation_function": older}
    found = RerankFiles.of(tmp_path / "m", fields)
    assert found is not None
    assert found.sigmoid is sigmoid


def test_a_judges_token_is_one_of_the_models_rows(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "rerankers" / "qwen3-judge", tmp_path / "m")
    rows = json.loads((tmp_path / "m" / "config.json").read_text())["vocab_size"]
    path = tmp_path / "m" / "1_LogitScore" / "config.json"
    for token, taken in ((rows - 1, True), (rows, False)):
        path.write_text(json.dumps({**json.loads(path.read_text()), "true_token_id": token}))
        if taken:
            assert load("it", [str(tmp_path / "m")]).pairing is not None
            continue
        with pytest.raises(
            ModelError, match=f"the token {rows} that scores are read from is none of the model's {rows}"
        ):
            load("it", [str(tmp_path / "m")])


class Forward:
    """Gives every second text a vector with this number."""

    least_tokens, streams = 8, 1

    def __init__(self, dim: int, number: float) -> None:
        self._dim, self._number = dim, number

    def __call__(self, texts: Sequence[Tokens]) -> Vectors:
        found = np.zeros((len(texts), self._dim), np.float32)
        found[1::2, 2] = self._number
        return found

    def warming(self) -> Iterator[None]:
        return iter(())


@pytest.mark.parametrize(
    ("number", "taken"), [(70_000.0, False), (-70_000.0, False), (65_504.0, True), (-65_504.0, True)]
)
def test_a_number_that_float16_does_not_hold_is_refused_whatever_its_sign(number: float, taken: bool) -> None:
    bert = load("bert", [str(BASES / "bert")])
    assert bert.embedding is not None
    lane = EmbedLane(bert, forward=Forward(bert.embedding.dim, number))
    ticket: Ticket[Any] = Ticket("job", "embed")
    asked = EmbedRequest(model="bert", texts=("a", "a"), dtype="float16", normalize=False)
    lane.admit(lane.prepare(ticket, asked, None))
    assert ticket.started is not None, "from now on it runs"
    while lane.busy:
        lane.run()
    if taken:
        assert ticket.error is None
    else:
        assert isinstance(ticket.error, InvalidRequest)
        assert "texts.1: float16 given, and its vector has a number beyond 65504" in str(ticket.error)


def test_the_text_that_ran_out_of_memory_is_named_and_it_stays_a_want_of_memory() -> None:
    assert isinstance(named(3, MemoryError("x")), MemoryError)
    assert isinstance(named(3, ValueError("x")), RuntimeError)
    assert isinstance(named(3, ModelError("x")), ModelError)
    assert all(str(named(3, error)).startswith("texts.3: ") for error in (MemoryError("x"), ModelError("x")))


# Text


def test_special_tokens_of_a_sentencepiece_vocabulary_are_parts_of_no_merge() -> None:
    tokens = list(gguf_text.SPM["prefix"]["tokens"])
    types, scores = list(gguf_text.SPM["prefix"]["types"]), list(gguf_text.SPM["prefix"]["scores"])
    # A control token of two letters that are tokens too, with the best score of all.
    letters = [token for token, kind in zip(tokens, types, strict=True) if kind == 1 and len(token) == 1][:2]
    tokens, types, scores = [*tokens, "".join(letters)], [*types, 3], [*scores, 10.0]
    built = gguf_text.spm(
        "prefix", tokens=tokens, token_type=np.array(types, np.int32), scores=np.array(scores, np.float32)
    )
    merges = json.loads(built.inner.to_str())["model"]["merges"]
    assert [*letters] not in [list(merge) if isinstance(merge, list) else merge.split() for merge in merges]


def test_a_template_of_the_name_default_is_the_default_where_there_is_no_other() -> None:
    gguf = gguf_text.gguf_of(model="gpt2", tokens=gguf_text.BYTE_LEVEL["tokens"],
                             merges=gguf_text.BYTE_LEVEL["merges"], pre="qwen2", add_bos_token=False)  # fmt: skip
    gguf.metadata |= {"tokenizer.chat_template.default": "N", "tokenizer.chat_template.tool_use": "T"}
    assert Tokenizer.from_gguf(gguf).templates == {"default": "N", "tool_use": "T"}
    gguf.metadata["tokenizer.chat_template"] = "D"
    assert Tokenizer.from_gguf(gguf).templates == {"default": "D", "tool_use": "T"}


def test_ids_of_added_tokens_count_to_the_vocabulary() -> None:
    found = gguf_text.byte_level(pre="qwen2")
    before = found.vocab_size
    assert before == len(gguf_text.BYTE_LEVEL["tokens"])
    found.inner.add_special_tokens(["<one more>"])
    assert Tokenizer(found.inner).vocab_size == before + 1


def test_a_token_that_is_half_a_character_ends_where_its_character_does() -> None:
    found = gguf_text.byte_level(pre="qwen2")
    text = "a漢字b"
    ids, stops = found.encode_spans(text, special=False)
    assert len(ids) > len(text)
    assert stops == sorted(stops)
    assert set(stops) <= {1, 2, 3, 4}
    assert stops[-1] == 4


def test_what_marks_a_part_of_a_turn_ends_none() -> None:
    assert ends({"<|end|>", "<|return|>"}) == ["<|end|>", "<|return|>"]
    assert ends({"<|end|>", "<|return|>", "<|call|>"}) == ["<|return|>", "<|call|>"]
    assert ends({"</s>", "<|tool_response>"}) == ["<|tool_response>"]


def test_a_name_that_a_file_refuses_gets_no_token_by_default(tmp_path: Path) -> None:
    found = SpecialTokens.from_folder(tmp_path, {"pad_token": None, "eos_token": "a"})
    inner = gguf_text.byte_level(pre="qwen2").inner
    made = found.with_defaults(inner, {"pad_token": "b", "unk_token": "c", "eos_token": "d"})
    assert made.texts == {"eos_token": "a", "unk_token": "c"}


# mlx-lm's files


def test_logits_are_the_same_where_none_of_them_is_another() -> None:
    wanted = mx.random.normal((2, 3, 50), key=mx.random.key(1))
    one = wanted + mx.where(mx.arange(300).reshape(2, 3, 50) == 77, 0.1, 0.0)
    assert network.same(wanted + 1e-5, wanted)
    assert not network.same(one, wanted)
    assert not network.same(wanted[:, :2], wanted)
    assert not network.same(wanted * mx.nan, wanted)


def test_each_layer_runs_as_the_trainer_wants_it_and_what_lies_within_one_at_once() -> None:
    under_way, ran = Pass(), []
    inner = blocks.Stage(nn.Linear(4, 4), under_way)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def __call__(self, x: mx.array) -> mx.array:
            found: mx.array = self.inner(x)
            return found

    layers = [blocks.Stage(Outer(), under_way) for _ in range(3)]

    def run_block(block: Any, x: mx.array) -> mx.array:
        ran.append(block)
        found: mx.array = block(x, None, None)
        return found

    under_way.run_block = run_block
    x = mx.ones((1, 2, 4))
    for layer in layers:
        x = layer(x)
    assert len(ran) == 3
    assert under_way.run_block is run_block


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, None),
        ({"rope.scale_linear": 4.0}, ("linear", 4.0)),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, ("linear", 8.0)),
        ({"rope.scaling.type": "linear", "rope.scale_linear": 4.0}, ("linear", 4.0)),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.scale_linear": 4.0}, ("linear", 8.0)),
        ({"rope.scaling.type": "none", "rope.scale_linear": 4.0}, ("linear", 4.0)),
    ],
)
def test_linear_scaling_of_a_gguf_is_read_under_each_of_its_keys(
    values: dict[str, Any], found: tuple[str, float] | None
) -> None:
    made = scaling(Keys({f"gemma3.{key}": value for key, value in values.items()}, "gemma3"), "linear")
    assert (None if made is None else (made["type"], made["factor"])) == found
    if found is not None:
        with pytest.raises(ModelError, match=r"rope\.scaling\.type = .* is not supported: none and yarn are"):
            scaling(Keys({f"gemma3.{key}": value for key, value in values.items()}, "gemma3"), "yarn")


class View:
    """What a slot asks for."""

    offset = 0

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def masked(self, tokens: int, window: int | None, *, array: bool) -> None:
        self.asked.append((tokens, window, array))

    def state(self, index: int) -> int:
        return index

    def set_state(self, index: int, new: object) -> None:
        self.asked.append((index, new))


def test_a_slot_has_the_window_that_a_layer_asks_for_before_its_own_and_states_from_either_end() -> None:
    view: Any = View()
    KvSlot(view, 0, 8).make_mask(3)
    KvSlot(view, 0, 8).make_mask(3, return_array=True, window_size=4)
    KvSlot(view, 0, None).make_mask(1)
    states: Any = StateSlot(view, 5, 3)
    assert [states[0], states[2], states[-1], states[-3]] == [5, 7, 7, 5]
    states[-1] = "new"
    assert view.asked == [(3, 8, False), (3, 4, True), (1, None, False), (7, "new")]
    with pytest.raises(IndexError):
        states[3]


def test_a_cache_that_keeps_the_first_tokens_of_a_text_is_none_of_ours() -> None:
    kind: Any = type("RotatingKVCache", (), {"keep": 0, "max_size": 9})
    (found,) = shapes_of([kind()])
    assert found is not None
    assert found.window == 9
    kind.keep = 4
    with pytest.raises(ModelError, match="RotatingKVCache are not supported"):
        shapes_of([kind()])


def test_a_layer_that_keeps_several_caches_has_a_slot_for_each_and_each_slot_its_own_place() -> None:
    def cache(kind: str, **fields: Any) -> Any:
        return type(kind, (), fields)()

    several = cache("CacheList", caches=[cache("KVCache"), None, cache("ArraysCache", cache=[None, None])])
    shapes = shapes_of([cache("ArraysCache", cache=[None, None]), several, None, cache("KVCache")])
    assert shapes == [
        SlotShape(0, states=2), SlotShape(0, parts=(SlotShape(0), SlotShape(2, states=2))), None, SlotShape(1)
    ]  # fmt: skip
    assert shapes[1] is not None
    view: Any = View()
    keys, states = opened = shapes[1].open(view)
    assert isinstance(keys, KvSlot)
    assert [states[0], states[1]] == [2, 3], "behind the one of the layer before"
    assert opened[1] is states


# The end of an engine


def test_jobs_that_wait_when_an_engine_ends_go_back_and_no_step_seems_to_hang(tmp_path: Path) -> None:
    blocked, reached = threading.Event(), threading.Event()

    def publish(entries: object) -> None:
        reached.set()
        assert blocked.wait(30)

    engine = Engine({"tiny": [str(BASES / "llama-linear")]}, adapters=tmp_path / "adapters", publish=publish)
    asked = GenerateRequest(model="tiny", prompt_ids=(5, 6), max_tokens=3, ignore_eos=True)
    began: list[float | None] = []
    engine.observe = lambda *_: began.append(engine.step_began)
    engine.start()
    first = engine.submit("first", asked)
    assert reached.wait(30)
    waiting = engine.submit("waiting", asked)
    engine.stop(timeout=0.0)
    late = engine.submit("late", asked)
    blocked.set()
    for ticket in (first, waiting, late):
        with pytest.raises(WorkerUnavailable, match="the worker is stopping"):
            ticket.result(30)
    engine.stop()
    assert began
    assert set(began) == {None}
