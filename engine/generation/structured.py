"""Answers that keep to a JSON schema or a regular expression: llguidance says which tokens may come next.

A grammar comes with a request, and may be made to take time and memory without end. What is limited:

- compiling: in a process of its own first (`grammar_process.py`), which the system ends after `SECONDS` of computing or
  beyond its memory. What it got through, the caller's thread compiles again; the engine's thread never compiles, except
  on ranks behind the first one, which compile what that got through;
- each step of a compiled grammar, and what it keeps: by llguidance's own limits (`LIMITS`);
- its first steps are tried before the request is admitted: most grammars that pass a limit do so there.

A grammar that passes a limit later ends its own request.
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.platform.limited import LimitedProcess, LimitPassed
from engine.text.tokenizer import Tokenizer
from stoker.contract import GenerateRequest
from stoker.contract.shown import brief, cut, printable
from stoker.errors import InvalidRequest, ModelError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

#: One layout only: where any white space may come, a small model writes nothing else until its tokens run out.
_LAYOUT: JsonCompileOptions = {"whitespace_flexible": False}
#: A fifth of llguidance's defaults, and an eighth of the states (2 KB each): as measured, no step then takes 0.1 s.
#: Its expressions are bounded by the initial fuel.
LIMITS: dict[str, int] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_lexer_states": 32_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
#: Of computing, for a grammar to compile. A schema of 500 fields takes a hundredth of it.
SECONDS = 2.0
#: Answers that are begun at random, and their tokens.
WALKS, TRIED = 4, 8
#: Characters of llguidance's words that are passed on: they repeat the expression.
_WORDS = 300
#: Of a regular expression it says by a drawing what is wrong, and in one line of it by words.
_WRONG_EXPRESSION = re.compile(r"regex parse error:\n(?P<drawn>.*?)^error: (?P<words>[^\n]+)", re.DOTALL | re.MULTILINE)
#: What a regular expression has otherwise between two slashes; with each backslash goes what it is for.
_SPELLINGS = {"/": r"\/", "\\\n": r"\n"}
_SPELLED_OTHERWISE = re.compile(r"\\.|/", re.DOTALL)
_process = LimitedProcess(Path(__file__).with_name("grammar_process.py"), "compiles grammars", "computing")


class GrammarVocabulary:
    """A model's tokens as llguidance knows them; made on first use, in a second or so."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._inner: LLTokenizer | None = None
        self._lock = threading.Lock()

    def grammar(self, request: GenerateRequest, *, passed: bool = False) -> Grammar | None:
        """What `request` wants kept to; None: nothing. `passed`: another process let it through, and it is not tried
        again. Raises `InvalidRequest` for a grammar that cannot be, or takes too much."""
        if request.json_schema is None and request.regex is None:
            return None
        name, given = (
            ("json_schema", json.dumps(request.json_schema)) if request.regex is None else ("regex", request.regex)
        )
        try:
            source = _source(request)
            if not passed:
                try_to_compile(source)
            found = Grammar(name, self._compiled(source))
            for seed in range(0 if passed else WALKS):
                found.copy().try_out(random.Random(seed), TRIED)
        except (_Refused, InvalidRequest) as error:
            short = given if len(given) <= 100 else f"{given[:97]}…"
            words = _on_one_line(str(error).removeprefix(f"{name}: "))
            raise InvalidRequest(f"{name}: {printable(short)} given; {words}") from None
        return found

    def _compiled(self, source: str) -> LLMatcher:
        # Here and not above: it is 8 MB of code that most requests never need.
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]  # its last two are flags
        matcher = LLMatcher(self._tokens(), source, log_level=0, limits=limits)
        if matcher.is_error():
            raise _Refused(matcher.get_error())
        return matcher

    def _tokens(self) -> LLTokenizer:
        with self._lock:
            if self._inner is None:
                self._inner = _tokens_of(self._tokenizer)
            return self._inner


class _Refused(Exception):
    """Why a grammar is not taken."""


