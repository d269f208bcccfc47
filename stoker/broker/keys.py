"""Every Redis key and channel that Stoker uses, and how long each lives.

All start with `stoker:`, Celery's own too (by `global_keyprefix`). `KINDS` lists every kind of key with the longest
time that one of it may have left to live. Those without a lifetime are durable: the queues themselves and what Celery
keeps about messages that are not acknowledged yet (a queue must outlive any outage, so no expiry is right for it), the
registry of adapters with their files, pinned prefixes, the policy, and the keys of the gateway.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from stoker.contract.codec import CONTRACT

PREFIX = "stoker:"

#: Seconds. A result and all that belongs to it can be fetched for this long after the job ended.
RESULT_TTL = 24 * 3600
#: Seconds. Vectors can be fetched again for this long after a client has fetched them.
FETCHED_TTL = 10 * 60
#: Seconds. A job that waits longer than this for a worker is forgotten, with its uploaded input.
PENDING_TTL = 7 * 24 * 3600
#: Seconds that an input which is sent in parts is kept after its last part, until its job's record names it.
UPLOAD_TTL = 10 * 60
#: Seconds. A model that nobody has served for this long is unknown again.
MODEL_TTL = 30 * 24 * 3600
#: Seconds that a dead letter is kept, and the input that its retry needs.
DEAD_TTL = 30 * 24 * 3600
#: Seconds. A worker writes its presence every `PRESENCE_EVERY`; after `PRESENCE_TTL` of silence it counts as gone.
PRESENCE_EVERY = 2.0
PRESENCE_TTL = 10
#: Seconds that a command waits for its worker, and that the answer waits for its client.
COMMAND_TTL = 600
#: Seconds that the messages for one worker alone are kept: after a fraction of one they are recalled. Those that no
#: other can run are not, and live as long as a job may wait.
PLACED_TTL = 60
#: Seconds for which a worker is known to have what a prompt begins with.
BEGINNING_TTL = 600
#: Seconds between two reports of what a worker has counted; they live as long as a presence.
METRICS_EVERY = 4.0
#: Seconds that what a key of the gateway has taken is remembered, and the longest that it waits for what it overdrew.
RATE_TTL = 3600
#: Seconds that a file which was uploaded to the gateway is kept at most, and by default.
FILE_TTL = 30 * 24 * 3600
#: Seconds that the lists of files outlive their last change: a file is there for as long as `FILE_TTL` afterwards.
FILES_TTL = FILE_TTL + 24 * 3600
#: Seconds that a run of the gateway's fine-tuning is known, and that the lists of such runs outlive the newest one.
FINE_TUNE_TTL = 30 * 24 * 3600
FINE_TUNES_TTL = FINE_TUNE_TTL + 24 * 3600
#: Seconds that a batch of the gateway can be asked for.
BATCH_TTL = 30 * 24 * 3600
#: Seconds after which the gateway that runs batches counts as gone, unless it says otherwise.
RUNNER_TTL = 20
#: The type of a kind whose keys have several.
ANY = "any"


@dataclass(frozen=True)
class Kind:
    """Keys of one kind: what their names are, after `PREFIX`, the longest time, in seconds, that one may have left to
    live (None: durable), and their type."""

    name: str
    pattern: str
    lifetime: int | None
    type: str


_QUEUE = r"stoker\.[a-z0-9._-]+"
_JOB = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = r"[a-z0-9._-]+"

KINDS = (
    Kind("job", rf"job:{_JOB}", PENDING_TTL, "hash"),
    Kind("open", rf"open:{_QUEUE}", PENDING_TTL, "zset"),
    Kind("backlog", rf"backlog:{_QUEUE}:[0-9]", PENDING_TTL, "zset"),
    Kind("placed", rf"{_QUEUE}:placed:.+", PENDING_TTL, "list"),
    Kind("beginning", r"beginning:[0-9a-f]{32}", BEGINNING_TTL, "set"),
    Kind("turns", rf"turns:{_QUEUE}", PENDING_TTL, "hash"),
    Kind("dispatched", rf"dispatched:{_QUEUE}", PENDING_TTL, "zset"),
    Kind("client", rf"client:{_NAME}:{_QUEUE}", PENDING_TTL, "zset"),
    Kind("sizes", rf"sizes:{_QUEUE}", PENDING_TTL, "hash"),
    Kind("cancel", rf"cancel:{_JOB}", PENDING_TTL, "string"),
    Kind("pace", rf"pace:{_QUEUE}", RESULT_TTL, "hash"),
    Kind("result", rf"celery-task-meta-{_JOB}", RESULT_TTL, "string"),
    Kind("stream", rf"stream:{_JOB}", RESULT_TTL, "stream"),
    Kind("vectors", rf"blob:vectors:{_JOB}", RESULT_TTL, "string"),
    Kind("vectors_unfetched", r"vectors:unfetched", RESULT_TTL, "zset"),
    Kind("vectors_fetched", r"vectors:fetched", RESULT_TTL, "zset"),
    Kind("vectors_sizes", r"vectors:sizes", RESULT_TTL, "hash"),
    # The input of a job that waits; of a dead letter, for as long as it may be sent again.
    Kind("input", rf"blob:(dataset|adapter):{_JOB}(:[0-9a-f]+){{0,3}}", DEAD_TTL, "string"),
    # The same of a training run.
    Kind("checkpoint", rf"checkpoint:{_JOB}", DEAD_TTL, "hash"),
    Kind("dead", r"dead", DEAD_TTL, "hash"),
    Kind("spoiled", r"spoiled:.+", DEAD_TTL, ANY),
    Kind("worker", r"worker:.+", PRESENCE_TTL, "string"),
    Kind("metrics", r"metrics:.+", PRESENCE_TTL, "string"),
    Kind("commands", r"commands:.+", COMMAND_TTL, "list"),
    Kind("command", rf"command:{_JOB}", COMMAND_TTL, "string"),
    Kind("loading", rf"loading:{_NAME}", PRESENCE_TTL, "string"),
    Kind("workers", r"workers", MODEL_TTL, "zset"),
    Kind("models", r"models", MODEL_TTL, "hash"),
    # Two leases; a lease is an hour at the longest.
    Kind("janitor", r"janitor", 2 * 3600, "string"),
    Kind("ready", _QUEUE, None, "list"),
    Kind("adapters", rf"adapters:{_NAME}", None, "set"),
    Kind("adapter", rf"adapter:{_NAME}:{_NAME}", None, "hash"),
    Kind("artifact", rf"artifact(:{_NAME}){{3}}", None, "string"),
    Kind("prefixes", rf"prefixes:{_NAME}", None, "hash"),
    Kind("policy", r"policy", None, "hash"),
    Kind("api_keys", r"keys", None, "hash"),
    Kind("rate", rf"rate:{_NAME}", RATE_TTL, "hash"),
    Kind("file", rf"file:{_JOB}", FILE_TTL, "string"),
    Kind("files", rf"files:{_NAME}", FILES_TTL, "zset"),
    Kind("file_contents", rf"file_contents:{_NAME}", FILES_TTL, "zset"),
    Kind("fine_tune", rf"fine_tune:{_JOB}", FINE_TUNE_TTL, "string"),
    Kind("fine_tunes", rf"fine_tunes:{_NAME}", FINE_TUNES_TTL, "zset"),
    Kind("batch", rf"batch:{_JOB}", BATCH_TTL, "hash"),
    Kind("batches", rf"batches:{_NAME}", BATCH_TTL, "zset"),
    Kind("open_batches", rf"open_batches:{_NAME}", BATCH_TTL, "zset"),
    Kind("batch_runner", rf"batch_runner:{_NAME}", RUNNER_TTL, "string"),
    # Which queues an exchange feeds, and messages that a worker holds: kombu's.
    Kind("binding", r"_kombu\.binding(_deadlines|(_permanent)?\..+)", None, ANY),
    Kind("unacked", r"unacked", None, "hash"),
    Kind("leases", r"unacked_index", None, "zset"),
    Kind("sweep", r"unacked_mutex", None, "string"),
)
_COMPILED = tuple((re.compile(PREFIX + kind.pattern), kind) for kind in KINDS)


def kind_of(key: str) -> Kind | None:
    """The kind of a key; None for one that is not declared here."""
    return next((kind for pattern, kind in _COMPILED if pattern.fullmatch(key)), None)


def types(names: Iterable[str]) -> dict[str, str]:
    """Each key → the type that it has to have."""
    return {name: kind.type for name in names if (kind := kind_of(name)) is not None}


def lifetime(key: str) -> int | None:
    """Seconds; None for a durable key, and for one that is not declared here."""
    kind = kind_of(key)
    return None if kind is None else kind.lifetime


def is_durable(key: str) -> bool:
    return kind_of(key) is not None and lifetime(key) is None


def job(job_id: str) -> str:
    """Hash: what was asked, when, and who owns the job now (`stoker.broker.ledger`)."""
    return f"{PREFIX}job:{job_id}"


def open_jobs(queue: str) -> str:
    """Sorted set: ids of the queue's jobs that have not ended → when they were submitted."""
    return f"{PREFIX}open:{queue}"


