"""The files of sentence-transformers: what they say of a text's length, letters and prompts, and where the model is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from engine.checkpoints import sources
from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import load
from engine.checkpoints.verifying import verify
from engine.models.bert import BertArgs
from engine.models.sentence import DenseSpec, EmbeddingSpec, Pooling
from engine.models.sentence_files import SentenceFiles, model_folder
from engine.text.tokenizer import Tokenizer
from stoker.errors import ModelError

ARGS = BertArgs(layers=1, dim=8, hidden=8, heads=2, vocab=9, positions=64, types=2, norm_eps=1e-12)
BERT = Path(__file__).parents[1] / "goldens" / "architectures" / "bert"
OLD = "sentence_transformers.models"
MODULES = [
    {"idx": 0, "name": "0", "type": f"{OLD}.Transformer", "path": ""},
    {"idx": 1, "name": "1", "type": f"{OLD}.Pooling", "path": "1_Pooling"},
]
NORMALIZE = {"idx": 2, "name": "2", "type": f"{OLD}.Normalize", "path": "2_Normalize"}
DENSE = {"idx": 2, "name": "2", "type": f"{OLD}.Dense", "path": "2_Dense"}
WORDS = json.loads((Path(__file__).parents[1] / "goldens" / "text" / "folders.json").read_text())["bases"]["words"]


def sentence_folder(tmp_path: Path, files: dict[str, Any]) -> Path:
    every = {"modules.json": MODULES, "1_Pooling/config.json": {"pooling_mode": "mean"}, **files}
    for name, content in every.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def dense(**values: Any) -> dict[str, Any]:
    """A folder with a Dense module; `values` besides what one has to say, or instead of it."""
    return {
        "modules.json": [*MODULES, DENSE],
        "2_Dense/config.json": {"in_features": 8, "out_features": 4, **values},
    }


def test_a_layer_behind_the_pooling_that_says_nothing_is_sentence_transformers_own(tmp_path: Path) -> None:
    (found,) = EmbeddingSpec.from_folder(sentence_folder(tmp_path, dense()), ARGS).heads
    assert isinstance(found, DenseSpec)
    assert (found.activation, found.bias, found.inputs, found.outputs) == ("Tanh", True, 8, 4)


def settings(**values: Any) -> dict[str, Any]:
    return {"sentence_bert_config.json": values}


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, 64),
        ({"tokenizer_config.json": {"model_max_length": 8}}, 8),
        ({"tokenizer_config.json": {"max_len": 8}}, 8),
        ({"tokenizer_config.json": {"model_max_length": 10**30}}, 64),
        ({**settings(max_seq_length=None), "tokenizer_config.json": {"model_max_length": 8}}, 8),
        ({**settings(max_seq_length=16), "tokenizer_config.json": {"model_max_length": 8}}, 16),
        ({**settings(max_seq_length=1000)}, 64),
        ({"sentence_roberta_config.json": {"max_seq_length": 7}}, 7),
    ],
)
def test_a_text_may_be_as_long_as_in_sentence_transformers(tmp_path: Path, files: dict[str, Any], most: int) -> None:
    assert EmbeddingSpec.from_folder(sentence_folder(tmp_path, files), ARGS).max_tokens == most


def test_a_plain_folder_is_bounded_by_its_tokenizer_alone(tmp_path: Path) -> None:
    """sentence-transformers looks at none of its own files where no modules.json is."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 4, "do_lower_case": True}))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"a": "b"}}))
    assert EmbeddingSpec.from_folder(tmp_path, ARGS) == EmbeddingSpec(8, "mean", False, 8)


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        (settings(max_seq_length="long"), '"long" is no number of tokens'),
        ({"tokenizer_config.json": {"model_max_length": 0}}, "0 is no number of tokens"),
        (settings(do_lower_case="yes"), 'do_lower_case is "yes", not true or false'),
        (settings(transformer_task="fill-mask"), 'transformer_task = "fill-mask" is not supported'),
        (
            settings(tokenizer_args={"padding_side": "left"}),
            'tokenizer_args: the field padding_side = "left" is not supported',
        ),
        (
            settings(config_kwargs={"num_hidden_layers": 1}),
            "config_kwargs: the field num_hidden_layers = 1 is not supported",
        ),
        (settings(tokenizer_name_or_path="other"), 'tokenizer_name_or_path = "other" is not supported'),
        ({"modules.json": [{**MODULES[0], "path": "../up"}]}, "leads out of the folder"),
        ({"modules.json": [{**MODULES[0], "path": "a\0b"}]}, "leads out of the folder"),
        ({"modules.json": MODULES[:1]}, "the modules Transformer; supported is a Transformer, then one Pooling"),
        ({"modules.json": MODULES[::-1]}, "the modules Pooling, Transformer; supported"),
        ({"modules.json": [MODULES[0], NORMALIZE, MODULES[1]]}, "the modules Transformer, Normalize, Pooling;"),
        ({"modules.json": [*MODULES, {**MODULES[1], "name": "2"}]}, "Transformer, Pooling, Pooling; supported"),
        ({"modules.json": [*MODULES, {**DENSE, "type": f"{OLD}.LSTM"}]}, "the module LSTM is not supported"),
        ({"modules.json": [*MODULES, {**NORMALIZE, "name": "3"}, DENSE]}, "Normalize, Dense; supported"),
        ({**dense(in_features=9)}, "in_features is 9, and what comes in has 8"),
        ({**dense(activation_function="torch.nn.modules.activation.ELU")}, 'ELU" is not supported; Identity, Tanh'),
        ({**dense(activation_function="own.Tanh")}, '"own.Tanh" is not supported'),
        ({**dense(use_residual=True)}, "use_residual = true is not supported"),
        ({**dense(dropout=0.1)}, "the field dropout = 0.1 is not supported"),
        ({**dense(module_input_name="token_embeddings")}, 'module_input_name = "token_embeddings"'),
        ({"modules.json": [*MODULES, {**NORMALIZE, "name": "1"}]}, 'two modules are called "1"'),
        ({"modules.json": [{**MODULES[0], "type": "own_code.Transformer"}]}, '"own_code.Transformer" is not supported'),
        ({"modules.json": [{**MODULES[0], "skip": True}]}, "the field skip = true is not supported"),
        ({"modules.json": [{"type": f"{OLD}.Transformer"}]}, "a module without a type or a path"),
        ({"modules.json": {}}, "not a list of modules"),
        ({"modules.json": []}, "or an empty one"),
        (settings(max_seq_len=5), "the field max_seq_len = 5 is not supported"),
        (settings(query_length=8), "query_length = 8 is not supported"),
        (settings(model_args={"num_hidden_layers": 1}), "model_args: the field num_hidden_layers = 1 is not supported"),
        (settings(processor_kwargs={"model_max_length": 4}), "processor_kwargs: the field model_max_length = 4"),
        (
            settings(modality_config={"text": {"method": "get_text_features", "method_output_name": None}}),
            "modality_config",
        ),
        (settings(tokenizer_args=[1]), r"tokenizer_args is \[1\], not an object"),
        ({"1_Pooling/config.json": {"pooling_mode": "first"}}, 'pooling "first" is not supported'),
        (
            {"1_Pooling/config.json": {"pooling_mode": ["mean", "first"]}},
            r'pooling \["mean", "first"\] is not supported',
        ),
        ({"1_Pooling/config.json": {"pooling_mode": []}}, r"pooling \[\] is not supported; mean, cls, .* and lists of"),
        ({"1_Pooling/config.json": {"pooling_mode": [["mean"]]}}, r'pooling \[\["mean"\]\] is not supported'),
        ({"1_Pooling/config.json": {"pooling_mode": None}}, "pooling null is not supported"),
        ({"1_Pooling/config.json": {"pooling_mode_cls_token": 1}}, "pooling_mode_cls_token is 1, not true or false"),
        ({"1_Pooling/config.json": {"pooling_mode_first_token": True}}, "the field pooling_mode_first_token = true"),
        ({"1_Pooling/config.json": {"include_prompt": False}}, "include_prompt = false is not supported"),
        (
            {
                "modules.json": [*MODULES, NORMALIZE],
                "2_Normalize/config.json": {"module_input_name": "token_embeddings"},
            },
            'module_input_name = "token_embeddings" is not supported',
        ),
        ({"config_sentence_transformers.json": {"truncate_dim": 4}}, "truncate_dim = 4 is not supported"),
        ({"config_sentence_transformers.json": {"model_type": "SparseEncoder"}}, 'model_type = "SparseEncoder" is not'),
        ({"config_sentence_transformers.json": {"query_prefix": "q"}}, 'the field query_prefix = "q" is not supported'),
        ({"config_sentence_transformers.json": {"prompts": {"a": 1}}}, "not an object of strings"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "a"}}, '"a" is none of its prompts'),
        (
            {"config_sentence_transformers.json": {"prompts": {"b": "B: "}, "default_prompt_name": "a"}},
            r'"a" is none of its prompts \(b\)',
        ),
        (
            {"config_sentence_transformers.json": {"default_prompt_name": ["a"]}},
            "default_prompt_name is .*, not a text",
        ),
        ({"config_sentence_transformers.json": {"default_prompt_name": {"a": 1}}}, "prompt_name is .*, not a text"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, files: dict[str, Any], cause: str) -> None:
    with pytest.raises(ModelError, match=cause):
        EmbeddingSpec.from_folder(sentence_folder(tmp_path, files), ARGS)


