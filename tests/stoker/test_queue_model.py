"""The ledger against a model of it, in every order of its transitions: submit, claim, release, complete, abandon,
cancel, pass on, recall, recover, retry; messages lost and doubled, workers that die or freeze, and time that passes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from stoker.broker import keys, ledger, letters, policy
from stoker.broker.envelope import envelope
from stoker.contract.kinds import KINDS
from stoker.errors import JobFailed
from tests.stoker.clocked import CLOCK, give_time, quick_broker, set_clock
from tests.stoker.queue_model import Message, Queue, Record

START = 1_800_000_000.0
WORKERS = ("w0", "w1", "w2")
#: What the presence of a worker says that takes jobs, and what those say that take none.
TAKES, TAKES_NONE = '{"models": [{"model": "toy"}]}', ['{"models": [{"model": "toy"}], "stopping": true}', "{}"]
#: Real seconds of a test that count in the broker's expiries and not in the model's.
SLACK = 60.0
DECISIONS = {"queue_limit": (12,), "client_limit": (4,), "crashes": (1, 2), "ageing": (100,)}
PICK = st.integers(0, 30)


class LedgerMachine(RuleBasedStateMachine):
    """Each rule does one thing to both, and compares what they answer and what stands in the ready list."""

    redis: Any
    ends: Any

    @initialize(kind=st.sampled_from(["train", "generate"]))
    def begin(self, kind: str) -> None:
        self.redis.flushdb()
        self.heard()
        self.alive, self.taking = set[str](), set[str]()
        for worker in WORKERS:
            self.a_worker_starts(worker)
        give_time(self.redis, START)
        window = KINDS[kind].ready
        self.model = Queue(keys.queue("toy", kind), window, START, self.alive.__contains__, self.taking.__contains__)
        #: Jobs that were passed on, and to whom.
        self.passed: list[tuple[str, str]] = []
        #: Tokens that were given out: (job, token).
        self.claims: list[tuple[str, str]] = []
        self.holders: dict[str, str] = {}
        self.count = 0

    # What clients do

    @rule(client=st.sampled_from("abc"), priority=st.sampled_from([5, 0, 9, 4]), number=st.integers(1, 5))
    def submit(self, client: str, priority: int, number: int) -> None:
        for _ in range(number):
            self.count += 1
            self.send(f"job-{self.count}", client, priority, has_input=self.count % 3 == 0)

    @precondition(lambda self: self.count)
    @rule(pick=PICK, priority=st.sampled_from([5, 0]))
    def submit_again(self, pick: int, priority: int) -> None:
        self.send(self.some_job(pick), "a", priority)

    @precondition(lambda self: self.model.dead)
    @rule(pick=PICK)
    def retry(self, pick: int) -> None:
        dead = sorted(self.model.dead)
        self.send(dead[pick % len(dead)], "b", 5, has_input=True, revive=True)

    def send(self, job: str, client: str, priority: int, *, has_input: bool = False, revive: bool = False) -> None:
        queue = self.model.name
        record = {
            "kind": "train",
            "model": "toy",
            "queue": queue,
            "client": client,
            "priority": str(priority),
            "request": "{}",
            "message": envelope(job, "train", "toy", queue),
        }
        record |= {"blob": keys.blob(f"dataset:{job}")} if has_input else {}
        data = b"input" if has_input and not revive else b""
        size = len(data) + sum(len(name) + len(value) for name, value in record.items())
        if revive and record.get("blob") in self.model.until:
            size += len(b"input")
        expected = self.model.submit(job, client, priority, size, has_input=has_input, revive=revive)
        reply = ledger.submit(self.redis, job, record, data, revive=revive)
        assert (reply.state, reply.depth, reply.limit) == (expected.state, expected.depth, expected.limit)
        assert abs(reply.wait - expected.wait) <= 0.051, "seconds, to a tenth"
        self.compare_ready_lists()

    @precondition(lambda self: self.count)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        job = self.some_job(pick)
        expected = self.model.cancel(job)
        assert ledger.cancel(self.redis, job, self.model.name) == expected
        self.compare_ready_lists()

    def some_job(self, pick: int) -> str:
        return f"job-{1 + pick % self.count}"

    # What workers do

    @precondition(lambda self: self.model.ready and self.alive)
    @rule(pick=PICK)
    def take(self, pick: int) -> None:
        """Celery takes a message and writes it down as held."""
        worker = sorted(self.alive)[pick % len(self.alive)]
        self.hold(worker)

    @precondition(lambda self: self.model.ready and self.alive)
    @rule(pick=PICK)
    def take_and_claim(self, pick: int) -> None:
        worker = sorted(self.alive)[pick % len(self.alive)]
        self.claim(self.hold(worker), worker)

    @precondition(lambda self: self.model.held)
    @rule(pick=PICK)
    def claim_what_is_held(self, pick: int) -> None:
        """Also one that another delivery owns, one that has ended, and the same once more."""
        tag = sorted(self.model.held)[pick % len(self.model.held)]
        self.claim(self.model.held[tag], self.holders[tag])

    def hold(self, worker: str, key: str | None = None, standing: list[Message] | None = None) -> Message:
        """What is next in the ready list, or in another."""
        raw = self.redis.rpop(key or keys.ready(self.model.name))
        message = (self.model.ready if standing is None else standing).pop()
        assert _read(raw) == message
        self.redis.hset(keys.UNACKED, message.tag, raw)
        self.model.held[message.tag], self.holders[message.tag] = message, worker
        return message

    def claim(self, message: Message, worker: str) -> None:
        token = f"token-{len(self.claims)}"
        job = message.job
        known = self.model.records.get(job)
        before = (known.began is not None, known.submitted) if known else (False, 0.0)
        expected = self.model.claim(job, token, message.tag, worker)
        reply = ledger.claim(self.redis, job, self.model.name, token, message.tag, worker)
        again = ledger.claim(self.redis, job, self.model.name, token, message.tag, worker)
        assert again == reply, "an answer that was lost is given again"
        assert reply.state == expected
        if expected in ("run", "dead"):
            record = self.model.records[job]
            assert (reply.resumed, self.model.now - reply.age) == (before[0], before[1])
            assert (reply.attempt, reply.client, reply.request) == (record.attempts, record.client, "{}")
            assert reply.cancelled == (job in self.model.marks)
            self.claims.append((job, token))
        if expected == "dead":
            letter = ledger.dead_letter(self.redis, job, self.model.name, token)
            assert len(letter.history) == self.model.dead_letter(job)
            assert [crash.worker for crash in letter.history] == self.model.records[job].history
            self.complete(job, token)
        self.compare_ready_lists()

    @precondition(lambda self: self.claims)
    @rule(pick=PICK)
    def complete_what_was_claimed(self, pick: int) -> None:
        """By its owner, by one that was fenced, or once more because the answer was lost."""
        job, token = self.claims[-1 - pick % len(self.claims)]
        if self.complete(job, token):
            self.acknowledge(job)

    def complete(self, job: str, token: str) -> int:
        expected = self.model.complete(job, token)
        outcome = ledger.success(job, {"made by": token})
        assert ledger.complete(self.redis, job, self.model.name, token, outcome) == expected
        self.compare_ready_lists()
        return expected

    @precondition(lambda self: self.claims)
    @rule(pick=PICK)
    def abandon_what_was_claimed(self, pick: int) -> None:
        job, token = self.claims[-1 - pick % len(self.claims)]
        if job in self.model.records:
            outcome = ledger.failure(job, JobFailed("its result is of another type"))
            expected = self.model.abandon(job, token)
            assert ledger.abandon(self.redis, job, self.model.name, token, outcome) == expected
            self.compare_ready_lists()

    def acknowledge(self, job: str) -> None:
        for tag in [tag for tag, message in self.model.held.items() if message.job == job]:
            self.redis.hdel(keys.UNACKED, tag)
            del self.model.held[tag]

    @precondition(lambda self: self.claims)
    @rule(pick=PICK, fate=st.sampled_from(["back", "lost"]))
    def release(self, pick: int, fate: str) -> None:
        job, token = self.claims[-1 - pick % len(self.claims)]
        record = self.model.records.get(job)
        tag = record.tag if record is not None else None
        expected = self.model.release(job, token)
        assert ledger.release(self.redis, job, self.model.name, token) == expected
        if expected and tag in self.model.held:
            self.bring_back(tag) if fate == "back" else self.lose_held(tag)

    @precondition(lambda self: self.claims)
    @rule(pick=PICK, worker=st.sampled_from(WORKERS), acknowledged=st.booleans(), needed=st.booleans())
    def pass_on(self, pick: int, worker: str, acknowledged: bool, needed: bool) -> None:
        job, token = self.claims[-1 - pick % len(self.claims)]
        record = self.model.records.get(job)
        tag = record.tag if record is not None else None
        expected = self.model.pass_on(job, token, worker, needed=needed)
        reply = ledger.pass_on(self.redis, job, self.model.name, token, worker, needed=needed)
        again = ledger.pass_on(self.redis, job, self.model.name, token, worker, needed=needed)
        assert reply == again == expected, "an answer that was lost is given again"
        self.compare_placed(worker)
        if expected == "passed":
            self.passed.append((job, worker))
            if acknowledged and tag in self.model.held:
                self.lose_held(tag)

    @precondition(lambda self: any(self.model.placed.get(worker) for worker in self.alive))
    @rule(pick=PICK)
    def take_what_was_passed_on(self, pick: int) -> None:
        able = sorted(worker for worker in self.alive if self.model.placed.get(worker))
        worker = able[pick % len(able)]
        self.claim(self.hold(worker, keys.placed(self.model.name, worker), self.model.placed[worker]), worker)

    @precondition(lambda self: self.passed)
    @rule(pick=PICK)
    def recall(self, pick: int) -> None:
        """In time, too late, or once more because the answer was lost."""
        job, worker = self.passed[-1 - pick % len(self.passed)]
        expected = self.model.recall(job, worker)
        assert ledger.recall(self.redis, job, self.model.name, worker) == expected
        self.compare_placed(worker)
        self.compare_ready_lists()

    def compare_placed(self, worker: str) -> None:
        standing = self.redis.lrange(keys.placed(self.model.name, worker), 0, -1)
        assert list(map(_read, standing)) == self.model.placed.get(worker, [])

    # What goes wrong

    @precondition(lambda self: self.model.held)
    @rule(pick=PICK, fate=st.sampled_from(["back", "back", "lost"]))
    def lease_runs_out(self, pick: int, fate: str) -> None:
        """Of a worker that died, or of one that was only frozen and will go on."""
        tag = sorted(self.model.held)[pick % len(self.model.held)]
        self.bring_back(tag) if fate == "back" else self.lose_held(tag)

    def bring_back(self, tag: str) -> None:
        """As kombu does: to the right end, marked."""
        message = self.model.held.pop(tag)
        raw = json.loads(self.redis.hget(keys.UNACKED, tag))
        raw["headers"]["redelivered"] = True
        self.redis.hdel(keys.UNACKED, tag)
        self.redis.rpush(keys.ready(self.model.name), json.dumps(raw))
        self.model.ready.append(Message(message.job, tag, came_back=True))

    def lose_held(self, tag: str) -> None:
        self.redis.hdel(keys.UNACKED, tag)
        del self.model.held[tag]

    @precondition(lambda self: self.model.ready)
    @rule()
    def a_message_is_lost(self) -> None:
        self.redis.rpop(keys.ready(self.model.name))
        self.model.ready.pop()

    @precondition(lambda self: self.alive)
    @rule(pick=PICK)
    def a_worker_dies(self, pick: int) -> None:
        worker = sorted(self.alive)[pick % len(self.alive)]
        self.redis.delete(keys.worker(worker))
        self.alive.discard(worker)
        self.taking.discard(worker)

    @rule(worker=st.sampled_from(WORKERS))
    def a_worker_starts(self, worker: str) -> None:
        self.redis.set(keys.worker(worker), TAKES, ex=keys.PRESENCE_TTL * 1000)
        self.alive.add(worker)
        self.taking.add(worker)

    @precondition(lambda self: self.alive)
    @rule(pick=PICK, says=st.sampled_from(TAKES_NONE))
    def a_worker_takes_no_more(self, pick: int, says: str) -> None:
        """It stops, or its model was unloaded."""
        worker = sorted(self.alive)[pick % len(self.alive)]
        self.redis.set(keys.worker(worker), says, ex=keys.PRESENCE_TTL * 1000)
        self.taking.discard(worker)

    # What passes by itself

    @rule(older_than=st.sampled_from([0, 20, 300]))
    def recover(self, older_than: float) -> None:
        expected = self.model.recover(older_than)
        found = ledger.recover(self.redis, self.model.name, older_than)
        assert list(found) == expected
        self.compare_ready_lists()
        for worker in WORKERS:
            self.compare_placed(worker)

    @rule(seconds=st.sampled_from([0.5, 20.0, 150.0, 299.5, 300.0, 1200.0]))
    def time_passes(self, seconds: float) -> None:
        self.model.advance(seconds)
        give_time(self.redis, self.model.now, seconds)

    @rule(days=st.sampled_from([1.01, 2.01, 7.01, 31.0]))
    def days_pass(self, days: float) -> None:
        self.time_passes(float(int(days * 86400)))
        self.compare_all()

    @rule(
        name_and_value=st.sampled_from(
            [(name, value) for name, values in DECISIONS.items() for value in (*values, None)]
        )
    )
    def decide(self, name_and_value: tuple[str, int | None]) -> None:
        """None: back to the default."""
        name, value = name_and_value
        policy.decide(self.redis, name, value)
        setattr(self.model.policy, name, policy.RULES[name].default if value is None else value)

    # What has to hold

    def compare_ready_lists(self) -> None:
        standing = self.redis.lrange(keys.ready(self.model.name), 0, -1)
        assert list(map(_read, standing)) == self.model.ready

    def compare_all(self) -> None:
        """Every key of the broker, with the time it has left, is that of the model."""
        self.compare_ready_lists()
        model = self.model
        pipeline = self.redis.pipeline(transaction=False)
        found = sorted(key.decode() for key in self.redis.scan_iter(count=1000))
        found = [key for key in found if key not in (CLOCK, keys.POLICY) and not key.startswith(keys.worker(""))]
        for key in found:
            pipeline.pttl(key)
        lifetimes = dict(zip(found, pipeline.execute(), strict=True))
        expected = model.lifetimes()
        assert found == sorted(expected)
        for key, seconds in expected.items():
            left = lifetimes[key]
            assert left == -1 if seconds is None else abs(left / 1000 - seconds) < SLACK, (key, left, seconds)
        self.compare_scores()
        sizes = {of.decode(): int(size) for of, size in self.redis.hgetall(keys.sizes(model.name)).items()}
        assert sizes.pop(":sum", 0) == sum(sizes.values())
        assert sizes == {job: model.sizes[job] for job in model.open}
        turns = self.redis.hgetall(keys.turns(model.name))
        assert {name.decode(): int(value) for name, value in turns.items()} == model.turns
        for job in model.records:
            pipeline.hgetall(keys.job(job))
        for record, fields in zip(model.records.values(), pipeline.execute(), strict=True):
            compare_record(record, {name.decode(): value.decode() for name, value in fields.items()})
        for job, letter in letters.parse(self.redis.hgetall(keys.DEAD)).items():
            client, history = model.dead[job]
            assert (letter["kind"], letter["model"], letter["request"]) == ("train", "toy", "{}")
            assert (letter["client"], [crash["worker"] for crash in letter["history"]]) == (client, list(history))
        last, interval = self.redis.hmget(keys.pace(model.name), "last", "interval")
        pace = (float(last), float(interval)) if last else None
        # The script rounds to a millionth each time, and keeps nine tenths of what it has rounded before.
        assert pace == (model.pace and pytest.approx(model.pace, rel=0, abs=1e-5))

    def compare_scores(self) -> None:
        """The sets of jobs: dispatched, open, of each client, and of each backlog."""
        model, pipeline = self.model, self.redis.pipeline(transaction=False)
        expected = {
            keys.dispatched(model.name): model.dispatched,
            keys.open_jobs(model.name): model.open,
            **{keys.client(client, model.name): mine for client, mine in model.mine.items()},
            **{keys.backlog(model.name, priority): backlog for priority, backlog in model.backlogs.items()},
        }
        for key in expected:
            pipeline.zrange(key, 0, -1, withscores=True)
        for (key, scores), found in zip(expected.items(), pipeline.execute(), strict=True):
            assert {member.decode(): score for member, score in found} == scores, key

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        self.compare_all()
        self.drain()
        self.compare_all()
        model = self.model
        # A mark outlives a job that was forgotten as its owner ran it; one that is sent again does not find it.
        marks = model.marks & set(model.records)
        left = (model.dispatched, model.open, model.turns, marks, *model.backlogs.values())
        assert not any(left), "no job waits, and nothing says that one does"
        # A forgotten job takes no place of its client's; the next submission sweeps it, or the key's expiry.
        oldest = model.now - keys.PENDING_TTL
        assert not [job for mine in model.mine.values() for job, since in mine.items() if since > oldest]
        assert Counter(self.heard()) == Counter(model.ends), "each end is reported once"
        assert Counter(model.ends) + Counter(model.forgotten) == Counter(model.taken_in), "each job ends once"
        for job, status in model.results.items():
            assert json.loads(self.redis.get(keys.result(job)))["status"] == status

    def drain(self) -> None:
        """All workers die, and those that come after them end what is left."""
        for worker in sorted(self.alive):
            self.redis.delete(keys.worker(worker))
        self.alive.clear()
        self.taking.clear()
        for tag in sorted(self.model.held):
            self.bring_back(tag)
        policy.decide(self.redis, "crashes", 1000)
        self.model.policy.crashes = 1000
        for _ in range(3 * self.count + 3):
            if not self.model.ready:
                self.recover(0)
            if not self.model.ready:
                break
            job = self.hold("last").job
            self.claim(self.model.held.popitem()[1], "last")
            owned = [token for of, token in self.claims if of == job]
            if owned:
                self.complete(job, owned[-1])
            self.redis.delete(keys.UNACKED)
        assert not self.model.ready, "what is left is ended"

    def heard(self) -> list[str]:
        """The jobs whose end was announced."""
        self.redis.publish(keys.result("stop"), "")
        found = []
        while (message := self.ends.get_message(timeout=10))["channel"] != keys.result("stop").encode():
            found.append(message["channel"].decode().removeprefix(keys.result("")))
        return found


def compare_record(record: Record, found: dict[str, str]) -> None:
    """A job that has ended has neither message nor request; its owner's name stays."""
    assert {name: found.get(name) for name in ("token", "tag", "worker")} == {
        "token": record.token,
        "tag": record.tag,
        "worker": record.worker,
    }
    assert (found["client"], int(found["priority"]), int(found["turn"])) == (
        record.client,
        record.priority,
        record.turn,
    )
    assert (int(found["sent"]), int(found.get("attempts", 0))) == (record.sent, record.attempts)
    assert [found.get(name) for name in ("began", "passed", "needs")] == [record.began, record.passed, record.needs]
    assert ("request" in found, "message" in found, found.get("ended")) == (
        (True, True, None) if record.open else (False, False, "1")
    )
    assert found.get("completed") == record.completed
    assert float(found["submitted"]) == record.submitted
    assert ("blob" in found) == record.has_input


def _read(raw: bytes) -> Message:
    message = json.loads(raw)
    came_back = bool(message["headers"].get("redelivered"))
    return Message(message["headers"]["id"], message["properties"]["delivery_tag"], came_back)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[LedgerMachine]]:
    with (
        quick_broker(tmp_path_factory.mktemp("quick")) as client,
        set_clock(client),
        client.pubsub(ignore_subscribe_messages=True) as heard,
    ):
        heard.psubscribe(keys.result("*"))
        heard.get_message(timeout=10)
        yield type("LedgerMachine", (LedgerMachine,), {"redis": client, "ends": heard})


CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
FEW = settings(max_examples=500, stateful_step_count=22, deadline=None, suppress_health_check=CHECKS)


@pytest.mark.timeout(300)
def test_the_ledger_does_what_its_model_does(machine: type[LedgerMachine]) -> None:
    run_state_machine_as_test(machine, settings=FEW)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_ledger_does_what_its_model_does_in_many_more_orders(machine: type[LedgerMachine]) -> None:
    many = settings(FEW, max_examples=20_000, stateful_step_count=30, derandomize=False, print_blob=True)
    run_state_machine_as_test(machine, settings=many)