def ready(queue: str) -> str:
    """List: the messages of the queue that Celery takes next, from its right end."""
    return f"{PREFIX}{queue}"


def backlog(queue: str, priority: int) -> str:
    """Sorted set: ids of jobs of one priority that wait behind the ready list → their client's turn."""
    return f"{PREFIX}backlog:{queue}:{priority}"


def turns(queue: str) -> str:
    """Hash: whose turn it is among clients and priorities, while any job waits in the backlog."""
    return f"{PREFIX}turns:{queue}"


def placed(queue: str, worker: str) -> str:
    """List: the messages of the queue that one worker alone takes, before those of `ready`. Named so that a worker may
    use it which may use the queue."""
    return f"{ready(queue)}:placed:{worker}"


def queue_of(list_name: str) -> str:
    """The queue of the messages of a list, `ready` or `placed`, as kombu names it: without `PREFIX`."""
    return list_name.partition(":")[0]


def beginning(digest: str) -> str:
    """Set: who has keys and values of prompts that begin so (`workers/services/placing.py`)."""
    return f"{PREFIX}beginning:{digest}"


def dispatched(queue: str) -> str:
    """Sorted set: ids of jobs that came to the ready list and have not ended → when."""
    return f"{PREFIX}dispatched:{queue}"


def pace(queue: str) -> str:
    """Hash: how fast jobs of the queue have ended."""
    return f"{PREFIX}pace:{queue}"


