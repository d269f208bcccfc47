"""Texts and models for the embedding benchmark: lengths of a realistic mix, and a checkpoint of MiniLM's shape."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np

#: all-MiniLM-L6-v2's sizes.
CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 6,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30_522,
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
#: Common words that all-MiniLM-L6-v2's vocabulary holds whole: a text of n of them has n + 2 tokens.
_COMMON = (
    "the of and to in was he on as for with that is his at by from it were an be had this which or also but not are "
    "first they one new after who their her she two been other when there all during into school time may years more "
    "most only over city some world would where later up such used many can state about national out known university "
    "united then made people war house river night water music book year day family small large work station"
)
WORDS = _COMMON.split()


def mixed_lengths(count: int, seed: int = 0) -> list[int]:
    """Tokens of texts, 8 to 256: most are short, some are long (log-normal, as sentences and paragraphs are)."""
    drawn = np.random.default_rng(seed).lognormal(mean=4.0, sigma=0.8, size=count)
    return np.clip(drawn, 8, 256).astype(int).tolist()  # type: ignore[no-any-return]


def texts_of(lengths: list[int], seed: int = 0, words: tuple[str, ...] | list[str] = WORDS) -> list[str]:
    """A text for each length in tokens, the two special ones included."""
    random = np.random.default_rng(seed)
    return [" ".join(words[index] for index in random.integers(0, len(words), length - 2)) for length in lengths]


def write_checkpoint(folder: Path, dtype: str = "float16", seed: int = 0) -> Path:
    """Random weights of MiniLM's shape with a WordPiece tokenizer, as both Stoker and sentence-transformers read it."""
    import safetensors.numpy

    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(
        {name: array.astype(dtype) for name, array in _weights(np.random.default_rng(seed)).items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    _write_tokenizer(folder)
    described = {
        "config.json": {**CONFIG, "torch_dtype": dtype},
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 512,
            **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)),
        },
    }
    for name, content in described.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), "utf-8")
    (folder / "2_Normalize").mkdir(exist_ok=True)
    return folder


def _weights(random: np.random.Generator) -> dict[str, np.ndarray]:
    dim, hidden = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    found: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, scale: float) -> None:
        found[f"{name}.weight"] = random.normal(0, scale, (rows, columns)).astype(np.float32)

    def linear(name: str, outputs: int, inputs: int) -> None:
        matrix(name, outputs, inputs, inputs**-0.5)
        found[f"{name}.bias"] = random.normal(0, 0.02, outputs).astype(np.float32)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = random.normal(1, 0.05, dim).astype(np.float32)
        found[f"{name}.bias"] = random.normal(0, 0.02, dim).astype(np.float32)

    matrix("embeddings.word_embeddings", CONFIG["vocab_size"], dim, 0.05)
    matrix("embeddings.position_embeddings", CONFIG["max_position_embeddings"], dim, 0.02)
    matrix("embeddings.token_type_embeddings", CONFIG["type_vocab_size"], dim, 0.02)
    norm("embeddings.LayerNorm")
    for index in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", dim, dim)
        linear(f"{layer}.attention.output.dense", dim, dim)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", hidden, dim)
        linear(f"{layer}.output.dense", dim, hidden)
        norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", dim, dim)
    return found


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = list(SPECIAL) + WORDS + list(string.ascii_lowercase) + [f"##{letter}" for letter in string.ascii_lowercase]
    pieces = [
        f"{a}{b}{c}" for a in string.ascii_lowercase for b in string.ascii_lowercase for c in string.ascii_lowercase
    ]
    words += pieces + [f"##{piece}" for piece in pieces]
    vocabulary = {word: index for index, word in enumerate(list(dict.fromkeys(words))[: CONFIG["vocab_size"]])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
