"""A query and a text as the one sequence that a reranker reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import tokenizers

from engine.text.chat import render
from engine.text.templates import DEFAULT
from engine.text.tokenizer import Tokenizer, checked_text
from engine.text.trial import no_panic
from stoker.errors import InvalidRequest, ModelError, TextTooLong

#: Ids, and the token type of each.
Encoded: TypeAlias = tuple[list[int], list[int]]


class Pairing(Protocol):
    """Ids of pairs; those of token type 1 are larger by the size of the vocabulary, as `Encoder.token_ids` reads them.

    `instructs`: whether a pair may have an instruction.
    """

    instructs: bool

    def encode(self, query: str, texts: Sequence[str], instruction: str | None) -> list[list[int]]:
        """Of the query with each of the texts."""
        ...

    def cut(self, query: str, text: str, instruction: str | None, longest: int) -> list[int]:
        """The same of as much as leaves `longest` ids. Raises `TextTooLong` if no text would be left."""
        ...


def encode_pairs(tokenizer: Tokenizer, first: str, seconds: Sequence[str]) -> list[Encoded]:
    """The ids and the token types of `first` with each of `seconds`, with all that the model wants around them."""
    first = checked_text(first)
    pairs = [(first, checked_text(second)) for second in seconds]
    with no_panic():
        found = tokenizer.inner.encode_batch(pairs, add_special_tokens=True)
    return [_with_types(tokenizer, encoding) for encoding in found]


def encode_pair_cut(tokenizer: Tokenizer, first: str, second: str, longest: int) -> Encoded:
    """The same of one pair, of which the longer text is cut, and both where each has more than half of `longest`, as
    transformers does it."""
    inner = tokenizer.inner
    with no_panic():
        parts = [inner.encode(checked_text(text), add_special_tokens=False) for text in (first, second)]
        room = max(0, longest - inner.num_special_tokens_to_add(is_pair=True))
        for part, kept in zip(parts, pair_lengths(len(parts[0]), len(parts[1]), room), strict=True):
            part.truncate(kept, direction=tokenizer.lost_side)
        return _with_types(tokenizer, inner.post_process(parts[0], parts[1], add_special_tokens=True))


def _with_types(tokenizer: Tokenizer, encoding: tokenizers.Encoding) -> Encoded:
    return encoding.ids, encoding.type_ids if tokenizer.manners.types else [0] * len(encoding.ids)


def pair_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens stay of two texts, of `room` in all."""
    if first + second <= room:
        return first, second
    half = room // 2
    if min(first, second) <= half:
        return (first, room - first) if first <= second else (room - second, second)
    return (half, room - half) if first <= second else (room - half, half)


class SidePairs:
    """The two next to each other, as the tokenizer has it: of cross-encoders.

    `vocabulary`: the size of the model's, if it knows a second token type.
    """

    instructs = False

    def __init__(self, tokenizer: Tokenizer, vocabulary: int | None) -> None:
        self._tokenizer, self._offset = tokenizer, vocabulary or 0

    def encode(self, query: str, texts: Sequence[str], instruction: str | None) -> list[list[int]]:
        return [self._typed(*pair) for pair in encode_pairs(self._tokenizer, query, texts)]

    def cut(self, query: str, text: str, instruction: str | None, longest: int) -> list[int]:
        return self._typed(*encode_pair_cut(self._tokenizer, query, text, longest))

    def _typed(self, ids: Sequence[int], types: Sequence[int]) -> list[int]:
        if not self._offset:
            return list(ids)
        return [index + self._offset * kind for index, kind in zip(ids, types, strict=True)]


@dataclass(frozen=True)
class Form:
    """What stands before the query, between it and the text, and behind the text."""

    before: str
    between: str
    behind: str


class Forms(Protocol):
    #: Whether a form has room for an instruction.
    instructs: bool

    def form(self, instruction: str | None) -> Form: ...