def client(key: str, queue: str) -> str:
    """Sorted set: ids of one client's jobs in one queue that have not ended → when they were submitted."""
    return f"{PREFIX}client:{key}:{queue}"


def sizes(queue: str) -> str:
    """Hash: ids of the queue's jobs that have not ended → their bytes, requests and inputs; and `:sum`."""
    return f"{PREFIX}sizes:{queue}"


def result(job_id: str) -> str:
    """String, JSON: Celery's result record. The same name is the channel on which Celery announces it."""
    return f"{PREFIX}celery-task-meta-{job_id}"


def stream(job_id: str) -> str:
    """Redis Stream: the job's tokens or reports; the entry of index i has the id `{i + 1}-0`."""
    return f"{PREFIX}stream:{job_id}"


def channel(job_id: str) -> str:
    """Channel: the entries of `stream`, as they are made."""
    return f"{PREFIX}events:{job_id}"


def cancel(job_id: str) -> str:
    """String: present when the job has been cancelled."""
    return f"{PREFIX}cancel:{job_id}"


#: Bytes of an input that are sent, and fetched, in one command: a broker serves nobody else meanwhile.
PART = 8 * 2**20


def blob(name: str) -> str:
    """String, bytes: a dataset or an adapter on its way in, or vectors on their way out."""
    return f"{PREFIX}blob:{name}"


def checkpoint(job_id: str) -> str:
    """Hash: the checkpoints of a training run from which any worker can go on (`workers/run_store.py`): `manifest`,
    `bytes` of all that is here, and parts of files by their content, unless STOKER_ARTIFACTS names another store."""
    return f"{PREFIX}checkpoint:{job_id}"


def adapters(model: str) -> str:
    """Set: names of the model's adapters."""
    return f"{PREFIX}adapters:{model}"


def adapter(model: str, name: str) -> str:
    """Hash: versions of an adapter, and which one serves (`stoker.broker.registry`)."""
    return f"{PREFIX}adapter:{model}:{name}"


def artifact(model: str, name: str, version: int) -> str:
    """String, bytes: the files of one version, unless STOKER_ARTIFACTS names another store for them."""
    return f"{PREFIX}artifact:{model}:{name}:{version}"


def prefixes(model: str) -> str:
    """Hash: the model's pinned prefixes by name, and whether they have changed (`stoker.broker.prefixes`)."""
    return f"{PREFIX}prefixes:{model}"


def vectors(job_id: str) -> str:
    """The name of the blob with an embedding job's vectors."""
    return f"vectors:{job_id}"


#: Sorted sets: ids of jobs whose vectors are kept → when these expire; those that no client has fetched yet, and those
#: that one has.
VECTORS_UNFETCHED = f"{PREFIX}vectors:unfetched"
VECTORS_FETCHED = f"{PREFIX}vectors:fetched"
#: Hash: ids of jobs whose vectors are kept → their bytes; and `:sum`.
VECTORS_SIZES = f"{PREFIX}vectors:sizes"


