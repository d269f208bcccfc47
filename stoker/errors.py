"""Every error that Stoker raises on purpose.

StokerError
├── ConfigError                 a setting is wrong
├── InvalidRequest              the request cannot be run as given
│   ├── TextTooLong             the text has more tokens than the model takes
│   ├── DatasetError            a training line is wrong (names the line)
│   ├── UnknownModel            no worker serves that model
│   └── UnknownAdapter          the model has no adapter of that name
├── ModelError                  a model's files are missing, damaged or not supported
├── BrokerUnavailable           the broker does not answer
│   └── BrokerLoading           it is reading its data back, and took longer than the patience
├── JobError                    the job ended without a result
│   ├── JobCancelled            it was cancelled
│   ├── JobFailed               it failed for a reason outside this tree
│   ├── JobDead                 it crashed one worker after another, or a worker gave it up: a dead letter
│   ├── OutOfMemory             the worker's memory did not suffice for it, again and again
│   ├── VectorsFull             the broker had no room for the vectors that it made
│   ├── DeadlineExceeded        its deadline passed before it ended
│   └── JobLost                 the broker knows nothing of it (expired, or its data is gone)
├── JobTimeout                  the caller's own time limit passed; the job goes on
├── QueueFull                   too many jobs, or bytes, wait already; try again later
└── WorkerUnavailable           the worker is stopping or cannot take the job

A message says what was given, what is allowed and what to do. A worker's error reaches the client as the
same class (`to_wire`, `from_wire`); the message alone travels.
"""

from __future__ import annotations

#: Letters of a message that shows what a file holds.
LONGEST = 1500


class StokerError(Exception):
    """The root: catch it to catch everything that Stoker raises on purpose."""

    #: What the `stoker` command exits with when this error ends it (docs/cli.md).
    exit_code = 1


class ConfigError(StokerError):
    """A setting (environment variable or option) is wrong."""

    exit_code = 2


class InvalidRequest(StokerError):
    """The request cannot be run as given."""

    exit_code = 2


class TextTooLong(InvalidRequest):
    """The text has more tokens than the model takes."""


class DatasetError(InvalidRequest):
    """A line of a training dataset is wrong."""


class UnknownModel(InvalidRequest):
    """No worker serves that model."""


class UnknownAdapter(InvalidRequest):
    """The model has no adapter of that name."""


class ModelError(StokerError):
    """A model's files are missing, damaged or of a kind that is not supported."""

    exit_code = 5

    def __init__(self, message: str = "") -> None:
        # It shows what a file holds, and that may have any length.
        super().__init__(message if len(message) <= LONGEST else f"{message[: LONGEST - 1]}…")


class BrokerUnavailable(StokerError):
    """The broker does not answer."""

    exit_code = 3


class BrokerLoading(BrokerUnavailable):
    """The broker is reading its data back from the disk, and was not done within `STOKER_PATIENCE` seconds."""


class JobError(StokerError):
    """The job ended without a result."""

    exit_code = 4


class JobCancelled(JobError):
    """The job was cancelled."""


class JobFailed(JobError):
    """The job failed for a reason outside this tree; the message names it."""


class JobDead(JobError):
    """The job crashed one worker after another, or a worker gave it up because of its disk or artifact store.

    It is a dead letter now (`stoker jobs dead`).
    """


class OutOfMemory(JobError):
    """The worker's memory did not suffice for the job, at several attempts."""


class VectorsFull(JobError):
    """The vectors that wait to be fetched left no room in the broker for those that the job has made."""


class DeadlineExceeded(JobError):
    """The job's deadline, counted from its submission, passed before it ended."""


class JobLost(JobError):
    """The broker knows nothing of the job: it expired, or the broker lost its data."""


class JobTimeout(StokerError, TimeoutError):
    """The caller's own time limit passed. The job goes on; ask again, or cancel it."""

    exit_code = 6


class QueueFull(StokerError):
    """Too many jobs wait in that queue already, its jobs have too many bytes, or too many of this client's are open.
    Nothing was sent.

    `depth`: jobs or bytes there; `limit`: how many may be; `wait`: seconds after which the queue should accept a job.
    """

    exit_code = 7

    def __init__(self, message: str, *, depth: int = 0, limit: int = 0, wait: float = 0.0) -> None:
        super().__init__(message)
        self.depth, self.limit, self.wait = depth, limit, wait


class WorkerUnavailable(StokerError):
    """The worker is stopping, or cannot take the job."""


def _tree(root: type[StokerError]) -> dict[str, type[StokerError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def to_wire(error: BaseException) -> StokerError:
    """`error` as one of this tree: itself, or a `JobFailed` that names its class.

    Workers raise what this returns, so that a client never has to import a worker's modules to read an error.
    """
    if isinstance(error, StokerError):
        return error
    return JobFailed(f"{type(error).__name__}: {error}. The worker's log has the traceback.")


def from_wire(name: str, message: str) -> StokerError:
    """The error whose class is called `name`; a name that this version does not know becomes `JobFailed`."""
    known = _tree(StokerError).get(name)
    return known(message) if known else JobFailed(f"{name}: {message}")
