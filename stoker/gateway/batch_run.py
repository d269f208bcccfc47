"""One batch, from where it is to its end: its lines become jobs, and these become lines of its files.

A line's job has an id that is made of the batch's and the line's number. So a runner that takes over sends those again
that another one had begun, and gets the same jobs; what counts as done is what the record in the broker says, which
names the parts of both files. A part that a dead runner wrote behind that is nobody's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from stoker.broker.batches import BatchRecord, Status, Trouble
from stoker.broker.stored_files import FileRecord
from stoker.errors import StokerError
from stoker.gateway import batch_lines
from stoker.gateway.batch_answers import Answers
from stoker.gateway.batch_lines import Line, Outcome, Survey, WrongLine, lines_of, survey
from stoker.gateway.errors import Refused
from stoker.gateway.stored import Draft, Store
from stoker.gateway.tasks import ended

log = logging.getLogger(__name__)
#: Seconds between two moments at which what is done is written for good, and bytes that wait for it at most.
COMMIT_EVERY, MOST_WAITING = 2.0, 8 * 2**20
#: Lines under way or finished that wait for one before them, for each job that may be in flight.
AHEAD = 4
#: Lines behind those that are done whose jobs are stopped when a batch ends early: a runner that died may have sent
#: them.
MOST_SENT = 2000
#: Seconds that the files of a batch outlive its window while it has not ended.
BEHIND = 24 * 3600
#: Why lines that were not answered were not.
WHY: Mapping[Status, tuple[str, str]] = {
    "expired": ("batch_expired", "the batch's completion window was over before this line was answered."),
    "cancelled": ("batch_cancelled", "the batch was cancelled before this line was answered."),
}
#: How many jobs may be in flight, by the models that they go to.
InFlight: TypeAlias = Callable[[set[str]], Awaitable[int]]


class Overtaken(Exception):
    """Another gateway runs the batches of this place now."""


@dataclass
class BatchRun:
    """`write`: says in the broker how far it is; False: another runner has the batch."""

    store: Store
    record: BatchRecord
    answers: Answers
    write: Callable[[BatchRecord], Awaitable[bool]]
    in_flight: InFlight
    #: Set when its client wants it to end.
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Raises `Overtaken`, and what a later try may not meet: `BrokerUnavailable`, a disk that takes nothing. Who
        cancels the task leaves the batch to a later try too."""
        try:
            source = await self.store.find(self.record.input_file, self.record.owner)
            async with aclosing(self.store.read(source)) as parts:
                found = await survey(parts)
            written = await self._begun(found.total)
            ending = await self._answered(source, found, written)
        except Refused as refused:
            if refused.status >= 500:
                raise
            # What the file is, or that it is gone, no later try would find otherwise.
            trouble = Trouble(code=refused.code or "invalid_file", message=refused.message)
            await self._say(trouble=(trouble,))
            ending = "failed"
        await self._end(ending)

    async def _begun(self, total: int) -> Written:
        record, now = self.record, int(await self.store.now())
        output, errors = record.output or await self._new("output"), record.errors or await self._new("errors")
        until = float(record.expires + BEHIND)
        drafts = await self.store.begin(output, until), await self.store.begin(errors, until)
        await self._say(status="in_progress", total=total, output=output, errors=errors, now=now)
        return Written(*drafts)

    async def _new(self, what: str) -> FileRecord:
        name = f"{self.record.id}_{what}.jsonl"
        return await self.store.new(self.record.owner, name, "batch_output", self.record.lifetime)

    async def _answered(self, source: FileRecord, found: Survey, written: Written) -> Status:
        """Answer all lines, or those that there is time for; how it ends."""
        lines = Lines(self.record, found, self.answers)
        stop = asyncio.ensure_future(self._stopped(self.record.expires - await self.store.now()))
        under_way = set[asyncio.Task[None]]()
        try:
            await self._answer(source, lines, written, under_way, stop)
        finally:
            await ended((stop, *under_way))
        if stop.cancelled():
            return "completed"
        await self._give_up(source, lines, written, stop.result())
        return stop.result()

    async def _stopped(self, left: float) -> Status:
        """Return when the batch has to end early, and how it ends then."""
        try:
            async with asyncio.timeout(max(0.0, left)):
                await self.cancelled.wait()
            return "cancelled"
        except TimeoutError:
            return "expired"

    async def _answer(
        self,
        source: FileRecord,
        lines: Lines,
        written: Written,
        under_way: set[asyncio.Task[None]],
        stop: asyncio.Task[Status],
    ) -> None:
        sent = 0
        async with aclosing(self._open(source)) as found:
            async for line in found:
                most = await self.in_flight(lines.models)
                while not stop.done() and (len(under_way) >= most or sent - written.all >= AHEAD * most):
                    await self._next(lines, written, under_way, stop)
                    most = await self.in_flight(lines.models)
                if stop.done():
                    return
                under_way.add(asyncio.ensure_future(lines.answer(line)))
                sent += 1
        while under_way and not stop.done():
            await self._next(lines, written, under_way, stop)
        await self._commit(written)

    async def _next(
        self, lines: Lines, written: Written, under_way: set[asyncio.Task[None]], stop: asyncio.Task[Status]
    ) -> None:
        """Wait until one more is finished, or it is time to say so; write those that are, in order."""
        await asyncio.wait({*under_way, stop}, timeout=COMMIT_EVERY, return_when=asyncio.FIRST_COMPLETED)
        for task in [task for task in under_way if task.done()]:
            under_way.remove(task)
            task.result()
        while (outcome := lines.finished.pop(self.record.done + written.lines, None)) is not None:
            await written.put(outcome)
        if written.is_due():
            await self._commit(written)

    async def _open(self, source: FileRecord) -> AsyncGenerator[Line]:
        """The lines that are not done."""
        done = self.record.done
        async with aclosing(self.store.read(source)) as parts, aclosing(lines_of(parts)) as lines:
            async for line in lines:
                if line.index >= done:
                    yield line

    async def _give_up(self, source: FileRecord, lines: Lines, written: Written, ending: Status) -> None:
        """Stop what is under way, and say of each line that has no answer why."""
        await self._commit(written)
        left = MOST_SENT
        async with aclosing(self._open(source)) as found:
            async for line in found:
                outcome = lines.finished.pop(line.index, None)
                if outcome is None and left:
                    left -= 1
                    await lines.stop(line)
                await written.put(outcome or lines.given_up(line, *WHY[ending]))
                if written.is_due():
                    await self._commit(written)
                # A million lines take a minute: no stream of this gateway waits for more than one of them.
                await asyncio.sleep(0)
        await self._commit(written)

    async def _commit(self, written: Written) -> None:
        """What was written is done, for good: the broker need not keep it any longer."""
        if not written.lines:
            return
        output, errors = await written.output.flush(), await written.errors.flush()
        right, wrong = self.record.completed + written.right, self.record.failed + written.lines - written.right
        await self._say(output=output, errors=errors, completed=right, failed=wrong)
        for job_id in written.taken():
            await self.answers.discard(job_id)

    async def _end(self, ending: Status) -> None:
        now = await self.store.now()
        await self._say(status="finalizing", now=int(now))
        kept: dict[str, FileRecord | None] = {}
        for name, file in (("output", self.record.output), ("errors", self.record.errors)):
            if file is None or not file.bytes:
                kept[name] = None
                continue
            file = file.model_copy(update={"created": now, "expires": int(now) + self.record.lifetime})
            await self.store.keep(file)
            kept[name] = file
        await self._say(status=ending, now=int(now), **kept)

    async def _say(self, *, now: int | None = None, **fields: Any) -> None:
        """The record says so from now on. `now`: when it came to its status."""
        if now is not None:
            fields["since"] = {fields["status"]: now} | self.record.since
        self.record = self.record.model_copy(update=fields)
        if not await self.write(self.record):
            raise Overtaken