def test_settings_that_change_nothing_are_taken(tmp_path: Path) -> None:
    """What sentence-transformers 6 writes, and what older versions wrote."""
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    files = {
        **settings(
            do_lower_case=False,
            transformer_task="feature-extraction",
            modality_config={"text": text},
            module_output_name="token_embeddings",
            config_args={},
            model_args={"torch_dtype": "float16", "attn_implementation": "sdpa"},
        ),
        "modules.json": [
            {**MODULES[0], "type": "sentence_transformers.base.modules.transformer.Transformer"},
            {**MODULES[1], "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling", "kwargs": []},
            {**NORMALIZE, "path": ""},
            {"name": "3", "type": f"{OLD}.Dropout", "path": "3_Dropout"},
        ],
        "config_sentence_transformers.json": {
            "__version__": {"sentence_transformers": "6.2.0"},
            "prompts": {"query": "q: "},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "model_type": "SentenceTransformer",
        },
    }
    spec = EmbeddingSpec.from_folder(sentence_folder(tmp_path, files), ARGS)
    assert (spec.max_tokens, spec.normalize, spec.prompts) == (64, True, {"query": "q: "})


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"word_embedding_dimension": 8}, "mean"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"embedding_dimension": 8, "pooling_mode": ["cls"], "include_prompt": True}, "cls"),
        ({"pooling_mode": ["mean", "cls"]}, ("mean", "cls")),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": True},
            ("cls", "max", "mean"),
        ),
        ({"pooling_mode": "mean", "pooling_mode_cls_token": True}, "mean"),
    ],
)
def test_pooling_is_that_of_sentence_transformers(tmp_path: Path, config: dict[str, Any], pooling: Pooling) -> None:
    spec = EmbeddingSpec.from_folder(sentence_folder(tmp_path, {"1_Pooling/config.json": config}), ARGS)
    assert (spec.pooling, spec.dim) == (pooling, 8 * (1 if isinstance(pooling, str) else len(pooling)))


