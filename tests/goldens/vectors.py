"""Tiny random embedding models in the layout of the real folders, and the vectors that sentence-transformers makes.

Run in the peers' environment (`make goldens-vectors`); with names those alone are made, and with `--into FOLDER` in
another folder than this one. Every folder has what the real ones have: `modules.json`, the
pooling's config, the settings of the transformer, the prompts, and a tokenizer.json that puts the model's own tokens
around a text. Each text is encoded by itself, in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers import __version__ as sentence_version
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
OLD = "sentence_transformers.models"
SENTENCES = [
    "a stoker keeps the furnace hot, and a warm model answers at once",
    "der Heizer hält den Ofen warm, und das Modell antwortet sofort",
    "the query asks, the passage answers; instruct the model to search",
]
TEXTS = [
    "a warm model",
    "der Ofen ist warm",
    "the",
    "  two  spaces, and 3 numbers: 12 ",
    "a word that is not there: Žluťoučký 我能",
    "the furnace answers " * 4,
    "a stoker keeps the furnace hot " * 14,
]
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Folder:
    """`parts`: the modules after the transformer, by their kind and their config. `prefix`: before every tensor.
    `saved`: whether tensors have the names that transformers gives them in files, not in memory."""

    model: Callable[[int], transformers.PreTrainedModel]
    tokenizer: Callable[[], Tokenizer]
    tokenizer_config: Mapping[str, Any]
    parts: list[tuple[str, Mapping[str, Any] | None]]
    settings: Mapping[str, Any] | None = field(default_factory=lambda: {"max_seq_length": 48, "do_lower_case": False})
    prompts: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    saved: bool = False


def old_pooling(*modes: str, **more: Any) -> dict[str, Any]:
    """As versions before 5.4 wrote it."""
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": 32, **{f"pooling_mode_{name}": name in modes for name in names}, **more}


def sentence_pieces(special: list[str], unknown: str, single: str, pair: str) -> Tokenizer:
    """A Unigram vocabulary of SentencePiece's kind, whose first tokens are the special ones."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    made.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=special, unk_token=unknown, show_progress=False, initial_alphabet=[]
    )
    made.train_from_iterator(SENTENCES, trainer)
    around = [(token, index) for index, token in enumerate(special)]
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=around)
    return made


def unigram() -> Tokenizer:
    """XLM-R's and CamemBERT's kind, with its `<s> … </s>`."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    made = sentence_pieces(special, "<unk>", "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    # XLM-R's <mask> is the last token, and takes the space before it away.
    made.add_special_tokens([transformers.AddedToken("<mask>", lstrip=True, special=True)])
    return made


def t5_pieces() -> Tokenizer:
    return sentence_pieces(["<pad>", "</s>", "<unk>"], "<unk>", "$A </s>", "$A </s> $B </s>")


def albert_pieces() -> Tokenizer:
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    return sentence_pieces(special, "<unk>", "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")


def deberta_pieces() -> Tokenizer:
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    return sentence_pieces(special, "[UNK]", "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")


def byte_level(special: list[str], single: str) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    made.train_from_iterator(SENTENCES, trainer)
    ids = [(token, made.token_to_id(token)) for token in special]
    made.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=single, special_tokens=ids)]
    )
    return made


def modern_bpe() -> Tokenizer:
    return byte_level(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"], "[CLS] $A [SEP]")


def qwen_bpe() -> Tokenizer:
    return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "$A <|endoftext|>")


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    ids = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return made


def gemma_bpe() -> Tokenizer:
    """SentencePiece's kind of BPE, whose unknown characters become bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    made.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    content = json.loads(made.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    made = Tokenizer.from_str(json.dumps(content))
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return made


def gemma(vocabulary: int) -> transformers.PreTrainedModel:
    """Seven layers, of which every third one sees all; a window of 4 tokens on either side."""
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 16_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}  # fmt: skip
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    config = transformers.Gemma3TextConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=48, max_position_embeddings=128, query_pre_attn_scalar=24, sliding_window=8,
        layer_types=kinds[:7], rope_parameters=rope, use_bidirectional_attention=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=2,
    )  # fmt: skip
    return transformers.Gemma3TextModel(config)


def nomic(vocabulary: int) -> transformers.PreTrainedModel:
    config = transformers.NomicBertConfig(
        vocab_size=vocabulary, **SIZES, intermediate_size=48, max_position_embeddings=96, type_vocab_size=2
    )
    return transformers.NomicBertModel(config)