def try_to_compile(source: str) -> None:
    """In a process of its own. Raises `_Refused`."""
    try:
        words = _process.ask({"grammar": source, "limits": LIMITS}, SECONDS)["refused"]
    except LimitPassed:
        raise _Refused(
            f"it takes more than {SECONDS:g} s of computing, or too much memory, to compile. Make it simpler: "
            "fewer repetitions and optional fields, no large multipleOf."
        ) from None
    if words:
        raise _Refused(words)


class Grammar:
    """How far one answer has come. What it raises is its own request's error."""

    def __init__(self, name: str, matcher: LLMatcher) -> None:
        self._name, self._matcher = name, matcher

    def copy(self) -> Grammar:
        """Another answer's, from where this one is."""
        return Grammar(self._name, self._matcher.deep_copy())

    def mask(self) -> np.ndarray:
        """Bits of the tokens that may come next, int32; one at least."""
        found = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        self._check()
        if not found.any():
            raise InvalidRequest(f"{self._name}: no token of the model can go on with this grammar.")
        return found

    def accept(self, token: int) -> None:
        """Go on behind `token`, one of those that `mask` allowed."""
        if not self._matcher.consume_token(token):
            self._check()
            raise ModelError(f"{self._name}: token {token} breaks the grammar.")

    def masks(self, draft: Sequence[int]) -> list[np.ndarray]:
        """`mask` of what comes next and of what comes behind each token of `draft`, as far as it keeps to the grammar
        and does not complete it. The answer stays where it is."""
        found, copy = [self.mask()], self.copy()
        for token in draft:
            try:
                copy.accept(token)
                if copy.complete:
                    break
                found.append(copy.mask())
            except (InvalidRequest, ModelError):
                break  # the draft breaks the grammar or passes a limit; the answer, which goes another way, does not
        return found

    @property
    def complete(self) -> bool:
        """Whether nothing except the end may follow."""
        self._check()
        return bool(self._matcher.is_stopped())

    def try_out(self, chance: random.Random, steps: int) -> None:
        """Go on at random, `steps` tokens at most."""
        for _ in range(steps):
            if self.complete:
                return
            bits = np.unpackbits(self.mask().view(np.uint8), bitorder="little")
            self.accept(int(chance.choice(np.flatnonzero(bits))))

    def _check(self) -> None:
        """A matcher that passed a limit says that it has stopped, and allows the end alone."""
        if not self._matcher.is_error():
            return
        words = self._matcher.get_error().removesuffix("\n<non-verbose/>")
        if words == "NoExtensionBias":
            raise InvalidRequest(f"{self._name}: no text fits this grammar.")
        raise InvalidRequest(f"{self._name}: the grammar takes too much: {words}")


def _on_one_line(words: str) -> str:
    """llguidance's own words, with the wrong expression where a schema may have several."""
    found = _WRONG_EXPRESSION.search(words)
    if found is None:
        return cut(" ".join(words.split()), _WORDS)
    expression = found["drawn"].split("\n", 1)[0].strip()
    # One of several lines is drawn otherwise.
    where = "" if expression.startswith("~") else f" in {brief(expression)}"
    return f"{found['words']}{where}."


def _source(request: GenerateRequest) -> str:
    """llguidance's form of what is asked."""
    from llguidance import LLMatcher

    if request.regex is not None:
        return LLMatcher.grammar_from_lark(f"start: /{_literal(request.regex)}/")
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(request.json_schema), overrides=_LAYOUT)
    except ValueError as error:
        raise _Refused(str(error)) from None


def _literal(regex: str) -> str:
    """What stands between two slashes for it. Unlike `grammar_from_regex` it leaves the ends of lines: behind (?x) they
    mean nothing, and end a comment. Nor does it drop a last backslash, which makes it no expression."""
    return _SPELLED_OTHERWISE.sub(lambda found: _SPELLINGS.get(found[0], found[0]), regex)


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
