"""Continuous batching: requests join between two steps, decode together, and leave when they are done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from engine.adapters.pool import AdapterPool
from engine.generation.batch import Batch
from engine.generation.prefill import Pace, Prefill, owner
from engine.generation.prefixes import SHORTEST, PrefixCache
from engine.generation.prompt import check_ids, tokenize
from engine.generation.row import Generation, Row
from engine.generation.step import Compiled, Step, usual
from engine.generation.structured import Vocabulary
from engine.loading import LoadedModel
from engine.models.cache import bytes_per_token
from engine.ticket import StepOutput, Ticket
from stoker.contract import GenerateRequest, StreamToken
from stoker.errors import InvalidRequest

#: Prompts that are prefilled in one pass where passes are compiled: on a GPU a short one costs as much as many.
GROUP = 16
#: Tokens, padding included, up to which prompts are grouped.
GROUP_TOKENS = 2048


@dataclass(frozen=True)
class Limits:
    """What a lane may use. `slots`: rows that decode at once. `kv_bytes`: keys and values of all rows, prompts on
    their way and prefixes. `prefix_share`: of these, what kept prefixes may take. `stall`: seconds that a prompt may
    hold up the streams beside it. `compiled`: None: what is usual on this machine."""

    slots: int = 16
    kv_bytes: int = 1 << 30
    prefix_share: float = 0.25
    stall: float = 0.25
    compiled: Compiled | None = None


class GenerateLane:
    """All generation jobs of one model, in order of arrival."""

    kind = "generate"

    def __init__(self, model: LoadedModel, pool: AdapterPool, limits: Limits | None = None) -> None:
        self._model, self._pool, self.limits = model, pool, limits or Limits()
        self._decoder = model.decoder
        self.step = Step(self._decoder, self.limits.compiled or usual())
        #: Of chunks beside running streams, and of those that hold up nobody.
        self._beside, self._alone = Pace(), Pace(256)
        #: Seconds of a turn that only decoded, as measured lately.
        self._turn = 0.0
        self._vocabulary = Vocabulary(model.tokenizer)
        self._waiting: deque[Row] = deque()
        #: Whether a pass may be launched before the last one is read: not while other lanes want their turn.
        self.ahead = True
        #: Rows that were put back because memory ran short.
        self.preempted = 0
        self._reset()

    def _reset(self) -> None:
        self.batch = Batch(self._decoder, self._pool, self.step)
        self._prefill: Prefill | None = None
        self.prefixes = PrefixCache(int(self.limits.kv_bytes * self.limits.prefix_share))

    def warm(self) -> None:
        """Generate three tokens for nobody: kernels are compiled before the first request waits for them."""
        request = GenerateRequest(model=self._model.name, prompt_ids=(0,), max_tokens=3, ignore_eos=True)
        self.admit(self.prepare(Ticket("warm", self.kind), request, None))
        while self.busy:
            self.run()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self.batch.rows or self._prefilling)

    @property
    def _prefilling(self) -> list[Row]:
        return self._prefill.rows if self._prefill else []

    @property
    def held(self) -> list[Row]:
        """Every row that has a place here, or waits for one."""
        return [*self._waiting, *self._prefilling, *self.batch.rows]

    @property
    def kv_bytes(self) -> int:
        """What keys and values take now."""
        return self.batch.nbytes + self.prefixes.nbytes + (self._prefill.kv.nbytes if self._prefill else 0)

    def prepare(self, ticket: Ticket, request: GenerateRequest, data: Sequence[StreamToken] | None) -> Generation:
        check_ids(self._model, request)
        prompt = tokenize(self._model, request)
        most = self._most_tokens()
        if len(prompt) >= most:
            raise InvalidRequest(
                f"prompt: {len(prompt)} tokens given; this worker's memory for keys and values holds {most} of "
                f"{request.model}. Shorten it, or raise STOKER_KV_CACHE."
            )
        if request.adapter is not None:
            self._pool.check(request.adapter)
        context, grammar = min(self._model.context, most), self._vocabulary.grammar(request)
        generation = Generation(ticket, request, prompt, self._model.tokenizer, context, grammar)
        generation.resume(data or ())
        return generation

    def _most_tokens(self) -> int:
        """Tokens of a row that is alone, prefilled and then copied into the batch, within the budget."""
        return int(self.limits.kv_bytes // (3 * bytes_per_token(self._decoder)))

    def admit(self, work: Generation) -> None:
        if work.ended:
            # Its last token was published before; only the result is missing.
            work.ticket.start()
            work.ticket.resolve(work.result())
            return
        self._waiting.extend(row for row in work.rows if not row.finish_reason)

    def drop_stopped(self) -> None:
        for row in [row for row in self.held if row.ticket.stopping]:
            self._release(row)
            row.ticket.fail_stopped()

    def run(self) -> StepOutput:
        """Take who waits, push prompts on by a chunk, decode everybody who is ready by one token."""
        output, began = StepOutput(), time.perf_counter()
        self._begin_prefill()
        calm = self._prefill is None
        self._advance_prefill(output)
        if output.entries and self.ahead:
            # A first token is there: it is told before anybody waits for the pass that is under way.
            self._launch()
            return output
        self._decode(output)
        if calm:
            seconds = time.perf_counter() - began
            self._turn = 0.8 * self._turn + 0.2 * seconds if self._turn else seconds
        return output

    # --- prompts ---

    def _begin_prefill(self) -> None:
        if self._prefill is None and (rows := self._next_group()):
            self._prefill = Prefill(self._decoder, self._pool, self.step, rows, self.prefixes)

    def _next_group(self) -> list[Row]:
        """The rows to be prefilled next: the first that waits, and where it pays those behind it that fit."""
        group: list[Row] = []
        most = GROUP if self.step.prompt_buckets else 1
        while self._waiting and len(group) < most and len(self.batch.rows) + len(group) < self.limits.slots:
            row = self._waiting[0]
            longest = max(one.length for one in (row, *group))
            if group and (longest * (len(group) + 1) > GROUP_TOKENS or row.generation is group[-1].generation):
                break  # completions of one prompt: the first leaves a prefix for the others
            if not self._admissible([*group, row]):
                break
            self._waiting.popleft()
            if self._acquire(row):
                group.append(row)
        return group

    def _acquire(self, row: Row) -> bool:
        """Pin the version of a row's adapter; a row that was preempted has it."""
        if row.adapter < 0:
            try:
                row.adapter = self._pool.acquire(row.request.adapter)
            except Exception as error:
                # A damaged adapter file fails the job that asked for it, not its neighbours.
                row.ticket.fail(error)
                for other in row.generation.rows:
                    self._release(other)
                return False
        row.ticket.start()
        return True

    def _advance_prefill(self, output: StepOutput) -> None:
        if self._prefill is None:
            return
        prefill, beside = self._prefill, bool(self.batch.rows)
        # A chunk as long as a decode step at most doubles the time between two tokens.
        patience = min(self.limits.stall, max(self._turn, 0.002)) if beside else 1.0
        for row, pick in prefill.advance(self._beside if beside else self._alone, patience):
            self._keep_prefix(prefill, row)
            row.generation.extend(row, pick, output)
            if row.finish_reason:
                self._release(row)
            else:
                self._make_room(len(self.batch.rows) + 1, row.cached + 1)
                self.batch.join(row, prefill.kv, prefill.place(row))
        if not prefill.rows:
            self._prefill = None

    def _keep_prefix(self, prefill: Prefill, row: Row) -> None:
        tokens = (row.generation.prompt + row.tokens)[: row.cached]
        name = owner(self._pool, row)
        if len(tokens) >= SHORTEST and not self.prefixes.has(name, tokens):
            self.prefixes.put(name, tokens, prefill.kv.row(prefill.place(row), row.cached))

    # --- decoding ---

    def _decode(self, output: StepOutput) -> None:
        """Read the pass that was launched in the turn before, after launching the next: the device never waits."""
        batch = self.batch
        if not batch.pending and not self._launch():
            return
        flight = batch.take()
        if flight is None:
            return
        if self.ahead and not any(row.grammar for row in batch.rows):
            # A grammar has to see a token before it can say which may follow.
            self._launch(again=True)
        for row, pick in batch.read(flight):
            row.generation.extend(row, pick, output)
            if row.finish_reason:
                self._release(row)

    def _launch(self, *, again: bool = False) -> bool:
        """Start a pass unless one is under way (`again`: behind it); False if no row needs one."""
        batch = self.batch
        if batch.pending and not again:
            return True
        self._make_room(len(batch.rows), max((row.cached for row in batch.rows), default=0) + 1)
        return batch.launch()

    # --- memory ---

    def _admissible(self, rows: Sequence[Row]) -> bool:
        """Whether the batch could take these rows in within the budget; kept prefixes make way."""
        length = max(row.length for row in rows) + 1
        needed = len(rows) * length * bytes_per_token(self._decoder) + self._growth(len(rows), length)
        while self.kv_bytes + needed > self.limits.kv_bytes:
            if not self.prefixes.evict():
                self.batch.shrink()
                needed = len(rows) * length * bytes_per_token(self._decoder) + self._growth(len(rows), length)
                return self.kv_bytes + needed <= self.limits.kv_bytes or not self.batch.rows
        return True

    def _growth(self, more: int, length: int) -> int:
        """Bytes that the batch would take on top of what it has, with `more` rows of `length` tokens."""
        longest = max([length, *(row.cached + 1 for row in self.batch.rows)])
        rows, capacity = self.batch.shape_for(len(self.batch.rows) + more, longest)
        return max(0, rows * capacity * bytes_per_token(self._decoder) - self.batch.nbytes)

    def _make_room(self, rows: int, length: int) -> None:
        """Before the batch grows: prefixes make way, then the rows that came last are put back among those that wait.

        They keep their tokens and are prefilled with them later, so that their streams go on where they were.
        """
        batch = self.batch
        while self.kv_bytes + self._growth(rows - len(batch.rows), length) > self.limits.kv_bytes:
            if self.prefixes.evict():
                continue
            if len(batch.rows) < 2:
                return
            self._preempt(max(batch.rows, key=lambda row: row.ticket.submitted))
            rows = min(rows, len(batch.rows) + 1)
            length = max((row.cached + 1 for row in batch.rows), default=1)
            batch.shrink()

    def _preempt(self, row: Row) -> None:
        self.batch.leave(row)
        row.cached = 0
        self._waiting.appendleft(row)
        self.preempted += 1

    # --- the end ---

    def _release(self, row: Row) -> None:
        """Free whatever a row holds, wherever it is."""
        if row in self._waiting:
            self._waiting.remove(row)
        if row.slot >= 0:
            self.batch.leave(row)
        if self._prefill is not None and row in self._prefill.rows:
            self._prefill.rows.remove(row)
            if not self._prefill.rows:
                self._prefill = None
        if row.adapter >= 0:
            self._pool.release(row.adapter)
            row.adapter = -1

    def fail_all(self, error: BaseException) -> None:
        for row in self.held:
            row.ticket.fail(error)
            if row.adapter >= 0:
                self._pool.release(row.adapter)
        self._waiting.clear()
        self._reset()
