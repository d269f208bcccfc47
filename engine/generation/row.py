"""One generation job and its rows of the batch: a row for each completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from engine.generation.draws import Draw, Pick, Uniforms, penalised
from engine.generation.guess import Guess
from engine.generation.lookup import Lookup, PromptNgrams
from engine.generation.prompt import TokenizedPrompt
from engine.generation.stopping import StopScanner
from engine.generation.structured import Grammar
from engine.models.openings import Opening
from engine.prefixes.shelf import Fetched
from engine.text.detokenizer import StreamingDetokenizer
from engine.text.tokenizer import Tokenizer
from engine.ticket import StepOutput, Ticket, contained
from stoker.contract import Alternative, Completion, FinishReason, GenerateRequest, GenerateResult, StreamToken, Usage
from stoker.contract.reasoning import reasoning_tokens
from stoker.errors import ModelError


class RowState(Enum):
    """Where a row is: in one container of its lane, from `admit` until it has ended."""

    NEW = auto()
    WAITING = auto()
    PREFILLING = auto()
    DECODING = auto()
    ENDED = auto()


class RowFault(Exception):
    """What one row asked for failed: `cause` ends its job alone. The pass that it was to be in has not begun."""

    def __init__(self, row: Row, cause: Exception) -> None:
        super().__init__(str(cause))
        self.row, self.cause = row, cause


class _Guard:
    """A class, and no generator: each row passes here several times a token."""

    __slots__ = ("_row",)

    def __init__(self, row: Row) -> None:
        self._row = row

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            raise RowFault(self._row, contained(error)) from error


class Generation:
    """A job: its prompt, its rows, and the number of tokens that all of them have published."""

    def __init__(
        self,
        ticket: Ticket[GenerateResult],
        request: GenerateRequest,
        prompt: TokenizedPrompt,
        tokenizer: Tokenizer,
        context: int,
        grammar: Grammar | None = None,
        *,
        drafts: bool = False,
    ) -> None:
        """`drafts`: whether its rows may draft."""
        self.ticket, self.request, self.prompt, self.tokenizer = ticket, request, prompt.ids, tokenizer
        self.grammar = grammar
        self.ngrams = PromptNgrams(prompt.ids) if drafts else None
        #: Tokens that were tried as drafts, and those of them that were right.
        self.drafted, self.accepted = 0, 0
        #: A grammar is that of the whole answer, and leaves no room for reasoning.
        self.in_reasoning = prompt.in_reasoning and grammar is None
        self.published = 0
        self.first_token_seconds = 0.0
        #: Prompt tokens that the first row to be seated found in the prefix cache; None: none was seated yet.
        self.cached_tokens: int | None = None
        #: What the disk had of the prompt, until memory has it.
        self.fetched: Fetched | None = None
        #: Tokens that an answer may have at most that begins here.
        self.room = context - len(self.prompt)
        self._openings: dict[int, Opening] = {}
        self.rows = [Row(self, number) for number in range(request.n)]

    def resume(self, published: Sequence[StreamToken]) -> None:
        """Go on behind tokens that were published before, by another process."""
        for row in self.rows:
            row.resume([token for token in published if token.completion == row.number])
        self.published = len(published)

    def opening(self, adapter: int) -> Opening:
        """The prompt, seen with a row of the adapter stack: one object for all rows that begin with it."""
        if adapter not in self._openings:
            self._openings[adapter] = Opening(adapter, np.array(self.prompt, dtype=np.int32))
        return self._openings[adapter]

    @property
    def open_rows(self) -> list[Row]:
        """Those that have not ended."""
        return [row for row in self.rows if not row.finish_reason]

    @property
    def ended(self) -> bool:
        return not self.open_rows

    def note_cached(self, length: int) -> None:
        """A row found `length` tokens in the prefix cache. One that comes later, or again, finds what the job left."""
        if self.cached_tokens is None:
            self.cached_tokens = min(length, len(self.prompt))

    def extend(self, row: Row, pick: Pick, output: StepOutput) -> None:
        """Publish a row's next token, and the result if it was the last of the last row."""
        if not self.first_token_seconds:
            self.first_token_seconds = self.ticket.run_seconds
        token = row.accept(pick, self.published)
        self.published += 1
        if self.ticket.quiet:
            if self.ended:
                self.ticket.resolve(self.result())
            return
        output.entries.append((self.ticket, token))
        if self.ended:
            output.end(self.ticket, self.result())

    def result(self) -> GenerateResult:
        """The whole, once every row has ended."""
        first, *others = [row.completion() for row in self.rows]
        return GenerateResult(
            **first.model_dump(),
            model=self.request.model,
            adapter=self.request.adapter,
            others=tuple(others),
            usage=Usage(
                prompt_tokens=len(self.prompt),
                cached_tokens=self.cached_tokens or 0,
                completion_tokens=sum(len(row.tokens) for row in self.rows),
                reasoning_tokens=sum(row.reasoning_tokens for row in self.rows),
                run_seconds=self.ticket.run_seconds,
                first_token_seconds=self.first_token_seconds,
                # Clients of earlier releases know no such fields, and ask for none.
                drafted_tokens=self.drafted if self.request.lookup else None,
                accepted_tokens=self.accepted if self.request.lookup else None,
            ),
        )


