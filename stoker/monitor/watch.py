"""Looking at the ledger once a second, and reporting to Flower's memory and Stoker's page what there is.

What it costs the broker is bounded: a queue's newest jobs and its count, the records of jobs that are new or about to
run, and one number for each job that runs. The ids of a queue are compared as a whole only when its count differs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from stoker import AsyncClient
from stoker.broker import keys, letters
from stoker.broker.connection import translated
from stoker.broker.ledger.record import watched
from stoker.broker.letters import Letter
from stoker.broker.registry import AdapterEntry
from stoker.contract import ModelCard, Presence, TrainReport
from stoker.contract.kinds import ADAPTERS, GENERATE, TRAIN
from stoker.errors import StokerError
from stoker.monitor.mirror import Line, Mirror, ending
from stoker.monitor.notices import Known, TaskNotice
from stoker.monitor.numbers import MetricsReport, parse_reports
from stoker.monitor.state import JobMemory

log = logging.getLogger(__name__)

#: Seconds between rounds; and between looks at what changes rarely: models, workers, dead letters, adapters.
EVERY = 1.0
RARELY = 5.0
#: Seconds for which what workers counted is kept: many scrapes cost the broker no more than one.
COUNTED = 2.0
#: New jobs of a queue that one round takes in, reports of a run, and strangers.
AT_ONCE = 2000
REPORTS = 500
#: Bytes of a result that say how its job ended.
HEAD = 255


class Watch:
    """`mirror`, `workers`, `cards`, `dead`: what was seen last. `trouble`: why the broker cannot be seen."""

    def __init__(self, client: AsyncClient, memory: Callable[[], JobMemory]) -> None:
        self._client, self._memory = client, memory
        self.mirror = Mirror()
        self.workers: list[Presence] = []
        self.cards: dict[str, ModelCard] = {}
        self.dead: dict[str, Letter] = {}
        self.trouble = ""
        #: What was seen in this round.
        self._notices: list[TaskNotice] = []
        self._adapters: list[AdapterEntry] = []
        self._reports: list[MetricsReport] = []
        self._adapters_seen = self._looked_around = self._reports_seen = -RARELY
        self._compare_history = True

    async def run(self) -> None:
        """Until it is cancelled. A broker that is away is waited for, and said once."""
        while True:
            try:
                await self.round()
                if self.trouble:
                    log.info("the broker answers again")
                self.trouble = ""
            except StokerError as error:
                if not self.trouble:
                    log.warning("the jobs cannot be seen: %s", error)
                self.trouble = str(error)
            except Exception as error:
                # A defect, or a reply that no broker gives: the page says so, and the next look may go well.
                if not self.trouble:
                    log.exception("the jobs cannot be seen")
                self.trouble = f"the jobs cannot be seen ({type(error).__name__}); see the monitor's log."
            await asyncio.sleep(EVERY)

    async def round(self) -> None:
        """One look. What was seen before it failed is reported all the same: it is not seen a second time."""
        try:
            with translated(self._client.settings):
                await self._look_around()
                await self._look_at_queues()
                await self.look_at_running()
                await self._meet()
        finally:
            notices, self._notices = self._notices, []
            self._memory().hear(notices)

    async def _look_around(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._looked_around < RARELY:
            return
        self._looked_around, self._compare_history = now, True
        self.workers, self.cards = await self._client.workers(), await self._client.models()
        kinds = [(card.model, kind) for card in self.cards.values() for kind in card.kinds]
        known = {keys.queue(*line): line for line in kinds}
        for queue, line in known.items():
            self.mirror.follow(queue, *line)
        self.mirror.leave(known)
        await self._look_at_letters()

    async def adapters(self, *, anew: bool = False) -> list[AdapterEntry]:
        """Asked for only while a page is open."""
        now = asyncio.get_running_loop().time()
        if anew or now - self._adapters_seen >= RARELY:
            models = [card.model for card in self.cards.values() if ADAPTERS.name in card.kinds]
            self._adapters = [entry for model in models for entry in await self._client.adapters.list(model)]
            self._adapters_seen = now
        return self._adapters

    async def reports(self) -> list[MetricsReport]:
        """What the living workers have counted, the one that started last at the end."""
        now = asyncio.get_running_loop().time()
        if now - self._reports_seen >= COUNTED:
            names = [there.worker for there in sorted(self.workers, key=lambda there: there.started)]
            with translated(self._client.settings):
                redis: Any = self._client.redis
                values = await redis.mget([keys.metrics(name) for name in names]) if names else []
            self._reports, self._reports_seen = parse_reports(values), now
        return self._reports

    async def _look_at_letters(self) -> None:
        """Each letter is read once: it has what was asked for in it, which may be long."""
        redis: Any = self._client.redis
        ids = await redis.hkeys(keys.DEAD)
        names = {raw: raw.decode(errors="backslashreplace") for raw in ids}
        self.dead = {name: self.dead[name] for name in names.values() if name in self.dead}
        new = [raw for raw, name in names.items() if name not in self.dead][:AT_ONCE]
        if new:
            values = await redis.hmget(keys.DEAD, new)
            found = {raw: value for raw, value in zip(new, values, strict=True) if value is not None}
            for name, letter in letters.parse(found).items():
                self.dead[name] = Letter(**{**letter, "request": "", "message": ""})

    async def _look_at_queues(self) -> None:
        mirror, lines = self.mirror, list(self.mirror.lines.items())
        pipeline = self._pipeline().time()
        for queue, line in lines:
            pipeline.zrangebyscore(keys.open_jobs(queue), line.since, "+inf", 0, AT_ONCE, withscores=True)
            pipeline.zcard(keys.open_jobs(queue))
            pipeline.zrange(keys.dispatched(queue), 0, -1)
        (seconds, micros), *replies = await pipeline.execute()
        mirror.now = float(seconds) + float(micros) / 1e6
        asked: list[tuple[str, str]] = []
        compared: list[str] = []
        for (queue, line), newest, count, dispatched in zip(
            lines, replies[::3], replies[1::3], replies[2::3], strict=True
        ):
            new = mirror.newcomers(queue, newest)
            asked += [(queue, job_id) for job_id in [*new, *_known(line, dispatched, new)]]
            # A queue that is still being read for the first time differs for that.
            if len(newest) < AT_ONCE and line.differs(count - len(new), mirror.now):
                compared.append(queue)
        gone = await self._compare(compared, asked)
        await self._ask_records(asked)
        await self._ask_ends(gone)

    async def _compare(self, queues: Sequence[str], asked: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The jobs that are gone from these queues. What is new there is added to `asked`."""
        if not queues:
            return []
        pipeline = self._pipeline()
        for queue in queues:
            pipeline.zrange(keys.open_jobs(queue), 0, -1)
        gone: list[tuple[str, str]] = []
        known = set(asked)
        for queue, ids in zip(queues, await pipeline.execute(), strict=True):
            ended, new = self.mirror.vanished(queue, ids)
            gone += [(queue, job_id) for job_id in ended[:AT_ONCE]]
            asked += [(queue, job_id) for job_id in new[:AT_ONCE] if (queue, job_id) not in known]
        return gone

    async def _ask_records(self, asked: Sequence[tuple[str, str]]) -> None:
        replies = await self._ask([watched(job_id).send for _, job_id in asked])
        for (queue, job_id), reply in zip(asked, replies, strict=True):
            self._notices += self.mirror.hear(queue, job_id, watched(job_id).parse(reply))

    async def _ask_ends(self, gone: Sequence[tuple[str, str]]) -> None:
        """How these jobs ended. All reports of a run come before its end."""
        runs = [job_id for _, job_id in gone if job_id in self.mirror.runs]
        while runs:
            runs = await self._ask_reports(runs)
        heads = await self._ask([_head(job_id) for _, job_id in gone])
        for (queue, job_id), head in zip(gone, heads, strict=True):
            state, error = ending(head if isinstance(head, bytes) else None)
            self._notices += self.mirror.end(queue, job_id, state, error)

    async def look_at_running(self) -> None:
        answering = self.mirror.owned(GENERATE.name)
        counts = await self._ask([_length(job_id) for job_id in answering])
        for job_id, count in zip(answering, counts, strict=True):
            self._notices += self.mirror.counted(job_id, count) if isinstance(count, int) else []
        await self._ask_reports(self.mirror.owned(TRAIN.name))

    async def _ask_reports(self, runs: Sequence[str]) -> list[str]:
        """The next reports of these runs. Those that may have more of them."""
        after = {run: self.mirror.runs[run].last for run in runs}
        asks = [_reports(run, keys.entry_id(last.index) if last else "") for run, last in after.items()]
        more = list[str]()
        for (run, before), entries in zip(after.items(), await self._ask(asks), strict=True):
            reports = list(read_reports(entries if isinstance(entries, list) else []))
            self._notices += self.mirror.report(run, reports)
            # What another program wrote there may lead nowhere.
            got_on = bool(reports) and (before is None or reports[-1].index > before.index)
            more += [run] if got_on and len(entries) >= REPORTS else []
        return more

    async def _meet(self) -> None:
        """Describe the tasks whose events came first; and end those whose end nobody heard: they are not open any more,
        and the broker has their results, or nothing of them."""
        memory = self._memory()
        for job_id, said in await self._records(memory.meet_strangers(AT_ONCE)):
            self._notices += [Known.of(job_id, said)] if said is not None else []
        if not self._compare_history:
            return
        self._compare_history = False
        lost = sorted(memory.unfinished() - self.mirror.jobs.keys())[:AT_ONCE]
        heads = await self._ask([_head(job_id) for job_id in lost])
        for (job_id, said), head in zip(await self._records(lost), heads, strict=True):
            if head or said is None:
                self._notices += self.mirror.end_unseen(job_id, *ending(head if isinstance(head, bytes) else None))

    async def _records(self, ids: Sequence[str]) -> list[tuple[str, Any]]:
        replies = await self._ask([watched(job_id).send for job_id in ids])
        return [(job_id, watched(job_id).parse(reply)) for job_id, reply in zip(ids, replies, strict=True)]

    async def _ask(self, questions: Sequence[Callable[[Any], Any]]) -> list[Any]:
        """The replies; the error in place of a reply for a key of another type, which is one job's alone."""
        if not questions:
            return []
        pipeline = self._pipeline()
        for question in questions:
            question(pipeline)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    def _pipeline(self) -> Any:
        return self._client.redis.pipeline(transaction=False)


def _known(line: Line, dispatched: Iterable[bytes], new: Sequence[str]) -> list[str]:
    """Of the jobs that were dispatched those that are known: each of them may have another owner by now."""
    ids = (raw.decode(errors="replace") for raw in dispatched)
    return [job_id for job_id in ids if job_id in line.jobs and job_id not in new]


def _head(job_id: str) -> Callable[[Any], Any]:
    return lambda pipeline: pipeline.getrange(keys.result(job_id), 0, HEAD)


def _length(job_id: str) -> Callable[[Any], Any]:
    return lambda pipeline: pipeline.xlen(keys.stream(job_id))


def _reports(job_id: str, after: str) -> Callable[[Any], Any]:
    start = f"({after}" if after else "-"
    return lambda pipeline: pipeline.xrange(keys.stream(job_id), start, "+", count=REPORTS)


def read_reports(entries: Iterable[Any]) -> Iterable[TrainReport]:
    """What a run published. An entry that cannot be read is left out: the curve goes on."""
    for _, fields in entries:
        try:
            yield TrainReport.model_validate_json(fields[b"entry"])
        except (ValidationError, KeyError):
            continue
