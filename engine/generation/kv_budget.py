"""What keys and values may take, and who makes way when they would take more."""

from __future__ import annotations

from collections.abc import Sequence

from engine.generation.batch import Batch
from engine.generation.draft_model import DraftModel
from engine.generation.row import Row
from engine.models.decoder import Decoder
from engine.models.kv_sizes import bytes_per_token
from engine.models.openings import Span
from engine.prefixes.memory import PrefixCache


class KvBudget:
    """`limit` bytes for the batch, prompts on their way, kept prefixes, which make way first, and what a draft model
    has of the rows, which makes way next."""

    def __init__(
        self, model: Decoder, limit: int, batch: Batch, prefixes: PrefixCache, drafts: DraftModel | None = None
    ) -> None:
        self._token, self._limit = bytes_per_token(model), limit
        #: What recurrent layers keep of a row, however long it is.
        self._state = model.kv_sizes.state_bytes
        self._batch, self._prefixes, self._drafts = batch, prefixes, drafts
        #: What prompts on their way take.
        self.prefilling = 0

    @property
    def used(self) -> int:
        return self._batch.nbytes + self._prefixes.nbytes + self.prefilling + self._drafting

    @property
    def spare(self) -> int:
        """What nobody takes."""
        return max(0, self._limit - self.used)

    @property
    def _drafting(self) -> int:
        return 0 if self._drafts is None else self._drafts.nbytes

    @property
    def most_tokens(self) -> int:
        """Tokens of a row that is alone, prefilled and then copied into the batch."""
        return int(self._limit // (3 * self._token))

    def admits(self, rows: Sequence[Row]) -> bool:
        """Whether the batch could take these rows in; then kept prefixes make way."""
        spans = [self._batch.span(row, row.length + 1) for row in rows]
        if not self._fits(self._needed(spans)):
            self._batch.shrink()
        needed = self._needed(spans)
        # A row that is alone may take more: nobody could make way for it.
        if (self._batch.rows or self.prefilling or len(rows) > 1) and not self._fits(needed):
            return False
        self._evict_for(needed)
        return True

    def could_admit(self, rows: Sequence[Row], staying: Sequence[Row]) -> bool:
        """Whether the batch could take these rows in next to those that stay, were all others gone."""
        spans = [self._batch.span(row, row.length + 1) for row in rows]
        seated = [row for row in staying if row.slot >= 0]
        prompts = [self._batch.span(row, row.cached + 1) for row in staying if row.slot < 0]
        return not staying or self._batch.bytes_for(seated, [*prompts, *spans]) + self._bytes(spans) <= self._limit

    def must_shrink(self, joining: Sequence[Row] = ()) -> bool:
        """Whether a row has to leave before the batch can hold a token more of each, and those that are `joining`; if
        none, kept prefixes make way."""
        growth = self._batch.growth([self._batch.span(row, row.cached + 1) for row in joining])
        if len(self._batch.rows) + len(joining) > 1 and not self._fits(growth):
            return True
        self._evict_for(growth)
        return False

    def _fits(self, more: int) -> bool:
        """Whether so many more bytes have room, were no prefix kept, and nothing drafted."""
        return self.used - self._prefixes.nbytes - self._drafting + more <= self._limit

    def _evict_for(self, more: int) -> None:
        """Let prefixes make way until so many more bytes have room, or none is left; then what drafts."""
        while self.used + more > self._limit and self._prefixes.evict():
            pass
        if self._drafts is not None and self.used + more > self._limit:
            self._drafts.give_up()

    def _needed(self, spans: Sequence[Span]) -> int:
        return self._bytes(spans) + self._batch.growth(spans)

    def _bytes(self, spans: Sequence[Span]) -> int:
        """Of such prompts on their way together, each by itself."""
        return len(spans) * (max(span.length for span in spans) * self._token + self._state)