@dataclass(eq=False)
class Row:
    """One completion: state that cannot be derived from the request and the tokens."""

    generation: Generation
    number: int
    state: RowState = RowState.NEW
    #: Row of the adapter stack; 0 is the bare base, −1: not acquired yet.
    adapter: int = -1
    #: Slot in the batch; -1 while it has none.
    slot: int = -1
    #: Counts how often it left the batch: what a pass chose for an earlier stay is void.
    epoch: int = 0
    #: Tokens whose keys and values are in the cache.
    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stopped_by: str | int | None = None
    #: What the answer must keep to, as far as it has come.
    grammar: Grammar | None = None
    #: Token → how often the answer has it, the prompt's included (with 0); kept only where penalties count it.
    tally: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        request = self.request
        #: Tokens that its answer may have at most.
        self.room = self.generation.room
        self._uniforms = Uniforms(request.seed, self.number)
        tokenizer = self.generation.tokenizer
        self._detokenizer = StreamingDetokenizer(tokenizer, after=self.generation.prompt)
        self._scanner = StopScanner(request.stop)
        #: Special tokens that a stop string speaks of: they have no text, and end the answer all the same.
        self._named = tokenizer.special_within(request.stop) if request.stop else {}
        self._eos = frozenset() if request.ignore_eos else tokenizer.eos_ids
        self._penalised = penalised(request)
        if self._penalised:
            self.tally = dict.fromkeys(self.generation.prompt, 0)
        if self.generation.grammar is not None:
            self.grammar = self.generation.grammar.copy()
        ngrams = self.generation.ngrams
        #: What it is expected to go on with; None: it drafts nothing.
        self.lookup = None if ngrams is None else Lookup(ngrams)
        #: What a draft model makes of that; None: none drafts for it.
        self.guess: Guess | None = None

    def guarded(self) -> _Guard:
        """What fails within is this row's own, and leaves as a `RowFault`."""
        return _Guard(self)

    @property
    def ticket(self) -> Ticket[GenerateResult]:
        return self.generation.ticket

    @property
    def request(self) -> GenerateRequest:
        return self.generation.request

    @property
    def priority(self) -> int:
        """Of its job: 0 is the best."""
        return self.request.priority

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.generation.prompt) + len(self.tokens)

    @property
    def known(self) -> list[int]:
        """Tokens of prompt and answer."""
        return self.generation.prompt + self.tokens

    @property
    def newest(self) -> int:
        """The last token of these."""
        return self.tokens[-1] if self.tokens else self.generation.prompt[-1]

    @property
    def uncached(self) -> list[int]:
        """Tokens that have to go through the model before the next one can be sampled."""
        return self.behind(self.cached)

    def behind(self, length: int) -> list[int]:
        """Tokens of prompt and answer except the first `length`."""
        prompt = self.generation.prompt
        if length >= len(prompt):
            return self.tokens[length - len(prompt) :]
        return prompt[length:] + self.tokens

    def ends_within(self, ahead: int) -> bool:
        """Whether `ahead` more tokens are certainly its last."""
        return len(self.tokens) + ahead >= min(self.request.max_tokens, self.room)

    @property
    def most_drafted(self) -> int:
        """Tokens of a draft at most: one more token comes with it, and all of them have to be wanted."""
        return min(self.request.max_tokens, self.room) - len(self.tokens) - 1

    def draft(self, most: int) -> tuple[list[int], list[Draw]]:
        """`most` tokens at most that are expected next, as far as its grammar lets them come; and how the next token is
        sampled, and the one behind each of these, were they to come."""
        draft = self._expected(max(0, min(most, self.most_drafted)))
        masks = [None] * (1 + len(draft)) if self.grammar is None else self.grammar.masks(draft)
        tally, found = self.tally, []
        for ahead, mask in enumerate(masks):
            if ahead and self._penalised:
                tally = {**tally, draft[ahead - 1]: tally.get(draft[ahead - 1], 0) + 1}
            uniform = self._uniforms(len(self.tokens) + ahead) if self.request.temperature else 0.0
            found.append(Draw(self.request, uniform, tally, mask))
        return draft[: len(found) - 1], found

    def _expected(self, most: int) -> list[int]:
        if self.guess is not None and self.guess.tokens:
            return self.guess.tokens[:most]
        return [] if self.lookup is None else self.lookup.draft(most)

    def draw(self, ahead: int = 0) -> Draw:
        """How the next token is sampled, when the host does not know the `ahead` (0 or 1) before it yet."""
        uniform = self._uniforms(len(self.tokens) + ahead) if self.request.temperature else 0.0
        mask = None if self.grammar is None else self.grammar.mask()
        return Draw(self.request, uniform, self.tally, mask, fresh=ahead > 0)

    def resume(self, published: Sequence[StreamToken]) -> None:
        """Go on behind tokens that another process published."""
        # It may have had memory for more of them: those who read along wait all the same for one that is the last.
        self.room = max(self.room, len(published) + 1)
        for token in published:
            self.replay(token)

    def replay(self, token: StreamToken) -> None:
        """Take a token that was published before; its text is made again, so that what was held back is known."""
        self._take(token.token_id, token.finish_reason)

    def accept(self, pick: Pick, index: int) -> StreamToken:
        """Take the next token and say what may be shown of it."""
        if not pick.finite:
            adapter = f" with adapter {self.request.adapter}" if self.request.adapter else ""
            raise ModelError(
                f"{self.request.model}{adapter} gives numbers that are not finite: at position {self.length} logit "
                f"{pick.logit}, logprob {pick.logprob}, probability {pick.probability}. Its weights are damaged, or "
                "too large for their type: `stoker models verify` looks at them."
            )
        text = self._take(pick.token_id)
        return StreamToken(
            index=index,
            token_id=pick.token_id,
            text=text,
            logit=pick.logit,
            logprob=pick.logprob,
            probability=pick.probability,
            is_eos=pick.token_id in self._eos,
            finish_reason=self.finish_reason,
            completion=self.number,
            alternatives=self._alternatives(pick),
            in_reasoning=self.generation.in_reasoning and len(self.tokens) == 1,
        )

    def _take(self, token: int, ended: FinishReason | None = None) -> str:
        """The text that may be shown with `token`. `ended`: why the answer has ended with it, where that is known."""
        self.tokens.append(token)
        if self.lookup is not None:
            self.lookup.add(token)
        if self.guess is not None:
            self.guess.add(token)
        if self.grammar is not None:
            self.grammar.accept(token)
        if self._penalised:
            self.tally[token] = self.tally.get(token, 0) + 1
        text = self._text(token)
        self.finish_reason = self.finish_reason or ended
        if self.finish_reason and self.finish_reason != "stop_string":
            shown, stop = self._scanner.add(self._detokenizer.finish())
            text += shown + ("" if stop else self._scanner.finish())
        self.texts.append(text)
        return text

    def _text(self, token: int) -> str:
        """What may be shown with `token`; sets `finish_reason` if it is the last."""
        if token in self._eos:
            self.finish_reason = "stop"
            return ""
        if token in self.request.stop_token_ids:
            self.finish_reason, self.stopped_by = "stop_token", token
            return ""
        text, stop = self._scanner.add(self._detokenizer.add(token), self._named.get(token, ""))
        if stop is not None:
            self.finish_reason, self.stopped_by = "stop_string", stop
        elif self.grammar is not None and self.grammar.complete:
            self.finish_reason = "grammar"
        elif len(self.tokens) >= self.request.max_tokens:
            self.finish_reason = "length"
        elif len(self.tokens) >= self.room:
            self.finish_reason = "context"
        return text

    def _alternatives(self, pick: Pick) -> tuple[Alternative, ...]:
        spelled = self.generation.tokenizer.spelled
        return tuple(
            Alternative(token_id=token, text=spelled(token), logprob=logprob)
            for token, logprob in pick.alternatives
            if logprob > -math.inf  # a token that the model rules out is no alternative
        )

    def completion(self) -> Completion:
        """The whole answer, once there is a `finish_reason`."""
        assert self.finish_reason is not None
        return Completion(
            text="".join(self.texts),
            token_ids=tuple(self.tokens),
            finish_reason=self.finish_reason,
            stopped_by=self.stopped_by,
            in_reasoning=self.generation.in_reasoning,
            functions=self.request.functions,
        )

    @property
    def reasoning_tokens(self) -> int:
        return reasoning_tokens(self.texts, in_reasoning=self.generation.in_reasoning)
