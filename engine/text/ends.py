"""Tokens that end a turn or a text, by their names: a checkpoint often names only one of its own as its end, and its
flags are often wrong. The names are those at which llama.cpp ends a generation (`llama-vocab.cpp`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_ENDS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>",
    "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>",
)  # fmt: skip
#: Of each of these groups llama.cpp takes one: what pads, and what parts files, when code is filled in.
_FILL_IN = (
    ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ("<|file_sep|>",),
)
#: What llama.cpp takes for special without asking the file, of each group one, and where no generation ends.
_MARKS = (
    ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "<|code_prefix|>", "<|prefix|>"),
    ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "<|code_suffix|>", "<|suffix|>"),
    ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "<|code_middle|>", "<|middle|>"),
)
#: What marks a part of a turn, not its end, in a vocabulary that has all of the others.
_EXCEPT = (
    ("<|end|>", ("<|return|>", "<|call|>")),
    ("<|end|>", ("<|call|>", "<|flush|>")),
    ("<|end|>", ("<|calls|>", "<|flush|>")),
    ("</s>", ("<|tool_response>",)),
)


def ends(tokens: Collection[str]) -> list[str]:
    """Those of `tokens` that end a turn or a text."""
    parts = {name for name, others in _EXCEPT if all(other in tokens for other in others)}
    return [name for name in _ENDS if name in tokens and name not in parts]


def gguf_ends(tokens: Collection[str]) -> list[str]:
    """The same for a GGUF file, with the marks of filled-in code at which llama.cpp ends too."""
    return [*ends(tokens), *_firsts(_FILL_IN, tokens)]


def gguf_special(tokens: Collection[str]) -> set[str]:
    """The tokens of a GGUF file that are special by name: the types that the file gives them do not count."""
    return {*gguf_ends(tokens), *_firsts(_MARKS, tokens)}


def _firsts(groups: Sequence[Sequence[str]], tokens: Collection[str]) -> list[str]:
    found = (next((name for name in group if name in tokens), None) for group in groups)
    return [name for name in found if name is not None]