def gte(vocabulary: int) -> transformers.PreTrainedModel:
    config = transformers.GteConfig(
        vocab_size=vocabulary, **SIZES, intermediate_size=48, max_position_embeddings=96, type_vocab_size=1
    )
    return transformers.GteModel(config)


def xlm_roberta(vocabulary: int, **more: Any) -> transformers.PreTrainedModel:
    sizes = {"intermediate_size": 64, "max_position_embeddings": 66, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return transformers.XLMRobertaModel(
        transformers.XLMRobertaConfig(vocab_size=vocabulary, **SIZES, **{**sizes, **more})
    )


def distilbert(vocabulary: int) -> transformers.PreTrainedModel:
    config = transformers.DistilBertConfig(
        vocab_size=vocabulary, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=66
    )
    return transformers.DistilBertModel(config)


def electra_config(vocabulary: int, **more: Any) -> transformers.PretrainedConfig:
    sizes = {"embedding_size": 16, "intermediate_size": 64, "max_position_embeddings": 66, "layer_norm_eps": 1e-5}
    return transformers.ElectraConfig(vocab_size=vocabulary, **SIZES, **{**sizes, **more})


def albert_config(vocabulary: int, **more: Any) -> transformers.PretrainedConfig:
    sizes = {"embedding_size": 16, "intermediate_size": 64, "max_position_embeddings": 66, "layer_norm_eps": 1e-5,
             "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
    return transformers.AlbertConfig(vocab_size=vocabulary, **{**SIZES, **sizes, **more})


def camembert_config(vocabulary: int, **more: Any) -> transformers.PretrainedConfig:
    sizes = {"intermediate_size": 64, "max_position_embeddings": 66, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return transformers.CamembertConfig(vocab_size=vocabulary, **SIZES, **{**sizes, **more})


def deberta_config(vocabulary: int, **more: Any) -> transformers.PretrainedConfig:
    """Version 3's, with so few buckets that long texts share them."""
    own = {"intermediate_size": 64, "max_position_embeddings": 66, "type_vocab_size": 0, "relative_attention": True,
           "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p",
           "position_biased_input": False, "max_relative_positions": -1}  # fmt: skip
    return transformers.DebertaV2Config(vocab_size=vocabulary, **SIZES, **{**own, **more})


#: As far as version 2's differs, and what its models may have and do not.
DEBERTA_2: dict[str, Any] = {
    "share_att_key": False, "position_buckets": -1, "max_relative_positions": 12, "norm_rel_ebd": "none",
    "pos_att_type": "c2p|p2c", "type_vocab_size": 2, "position_biased_input": True,
}  # fmt: skip


def t5(vocabulary: int, **more: Any) -> transformers.PreTrainedModel:
    own = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0, "eos_token_id": 1,
           "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}  # fmt: skip
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=vocabulary, **{**own, **more}))


def modernbert(vocabulary: int, **more: Any) -> transformers.PreTrainedModel:
    """Six layers: of every three the first is global. A window of 4 tokens on either side."""
    own = {"num_hidden_layers": 5, "intermediate_size": 48, "max_position_embeddings": 128, "local_attention": 8,
           "pad_token_id": 3, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}  # fmt: skip
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 16_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}  # fmt: skip
    config = transformers.ModernBertConfig(vocab_size=vocabulary, rope_parameters=rope, **{**SIZES, **own, **more})
    return transformers.ModernBertModel(config)


def qwen3(vocabulary: int) -> transformers.PreTrainedModel:
    own = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 128,
           "tie_word_embeddings": True, "rope_theta": 1e6, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    return transformers.Qwen3Model(transformers.Qwen3Config(vocab_size=vocabulary, **SIZES, **own))


XLMR = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 64, "bos_token": "<s>", "eos_token": "</s>",
        "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "mask_token": "<mask>"}  # fmt: skip
MODERN = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128, "cls_token": "[CLS]",
          "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]",
          "model_input_names": ["input_ids", "attention_mask"]}  # fmt: skip
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 96, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "padding_side": "left"}  # fmt: skip
GEMMA = {"tokenizer_class": "GemmaTokenizer", "model_max_length": 96, "bos_token": "<bos>", "eos_token": "<eos>",
         "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>", "add_bos_token": True,
         "add_eos_token": True}  # fmt: skip
BERT = {"tokenizer_class": "BertTokenizer", "model_max_length": 96}
DISTILBERT = {"tokenizer_class": "DistilBertTokenizer", "model_max_length": 96}
ELECTRA = {"tokenizer_class": "ElectraTokenizer", "model_max_length": 96}
CAMEMBERT = {**XLMR, "tokenizer_class": "CamembertTokenizer"}
ALBERT = {"tokenizer_class": "AlbertTokenizer", "model_max_length": 64, "unk_token": "<unk>", "pad_token": "<pad>",
          "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "bos_token": "[CLS]",
          "eos_token": "[SEP]"}  # fmt: skip
