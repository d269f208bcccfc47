"""The ledger once more, in plain Python: what every transition is to answer, and what is to lie in the broker after it.

It follows the words of `docs/guarantees.md` and the comments of `prelude.lua`, not their form: no script, no keys
that are passed about. `tests/stoker/test_queue_model.py` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stoker.broker import keys

PRIORITIES = range(10)


@dataclass
class Record:
    """What the broker keeps of one job; `open` until it has ended."""

    client: str
    priority: int
    submitted: float
    has_input: bool
    turn: int = 0
    sent: int = 0
    token: str | None = None
    tag: str | None = None
    worker: str | None = None
    #: The token of its first owner, since it was passed on at least; and of the one that passed it on.
    began: str | None = None
    passed: str | None = None
    #: The worker that alone can run it.
    needs: str | None = None
    attempts: int = 0
    #: The workers that went silent with it.
    history: list[str] = field(default_factory=list)
    completed: str | None = None
    open: bool = True
    keeps_input: bool = False


@dataclass(frozen=True)
class Message:
    """A message in the ready list or with a worker. One that came back differs from the text in its job's record."""

    job: str
    tag: str
    came_back: bool = False


@dataclass
class Policy:
    queue_limit: int = 20_000
    client_limit: int = 20_000
    crashes: int = 3
    ageing: int = 300


@dataclass(frozen=True)
class Reply:
    """What a submission is answered."""

    state: str
    depth: int = 0
    limit: int = 0
    wait: float = 0.0


