"""Continuous batching: requests join between two steps, decode together, and leave when they are done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from engine.adapters.pool import AdapterPool
from engine.checkpoints.loading import LoadedModel
from engine.generation.batch import Batch, PendingStep
from engine.generation.draft_model import DraftModel
from engine.generation.drafting import Drafter, Plan
from engine.generation.draws import Pick
from engine.generation.grouping import GROUP_TOKENS, PASS, Grouping, GroupLimits
from engine.generation.guess import Guess
from engine.generation.kv_budget import KvBudget
from engine.generation.limits import GenerationLoad, LaneLimits
from engine.generation.pacing import CHUNK, CHUNK_OF_LAUNCHES, Chunk, LanePacer
from engine.generation.prefill import PassInTurns, Prefill, PromptChunk, owner
from engine.generation.prompt import beginning_of, check_ids, check_memory, tokenize
from engine.generation.prompts import Prompts
from engine.generation.roster import Roster
from engine.generation.row import Generation, Row, RowFault, RowState
from engine.generation.seats import Seats
from engine.generation.step import Step, usual
from engine.generation.structured import GrammarVocabulary
from engine.platform.compiler import on_cpu
from engine.prefixes.memory import SHORTEST, SHORTEST_ON_CPU, PrefixCache
from engine.prefixes.pins import Beginning, bytes_together
from engine.prefixes.shelf import Shelf
from engine.ticket import StepOutput, Ticket
from stoker.contract import GenerateRequest, GenerateResult, StreamToken

log = logging.getLogger(__name__)


class Decoded(NamedTuple):
    """A pass over `width` tokens of each row that decodes, and over so many tokens of `prompts`."""

    width: int = 1
    prompts: int = 0


class GenerateLane:
    """All generation jobs of one model, by priority, and those of one priority in order of arrival.

    Who does what in a step, and what happens at an error: docs/architecture.md#a-step-of-the-generation-lane. `run`
    raises what is the whole step's.
    """

    kind = GenerateRequest.kind

    def __init__(
        self,
        model: LoadedModel,
        pool: AdapterPool,
        limits: LaneLimits | None = None,
        shelf: Shelf | None = None,
        *,
        clock: Callable[[], float] | None = None,
        agreed: Callable[[bool], bool] = bool,
    ) -> None:
        """`shelf`: the model's prefixes on disk; None: there are none. `clock`: what it measures its steps by;
        None: this process's. `agreed`: of what ranks that share the model find differently, what all go by."""
        self.shelf, self._clock, self._agreed = shelf, clock or time.perf_counter, agreed
        self._model, self._pool, self.limits = model, pool, limits or LaneLimits()
        self._decoder = model.decoder
        compiled = self.limits.compiled or usual()
        self.step = Step(self._decoder, compiled)
        chunk = CHUNK_OF_LAUNCHES if self.step.prompt_buckets else CHUNK
        self._pacer = LanePacer(self.limits.stall, chunk)
        drafts = None if model.draft is None else DraftModel(model.draft, self._decoder.args.vocab, compiled)
        self.drafter = Drafter(drafts, self._clock)
        #: When the last step ended.
        self._ended = 0.0
        self._vocabulary = GrammarVocabulary(model.tokenizer)
        self._pinned: Sequence[Beginning] = ()
        self._reset(preempted=0)

    def _reset(self, preempted: int) -> None:
        #: Whether the rows that decode let the last chunk of prompts go before them; and the turn that prompts had in
        #: this step.
        self._let_go = False
        self._turn: PassInTurns | None = None
        self.batch = Batch(self._decoder, self._pool, self.step)
        kept = int(self.limits.kv_bytes * self.limits.prefix_share)
        shortest = SHORTEST_ON_CPU if on_cpu() else SHORTEST
        self.prefixes = PrefixCache(kept, whole=bool(self._decoder.kv_sizes.states), shortest=shortest)
        self.pin(self._pinned)
        self.drafter.reset()
        self.budget = KvBudget(self._decoder, self.limits.kv_bytes, self.batch, self.prefixes, self.drafter.model)
        self._prompts, self._roster = Prompts(self.budget), Roster()
        self._seats = Seats(self.limits.slots, self._roster, self._prompts, self.batch, self.budget, preempted)

    def warm(self) -> None:
        """`warming` at once."""
        for _ in self.warming():
            pass

    def warming(self) -> Iterator[None]:
        """Generate three tokens for nobody, with at most one pass that is new at a time: passes are compiled before the
        first request waits."""
        request = GenerateRequest(model=self._model.name, prompt_ids=(0,), max_tokens=3, ignore_eos=True, lookup=False)
        ticket: Ticket[GenerateResult] = Ticket("warm", self.kind)
        self.admit(self.prepare(ticket, request, None))
        yield
        while self.busy:
            self.run()
            yield
        if (error := ticket.error) is not None:
            # Its jobs will say the same; other models of this worker serve.
            log.error("model %s cannot generate: %s", self._model.name, error)
        if self.drafter.model is not None:
            yield from self.drafter.model.warming()

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
        return self._prompts.rows

    @property
    def held(self) -> list[Row]:
        """Every row that was admitted and has not ended."""
        return self._roster.rows

    @property
    def load(self) -> GenerationLoad:
        """How full it is. From any thread."""
        hits = 0 if self.shelf is None else self.shelf.hits
        kv_bytes, limit, counts = self.kv_bytes, self.limits.kv_bytes, self.drafter.counts
        bits = self._decoder.kv_bits
        return GenerationLoad(kv_bytes, limit, self.preempted, self.step.traced, hits, *counts, bits)

    @property
    def preempted(self) -> int:
        """Rows that were put back because they had to make way."""
        return self._seats.preempted

    @property
    def kv_bytes(self) -> int:
        """What keys and values take now."""
        return self.budget.used

    @property
    def model_name(self) -> str:
        return self._model.name

    def beginning(self, request: GenerateRequest) -> Beginning:
        """What all prompts have that go on from the request's. Raises `InvalidRequest`, and `UnknownAdapter`. From any
        thread."""
        check_ids(self._model, request)
        ids, sizes = beginning_of(self._model, request), self._decoder.kv_sizes
        check_memory(len(ids), self.budget.most_tokens, request.model)
        adapter = self._pool.resolved(request.adapter)
        return Beginning(adapter, tuple(ids), len(ids) * sizes.token_bytes + sizes.state_bytes)

    def bytes_of(self, beginnings: Iterable[Beginning]) -> int:
        """What memory takes for all of them. From any thread."""
        return bytes_together(beginnings, self._decoder.kv_sizes.token_bytes, self.prefixes.shortest)

    def pin(self, beginnings: Sequence[Beginning]) -> None:
        """From now on memory keeps these, once it has them, and no others."""
        self._pinned = beginnings
        self.prefixes.pin((each.adapter, each.ids) for each in beginnings)

    def forget(self, name: str, version: int) -> None:
        """The files of an adapter's version have become others: what comes from now on has the new ones, and nothing
        that was made with the old ones. What runs goes on as it began."""
        self._pool.drop(name, version)
        self.prefixes.forget((name, version))

    def prepare(
        self,
        ticket: Ticket[GenerateResult],
        request: GenerateRequest,
        data: Sequence[StreamToken] | None,
        *,
        passed: bool = False,
    ) -> Generation:
        """`passed`: another rank has prepared it before."""
        check_ids(self._model, request)
        prompt = tokenize(self._model, request, ticket.sent)
        most = self.budget.most_tokens
        check_memory(len(prompt.ids), most, request.model)
        adapter = self._pool.resolved(request.adapter)
        context, grammar = min(self._model.context, most), self._vocabulary.grammar(request, passed=passed)
        drafts = self._drafts(request)
        generation = Generation(ticket, request, prompt, self._model.tokenizer, context, grammar, drafts=drafts)
        draft = self.drafter.model
        if draft is not None and request.lookup is not False:
            for row in generation.rows:
                row.guess = Guess(draft.rate)
        generation.resume(data or ())
        if self.shelf is not None:
            generation.fetched = self.shelf.fetch(adapter, prompt.ids, self.prefixes)
        return generation

    def _drafts(self, request: GenerateRequest) -> bool:
        """Whether its rows may draft. A state that has seen a token cannot go back behind it."""
        asked = self.limits.lookup if request.lookup is None else request.lookup
        return (on_cpu() if asked is None else asked) and not self._decoder.kv_sizes.states

    def admit(self, work: Generation) -> None:
        if work.ended:
            # Its last token was published before; only the result is missing.
            work.ticket.start()
            work.ticket.resolve(work.result())
            return
        if self.shelf is not None and work.fetched is not None:
            self.shelf.take_in(work.fetched, self.prefixes)
            work.fetched = None
        self._roster.admit(work.open_rows)

    def drop_stopped(self) -> None:
        for row in self.held:
            if row.ticket.stopping:
                self.drop(row)

    def drop(self, row: Row) -> None:
        """The end of a row whose job is stopped."""
        self._release(row)
        row.ticket.fail_stopped()

    def run(self, *, lookahead: bool = True) -> StepOutput:
        """One step: prompts go on, or rows that decode get tokens, or both."""
        output = StepOutput()
        try:
            self._step(output, lookahead)
        except Exception as error:
            # Jobs that ended in this step have left the lane: nothing else would end them.
            for ticket, _ in output.ended:
                ticket.fail(error)
            raise
        return output

    def _step(self, output: StepOutput, lookahead: bool) -> None:
        # A pass that is under way began when the last step ended.
        began = self._ended if self.batch.in_flight else self._clock()
        decoded, begun, self._turn = Decoded(), self.batch.begun, None
        self.drafter.begin(self.batch.rows)
        self._pacer.begin({row.priority for row in self.held}, alone=lookahead, empty=not self.batch.rows)
        # Prompts and rows that decode take turns, unless one pass takes both.
        late, self._let_go = self._let_go, False
        pushed = not (late or self._ends_prompts) and self._push_prompts(output)
        if pushed and self._pacer.gathers:
            # What came meanwhile is admitted behind this step.
            self._pacer.gather()
        elif output.entries and lookahead:
            # A first token is there: it is reported before the lane waits for the pass that is under way.
            self._let_go = self._launch()
            if not on_cpu():
                self.batch.begin()
        else:
            # Behind first tokens that went before, the next chunk comes before the next pass.
            decoded = self._decode(output, lookahead and not (late and (self._prompts or self._roster.waiting)))
        self._ended = self._clock()
        # On a CPU a step takes as long as the passes that began in it; one with drafts is counted by itself.
        one = self.batch.begun - begun == 1 or decoded.width > 1
        alone = one and not (pushed or late or self.drafter.has_read)
        self._note(self._ended - began, output.rows, decoded, alone=alone)

    def _note(self, seconds: float, rows: int, decoded: Decoded, *, alone: bool) -> None:
        """The step took `seconds`, with such a pass of so many rows; `alone`: with nothing else."""
        width, prompts = decoded
        if self._turn is not None:
            self._pacer.note_turn(self._turn, seconds)
        self._pacer.note(seconds, rows if alone and width == 1 and not prompts else None)
        if alone and prompts:
            self._pacer.note_mixed(seconds, prompts)
        elif alone and rows:
            self.drafter.note(rows, width, seconds)

    # --- prompts ---

    def _push_prompts(self, output: StepOutput) -> bool:
        """Push prompts of the foreground on by a chunk, and those of the background while this is its turn; whether
        there were any."""
        if not (self._prompts or self._roster.waiting):
            return False
        pushed = self._push(self._pacer.foreground, output)
        until = self._clock() + self._pacer.background_seconds
        while self._push(self._pacer.background, output):
            pushed = True
            if self._clock() >= until:
                break
        return pushed

    def _push(self, priorities: range, output: StepOutput) -> bool:
        """Push the best group of these priorities on by a chunk; whether there is one that has a pass to itself."""
        self._begin_prefill(priorities)
        prefill = self._prompts.best(priorities)
        if prefill is None or self._goes_along(prefill):
            return False
        chunk = self._chunk(prefill.priority, long=prefill.long and self.step.parts > 1)
        self._seat(self._advanced(prefill, chunk), prefill, output)
        self._turn = prefill.turns
        return True

    def _seat(self, through: Sequence[tuple[Row, Pick]], prefill: Prefill, output: StepOutput) -> None:
        """Let rows that are through with their prompts decode, each from its first token on."""
        self._seats.prepare([row for row, _ in through])
        for row, pick in through:
            wants_more = self._extend(row, pick, output, prefill)
            if row.finish_reason:
                self._release(row)
            elif wants_more and self._seats.make_room(row):
                self.batch.join(row, prefill.kv, prefill.kv_row(row))
        self._prompts.count()

    def _join(self, group: Prefill) -> None:
        """Let rows decode whose prompts are here except for their last tokens, which the next pass takes. The batch has
        room for them: they were taken by that."""
        rows, group.rows = group.rows, []
        self._seats.prepare(rows)
        for row in rows:
            self.batch.join(row, group.kv, group.kv_row(row))
        self._prompts.count()

    def _goes_along(self, group: Prefill) -> bool:
        """Whether prompts go along with the passes of the rows that decode. Drafts have these passes to themselves, and
        so has a foreground; short prompts have their first tokens sooner by a pass of their own."""
        rows, pacer, ahead = self.batch.rows, self._pacer, int(self.batch.in_flight is not None)
        if not (self.step.mixes and rows) or group.short or pacer.contested or pacer.gathers:
            return False
        return self.drafter.plan(rows, self.batch.room - ahead, ahead).width == 1

    @property
    def _ends_prompts(self) -> bool:
        """Whether the pass that is under way has the last tokens of prompts."""
        pending = self.batch.in_flight
        return pending is not None and pending.chunk is not None and pending.chunk.waits

    def _along(self) -> PromptChunk | None:
        """What the next pass takes along."""
        group = self._prompts.best(self._pacer.foreground)
        if group is None or not self._goes_along(group):
            return None
        tokens = self._pacer.mixed_tokens(self._coming(group.priority))
        return group.next(tokens) if tokens else None

    def _begin_prefill(self, priorities: range) -> None:
        """Take rows that wait, unless a group as good is under way."""
        waiting = [row for row in self._roster.waiting if row.priority in priorities]
        under_way = self._prompts.best(priorities)
        if not waiting or (under_way is not None and under_way.priority <= waiting[0].priority):
            return
        grouping = Grouping(self._group_limits(waiting[0].priority), self._pool, self.prefixes)
        rows, group = list[Row](), None
        try:
            for row in self._seats.taken(waiting, grouping):
                if self._acquire(row):
                    rows.append(row)
            if rows:
                # What a row finds that is seated again, or behind others of its job, was left by the job itself.
                new = [row for row in rows if row.generation.cached_tokens is None]
                group = self._prefill(rows)
                self._prompts.begin(group)
                self._note_served(new)
        except RowFault as fault:
            self._fail(fault)
            self._roster.put_back(rows)
            return
        if group is not None and group.known:
            self._join(group)

    def _prefill(self, rows: Sequence[Row]) -> Prefill:
        return Prefill(self._decoder, self._pool, self.step, rows, self.prefixes, self._clock, self._agreed)

    def _note_served(self, rows: Sequence[Row]) -> None:
        """Let the disk have what the prefix cache had for rows that come from elsewhere."""
        if self.shelf is not None:
            for row in rows:
                self.shelf.served(owner(self._pool, row), row.known[: row.cached], self.prefixes)

    def _keep_prefix(self, row: Row, prefill: Prefill) -> None:
        """Let the prefix cache have a prompt that was prefilled, and the disk if it is long."""
        if prefill.keep_prefix(row, self.prefixes) and self.shelf is not None:
            self.shelf.kept(owner(self._pool, row), row.known[: row.cached], self.prefixes)

    def _group_limits(self, priority: int) -> GroupLimits:
        """Which prompts of this priority go together: on a CPU as many as one chunk takes."""
        if self.step.prompt_buckets:
            return GroupLimits(GROUP_TOKENS)
        return GroupLimits(self._chunk(priority).pacer.most, padding=PASS, alike=bool(self._decoder.kv_sizes.states))

    def _chunk(self, priority: int, *, long: bool = False) -> Chunk:
        """How much of the prompts of this priority goes next."""
        decoding = any(row.priority <= priority for row in self.batch.rows)
        return self._pacer.chunk(priority, decoding=decoding, prompts=self._coming(priority), long=long)

    def _coming(self, priority: int) -> int:
        """How many prompts of this priority are under way, or wait for no other than these; at least one."""
        under_way = self._prompts.rows
        free = self.limits.slots - len(self.batch.rows) - len(under_way)
        waiting = sum(row.priority == priority for row in self._roster.waiting)
        return max(1, sum(row.priority == priority for row in under_way) + min(waiting, free))

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

    def _advanced(self, prefill: Prefill, chunk: Chunk) -> list[tuple[Row, Pick]]:
        try:
            return prefill.advance(chunk.pacer, chunk.patience, chunk.turns)
        except RowFault as fault:
            self._fail(fault)
            return []

    def _extend(self, row: Row, pick: Pick, output: StepOutput, prefill: Prefill | None = None) -> bool:
        """Give a row its next token; whether it wants more. `prefill`: where its prompt has just been."""
        if row.state is RowState.ENDED:
            return False  # its job failed meanwhile, in another of its rows
        try:
            with row.guarded():
                if prefill is not None and pick.finite:
                    self._keep_prefix(row, prefill)
                row.generation.extend(row, pick, output)
        except RowFault as fault:
            self._fail(fault)
            return False
        return not row.finish_reason

    # --- decoding ---

    def _decode(self, output: StepOutput, lookahead: bool) -> Decoded:
        """Read the pass that was launched in the turn before, after launching the next if `lookahead`: the device never
        waits then. Or launch one with drafts, and read that. What the pass was that was read."""
        batch = self.batch
        if batch.in_flight is None:
            if (plan := self._plan_drafts()).width > 1:
                self._try_drafts(output, plan)
                return Decoded(plan.width)
            if not self._launch():
                return Decoded()
        pending = batch.in_flight
        if pending is None:
            return Decoded()
        batch.begin()
        # A grammar has to see a token before it can say which may follow, and so has a draft.
        if lookahead and not any(row.grammar for row in batch.rows) and self._plan_drafts(ahead=1).width == 1:
            self._launch_ahead(pending)
        output.rows = len(pending.rows)
        read, chunk = batch.read(pending), pending.chunk
        for row, pick in read.rows:
            self._extend(row, pick, output)
        self._release_ended([row for row, _ in read.rows])
        if chunk is None:
            return Decoded()
        self._seat(read.through, chunk.prefill, output)
        return Decoded(prompts=chunk.tokens)

    def _launch_ahead(self, pending: PendingStep) -> None:
        """Launch the pass behind this one, and let it begin: its host's part is done while that runs. It does not begin
        where prompts go along: of a pass that is not compiled the host's part is most, and MLX would hold up what is to
        be read before it. There is none behind the last tokens of prompts, whose rows would not be in it."""
        if pending.chunk is not None and pending.chunk.done:
            return
        launched = self.batch.in_flight if self._launch(again=True) else None
        if launched is not None and launched.chunk is None and pending.chunk is None:
            self.batch.begin()

    def _plan_drafts(self, ahead: int = 0) -> Plan:
        """Which drafts the next pass tries. Next to a background none: how many of its rows fit is measured without.
        Rows that a model is to draft for are read on."""
        if self._pacer.contested:
            return Plan()
        plan = self.drafter.plan(self.batch.rows, self.batch.room - ahead, ahead)
        self.drafter.read(plan, len(self.batch.rows), self.budget.spare)
        return plan

    def _try_drafts(self, output: StepOutput, plan: Plan) -> None:
        self.drafter.draft(plan, self.batch.rows, self.budget.spare)
        try:
            tried = self.batch.try_drafts(plan.width)
        except RowFault as fault:
            self._fail(fault)
            return
        self._pacer.decodes()
        output.rows = len(tried)
        for one in tried:
            self.drafter.count(one)
            for pick in one.taken:
                if not self._extend(one.row, pick, output):
                    break
        self._release_ended([one.row for one in tried])

    def _release_ended(self, rows: Sequence[Row]) -> None:
        # From the last slot on: none that ends moves into the slot of another first, which is a copy of all there is.
        for row in reversed(rows):
            if row.finish_reason:
                self._release(row)

    def _launch(self, *, again: bool = False) -> bool:
        """Start a pass unless one is under way (`again`: behind it); False if no row needs one."""
        batch = self.batch
        if batch.in_flight is not None and not again:
            return True
        while True:
            self._seats.make_room()
            try:
                chunk = self._along()
                launched = batch.launch(self._width(), chunk)
            except RowFault as fault:
                self._fail(fault)
                continue
            if launched:
                self._pacer.decodes()
            return launched

    def _width(self) -> int:
        """How many rows the next pass takes: the first ones."""
        rows = self.batch.rows
        if not self._pacer.contested:
            return len(rows)
        self.batch.arrange()
        return self._pacer.rows(sum(row.priority == self._pacer.best for row in rows), len(rows))

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
        self.drafter.leave(row)
        self._prompts.drop(row)
        self.batch.settle()
        if row.adapter >= 0:
            self._pool.release(row.adapter)
            row.adapter = -1
        self._roster.end(row)

    def fail_all(self, error: BaseException) -> None:
        for row in self.held:
            row.ticket.fail(error)
            self._roster.end(row)
            if row.adapter >= 0:
                self._pool.release(row.adapter)
                row.adapter = -1
        self._reset(self.preempted)
