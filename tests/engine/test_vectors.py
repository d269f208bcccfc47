"""Embedding models in the layout of their real folders, against what sentence-transformers makes of them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import LoadedModel, load
from engine.checkpoints.prospect import prospect
from engine.checkpoints.verifying import verify
from engine.embedding.forward import Forward, PackedForward, PaddedForward
from engine.embedding.lane import EmbedLane
from engine.embedding.pooling import pool
from engine.models import fastmath
from engine.models.attention import attention, attention_nearby
from engine.models.encoder import unseen
from engine.text.tokenizer import Tokenizer
from engine.ticket import Ticket
from engine.weights import safetensors
from stoker.contract import EmbedRequest
from stoker.errors import ModelError, TextTooLong
from tests.thorough import in_turn

GOLDENS = Path(__file__).parents[1] / "goldens"
SAID = json.loads((GOLDENS / "vectors.json").read_text())
WANTED = np.load(GOLDENS / "vectors.npz")
TEXTS: list[str] = SAID["texts"]
FOLDERS = (
    "xlm-roberta",
    "bge-m3",
    "max",
    "sqrt",
    "weighted",
    "dense",
    "modernbert",
    "modernbert-biased",
    "qwen3-embedding",
    "embeddinggemma",
    "nomic-bert",
    "gte",
    "distilbert",
    "t5",
    "t5-gated",
    "camembert",
    "albert",
    "electra",
    "deberta-v3",
    "deberta-v2",
    "poolings",
    "poolings-older",
    "layer-norm",
)
FORWARDS: dict[str, Callable[[LoadedModel], Forward]] = {
    "packed": lambda model: PackedForward(model, 2),
    "padded": PaddedForward,
}
CLOSE = 1e-4


@functools.cache
def opened(name: str) -> LoadedModel:
    """No test changes it."""
    return load(name, [str(GOLDENS / "vectors" / name)])


def embedded(model: LoadedModel, texts: list[str], forward: Forward | None = None, **options: Any) -> np.ndarray:
    """The vectors of one job."""
    lane = EmbedLane(model, forward=forward)
    ticket: Ticket[Any] = Ticket("j", "embed")
    request = EmbedRequest(model=model.name, texts=tuple(texts), **{"truncation": "end", **options})
    lane.admit(lane.prepare(ticket, request, None))
    while lane.busy:
        for ended, found in lane.run().ended:
            ended.resolve(found)
    vectors: np.ndarray = ticket.result(0).vectors
    return vectors


@pytest.mark.parametrize(("forward", "plain"), in_turn(list(FORWARDS), [False, True]))
@pytest.mark.parametrize("name", FOLDERS)
def test_vectors_are_those_of_sentence_transformers(
    name: str, forward: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all texts in one batch, the longest cut; by the polynomials, and by the plain operations of a GPU."""
    if plain:
        monkeypatch.setattr(fastmath, "fuses_on_cpu", lambda: False)
    model = opened(name)
    for kind, prompt in (("plain", ""), ("default", None), ("query", "query")):
        found = embedded(model, TEXTS, FORWARDS[forward](model), prompt=prompt)
        assert np.abs(found - WANTED[f"{name}.{kind}"]).max() < CLOSE


