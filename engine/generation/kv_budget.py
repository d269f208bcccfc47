"""What keys and values may take, and who makes way when they would take more."""

from __future__ import annotations

from collections.abc import Sequence

from engine.generation.batch import Batch
from engine.generation.draft_model import DraftModel
from engine.generation.row import Row
from engine.models.cache import bytes_per_token
from engine.models.decoder import Decoder
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
        count, length = len(rows), max(row.length for row in rows) + 1
        if not self._fits(self._needed(count, length)):
            self._batch.shrink()
        needed = self._needed(count, length)
        # A row that is alone may take more: nobody could make way for it.
        if (self._batch.rows or self.prefilling or count > 1) and not self._fits(needed):
            return False
        self._evict_for(needed)
        return True

    def could_admit(self, rows: Sequence[Row], staying: Sequence[Row]) -> bool:
        """Whether the batch could take these rows in next to those that stay, were all others gone."""
        length = max(row.length for row in rows) + 1
        together = self._batch.bytes_for([*(row.cached + 1 for row in staying), *[length] * len(rows)])
        return not staying or together + self._bytes(len(rows), length) <= self._limit

    def must_shrink(self, rows: int, length: int) -> bool:
        """Whether a row has to leave before the batch can hold `rows` of `length` tokens; if none, kept prefixes make
        way."""
        growth = self._batch.growth([length] * (rows - len(self._batch.rows)))
        if rows > 1 and not self._fits(growth):
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

    def _needed(self, rows: int, length: int) -> int:
        return self._bytes(rows, length) + self._batch.growth([length] * rows)

    def _bytes(self, rows: int, length: int) -> int:
        return rows * (length * self._token + self._state)
