"""Makes this folder's golden files: what sentencepiece and transformers say about small vocabularies and templates.

Run it in the environment of `make goldens`, with sentencepiece added. The files are committed: the tests need none of
those packages.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from templates import CASES, TEMPLATES
from texts import CORPUS, TEXTS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

HERE = Path(__file__).resolve().parent


def main() -> None:
    made_with = {
        name: importlib.metadata.version(name) for name in ("sentencepiece", "transformers", "tokenizers", "jinja2")
    }
    write("byte_level.json", {"made_with": made_with, **byte_level()})
    write("sentencepiece.json", {"made_with": made_with, "prefix": spm(True), "no_prefix": spm(False)})
    write("chats.json", {"made_with": made_with, "cases": chats()})


def byte_level() -> dict[str, Any]:
    """One vocabulary under the pre-tokenizers of three model families."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        [CORPUS] * 4, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    )
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"]
    # Whole numbers as tokens that no merge makes: Llama 3 takes them, the others cannot.
    vocab |= {text: len(vocab) + number for number, text in enumerate(("789", "42", "007"))}
    merges = [tuple(pair) for pair in model["merges"]]
    pattern = TikTokenConverter().pattern
    llama3 = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    llama3.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    llama3.decoder = decoders.ByteLevel()
    oracles = {
        "qwen2": Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges)),
        "gpt-2": GPT2Tokenizer(vocab=dict(vocab), merges=list(merges)),
        "llama-bpe": PreTrainedTokenizerFast(tokenizer_object=llama3),
    }
    ids = {
        name: [oracle(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        for name, oracle in oracles.items()
    }
    tokens = sorted(vocab, key=vocab.__getitem__)
    return {"tokens": tokens, "merges": [" ".join(pair) for pair in merges], "texts": TEXTS, "ids": ids}


def spm(prefix: bool) -> dict[str, Any]:
    """A vocabulary trained as Llama's was, and what sentencepiece itself says of the texts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n") * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        character_coverage=0.98,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = processor.vocab_size()
    tokens = [processor.id_to_piece(index) for index in range(size)]
    scores = [processor.get_score(index) for index in range(size)]
    ids = [processor.encode(text) for text in TEXTS]
    if prefix:
        check_transformers(tokens, scores, ids)
    return {
        "tokens": tokens,
        "scores": scores,
        "types": [spm_type(processor, index) for index in range(size)],
        "texts": TEXTS,
        "ids": ids,
    }


def spm_type(processor: Any, index: int) -> int:
    if processor.is_unknown(index):
        return 2
    if processor.is_control(index):
        return 3
    if processor.is_byte(index):
        return 6
    return 4 if processor.id_to_piece(index) == "<tool>" else 1


def check_transformers(tokens: list[str], scores: list[float], ids: list[list[int]]) -> None:
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    oracle = LlamaTokenizer(vocab=vocab, merges=merges)
    for text, expected in zip(TEXTS, ids, strict=True):
        got = oracle(text, add_special_tokens=False)["input_ids"]
        # transformers puts no second space before a text that starts with one; sentencepiece and llama.cpp do.
        if got != expected and "<tool>" not in text and not text.startswith((" ", "\u2581")):
            raise SystemExit(f"transformers differs from sentencepiece on {text!r}: {got} {expected}")


def chats() -> list[dict[str, Any]]:
    """Every conversation through every template that takes it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[])),
        bos_token="<s>",
        eos_token="</s>",
    )
    found = []
    for name, template in TEMPLATES.items():
        for case, arguments in CASES.items():
            try:
                text = tokenizer.apply_chat_template(chat_template=template, tokenize=False, **arguments)
            except Exception as error:
                found.append({"template": name, "case": case, "error": str(error)})
            else:
                found.append({"template": name, "case": case, "text": text})
    return found


def write(name: str, content: Any) -> None:
    (HERE / name).write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(name, (HERE / name).stat().st_size, "bytes")


if __name__ == "__main__":
    main()