@dataclass
class Queue:
    """One queue of a broker. `ready`: Celery takes from its right end, the last place."""

    name: str
    window: int
    now: float
    present: Callable[[str], bool]
    #: Whether a worker takes jobs.
    takes: Callable[[str], bool]
    policy: Policy = field(default_factory=Policy)
    ready: list[Message] = field(default_factory=list)
    held: dict[str, Message] = field(default_factory=dict)
    #: The messages for one worker alone.
    placed: dict[str, list[Message]] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    backlogs: dict[int, dict[str, int]] = field(default_factory=lambda: {priority: {} for priority in PRIORITIES})
    dispatched: dict[str, float] = field(default_factory=dict)
    open: dict[str, float] = field(default_factory=dict)
    mine: dict[str, dict[str, float]] = field(default_factory=dict)
    #: A dead letter's client, and the workers that its job crashed.
    dead: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    #: The bytes of each open job.
    sizes: dict[str, int] = field(default_factory=dict)
    #: When a job ended last, and the mean of the seconds between two ends.
    pace: tuple[float, float] | None = None
    marks: set[str] = field(default_factory=set)
    turns: dict[str, int] = field(default_factory=dict)
    #: key → when it expires. A key is there while its container holds something.
    until: dict[str, float] = field(default_factory=dict)
    #: A job that was taken in ends once, unless it waited until it was forgotten.
    taken_in: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def keep(self, key: str, seconds: float) -> None:
        self.until[key] = self.now + seconds

    # Waiting

    def waiting(self, job: str) -> Record | None:
        """The record of a job that may be put into the ready list."""
        record = self.records.get(job)
        return record if record is not None and record.open else None

    def level(self, job: str) -> int:
        """The priority that waiting has brought it to; what is no job any more stands as it is."""
        record = self.waiting(job)
        return (
            0 if record is None else max(0, record.priority - int((self.now - record.submitted) // self.policy.ageing))
        )

    def enter_backlog(self, job: str) -> None:
        record = self.records[job]
        mine = f"next:{record.priority}:{record.client}"
        record.turn = max(self.turns.get(f"now:{record.priority}", 0), self.turns.get(mine, 0))
        self.turns[mine] = record.turn + 1
        self.keep(keys.turns(self.name), keys.PENDING_TTL)
        self.leave_backlogs(job)
        self.to_backlog(job)

    def leave_backlogs(self, job: str) -> None:
        for backlog in self.backlogs.values():
            backlog.pop(job, None)

    def to_backlog(self, job: str) -> None:
        record = self.records[job]
        self.backlogs[record.priority][job] = record.turn
        self.keep(keys.backlog(self.name, record.priority), keys.PENDING_TTL)

    def wait_again(self, job: str) -> None:
        """As one whose turn it is: its own may be of before the turns began anew."""
        record = self.records[job]
        record.turn = min(record.turn, self.turns.get(f"now:{record.priority}", 0))
        self.to_backlog(job)

    def best(self) -> str | None:
        """Of the first of every backlog the one of the best level; of equals, whose priority was served longest ago."""
        heads = []
        for priority, backlog in self.backlogs.items():
            while backlog:
                head = min(backlog, key=lambda job: (backlog[job], job.encode()))
                if self.waiting(head):
                    heads.append((self.level(head), self.turns.get(f"served:{priority}", 0), priority, head))
                    break
                del backlog[head]
        return min(heads)[-1] if heads else None

    def push(self, job: str) -> None:
        """To the ready list, behind all that are as good."""
        record = self.records[job]
        record.sent += 1
        message = Message(job, f"{job}#{record.sent}")
        level = self.level(job)
        if self.ready and self.level(self.ready[0].job) > level:
            place = len(self.ready)
            while self.level(self.ready[place - 1].job) <= level:
                place -= 1
            self.ready.insert(place, message)
        else:
            self.ready.insert(0, message)
        del self.backlogs[record.priority][job]
        served = self.turns["served"] = self.turns.get("served", 0) + 1
        self.turns |= {f"now:{record.priority}": record.turn, f"served:{record.priority}": served}
        self.keep(keys.turns(self.name), keys.PENDING_TTL)
        self.dispatch(job)

    def dispatch(self, job: str) -> None:
        self.dispatched[job] = self.now
        self.keep(keys.dispatched(self.name), keys.PENDING_TTL)

    def refill(self) -> None:
        while len(self.ready) < self.window:
            job = self.best()
            if job is None:
                self.turns.clear()
                return
            self.push(job)

    def make_way(self) -> None:
        job, last = self.best(), self.ready[0].job
        record = self.waiting(last)
        if job is None or record is None or record.token or self.level(job) >= self.level(last):
            return
        self.ready.pop(0)
        self.dispatched.pop(last, None)
        self.wait_again(last)
        self.push(job)

    @property
    def depth(self) -> int:
        """Messages and ids that wait."""
        return len(self.ready) + sum(map(len, self.backlogs.values()))

    # Transitions

    def wait_for(self, jobs: float) -> float:
        """Seconds until so many more have ended: from one to an hour."""
        return min(3600.0, max(1.0, (self.pace[1] if self.pace else 1.0) * jobs))

    def submit(
        self, job: str, client: str, priority: int, size: int, *, has_input: bool = False, revive: bool = False
    ) -> Reply:
        """`size`: bytes of its record and its input."""
        if revive and job not in self.dead:
            return Reply("unknown")
        if self.waiting(job) is not None or (not revive and job in self.records):
            return Reply("known")
        limit, depth = self.policy.queue_limit, self.depth
        if depth >= limit:
            # Ids at the heads of the backlogs that have no job do not count.
            self.best()
            depth = self.depth
            if depth >= limit:
                return Reply("full", depth, limit, self.wait_for(depth - limit + 1))
        mine = self.mine.setdefault(client, {})
        young = {other: since for other, since in mine.items() if since >= self.now - keys.PENDING_TTL}
        if len(young) >= self.policy.client_limit:
            share = max(1.0, depth / len(young))
            return Reply("client_full", len(young), self.policy.client_limit, self.wait_for(share))
        former = self.records.get(job)
        if revive:
            del self.dead[job]
            self.results.pop(job, None)
        sent = max(int(self.now * 1e6), former.sent if former is not None else 0)
        attempts = former.attempts if former is not None else 0
        self.records[job] = Record(client, priority, self.now, has_input, sent=sent, attempts=attempts)
        self.sizes[job] = size
        self.taken_in.append(job)
        self.marks.discard(job)
        self.mine[client] = {other: since for other, since in mine.items() if since > self.now - keys.PENDING_TTL}
        self.open[job] = self.mine[client][job] = self.now
        for key in (keys.job(job), keys.open_jobs(self.name), keys.client(client, self.name)):
            self.keep(key, keys.PENDING_TTL)
        if has_input and (not revive or keys.blob(f"dataset:{job}") in self.until):
            self.keep(keys.blob(f"dataset:{job}"), keys.PENDING_TTL)
        self.enter_backlog(job)
        self.refill()
        if job in self.backlogs[priority]:
            self.make_way()
        return Reply("new", depth, limit)

    def claim(self, job: str, token: str, tag: str, worker: str) -> str:
        self.refill()
        record = self.records.get(job)
        if self.has_ended(job):
            self.strike_out(job)
            return "ended"
        if record is None:
            return "unknown"
        if record.token and record.tag != tag:
            return "duplicate"
        if record.token != token:
            self.note_crash(record)
            record.attempts += 1
        record.token, record.tag, record.worker, record.began = token, tag, worker, record.began or token
        self.keep(keys.job(job), keys.PENDING_TTL)
        return "dead" if len(record.history) >= self.policy.crashes else "run"

    def note_crash(self, record: Record) -> None:
        if record.token and record.worker:
            record.history.append(record.worker)

    def release(self, job: str, token: str) -> int:
        record = self.records.get(job)
        if record is None or record.token != token:
            return 0
        record.token = record.tag = record.worker = None
        self.dispatch(job)
        return 1

    def pass_on(self, job: str, token: str, worker: str, *, needed: bool) -> str:
        record = self.records.get(job)
        if record is not None and record.passed == token:
            return "passed"
        if record is None or record.token != token or not record.open:
            return "fenced"
        if (record.passed and not needed) or job in self.marks:
            return "stays"
        record.sent += 1
        record.attempts -= 1
        record.began = None if record.began == token else record.began
        record.token = record.tag = record.worker = None
        record.passed, record.needs = token, worker if needed else record.needs
        key, standing = keys.placed(self.name, worker), self.placed.setdefault(worker, [])
        until = self.until[key] if standing else 0.0
        standing.insert(0, Message(job, f"{job}#{record.sent}"))
        self.keep(key, keys.PENDING_TTL if needed else keys.PLACED_TTL)
        self.until[key] = max(self.until[key], until)
        self.dispatch(job)
        return "passed"

    def recall(self, job: str, worker: str) -> int:
        record = self.waiting(job)
        placed = self.placed.get(worker, [])
        if record is None or (message := Message(job, f"{job}#{record.sent}")) not in placed:
            return 0
        placed.remove(message)
        if record.token:
            return 0
        self.ready.append(message)
        self.dispatch(job)
        return 1

    def complete(self, job: str, token: str) -> int:
        record = self.records.get(job)
        if record is not None and record.completed == token:
            return 1
        if record is None or record.token != token or self.has_ended(job):
            return 0
        self.strike_out(job)
        record.completed = token
        self.finish(job, "SUCCESS")
        last, interval = self.pace or (self.now, None)
        since = self.now - last
        self.pace = (self.now, since if interval is None else 0.9 * interval + 0.1 * since)
        self.keep(keys.pace(self.name), keys.RESULT_TTL)
        return 1

    def abandon(self, job: str, token: str) -> int:
        if self.has_ended(job) or self.records[job].token != token:
            return 0
        self.strike_out(job)
        self.finish(job, "FAILURE")
        return 1

    def cancel(self, job: str) -> str:
        if self.has_ended(job):
            return "ended"
        record = self.records.get(job)
        if record is None:
            return "unknown"
        if record.token and record.worker and self.present(record.worker):
            self.marks.add(job)
            self.keep(keys.cancel(job), keys.PENDING_TTL)
            return "asked"
        if record.token:
            record.token = "cancelled"
        self.strike_out(job)
        self.finish(job, "REVOKED")
        self.refill()
        return "cancelled"

    def recover(self, older_than: float) -> list[str]:
        standing = {message.job for message in self.ready}
        self.look_at_open_jobs()
        found = []
        for job in sorted(self.dispatched, key=lambda job: (self.dispatched[job], job.encode())):
            record = self.waiting(job)
            if self.dispatched[job] > self.now - older_than:
                continue
            if record is None:
                del self.dispatched[job]
                self.open.pop(job, None)
            elif job not in standing and self.is_lost(record) and not self.waits_for_one(job, record):
                self.note_crash(record)
                self.take_from_its_list(job, record)
                record.token = record.tag = record.worker = None
                del self.dispatched[job]
                self.wait_again(job)
                found.append(job)
            elif job not in standing:
                self.keep_running(job, record)
        oldest = self.now - keys.PENDING_TTL
        self.open = {job: since for job, since in self.open.items() if since > oldest or self.waiting(job)}
        self.refill()
        return found

    def keep_running(self, job: str, record: Record) -> None:
        """A run may take longer than a job may wait: what it needs lives on."""
        if record.submitted > self.now - keys.PENDING_TTL / 2:
            return
        for key in (keys.job(job), keys.open_jobs(self.name), keys.dispatched(self.name)):
            self.keep(key, keys.PENDING_TTL)
        if keys.blob(f"dataset:{job}") in self.until:
            self.keep(keys.blob(f"dataset:{job}"), keys.PENDING_TTL)

    def look_at_open_jobs(self) -> None:
        """What was forgotten waits no more. What is in no order, of the oldest hundred, counts as dispatched now."""
        jobs = sorted(self.open, key=lambda job: (self.open[job], job.encode()))
        ordered = len(self.dispatched) + sum(map(len, self.backlogs.values()))
        if ordered == len(jobs) and all(job in self.records for job in jobs[:10]):
            jobs = [job for job in jobs if job not in self.records]
        for place, job in enumerate(jobs):
            record = self.waiting(job)
            if record is None:
                self.leave_backlogs(job)
                self.dispatched.pop(job, None)
            elif place < 100 and job not in self.dispatched and job not in self.backlogs[record.priority]:
                self.dispatch(job)

    def is_lost(self, record: Record) -> bool:
        if record.token is None or record.worker is None:
            return True
        return record.tag not in self.held and not self.present(record.worker)

    def waits_for_one(self, job: str, record: Record) -> bool:
        """Whether it stands in the list of the worker that alone can run it, and that takes jobs."""
        if record.token is not None or record.needs is None or not self.takes(record.needs):
            return False
        return Message(job, f"{job}#{record.sent}") in self.placed.get(record.needs, [])

    def take_from_its_list(self, job: str, record: Record) -> None:
        message = Message(job, f"{job}#{record.sent}")
        if record.token is None and record.needs and message in self.placed.get(record.needs, []):
            self.placed[record.needs].remove(message)

    def dead_letter(self, job: str) -> int:
        record = self.records[job]
        self.dead[job] = record.client, tuple(record.history)
        self.keep(keys.DEAD, keys.DEAD_TTL)
        record.keeps_input = True
        if keys.blob(f"dataset:{job}") in self.until:
            self.keep(keys.blob(f"dataset:{job}"), keys.DEAD_TTL)
        return len(record.history)

    # Ends

    def has_ended(self, job: str) -> bool:
        record = self.records.get(job)
        return job in self.results or (record is not None and not record.open)

    def strike_out(self, job: str) -> None:
        record = self.records.get(job)
        if record is not None:
            standing = Message(job, f"{job}#{record.sent}")
            if record.open and standing in self.ready:
                self.ready.remove(standing)
            self.mine.get(record.client, {}).pop(job, None)
            if record.has_input and not record.keeps_input:
                self.until.pop(keys.blob(f"dataset:{job}"), None)
            record.open = False
            self.keep(keys.job(job), keys.RESULT_TTL)
        self.leave_backlogs(job)
        self.open.pop(job, None)
        self.dispatched.pop(job, None)
        self.marks.discard(job)

    def finish(self, job: str, status: str) -> None:
        self.results[job] = status
        self.ends.append(job)
        self.keep(keys.result(job), keys.RESULT_TTL)

    # Time

    def advance(self, seconds: float) -> None:
        """Time passes, and what has had its time is gone."""
        self.now += seconds
        gone = {key for key, until in self.until.items() if until <= self.now}
        for key in gone:
            del self.until[key]
        self.forgotten += [job for job, record in self.records.items() if record.open and keys.job(job) in gone]
        self.records = {job: record for job, record in self.records.items() if keys.job(job) not in gone}
        self.results = {job: status for job, status in self.results.items() if keys.result(job) not in gone}
        self.marks = {job for job in self.marks if keys.cancel(job) not in gone}
        if keys.pace(self.name) in gone:
            self.pace = None
        containers: list[tuple[str, Any]] = [
            (keys.dispatched(self.name), self.dispatched),
            (keys.open_jobs(self.name), self.open),
            (keys.turns(self.name), self.turns),
            (keys.DEAD, self.dead),
            *((keys.backlog(self.name, priority), backlog) for priority, backlog in self.backlogs.items()),
            *((keys.client(client, self.name), mine) for client, mine in self.mine.items()),
            *((keys.placed(self.name, worker), placed) for worker, placed in self.placed.items()),
        ]
        for key, container in containers:
            if key in gone:
                container.clear()

    def lifetimes(self) -> dict[str, float | None]:
        """What is to lie in the broker: key → seconds that are left to it, None for what is durable."""
        there: set[str] = {keys.job(job) for job in self.records} | {keys.result(job) for job in self.results}
        there |= {keys.cancel(job) for job in self.marks}
        there |= {key for key in self.until if key.startswith(keys.blob("")) or key == keys.pace(self.name)}
        there |= {keys.backlog(self.name, priority) for priority, backlog in self.backlogs.items() if backlog}
        there |= {keys.client(client, self.name) for client, mine in self.mine.items() if mine}
        there |= {keys.placed(self.name, worker) for worker, placed in self.placed.items() if placed}
        sets = {keys.dispatched: self.dispatched, keys.open_jobs: self.open, keys.turns: self.turns}
        there |= {name(self.name) for name, container in sets.items() if container}
        sizes = {keys.sizes(self.name): self.until[keys.open_jobs(self.name)] - self.now} if self.open else {}
        there |= {keys.DEAD} if self.dead else set()
        durable: dict[str, float | None] = {keys.ready(self.name): None} if self.ready else {}
        durable |= {keys.UNACKED: None} if self.held else {}
        return {key: self.until[key] - self.now for key in there} | durable | sizes
