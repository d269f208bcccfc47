"""Continuous batching: requests join between two steps, decode together, and leave when they are done."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

from engine.adapters.pool import AdapterPool
from engine.checkpoints.loading import LoadedModel
from engine.generation.batch import Batch
from engine.generation.draws import Pick
from engine.generation.kv_budget import KvBudget
from engine.generation.limits import GROUP, GROUP_TOKENS, GenerationLoad, LaneLimits
from engine.generation.prefill import Prefill, PrefillPacer
from engine.generation.prefixes import PrefixCache
from engine.generation.prompt import check_ids, check_memory, tokenize
from engine.generation.roster import Roster
from engine.generation.row import Generation, Row, RowFault, RowState
from engine.generation.step import Step, usual
from engine.generation.structured import GrammarVocabulary
from engine.ticket import StepOutput, Ticket
from stoker.contract import GenerateRequest, GenerateResult, StreamToken

log = logging.getLogger(__name__)


class GenerateLane:
    """All generation jobs of one model, in order of arrival.

    Its roster owns each row from `admit` until `_release`, wherever the row is meanwhile: a cancel, a deadline and
    `fail_all` always find it. What fails for one row is a `RowFault`, and ends its own job; any other exception of
    `run` is the whole step's.
    """

    kind = GenerateRequest.kind

    def __init__(self, model: LoadedModel, pool: AdapterPool, limits: LaneLimits | None = None) -> None:
        self._model, self._pool, self.limits = model, pool, limits or LaneLimits()
        self._decoder = model.decoder
        self.step = Step(self._decoder, self.limits.compiled or usual())
        #: One paces chunks while streams run, the other paces chunks that hold up no stream.
        self._busy_pacer, self._idle_pacer = PrefillPacer(), PrefillPacer(256)
        #: Seconds of a turn that only decoded, as measured lately.
        self._turn = 0.0
        self._vocabulary = GrammarVocabulary(model.tokenizer)
        #: Rows that were put back because memory ran short.
        self.preempted = 0
        self._reset()

    def _reset(self) -> None:
        self.batch = Batch(self._decoder, self._pool, self.step)
        self._prefill: Prefill | None = None
        kept = int(self.limits.kv_bytes * self.limits.prefix_share)
        self.prefixes = PrefixCache(kept, whole=bool(self._decoder.kv_sizes.states))
        self.budget = KvBudget(self._decoder, self.limits.kv_bytes, self.batch, self.prefixes)
        self._roster = Roster()

    def warm(self) -> None:
        """`warming` at once."""
        for _ in self.warming():
            pass

    def warming(self) -> Iterator[None]:
        """Generate three tokens for nobody, a step at a time: passes are compiled before the first request waits."""
        request = GenerateRequest(model=self._model.name, prompt_ids=(0,), max_tokens=3, ignore_eos=True)
        ticket: Ticket[GenerateResult] = Ticket("warm", self.kind)
        self.admit(self.prepare(ticket, request, None))
        while self.busy:
            self.run()
            yield
        if (error := ticket.error) is not None:
            # Its jobs will say the same; other models of this worker serve.
            log.error("model %s cannot generate: %s", self._model.name, error)

    @property
    def busy(self) -> bool:
        return bool(self._roster)

    @property
    def waiting(self) -> list[Row]:
        """Rows that have no slot yet, or lost it, in the order in which they get one."""
        return list(self._roster.waiting)

    @property
    def prefilling(self) -> list[Row]:
        """Rows whose prompts are on their way through the model."""
        return self._prefill.rows if self._prefill else []

    @property
    def held(self) -> list[Row]:
        """Every row that was admitted and has not ended."""
        return self._roster.rows

    @property
    def load(self) -> GenerationLoad:
        """How full it is. From any thread."""
        return GenerationLoad(self.kv_bytes, self.limits.kv_bytes, self.preempted, self.step.traced)

    @property
    def kv_bytes(self) -> int:
        """What keys and values take now."""
        return self.budget.used

    def prepare(
        self, ticket: Ticket[GenerateResult], request: GenerateRequest, data: Sequence[StreamToken] | None
    ) -> Generation:
        check_ids(self._model, request)
        prompt = tokenize(self._model, request)
        most = self.budget.most_tokens
        check_memory(len(prompt.ids), most, request.model)
        if request.adapter is not None:
            self._pool.check(request.adapter)
        context, grammar = min(self._model.context, most), self._vocabulary.grammar(request)
        generation = Generation(ticket, request, prompt, self._model.tokenizer, context, grammar)
        generation.resume(data or ())
        return generation

    def admit(self, work: Generation) -> None:
        if work.ended:
            # Its last token was published before; only the result is missing.
            work.ticket.start()
            work.ticket.resolve(work.result())
            return
        self._roster.admit(work.open_rows)

    def drop_stopped(self) -> None:
        for row in self.held:
            if row.ticket.stopping:
                self._release(row)
                row.ticket.fail_stopped()

    def run(self, *, lookahead: bool = True) -> StepOutput:
        """Take rows that wait, push prompts on by a chunk, decode every row that is ready by one token."""
        output, began = StepOutput(), time.perf_counter()
        self._begin_prefill()
        calm = self._prefill is None
        self._advance_prefill(output)
        if output.entries and lookahead:
            # A first token is there: it is reported before the lane waits for the pass that is under way.
            self._launch()
            return output
        self._decode(output, lookahead)
        if calm:
            seconds = time.perf_counter() - began
            self._turn = 0.8 * self._turn + 0.2 * seconds if self._turn else seconds
        return output

    # --- prompts ---

    def _begin_prefill(self) -> None:
        if self._prefill is not None or not (rows := self._next_group()):
            return
        try:
            self._prefill = Prefill(self._decoder, self._pool, self.step, rows, self.prefixes)
            self.budget.prefilling = self._prefill.kv.nbytes
        except RowFault as fault:
            self._fail(fault)
            self._roster.put_back(rows)

    def _end_prefill(self) -> None:
        self._prefill, self.budget.prefilling = None, 0

    def _next_group(self) -> list[Row]:
        """The rows to be prefilled next: the first that waits, and where it pays those behind it that fit."""
        group: list[Row] = []
        most = GROUP if self.step.prompt_buckets else 1
        waiting = self._roster.waiting
        while waiting and len(group) < most and len(self.batch.rows) + len(group) < self.limits.slots:
            row = waiting[0]
            longest = max(one.length for one in (row, *group))
            if group and (longest * (len(group) + 1) > GROUP_TOKENS or row.generation is group[-1].generation):
                break  # completions of one prompt: the first leaves a prefix for the others
            if not self.budget.admits([*group, row]):
                break
            waiting.popleft()
            if self._acquire(row):
                group.append(row)
        return group

    def _acquire(self, row: Row) -> bool:
        """Pin the version of a row's adapter; a row that was preempted has it."""
        if row.adapter < 0:
            try:
                with row.guarded():
                    row.adapter = self._pool.acquire(row.request.adapter)
            except RowFault as fault:
                self._fail(fault)
                return False
        row.ticket.start()
        return True

    def _advance_prefill(self, output: StepOutput) -> None:
        if self._prefill is None:
            return
        prefill, busy = self._prefill, bool(self.batch.rows)
        # A chunk as long as a decode step at most doubles the time between two tokens.
        patience = min(self.limits.stall, max(self._turn, 0.002)) if busy else 1.0
        for row, pick in self._advanced(prefill, self._busy_pacer if busy else self._idle_pacer, patience):
            if self._extend(row, pick, output, prefill):
                self._make_room(len(self.batch.rows) + 1, row.cached + 1)
                self.batch.join(row, prefill.kv, prefill.kv_row(row))
        if not prefill.rows:
            self._end_prefill()

    def _advanced(self, prefill: Prefill, pacer: PrefillPacer, patience: float) -> list[tuple[Row, Pick]]:
        try:
            found = prefill.advance(pacer, patience)
        except RowFault as fault:
            self._fail(fault)
            return []
        self.budget.prefilling = prefill.kv.nbytes
        return found

    def _extend(self, row: Row, pick: Pick, output: StepOutput, prefill: Prefill | None = None) -> bool:
        """Give a row its next token; whether it wants more. `prefill`: where its prompt has just been."""
        if row.state is RowState.ENDED:
            return False  # its job failed meanwhile, in another of its rows
        try:
            with row.guarded():
                if prefill is not None and pick.finite:
                    prefill.keep_prefix(row, self.prefixes)
                row.generation.extend(row, pick, output)
        except RowFault as fault:
            self._fail(fault)
            return False
        if row.finish_reason:
            self._release(row)
        return not row.finish_reason

    # --- decoding ---

    def _decode(self, output: StepOutput, lookahead: bool) -> None:
        """Read the pass that was launched in the turn before, after launching the next if `lookahead`: the device never
        waits then."""
        batch = self.batch
        if batch.in_flight is None and not self._launch():
            return
        pending = batch.in_flight
        if pending is None:
            return
        if lookahead and not any(row.grammar for row in batch.rows):
            # A grammar has to see a token before it can say which may follow.
            self._launch(again=True)
        output.rows = len(pending.rows)
        for row, pick in batch.read(pending):
            self._extend(row, pick, output)

    def _launch(self, *, again: bool = False) -> bool:
        """Start a pass unless one is under way (`again`: behind it); False if no row needs one."""
        batch = self.batch
        if batch.in_flight is not None and not again:
            return True
        while True:
            self._make_room(len(batch.rows), max((row.cached for row in batch.rows), default=0) + 1)
            try:
                return batch.launch()
            except RowFault as fault:
                self._fail(fault)

    def _make_room(self, rows: int, length: int) -> None:
        """Before the batch grows to `rows` of `length` tokens: the rows that came last are put back among those that
        wait. They keep their tokens and are prefilled with them later, so that their streams go on where they were.
        """
        batch = self.batch
        while self.budget.must_shrink(rows, length):
            self._preempt(max(batch.rows, key=lambda row: row.ticket.submitted))
            rows = min(rows, len(batch.rows) + 1)
            length = max((row.cached + 1 for row in batch.rows), default=1)
            batch.shrink()

    def _preempt(self, row: Row) -> None:
        self.batch.leave(row)
        self._roster.put_back([row])
        self.preempted += 1

    # --- the end ---

    def _fail(self, fault: RowFault) -> None:
        """End the job of a row that failed by itself; the others go on."""
        generation = fault.row.generation
        generation.ticket.fail(fault.cause)
        for row in generation.rows:
            self._release(row)
        self.batch.clean()

    def _release(self, row: Row) -> None:
        """The end of a row: free what it holds, wherever it is."""
        if row.slot >= 0:
            self.batch.leave(row)
        if row in self.prefilling:
            self._drop_from_prefill(row)
        if row.adapter >= 0:
            self._pool.release(row.adapter)
            row.adapter = -1
        self._roster.end(row)

    def _drop_from_prefill(self, row: Row) -> None:
        assert self._prefill is not None
        self._prefill.rows.remove(row)
        if not self._prefill.rows:
            self._end_prefill()

    def fail_all(self, error: BaseException) -> None:
        for row in self.held:
            row.ticket.fail(error)
            self._roster.end(row)
            if row.adapter >= 0:
                self._pool.release(row.adapter)
                row.adapter = -1
        self._reset()
