"""Answers that keep to a JSON schema or a regular expression: llguidance says which tokens may come next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine.text.tokenizer import Tokenizer
from stoker.contract import GenerateRequest
from stoker.errors import InvalidRequest, ModelError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

#: One layout only: where any white space may come, a small model writes nothing else until its tokens run out.
_LAYOUT: JsonCompileOptions = {"whitespace_flexible": False}


class Vocabulary:
    """A model's tokens as llguidance knows them; made on first use, in a second or so."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._inner: LLTokenizer | None = None

    def grammar(self, request: GenerateRequest) -> Grammar | None:
        """What `request` wants kept to; None: nothing. Raises `InvalidRequest` for a schema that cannot be."""
        if request.json_schema is None and request.regex is None:
            return None
        # Here and not above: it is 8 MB of code that most requests never need.
        from llguidance import LLMatcher

        if request.json_schema is not None:
            name = "json_schema"
            source = LLMatcher.grammar_from_json_schema(request.json_schema, overrides=_LAYOUT)
        else:
            name, source = "regex", LLMatcher.grammar_from_regex(request.regex or "")
        if self._inner is None:
            self._inner = _tokens_of(self._tokenizer)
        matcher = LLMatcher(self._inner, source, log_level=0)
        if matcher.is_error():
            given = request.regex or json.dumps(request.json_schema)
            raise InvalidRequest(f"{name}: {given[:100]} given; {matcher.get_error().splitlines()[0][:300]}.")
        return Grammar(matcher)


class Grammar:
    """How far one answer has come."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Grammar:
        """Another answer's, from where this one is."""
        return Grammar(self._matcher.deep_copy())

    def mask(self) -> np.ndarray:
        """Bits of the tokens that may come next, int32."""
        return np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)

    def accept(self, token: int) -> None:
        """Go on behind `token`, one of those that `mask` allowed."""
        if not self._matcher.consume_token(token):
            raise ModelError(f"token {token} broke the grammar: {self._matcher.get_error()[:300]}")

    @property
    def complete(self) -> bool:
        """Whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())


def _tokens_of(tokenizer: Tokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    end = tokenizer.main_eos_id
    if tokenizer.pieces is None or end is None:
        raise InvalidRequest(
            "json_schema and regex need a model whose tokens are bytes and that has an end token; this one has not."
        )
    return LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, end)), eos_token=sorted(tokenizer.eos_ids))


class _Tokens:
    """What llguidance asks of a tokenizer: the bytes of every token, and how it would cut a text."""

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        assert tokenizer.pieces is not None
        self.eos_token_id, self.bos_token_id = end, tokenizer.bos_id
        self.special_token_ids: Sequence[int] = sorted(tokenizer.special_ids)
        self.tokens = [tokenizer.pieces(index) for index in range(tokenizer.vocab_size)]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=False)