class FormPairs:
    """The two in a form of words, such as a chat template makes of them: of decoders."""

    def __init__(self, tokenizer: Tokenizer, forms: Forms) -> None:
        self._tokenizer, self._forms, self.instructs = tokenizer, forms, forms.instructs

    def encode(self, query: str, texts: Sequence[str], instruction: str | None) -> list[list[int]]:
        form = self._forms.form(instruction)
        filled = [form.before + query + form.between + text + form.behind for text in texts]
        return self._tokenizer.encode_batch(filled, special=False)

    def cut(self, query: str, text: str, instruction: str | None, longest: int) -> list[int]:
        """The end of the text goes; what stands behind it stays, for the model answers to that."""
        form = self._forms.form(instruction)
        behind = self._tokenizer.encode(form.behind, special=False)
        around = len(self._tokenizer.encode(form.before + query + form.between, special=False)) + len(behind)
        if around >= longest:
            raise TextTooLong(
                f"query: {around} tokens given with what stands around it and the text; the model takes {longest}, and "
                "leaves no room for a text. Shorten it."
            )
        (ids,) = self.encode(query, [text], instruction)
        return ids[: longest - len(behind)] + behind


class QwenForms:
    """Qwen3-Reranker's (Zhang et al., 2025), which its model card gives and its chat template does not."""

    instructs = True

    def form(self, instruction: str | None) -> Form:
        asked = instruction or "Given a web search query, retrieve relevant passages that answer the query"
        return Form(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            f"<Instruct>: {asked}\n<Query>: ",
            "\n<Document>: ",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        )


#: What stands for the query, the text and the instruction while a chat template is tried.
_QUERY, _TEXT, _INSTRUCTION = " qry7f3a ", " txt9c1e ", " ins5b2d "


class TemplateForms:
    """Those of a chat template that takes messages of the roles `query` and `document`, as sentence-transformers gives
    them to it; an instruction is a message of the role `system` before them.

    It is rendered twice, when the model is loaded: what it makes of other texts follows from that.
    """

    def __init__(self, template: str, names: Mapping[str, str]) -> None:
        pair = [{"role": "query", "content": _QUERY}, {"role": "document", "content": _TEXT}]
        self._plain = _form(_rendered(template, pair, names))
        instructed = _form(_rendered(template, [{"role": "system", "content": _INSTRUCTION}, *pair], names))
        self._instructed = instructed if instructed is not None and instructed.before.count(_INSTRUCTION) == 1 else None
        self.instructs = self._instructed is not None

    @property
    def fits(self) -> bool:
        """Whether the template takes such messages."""
        return self._plain is not None

    def form(self, instruction: str | None) -> Form:
        assert self._plain is not None, "a template that does not fit has no form"
        if instruction is None or self._instructed is None:
            return self._plain
        instructed = self._instructed
        return Form(instructed.before.replace(_INSTRUCTION, instruction), instructed.between, instructed.behind)


def _rendered(template: str, messages: list[dict[str, str]], names: Mapping[str, str]) -> str:
    """Nothing, for a template that refuses such messages."""
    try:
        return render(template, messages, names=names, add_generation_prompt=False)
    except InvalidRequest:
        return ""


def _form(text: str) -> Form | None:
    if text.count(_QUERY) != 1 or text.count(_TEXT) != 1:
        return None
    before, _, rest = text.partition(_QUERY)
    between, separator, behind = rest.partition(_TEXT)
    return Form(before, between, behind) if separator else None


def forms_of(tokenizer: Tokenizer, *, named: bool) -> Forms | None:
    """The form of a decoder's pairs: by its chat template; for a Qwen3-Reranker whose template has none, its own. None
    where there is no template. Raises `ModelError` for a template that takes no pairs."""
    template = tokenizer.templates.get(DEFAULT)
    if template is not None:
        forms = TemplateForms(template, tokenizer.manners.names)
        if forms.fits:
            return forms
    if named:
        return QwenForms()
    if template is None:
        return None
    raise ModelError(
        "its chat template takes no messages of the roles query and document, so it is not known how a pair is put to "
        "it. Give the folder a chat_template.jinja that writes both; a Qwen3-Reranker without one has to be called so"
    )
