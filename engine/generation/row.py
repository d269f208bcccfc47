"""One running generation request: a row of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.generation.sampling import Draw, Pick
from engine.text.detokenizer import StreamingDetokenizer
from engine.ticket import Ticket
from stoker.contract import GenerateRequest, GenerateResult, StreamToken, Usage


@dataclass(eq=False)
class Row:
    """State that cannot be derived: what was asked, what is in the cache, what was made."""

    ticket: Ticket
    request: GenerateRequest
    prompt: list[int]
    eos_ids: frozenset[int]
    detokenizer: StreamingDetokenizer
    #: Row of the KV cache; -1 while the request waits for one.
    slot: int = -1
    #: Row of the adapter stack; 0 is the bare base.
    adapter: int = 0
    #: Tokens whose keys and values are in the cache.
    cached: int = 0
    #: How many of `tokens` another process made.
    resumed: int = 0
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    first_token_seconds: float = 0.0
    finish_reason: Literal["stop", "length"] | None = None

    def resume(self, published: Sequence[StreamToken]) -> None:
        """Go on behind tokens that were published before, by another process."""
        for token in published:
            self.tokens.append(token.token_id)
            self.texts.append(token.text)
            self.finish_reason = token.finish_reason
            if not token.is_eos:
                self.detokenizer.add(token.token_id)
        self.resumed = len(published)

    @property
    def known(self) -> list[int]:
        """The tokens that have to be in the cache before the first one is sampled here."""
        return self.prompt + self.tokens[: self.resumed]

    @property
    def prefilled(self) -> bool:
        return self.cached >= len(self.prompt) + self.resumed

    @property
    def draw(self) -> Draw:
        return Draw(self.request, len(self.tokens))

    def accept(self, pick: Pick) -> StreamToken:
        """Take the next token and say what may be shown of it."""
        if len(self.tokens) == self.resumed:
            self.first_token_seconds = self.ticket.run_seconds
        self.tokens.append(pick.token_id)
        is_eos = pick.token_id in self.eos_ids
        if is_eos:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.request.max_tokens:
            self.finish_reason = "length"
        text = "" if is_eos else self.detokenizer.add(pick.token_id)
        if self.finish_reason:
            text += self.detokenizer.finish()
        self.texts.append(text)
        return StreamToken(
            index=len(self.tokens) - 1,
            token_id=pick.token_id,
            text=text,
            logit=pick.logit,
            logprob=pick.logprob,
            probability=pick.probability,
            is_eos=is_eos,
            finish_reason=self.finish_reason,
        )

    def result(self) -> GenerateResult:
        """The whole, once there is a `finish_reason`."""
        assert self.finish_reason is not None
        return GenerateResult(
            model=self.request.model,
            adapter=self.request.adapter,
            text="".join(self.texts),
            token_ids=tuple(self.tokens),
            finish_reason=self.finish_reason,
            usage=Usage(
                prompt_tokens=len(self.prompt),
                completion_tokens=len(self.tokens),
                run_seconds=self.ticket.run_seconds,
                first_token_seconds=self.first_token_seconds,
            ),
        )