def worker(name: str) -> str:
    """String, JSON: a worker's `Presence`."""
    return f"{PREFIX}worker:{name}"


def metrics(worker: str) -> str:
    """String, JSON: what a worker has counted (`stoker.monitor.numbers`)."""
    return f"{PREFIX}metrics:{worker}"


def commands(worker: str) -> str:
    """List: what a worker is asked besides jobs (`stoker.contract.control`), the oldest first."""
    return f"{PREFIX}commands:{worker}"


def command(command_id: str) -> str:
    """String, JSON: what has become of a command."""
    return f"{PREFIX}command:{command_id}"


def loading(model: str) -> str:
    """String: the worker that loads the model because a job for it waits."""
    return f"{PREFIX}loading:{model}"


#: Hash: the messages that workers hold, by delivery tag (kombu's).
UNACKED = f"{PREFIX}unacked"
#: Sorted set: their delivery tags → when each was last said to be held, by the broker's clock.
LEASES = f"{PREFIX}unacked_index"
#: Channel: ids of jobs that were cancelled just now.
CANCELS = f"{PREFIX}cancels"
#: Hash: limits and ageing, where they differ from the defaults (`stoker jobs policy`). Durable.
POLICY = f"{PREFIX}policy"
#: Hash: SHA-256 of a key of the gateway → JSON of what it may (`stoker.broker.api_keys`). Durable.
API_KEYS = f"{PREFIX}keys"
#: Hash: id → JSON of a dead letter (`stoker.broker.letters`), until its job is retried.
DEAD = f"{PREFIX}dead"


def rate(key: str) -> str:
    """Hash: what is left of what a key of the gateway may take in a minute."""
    return f"{PREFIX}rate:{key}"


def file(file_id: str) -> str:
    """String, JSON: a file that a client has stored (`stoker.broker.stored_files`)."""
    return f"{PREFIX}file:{file_id}"


def files(owner: str) -> str:
    """Sorted set: ids of the files of one client → when they were stored."""
    return f"{PREFIX}files:{owner}"


def file_contents(place: str) -> str:
    """Sorted set: ids of files of which parts may lie in one place → when these may go."""
    return f"{PREFIX}file_contents:{place}"


def fine_tune(job_id: str) -> str:
    """String, JSON: what a client of the gateway asked of a training run (`stoker.broker.fine_tunes`)."""
    return f"{PREFIX}fine_tune:{job_id}"


def fine_tunes(owner: str) -> str:
    """Sorted set: ids of one client's runs → when they were asked for."""
    return f"{PREFIX}fine_tunes:{owner}"


def batch(batch_id: str) -> str:
    """Hash: a batch of the gateway, and whether its client wants it to end (`stoker.broker.batches`)."""
    return f"{PREFIX}batch:{batch_id}"


def batches(owner: str) -> str:
    """Sorted set: ids of the batches of one client → when they were made."""
    return f"{PREFIX}batches:{owner}"


def open_batches(place: str) -> str:
    """Sorted set: ids of batches that have not ended, whose files lie in one place → when they were made."""
    return f"{PREFIX}open_batches:{place}"


def batch_runner(place: str) -> str:
    """String: which gateway runs the batches of a place now."""
    return f"{PREFIX}batch_runner:{place}"


def spoiled(key: str) -> str:
    """Any type: what another program wrote into `key`, and is of another type than `key` holds."""
    return f"{PREFIX}spoiled:{key.removeprefix(PREFIX)}"


#: String: which worker looks for lost messages now.
JANITOR = f"{PREFIX}janitor"
#: Sorted set: worker name → time of its last presence, so that nobody has to scan for them.
WORKERS = f"{PREFIX}workers"
#: Hash: model → JSON of what it serves, for every model that some worker has served lately.
MODELS = f"{PREFIX}models"


def entry_id(index: int) -> str:
    """The stream id of the entry `index`: Redis refuses an id twice, and so a token twice."""
    return f"{index + 1}-0"


def queue(model: str, kind: str) -> str:
    """The Celery queue of one model and kind, and of one version of the contract; kombu puts `PREFIX` before it."""
    return f"stoker.{model}.{kind}" + (f".v{CONTRACT}" if CONTRACT > 1 else "")


def model_of(queue: str) -> str:
    """The model whose jobs come through `queue`, in any version of the contract."""
    return re.sub(r"\.[a-z]+(\.v\d+)?$", "", queue.removeprefix("stoker."))
