"""Tiny random rerankers in the layout of the real folders, and the scores that their own code gives to pairs.

Run in the peers' environment (`make goldens-vectors`); names and `--into` as `vectors.py` has them. Cross-encoders and
folders with sentence-transformers' files are asked through its CrossEncoder; `Qwen3-Reranker-tiny`, with none of
them, by the code of its model card. Each pair is scored by itself, in float32, before any activation.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentence_transformers import CrossEncoder
from sentence_transformers import __version__ as sentence_version
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from vectors import (
    ALBERT,
    CAMEMBERT,
    DEBERTA,
    DEBERTA_2,
    DISTILBERT,
    ELECTRA,
    MODERN,
    QWEN,
    SENTENCES,
    SIZES,
    TEXTS,
    XLMR,
    albert_config,
    albert_pieces,
    asked,
    byte_level,
    camembert_config,
    deberta_config,
    deberta_pieces,
    electra_config,
    unigram,
    word_piece,
    write,
)

HERE = Path(__file__).parent
QUERIES = [
    "how does a stoker keep the furnace hot?",
    "Ofen",
    "the furnace and the passage, the query and the model, " * 8,
]
TEMPLATE = (
    "{%- set told = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list -%}"
    "<|im_start|>judge by {{ told[0] if told else 'the query' }}<|im_end|>\n"
    "{%- for message in messages -%}{%- if message.role == 'query' %}\n<query>: {{ message.content }}"
    "{%- elif message.role == 'document' %}\n<text>: {{ message.content }}<|im_end|>\n<|im_start|>answer\n"
    "{%- endif -%}{%- endfor -%}"
)
IDENTITY = "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class Folder:
    """`sentence`: whether sentence-transformers' own files are in it. `own`: further fields of its config.json."""

    model: Callable[[int], transformers.PreTrainedModel]
    tokenizer: Callable[[], Tokenizer]
    tokenizer_config: Mapping[str, Any]
    sentence: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None


def modern() -> Tokenizer:
    made = byte_level(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"], "[CLS] $A [SEP]")
    ids = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    pair = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ids)
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), pair])
    return made


def qwen() -> Tokenizer:
    """Without tokens of its own around a text; with the two whose logits are read."""
    made = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "$A")
    made.add_tokens(["yes", "no"])
    return made