DEBERTA = {**ALBERT, "tokenizer_class": "DebertaV2Tokenizer", "unk_token": "[UNK]", "pad_token": "[PAD]"}
T5 = {"tokenizer_class": "T5Tokenizer", "model_max_length": 96, "eos_token": "</s>", "unk_token": "<unk>",
      "pad_token": "<pad>", "extra_ids": 0}  # fmt: skip
TASKS = {"prompts": {"query": "task: search result | query: ", "document": "title: none | text: "},
         "default_prompt_name": None}  # fmt: skip
INSTRUCT = {"prompts": {"query": "instruct the model to search\nquery:", "document": ""}, "default_prompt_name": None}
TANH, IDENTITY = ("torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity")


def dense(inputs: int, outputs: int, activation: str, bias: bool = True) -> tuple[str, dict[str, Any]]:
    return "Dense", {
        "in_features": inputs, "out_features": outputs, "bias": bias, "activation_function": activation,
    }  # fmt: skip


def folders() -> dict[str, Folder]:
    cls, mean = ("Pooling", old_pooling("cls_token")), ("Pooling", old_pooling("mean_tokens"))
    normalize: tuple[str, None] = ("Normalize", None)

    def pooled(mode: str | list[str], *more: tuple[str, Mapping[str, Any] | None], **options: Any) -> Folder:
        pooling = ("Pooling", {"embedding_dimension": 32, "pooling_mode": mode, "include_prompt": True})
        return Folder(xlm_roberta, unigram, XLMR, [pooling, *more], **options)

    last = ("Pooling", old_pooling("lasttoken", include_prompt=True))
    named = {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": "passage"}
    biased = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "global_attn_every_n_layers": 2}
    return {
        "xlm-roberta": Folder(xlm_roberta, unigram, XLMR, [mean, normalize], prefix="roberta."),
        "bge-m3": Folder(lambda rows: xlm_roberta(rows, pad_token_id=4, type_vocab_size=2), unigram, XLMR, [cls]),
        "max": pooled("max"),
        "sqrt": pooled("mean_sqrt_len_tokens"),
        "weighted": pooled("weightedmean"),
        "dense": pooled("mean", dense(32, 48, IDENTITY, bias=False), dense(48, 16, TANH), normalize, prompts=named),
        "modernbert": Folder(modernbert, modern_bpe, MODERN, [mean], prefix="model."),
        "modernbert-biased": Folder(lambda rows: modernbert(rows, **biased), modern_bpe, MODERN, [cls, normalize]),
        "embeddinggemma": Folder(
            gemma,
            gemma_bpe,
            GEMMA,
            [mean, dense(32, 48, IDENTITY, bias=False), dense(48, 32, IDENTITY, bias=False), normalize],
            prompts=TASKS,
        ),
        "nomic-bert": Folder(nomic, word_piece, BERT, [mean], saved=True),
        "gte": Folder(gte, unigram, XLMR, [cls, normalize], saved=True),
        "qwen3-embedding": Folder(qwen3, qwen_bpe, QWEN, [last, normalize], settings=None, prompts=INSTRUCT),
        "distilbert": Folder(distilbert, word_piece, DISTILBERT, [mean], prefix="distilbert."),
        "t5": Folder(t5, t5_pieces, T5, [mean, dense(32, 48, IDENTITY, bias=False), normalize], saved=True),
        "t5-gated": Folder(
            lambda rows: t5(rows, d_kv=16, feed_forward_proj="gated-gelu"),
            t5_pieces,
            T5,
            [mean, normalize],
            saved=True,
        ),
        "camembert": Folder(
            lambda rows: transformers.CamembertModel(camembert_config(rows)),
            unigram,
            CAMEMBERT,
            [mean],
            prefix="roberta.",
        ),
        "albert": Folder(
            lambda rows: transformers.AlbertModel(albert_config(rows, num_hidden_layers=4, num_hidden_groups=2)),
            albert_pieces,
            ALBERT,
            [mean],
            prefix="albert.",
        ),
        "electra": Folder(
            lambda rows: transformers.ElectraModel(electra_config(rows)), word_piece, ELECTRA, [cls], prefix="electra."
        ),
        "deberta-v3": Folder(
            lambda rows: transformers.DebertaV2Model(deberta_config(rows)),
            deberta_pieces,
            DEBERTA,
            [mean],
            prefix="deberta.",
        ),
        "deberta-v2": Folder(
            lambda rows: transformers.DebertaV2Model(deberta_config(rows, **DEBERTA_2)),
            deberta_pieces,
            {**DEBERTA, "do_lower_case": True, "split_by_punct": True},
            [cls, normalize],
            saved=True,
        ),
        "poolings": pooled(["weightedmean", "cls", "mean_sqrt_len_tokens"]),
        "poolings-older": Folder(
            xlm_roberta,
            unigram,
            XLMR,
            [("Pooling", old_pooling("mean_tokens", "lasttoken", "max_tokens", "cls_token")), normalize],
        ),
        "layer-norm": pooled("mean", ("LayerNorm", {"dimension": 32}), dense(32, 16, TANH), normalize),
    }


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def make(home: Path, folder: Folder, generator: torch.Generator) -> None:
    tokenizer = folder.tokenizer()
    home.mkdir(parents=True)
    tokenizer.save(str(home / "tokenizer.json"))
    write(home / "tokenizer_config.json", folder.tokenizer_config)
    model = folder.model(tokenizer.get_vocab_size()).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            parameter.copy_(noise * (1.0 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5))
        else:
            parameter.copy_(noise * 0.3 + (1.0 if name.endswith("weight") else 0.0))
    if folder.saved:
        model.save_pretrained(home)
    else:
        model.config.save_pretrained(home)
        tensors = {folder.prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, home / "model.safetensors", {"format": "pt"})
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{OLD}.Transformer"}]
    for index, (kind, config) in enumerate(folder.parts, start=1):
        path = f"{index}_{kind}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": f"{OLD}.{kind}"})
        if config is not None:
            write(home / path / "config.json", config)
        if kind == "Dense" and config is not None:
            shapes = {"linear.weight": (config["out_features"], config["in_features"])}
            shapes |= {"linear.bias": (config["out_features"],)} if config["bias"] else {}
            heads = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
            save_file(heads, home / path / "model.safetensors", {"format": "pt"})
        if kind == "LayerNorm" and config is not None:
            weight, bias = (torch.randn(config["dimension"], generator=generator) for _ in range(2))
            norm = {"norm.weight": weight, "norm.bias": bias}
            save_file(norm, home / path / "model.safetensors", {"format": "pt"})
    write(home / "modules.json", modules)
    if folder.settings is not None:
        write(home / "sentence_bert_config.json", folder.settings)
    write(home / "config_sentence_transformers.json", {"__version__": {"pytorch": "2"}, **folder.prompts})