@pytest.mark.parametrize("name", FOLDERS)
def test_a_text_alone_has_the_vector_that_it_has_in_a_mixed_batch(name: str) -> None:
    model = opened(name)
    together = embedded(model, TEXTS)
    alone = np.concatenate([embedded(model, [text]) for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-5


@pytest.mark.parametrize("name", FOLDERS)
def test_texts_are_cut_where_sentence_transformers_cuts_them(name: str) -> None:
    model, said = opened(name), SAID["checkpoints"][name]
    assert model.context == inspect(model.path).context
    for text, ids in zip(TEXTS, said["token_ids"], strict=True):
        assert model.tokenizer.encode_cut(text, min(model.context, said["longest"])) == ids
    longest = max(TEXTS, key=len)
    assert len(model.tokenizer.encode(longest)) > model.context
    with pytest.raises(TextTooLong, match=f"{name} takes {model.context}"):
        embedded(model, [longest], truncation="error")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_verified_as_it_is_loaded(name: str) -> None:
    path = GOLDENS / "vectors" / name
    assert inspect(path).kind == "embed"
    assert verify(path).inspection.supported


def changed(tmp_path: Path, name: str, file: str, change: dict[str, Any]) -> Path:
    """A copy of the folder `name` with other fields in one of its files; None takes a field out."""
    shutil.copytree(GOLDENS / "vectors" / name, tmp_path / "model")
    path = tmp_path / "model" / file
    content = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [("xlm-roberta", {"position_embedding_type": "relative_key"}, 'position_embedding_type = "relative_key"'),
     ("xlm-roberta", {"hidden_act": "relu"}, 'hidden_act = "relu"'),
     ("xlm-roberta", {"adapter_layers": 2}, "the field adapter_layers = 2"),
     ("xlm-roberta", {"pad_token_id": -1}, "pad_token_id is -1, not an integer from 0 on"),
     ("xlm-roberta", {"pad_token_id": 65}, "the first 66 of them are for padding"),
     ("xlm-roberta", {"auto_map": {"AutoModel": "own.Own"}}, "auto_map"),
     ("modernbert", {"hidden_activation": "silu"}, 'hidden_activation = "silu"'),
     ("modernbert", {"layer_types": ["full_attention"] * 4}, "layer_types .* is not a list of 5 times"),
     ("modernbert", {"layer_types": ["full_attention"] * 4 + ["chunked_attention"]}, "chunked_attention"),
     ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, "rope_type"),
     ("modernbert", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters .* is not"),
     ("modernbert", {"rope_parameters": {"full_attention": {"rope_theta": -1.0}}}, "rope_theta is -1.0"),
     ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
     ("modernbert", {"local_attention": "wide"}, 'local_attention is "wide"'),
     ("modernbert", {"norm_bias": 1}, "norm_bias is 1, not true or false"),
     ("modernbert", {"num_attention_heads": 5}, "a head's size must be whole and even"),
     ("qwen3-embedding", {"is_causal": False}, "is_causal = false"),
     ("modernbert", {"own": 1}, "the field own = 1")],
)  # fmt: skip
def test_what_a_config_asks_for_in_vain_is_refused_by_name(
    tmp_path: Path, name: str, change: dict[str, Any], cause: str
) -> None:
    path = changed(tmp_path, name, "config.json", change)
    for check in (verify, lambda path: load("it", [str(path)])):
        with pytest.raises(ModelError, match=cause):
            check(path)


def test_roberta_is_xlm_r_by_another_name(tmp_path: Path) -> None:
    path = changed(tmp_path, "xlm-roberta", "config.json", {"model_type": "roberta"})
    tokens = mx.array([[0, 9, 1, 20, 2]])
    assert mx.array_equal(load("it", [str(path)]).encoder(tokens), opened("xlm-roberta").encoder(tokens))


def test_a_decoder_without_modules_generates(tmp_path: Path) -> None:
    path = changed(tmp_path, "qwen3-embedding", "config.json", {})
    (path / "modules.json").unlink()
    assert load("it", [str(path)]).kind == inspect(path).kind == "generate"


def test_a_decoder_that_embeds_needs_no_head_and_does_not_generate(tmp_path: Path) -> None:
    path = changed(tmp_path, "qwen3-embedding", "config.json", {"tie_word_embeddings": False})
    model = load("it", [str(path)])
    assert np.abs(embedded(model, TEXTS[:2]) - embedded(opened("qwen3-embedding"), TEXTS[:2])).max() < 1e-6
    with pytest.raises(ModelError, match="makes embeddings; it neither generates nor trains"):
        _ = model.decoder


@pytest.mark.parametrize("positions", ["absolute", "sans_pos"])
def test_modernbert_reads_its_layers_and_bases_from_older_files_too(tmp_path: Path, positions: str) -> None:
    older = {"layer_types": None, "rope_parameters": None, "global_attn_every_n_layers": 3,
             "global_rope_theta": 16_000.0, "local_rope_theta": 100.0, "position_embedding_type": positions,
             "layer_norm_eps": 0.5, "reference_compile": True}  # fmt: skip
    path = changed(tmp_path, "modernbert", "config.json", older)
    tokens = mx.array([list(range(40))])
    assert mx.array_equal(load("it", [str(path)]).encoder(tokens), opened("modernbert").encoder(tokens))


@pytest.mark.parametrize(("length", "reach"), [(5, 4), (6, 4), (200, 4), (300, 64), (129, 200)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_window_is_the_same_in_blocks_as_by_one_mask(length: int, reach: int, padded: bool) -> None:
    queries, keys, values = (mx.random.normal((2, 2, length, 8), key=mx.random.key(seed)) for seed in range(3))
    mask = mx.arange(length) < mx.array([[length], [length - 2]])
    addend = unseen(mask[:, None, None, :], mx.float32) if padded else None
    near = mx.abs(mx.arange(length)[:, None] - mx.arange(length)) <= reach
    seen = near[None, None] & mask[:, None, None, :] if padded else near[None, None]
    wanted = attention(queries, keys, values, scale=0.3, mask=seen)
    found = attention_nearby(queries, keys, values, scale=0.3, reach=reach, addend=addend)
    real = length - 2
    assert np.abs(np.array(found - wanted)[:, :, :real]).max() < 1e-5


@pytest.mark.parametrize("pooling", ["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"])
def test_no_way_of_pooling_sees_what_pads_a_text(pooling: str) -> None:
    hidden = mx.random.normal((2, 5, 8), key=mx.random.key(7))
    padded = mx.concatenate([hidden, mx.full((2, 3, 8), 100.0)], axis=1)
    mask = mx.broadcast_to(mx.arange(8) < 5, (2, 8))
    assert np.abs(np.array(pool(padded, mask, pooling) - pool(hidden, None, pooling))).max() < 1e-5


@pytest.mark.parametrize("pooling", ["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_numbers_of_16_bits_are_pooled_in_32(pooling: str, masked: bool, dtype: mx.Dtype) -> None:
    """The sum of a long text is beyond float16, and each partial sum of bfloat16 would be rounded."""
    hidden = (90.0 + mx.random.normal((2, 900, 4), key=mx.random.key(3))).astype(dtype)
    mask = mx.arange(900)[None] < mx.array([[900], [700]]) if masked else None
    found = pool(hidden, mask, pooling)
    assert found.dtype == mx.float32
    assert np.array_equal(np.array(found), np.array(pool(hidden.astype(mx.float32), mask, pooling)))


def test_the_layers_behind_the_pooling_say_how_long_a_vector_is() -> None:
    model = opened("dense")
    assert model.card(("embed",)).dim == prospect("it", [str(model.path)]).card.dim == 16
    assert model.parameters == opened("max").parameters + 32 * 48 + 48 * 16 + 16
    assert verify(model.path).tensors == verify(GOLDENS / "vectors" / "max").tensors + 3


@pytest.mark.parametrize(
    ("tensors", "cause"),
    [({"linear.weight": (16, 48)}, "'linear.bias' of shape \\(16,\\) is missing"),
     ({"linear.weight": (16, 32), "linear.bias": (16,)}, "has shape \\(16, 32\\), not \\(16, 48\\)"),
     ({"linear.weight": (16, 48), "linear.bias": (16,), "residual.weight": (2, 2)}, "residual.weight")],
)  # fmt: skip
def test_a_layer_behind_the_pooling_is_checked_as_the_model_is(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], cause: str
) -> None:
    path = changed(tmp_path, "dense", "3_Dense/config.json", {})
    safetensors.write(path / "3_Dense" / "model.safetensors", {name: mx.ones(of) for name, of in tensors.items()})
    for check in (verify, lambda path: load("it", [str(path)])):
        with pytest.raises(ModelError, match=cause):
            check(path)


def test_a_layer_behind_the_pooling_that_holds_no_numbers_is_found(tmp_path: Path) -> None:
    path = changed(tmp_path, "dense", "3_Dense/config.json", {})
    arrays = {"linear.weight": mx.full((16, 48), mx.nan), "linear.bias": mx.ones(16)}
    safetensors.write(path / "3_Dense" / "model.safetensors", arrays)
    with pytest.raises(ModelError, match=r"'linear\.weight' holds values that are infinite or no numbers"):
        verify(path)


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [("embeddinggemma", {"use_bidirectional_attention": None}, "use_bidirectional_attention is not true"),
     ("embeddinggemma", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
     ("embeddinggemma", {"hidden_activation": "silu"}, 'hidden_activation = "silu"'),
     ("embeddinggemma", {"layer_types": ["full_attention"] * 4}, "layer_types .* is not a list of 7 times"),
     ("embeddinggemma", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters .* is not supported"),
     ("embeddinggemma", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, 'rope_type = "yarn"'),
     ("embeddinggemma", {"num_key_value_heads": 3}, "num_attention_heads is 4, num_key_value_heads 3 and head_dim 16"),
     ("embeddinggemma", {"auto_map": {"AutoModel": "own.Own"}}, "auto_map"),
     ("nomic-bert", {"n_embd": 64}, "n_embd is 64, and hidden_size, which is the same, 32"),
     ("nomic-bert", {"rotary_scaling_factor": 2}, "rotary_scaling_factor = 2 is not supported"),
     ("nomic-bert", {"rotary_emb_fraction": 0.5}, "rotary_emb_fraction = 0.5"),
     ("nomic-bert", {"prenorm": True}, "prenorm = true"),
     ("nomic-bert", {"moe_every_n_layers": 2}, "the field moe_every_n_layers = 2"),
     ("nomic-bert", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 'rope_type = "dynamic"|factor'),
     ("nomic-bert", {"head_dim": 4}, "head_dim = 4"),
     ("nomic-bert", {"num_attention_heads": 32, "head_dim": None}, "a head's size must be whole and even"),
     ("nomic-bert", {"architectures": ["NomicBertForSequenceClassification"]}, None),
     ("gte", {"hidden_act": "silu"}, 'hidden_act = "silu"'),
     ("gte", {"type_vocab_size": 2}, "token_type_embeddings"),
     ("gte", {"model_type": "new"}, '"new" is not supported')],
)  # fmt: skip
def test_what_the_newer_architectures_do_not_do_is_refused_by_name(
    tmp_path: Path, name: str, change: dict[str, Any], cause: str | None
) -> None:
    path = changed(tmp_path, name, "config.json", change)
    if cause is None:
        (path / "modules.json").unlink()
        cause = 'cross-encoder of model_type "nomic_bert" is not supported'
    with pytest.raises(ModelError, match=cause):
        load("it", [str(path)])


#: config.json of nomic-embed-text-v1.5 in its own words, with the sizes of the small one.
NOMIC = {
    "activation_function": "swiglu", "architectures": ["NomicBertModel"], "attn_pdrop": 0.0,
    "auto_map": {"AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"}, "bos_token_id": None,
    "causal": False, "dense_seq_output": True, "embd_pdrop": 0.0, "eos_token_id": None, "fused_bias_fc": True,
    "fused_dropout_add_ln": True, "initializer_range": 0.02, "layer_norm_epsilon": 1e-12, "max_trained_positions": 2048,
    "mlp_fc1_bias": False, "mlp_fc2_bias": False, "model_type": "nomic_bert", "n_embd": 32, "n_head": 4, "n_inner": 48,
    "n_layer": 2, "n_positions": 96, "pad_vocab_size_multiple": 64, "parallel_block": False,
    "parallel_block_tied_norm": False, "prenorm": False, "qkv_proj_bias": False, "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.0, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True, "summary_activation": None, "summary_first_dropout": 0.0,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "torch_dtype": "float32",
    "transformers_version": "4.37.2", "type_vocab_size": 2, "use_cache": True, "use_flash_attn": True,
    "use_rms_norm": False, "use_xentropy": True,
}  # fmt: skip


def test_nomics_own_config_is_read_and_the_code_that_it_names_is_not_run(tmp_path: Path) -> None:
    wanted = opened("nomic-bert")
    path = changed(tmp_path, "nomic-bert", "config.json", {})
    (path / "config.json").write_text(json.dumps({**NOMIC, "vocab_size": wanted.encoder.args.vocab}))
    tokens = mx.array([list(range(5, 40))])
    assert mx.array_equal(load("it", [str(path)]).encoder(tokens), wanted.encoder(tokens))
    assert inspect(path).context == 48


def test_gemma_reads_its_layers_and_bases_from_older_files_too(tmp_path: Path) -> None:
    older = {"layer_types": None, "_sliding_window_pattern": 3, "rope_parameters": None, "rope_theta": 16_000.0,
             "rope_local_base_freq": 100.0, "rope_scaling": None}  # fmt: skip
    path = changed(tmp_path, "embeddinggemma", "config.json", older)
    tokens = mx.array([list(range(40))])
    found, wanted = load("it", [str(path)]).encoder(tokens), opened("embeddinggemma").encoder(tokens)
    assert mx.array_equal(found, wanted)
    scaled = {**older, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **scaled}))
    assert not mx.allclose(load("it", [str(path)]).encoder(tokens), wanted, atol=1e-3)


def test_embeddinggemma_without_its_modules_does_not_generate(tmp_path: Path) -> None:
    """Its tokens see those behind them."""
    path = changed(tmp_path, "embeddinggemma", "config.json", {"layer_types": None})
    (path / "modules.json").unlink()
    with pytest.raises(ModelError, match="use_bidirectional_attention"):
        load("it", [str(path)])


def test_a_gte_without_token_types_adds_none(tmp_path: Path) -> None:
    path = changed(tmp_path, "gte", "config.json", {"type_vocab_size": 0})
    arrays = safetensors.read_folder(path)
    (name,) = [name for name in arrays if "token_type_embeddings" in name]
    table = arrays.pop(name)
    words = next(name for name in arrays if "word_embeddings" in name)
    arrays[words] = arrays[words] + table[0]
    safetensors.write(path / "model.safetensors", arrays)
    tokens = mx.array([list(range(5, 30))])
    assert mx.allclose(load("it", [str(path)]).encoder(tokens), opened("gte").encoder(tokens), atol=1e-5)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("name", ["llama-llama3", "mistral", "qwen2-untied"])
def test_a_decoder_of_the_llama_family_with_modules_embeds(name: str, ends: bool, tmp_path: Path) -> None:
    """As E5-Mistral, and the Qwen2 that code is embedded by: the state of the last token, which has seen all, at
    length one. The oracle is the decoder itself, which generates without these files."""
    source, folder = GOLDENS / "architectures" / name, tmp_path / "model"
    shutil.copytree(source, folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    (folder / "modules.json").write_text(json.dumps(listed))
    generating = load("it", [str(source)])
    eos = generating.tokenizer.main_eos_id
    assert eos is not None
    said = {"eos_token": generating.tokenizer.inner.id_to_token(eos), "add_eos_token": ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    model = load("it", [str(folder)])
    assert model.embedding is not None
    assert model.kind == inspect(folder).kind == verify(folder).inspection.kind == "embed"
    end, room = [eos] if ends else [], model.embedding.max_tokens
    texts = [text for text in TEXTS if text]
    for text, vector in zip(texts, embedded(model, texts), strict=True):
        tokens = [*generating.tokenizer.encode(text)[: room - len(end)], *end]
        last = np.array(generating.decoder(mx.array([tokens])))[0, -1]
        assert np.abs(vector - last / np.linalg.norm(last)).max() < CLOSE


def test_a_text_that_the_tokenizers_file_begins_is_ended_too(tmp_path: Path) -> None:
    """As of E5-Mistral, whose file has the token before a text alone. What is cut keeps both."""
    plain = Tokenizer.from_folder(GOLDENS / "architectures" / "mistral")
    first, last = (str(plain.inner.id_to_token(index)) for index in (1, 2))
    changed = tokenizers.Tokenizer.from_str(plain.inner.to_str())
    changed.post_processor = TemplateProcessing(single=[first, "$A"], pair=None, special_tokens=[(first, 1)])
    changed.save(str(tmp_path / "tokenizer.json"))
    said = {"bos_token": first, "eos_token": last, "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    ids = plain.encode("heat and heat", special=False)
    assert Tokenizer.from_folder(tmp_path).encode("heat and heat") == [1, *ids]
    ended = Tokenizer.from_folder(tmp_path, ends=True)
    assert ended.encode("heat and heat") == [1, *ids, 2]
    assert ended.encode_cut("heat and heat", 4) == [1, *ids[:2], 2]
