"""SentencePiece vocabularies of GGUF files (`tokenizer.ggml.model` "llama"), as a `tokenizers` pipeline.

SentencePiece's BPE (https://github.com/google/sentencepiece, `bpe_model.cc`) joins, again and again, the two
neighbours whose union is the piece of the highest score. The same as merges: every way to cut a piece into two pieces
is one, in the order of the scores. What no piece covers becomes byte tokens `<0xXX>`. The file's scores of a real
model are all different; of two pieces of one score SentencePiece takes the one on the left, this the lower id.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

from engine.text.gguf_fields import NORMAL, Vocabulary
from engine.text.pieces import SPACE
from stoker.errors import ModelError


def build(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer without its special tokens. Raises `ModelError` for a vocabulary without scores or bytes."""
    scores = vocabulary.scores()
    index = vocabulary.index
    bytes_absent = sum(f"<0x{byte:02X}>" not in index for byte in range(256))
    if bytes_absent and bytes_absent != 256:
        raise ModelError(f"{vocabulary.where}: its vocabulary lacks {bytes_absent} of the 256 byte tokens")
    unknown = vocabulary.token("unknown_token_id")
    if bytes_absent and unknown is None:
        raise ModelError(f"{vocabulary.where}: its vocabulary has neither byte tokens nor an unknown token")
    model = models.BPE(
        vocab=index,
        merges=_merges(vocabulary, scores),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=not bytes_absent,
    )
    tokenizer = Tokenizer(model)
    prefix = vocabulary.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    # Before every stretch of text between special tokens, as llama.cpp does it.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    mergeable = {token: number for token, number in vocabulary.index.items() if vocabulary.types[number] == NORMAL}
    found = []
    for token, number in mergeable.items():
        for cut in range(1, len(token)):
            left, right = mergeable.get(token[:cut]), mergeable.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[number], number, left, right))
    found.sort()
    tokens = vocabulary.tokens
    return [(tokens[left], tokens[right]) for _, _, left, right in found]