def asked(known: Sequence[str]) -> tuple[list[str], Path]:
    """The names of the command line, of those that there are, and where to make them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="make these alone, and leave the others as they are")
    parser.add_argument("--into", type=Path, default=HERE, help="another folder than that of the script")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(known)):
        parser.error(f"none is called {', '.join(unknown)}; there are {', '.join(known)}")
    return given.names, given.into


def main() -> None:
    """Make all, or those that are named, and leave the others as they are."""
    wanted, into = asked(list(folders()))
    home = into / "vectors"
    arrays, said = {}, {}
    if wanted:
        arrays = dict(np.load(HERE / "vectors.npz"))
        said = json.loads((HERE / "vectors.json").read_text())["checkpoints"]
    for name, folder in folders().items():
        if wanted and name not in wanted:
            continue
        shutil.rmtree(home / name, ignore_errors=True)
        make(home / name, folder, torch.Generator().manual_seed(zlib.crc32(name.encode())))
        oracle = SentenceTransformer(str(home / name), device="cpu", model_kwargs={"attn_implementation": "eager"})
        arrays[f"{name}.plain"] = np.stack([oracle.encode(text, prompt="") for text in TEXTS])
        arrays[f"{name}.default"] = np.stack([oracle.encode(text) for text in TEXTS])
        arrays[f"{name}.query"] = np.stack([oracle.encode(text, prompt="query: ") for text in TEXTS])
        if "query" in folder.prompts.get("prompts", {}):
            arrays[f"{name}.query"] = np.stack([oracle.encode(text, prompt_name="query") for text in TEXTS])
        ids = [oracle.preprocess([text])["input_ids"][0].tolist() for text in TEXTS]
        said[name] = {"longest": oracle.max_seq_length, "token_ids": ids}
    np.savez_compressed(into / "vectors.npz", **arrays)
    versions = {"transformers": transformers.__version__, "sentence-transformers": sentence_version}
    content = {"made_with": {**versions, "torch": torch.__version__}, "texts": TEXTS, "checkpoints": said}
    (into / "vectors.json").write_text(json.dumps(content, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