def test_settings_that_say_nothing_leave_it_to_the_next_name(tmp_path: Path) -> None:
    files = {**settings(), "sentence_roberta_config.json": {"max_seq_length": 7}}
    assert EmbeddingSpec.from_folder(sentence_folder(tmp_path, files), ARGS).max_tokens == 7


def test_a_pooling_without_its_file_is_refused(tmp_path: Path) -> None:
    path = sentence_folder(tmp_path, {})
    (path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"1_Pooling: no config\.json in it"):
        EmbeddingSpec.from_folder(path, ARGS)


def test_a_prompt_without_text_is_an_empty_one(tmp_path: Path) -> None:
    files = {"config_sentence_transformers.json": {"prompts": {"a": None}, "default_prompt_name": "query"}}
    spec = EmbeddingSpec.from_folder(sentence_folder(tmp_path, files), ARGS)
    assert (spec.prompts, spec.default_prompt) == ({"a": "", "query": ""}, "query")


@pytest.mark.parametrize(
    ("asked", "own", "texts"),
    [(True, False, ("the CAFÉ", "the café")), (False, False, ("the Café", "the Café")), (True, True, ("Café", "cafe"))],
)
def test_a_text_is_written_small_where_either_file_asks(
    tmp_path: Path, asked: bool, own: bool, texts: tuple[str, str]
) -> None:
    """`do_lower_case` of sentence_bert_config.json leaves accents; the tokenizer's own takes them away too."""
    files = {
        "tokenizer.json": WORDS,
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "do_lower_case": own},
        **settings(do_lower_case=asked),
    }
    path = sentence_folder(tmp_path, files)
    assert SentenceFiles.of(path).lowercase is asked
    tokenizer = Tokenizer.from_folder(path, lowercase=asked)
    given, read = texts
    assert tokenizer.inner.normalizer.normalize_str(given) == read
    assert tokenizer.encode("[MASK]", special=False) == [4], "a special token keeps its letters"


def test_the_hub_gives_the_folders_of_modules_and_no_copies_of_the_weights() -> None:
    wanted = ["0_Transformer/config.json", "0_Transformer/model.safetensors", "0_BERT/tokenizer.json",
              "model.safetensors", "1_Pooling/config.json", "additional_chat_templates/tool_use.jinja",
              "added_tokens.json", "sentence_roberta_config.json"]  # fmt: skip
    others = ["onnx/model.safetensors", "original/consolidated.safetensors", "onnx/config.json", "pytorch_model.bin",
              "consolidated.safetensors", "consolidated-00001-of-00002.safetensors",
              "consolidated.safetensors.index.json"]  # fmt: skip
    found = filter_repo_objects(
        wanted + others, allow_patterns=list(sources.HUB_FILES), ignore_patterns=list(sources.HUB_IGNORED)
    )
    assert list(found) == wanted


def subfolder(tmp_path: Path) -> Path:
    inner = {"0_Transformer/sentence_bert_config.json": {"max_seq_length": 9}}
    modules = [{**MODULES[0], "path": "0_Transformer"}, MODULES[1]]
    path = sentence_folder(tmp_path, {"modules.json": modules, **inner})
    for file in BERT.iterdir():
        shutil.copy(file, path / "0_Transformer" / file.name)
    return path


def test_a_model_may_lie_in_the_folder_of_its_module(tmp_path: Path) -> None:
    path = subfolder(tmp_path)
    model, plain = load("m", [str(path)]), load("p", [str(BERT)])
    assert (model.path, model_folder(path), model.context) == (path, path / "0_Transformer", 9)
    assert model.digest == plain.digest
    assert (inspect(path).context, inspect(path).parameters) == (9, inspect(BERT).parameters)
    assert verify(path).tensors == verify(BERT).tensors
    (path / "0_Transformer" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"0_Transformer: no config\.json in it"):
        load("m", [str(path)])