@dataclass
class Written:
    """The files of a batch, and what was written to them and is not said yet: `lines`, and how many are answers."""

    output: Draft
    errors: Draft
    lines: int = 0
    right: int = 0
    #: Lines since the beginning.
    all: int = 0
    _bytes: int = 0
    _jobs: list[str] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)

    async def put(self, outcome: Outcome) -> None:
        await (self.output if outcome.right else self.errors).write(outcome.line)
        self.lines += 1
        self.all += 1
        self.right += outcome.right
        self._bytes += len(outcome.line)
        if outcome.job_id:
            self._jobs.append(outcome.job_id)

    def is_due(self) -> bool:
        """Whether it is time to say so."""
        return time.monotonic() - self._since >= COMMIT_EVERY or self._bytes >= MOST_WAITING

    def taken(self) -> list[str]:
        """All was said; the jobs whose answers were written meanwhile."""
        jobs, self._jobs = self._jobs, []
        self.lines = self.right = self._bytes = 0
        self._since = time.monotonic()
        return jobs


@dataclass
class Lines:
    """What becomes of each line. `models`: those that were asked. `finished`: outcomes by the line's index, of lines
    that wait for one before them."""

    record: BatchRecord
    survey: Survey
    answers: Answers
    models: set[str] = field(default_factory=set)
    finished: dict[int, Outcome] = field(default_factory=dict)

    async def answer(self, line: Line) -> None:
        """Have it `finished`."""
        self.finished[line.index] = await self._outcome(line)

    async def _outcome(self, line: Line) -> Outcome:
        name, job_id = self._name(line), self._job(line)
        try:
            custom_id, body = self._asked(line)
        except WrongLine as error:
            return batch_lines.failed(name, error.custom_id, error.code, str(error))
        try:
            answered_by, answer = await self.answers.answer(job_id, body, self.models)
        except Refused as refusal:
            return batch_lines.refused(name, custom_id, job_id, refusal)
        except StokerError:
            # It meets all lines alike.
            raise
        except Exception:
            log.exception("line %d of batch %s failed by a defect of the gateway", line.number, self.record.id)
            return batch_lines.failed(name, custom_id, "gateway_error", "the gateway failed; its log has the reason.")
        return batch_lines.answered(name, custom_id, answered_by, answer)

    def given_up(self, line: Line, code: str, message: str) -> Outcome:
        try:
            return batch_lines.failed(self._name(line), self._asked(line)[0], code, message)
        except WrongLine as error:
            return batch_lines.failed(self._name(line), error.custom_id, error.code, str(error))

    async def stop(self, line: Line) -> None:
        await self.answers.stop(self._job(line))

    def _asked(self, line: Line) -> tuple[str, bytes]:
        return line.asked(self.record.endpoint, duplicate=self.survey.duplicate(line))

    def _job(self, line: Line) -> str:
        return f"{self.record.id}-{line.index}"

    def _name(self, line: Line) -> str:
        return f"batch_req_{self.record.id.removeprefix('batch_')}_{line.index}"