def mpnet_pieces() -> Tokenizer:
    """BERT's kind of vocabulary with RoBERTa's tokens around a text."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
    made.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return made


def distilbert(rows: int) -> transformers.PreTrainedModel:
    # An even number for query and text: of an odd one tokenizers 0.23.2 gives the text one more, and 0.23.3 the longer.
    config = transformers.DistilBertConfig(
        vocab_size=rows, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=57, num_labels=1
    )
    return transformers.DistilBertForSequenceClassification(config)


def mpnet(rows: int) -> transformers.PreTrainedModel:
    config = transformers.MPNetConfig(
        vocab_size=rows, **SIZES, intermediate_size=64, max_position_embeddings=58, num_labels=1
    )
    return transformers.MPNetForSequenceClassification(config)


def deberta(rows: int, **more: Any) -> transformers.PreTrainedModel:
    config = deberta_config(rows, **{"max_position_embeddings": 56, "num_labels": 1, **more})
    return transformers.DebertaV2ForSequenceClassification(config)


def qwen2(rows: int) -> transformers.PreTrainedModel:
    config = transformers.Qwen2Config(
        vocab_size=rows, **SIZES, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=256,
        num_labels=1, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.Qwen2ForSequenceClassification(config)


def xlm_roberta(rows: int) -> transformers.PreTrainedModel:
    config = transformers.XLMRobertaConfig(
        vocab_size=rows, **SIZES, intermediate_size=64, max_position_embeddings=66, type_vocab_size=1,
        layer_norm_eps=1e-5, num_labels=1,
    )  # fmt: skip
    return transformers.XLMRobertaForSequenceClassification(config)


def bert(rows: int) -> transformers.PreTrainedModel:
    config = transformers.BertConfig(
        vocab_size=rows, **SIZES, intermediate_size=64, max_position_embeddings=56, type_vocab_size=2, num_labels=1
    )
    return transformers.BertForSequenceClassification(config)


def modernbert(rows: int, **more: Any) -> transformers.PreTrainedModel:
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 16_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}  # fmt: skip
    config = transformers.ModernBertConfig(
        vocab_size=rows, rope_parameters=rope, num_labels=1, pad_token_id=3, bos_token_id=1, cls_token_id=1,
        eos_token_id=2, sep_token_id=2,
        **{**SIZES, "num_hidden_layers": 4, "intermediate_size": 48, "max_position_embeddings": 96,
           "local_attention": 8, **more},
    )  # fmt: skip
    return transformers.ModernBertForSequenceClassification(config)


def qwen3(rows: int, *, head: bool = False, tied: bool = True, longest: int = 256) -> transformers.PreTrainedModel:
    config = transformers.Qwen3Config(
        vocab_size=rows, **SIZES, num_key_value_heads=2, head_dim=16, intermediate_size=48,
        max_position_embeddings=longest, tie_word_embeddings=tied, num_labels=1, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return (transformers.Qwen3ForSequenceClassification if head else transformers.Qwen3ForCausalLM)(config)


def folders() -> dict[str, Folder]:
    told = {**QWEN, "model_max_length": 192}
    marco = {"sentence_transformers": {"activation_fn": IDENTITY, "version": "4.1.0"}}
    return {
        "bge-reranker": Folder(xlm_roberta, unigram, XLMR),
        "ms-marco": Folder(bert, word_piece, {"tokenizer_class": "BertTokenizer", "model_max_length": 512}, own=marco),
        "modernbert": Folder(modernbert, modern, {**MODERN, "model_max_length": 96}, sentence=True),
        "modernbert-mean": Folder(
            lambda rows: modernbert(rows, classifier_pooling="mean", classifier_bias=True, norm_bias=True),
            modern, MODERN,
        ),
        "qwen3-judge": Folder(
            lambda rows: qwen3(rows, tied=False), qwen, {**told, "chat_template": TEMPLATE}, True, prompt="reason"
        ),
        "qwen3-classifier": Folder(
            lambda rows: qwen3(rows, head=True), qwen, {**told, "chat_template": TEMPLATE}, True
        ),
        "distilbert": Folder(distilbert, word_piece, DISTILBERT),
        "camembert": Folder(
            lambda rows: transformers.CamembertForSequenceClassification(camembert_config(rows, num_labels=1)),
            unigram, CAMEMBERT,
        ),
        "electra": Folder(
            lambda rows: transformers.ElectraForSequenceClassification(
                electra_config(rows, num_labels=1, max_position_embeddings=56)
            ),
            word_piece, ELECTRA, own=marco,
        ),
        "albert": Folder(
            lambda rows: transformers.AlbertForSequenceClassification(
                albert_config(rows, num_labels=1, hidden_act="gelu")
            ),
            # Which transformers 5 forgot, and 4 had by itself.
            albert_pieces, {**ALBERT, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
        ),
        "mxbai-rerank": Folder(deberta, deberta_pieces, DEBERTA),
        "deberta-v2": Folder(
            lambda rows: deberta(rows, **DEBERTA_2, pooler_hidden_act="tanh"), deberta_pieces, DEBERTA, sentence=True
        ),
        "mpnet": Folder(mpnet, mpnet_pieces, {"tokenizer_class": "MPNetTokenizer", "model_max_length": 56}),
        "qwen2-classifier": Folder(qwen2, qwen, {**told, "chat_template": TEMPLATE}, True),
        "Qwen3-Reranker-tiny": Folder(lambda rows: qwen3(rows, longest=448), qwen, {**told, "model_max_length": 512}),
    }  # fmt: skip


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
    model.save_pretrained(home)
    (home / "generation_config.json").unlink(missing_ok=True)
    if folder.sentence:
        prompts = {} if folder.prompt is None else {"query": folder.prompt}
        oracle = CrossEncoder(str(home), device="cpu", prompts=prompts)
        shutil.rmtree(home)
        oracle.save_pretrained(str(home), create_model_card=False)
    config = json.loads((home / "config.json").read_text())
    write(home / "config.json", {**config, **folder.own})


Scored = tuple[list[list[int]], list[float]]


def by_sentence_transformers(home: Path, prompt: str | None) -> tuple[list[int], Scored]:
    oracle = CrossEncoder(str(home), device="cpu", model_kwargs={"attn_implementation": "eager"})
    ids, scores = [], []
    for query in QUERIES:
        for text in TEXTS:
            ids.append(oracle.preprocess([(query, text)], prompt=prompt)["input_ids"][0].tolist())
            scores.append(float(oracle.predict([(query, text)], prompt=prompt, activation_fn=torch.nn.Identity())[0]))
    return [oracle.max_seq_length], (ids, scores)


def by_its_card(home: Path) -> tuple[list[int], Scored]:
    """As on https://huggingface.co/Qwen/Qwen3-Reranker-0.6B, before the softmax of the two logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    model = transformers.AutoModelForCausalLM.from_pretrained(home, attn_implementation="eager").eval()
    longest = model.config.max_position_embeddings
    yes, no = (tokenizer.convert_tokens_to_ids(token) for token in ("yes", "no"))
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    before, behind = (tokenizer.encode(part, add_special_tokens=False) for part in (prefix, suffix))
    task = "Given a web search query, retrieve relevant passages that answer the query"
    ids, scores = [], []
    for query in QUERIES:
        for text in TEXTS:
            pair = f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {text}"
            given = tokenizer(pair, truncation="longest_first", max_length=longest - len(before) - len(behind))
            ids.append(before + given["input_ids"] + behind)
            with torch.no_grad():
                logits = model(torch.tensor([ids[-1]])).logits[0, -1]
            scores.append(float(logits[yes] - logits[no]))
    return [longest], (ids, scores)


def main() -> None:
    """Make all, or those that are named, and leave the others as they are."""
    wanted, into = asked(list(folders()))
    home = into / "rerankers"
    said: dict[str, Any] = {}
    if wanted:
        said = json.loads((HERE / "rerankers.json").read_text())["checkpoints"]
    for name, folder in folders().items():
        if wanted and name not in wanted:
            continue
        shutil.rmtree(home / name, ignore_errors=True)
        make(home / name, folder, torch.Generator().manual_seed(zlib.crc32(name.encode())))
        card = name.startswith("Qwen3-Reranker")
        (longest,), (ids, scores) = by_its_card(home / name) if card else by_sentence_transformers(home / name, None)
        said[name] = {"longest": longest, "token_ids": ids, "scores": scores}
        if folder.prompt is not None:
            _, (_, said[name]["instructed"]) = by_sentence_transformers(home / name, folder.prompt)
    versions = {"transformers": transformers.__version__, "sentence-transformers": sentence_version}
    content = {
        "made_with": {**versions, "torch": torch.__version__}, "queries": QUERIES, "texts": TEXTS,
        "template": TEMPLATE, "checkpoints": said,
    }  # fmt: skip
    (into / "rerankers.json").write_text(json.dumps(content, ensure_ascii=False) + "\n")
    spread = {name: float(np.std(each["scores"])) for name, each in said.items()}
    assert min(spread.values()) > 0.05, spread


if __name__ == "__main__":
    main()
