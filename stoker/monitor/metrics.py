"""Every metric of Stoker: name, type, labels and meaning. Workers, the monitor and the gateway name no other.

Names and units are as Prometheus wants them. Labels have few values: no id of a job, no key of a client, and a model
that is not known is `OTHER`. `docs/monitor.md` has the same table, and a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: The label of what is not known by name here: else every client could make series without end.
OTHER = "other"
#: The label that every metric of a worker has, before its own: the name that the worker keeps when it is started again.
WORKER_LABEL = "worker"


@dataclass(frozen=True, eq=False)
class Metric:
    """`labels`: its own, in order. `buckets`: the upper bounds of a histogram.

    Two are equal if they are one: the engine looks series up at each step, and hashes no buckets for it.
    """

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


#: A free worker takes a job within milliseconds; a reader notices half a second; training may wait for hours.
_WAITS = (0.005, 0.02, 0.1, 0.5, 1.0, 2.5, 10.0, 30.0, 60.0, 300.0, 1800.0)
#: What a reader feels as at once, as prompt and as slow; a long prompt behind others takes a minute.
_FIRST_TOKENS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 15.0, 60.0)
#: From a small model on a GPU to a large one on a CPU. 0.25 is the default of STOKER_STALL: its share can be read.
_BETWEEN_TOKENS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
#: An embedding of one text takes milliseconds, a training run hours.
_DURATIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 28800.0)
#: Powers of two, up to the most slots that a worker may have.
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
#: A script of the publisher takes a fraction of a millisecond; beyond a second the broker is slow or away.
_LAGS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0, 10.0, 60.0)
#: A broker on this machine answers within 0.1 ms, one in the same room within 1 ms, one that swaps in seconds.
_ROUND_TRIPS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0)

_JOB = ("model", "kind")

# --- of the fleet: what the monitor reads from the ledger ---

WAITING = Metric("stoker_jobs_waiting", "gauge", "Jobs that wait.", (*_JOB, "priority"))
OLDEST_WAIT = Metric(
    "stoker_oldest_wait_seconds", "gauge", "How long the oldest waiting job has waited; 0: none waits.",
    (*_JOB, "priority"),
)  # fmt: skip
RUNNING = Metric("stoker_jobs_running", "gauge", "Jobs that a worker owns.", _JOB)
CANCELLED_WAITING = Metric(
    "stoker_jobs_cancelled_waiting_total", "counter",
    "Jobs that the monitor saw waiting and that ended cancelled before a worker had them.", _JOB,
)  # fmt: skip
DEAD_LETTERS = Metric("stoker_dead_letters", "gauge", "Dead letters that are kept.", _JOB)
WORKERS = Metric("stoker_workers", "gauge", "Living workers that serve a model.", ("model",))
BROKER_UP = Metric("stoker_broker_up", "gauge", "1 if the monitor's last look at the broker was answered, else 0.")

FLEET = (WAITING, OLDEST_WAIT, RUNNING, CANCELLED_WAITING, DEAD_LETTERS, WORKERS, BROKER_UP)

# --- of a worker: each has the label `worker` too ---

JOBS = Metric(
    "stoker_jobs_total", "counter", "Jobs that ended here: succeeded, failed, cancelled or dead (a dead letter).",
    (*_JOB, "outcome"),
)  # fmt: skip
ATTEMPTS = Metric("stoker_job_attempts_total", "counter", "Times that a job was begun here.", _JOB)
RESUMED = Metric(
    "stoker_job_resumes_total", "counter", "Times that a job was begun here which had had an owner before.", _JOB
)
RETURNED = Metric("stoker_jobs_returned_total", "counter", "Jobs that went back to their queue, alive.", _JOB)
PASSED_ON = Metric(
    "stoker_jobs_passed_on_total", "counter",
    "Jobs that went to another worker, which has what their prompt begins with, or memory for all of it.", _JOB,
)  # fmt: skip
QUEUE_WAIT = Metric(
    "stoker_queue_wait_seconds", "histogram", "From the submission of a job until its first owner had it.",
    _JOB, _WAITS,
)  # fmt: skip
DURATION = Metric(
    "stoker_job_duration_seconds", "histogram", "From the submission of a job that was begun here until its end.",
    _JOB, _DURATIONS,
)  # fmt: skip
FIRST_TOKEN = Metric(
    "stoker_time_to_first_token_seconds", "histogram", "From the submission of a job until its first token was made.",
    ("model",), _FIRST_TOKENS,
)  # fmt: skip
INTER_TOKEN = Metric(
    "stoker_inter_token_seconds", "histogram", "Between two tokens of one completion.", ("model",), _BETWEEN_TOKENS
)
INPUT_TOKENS = Metric(
    "stoker_input_tokens_total", "counter",
    "Tokens of prompts, of texts and of training steps; counted when the engine has done their job.", _JOB,
)  # fmt: skip
GENERATED_TOKENS = Metric("stoker_generated_tokens_total", "counter", "Tokens that were generated.", ("model",))
DRAFTED_TOKENS = Metric("stoker_drafted_tokens_total", "counter", "Tokens that were tried as drafts.", ("model",))
ACCEPTED_TOKENS = Metric("stoker_accepted_tokens_total", "counter", "Of these, those that were right.", ("model",))
PREFIX_HITS = Metric(
    "stoker_prefix_hits_total", "counter", "Generation jobs that found the beginning of their prompt kept.", ("model",)
)
PREFIX_TOKENS = Metric(
    "stoker_prefix_hit_tokens_total", "counter", "Tokens of prompts whose keys and values were kept.", ("model",)
)
PREFIX_DISK_HITS = Metric(
    "stoker_prefix_disk_hits_total", "counter", "Beginnings of prompts that were read from the disk into memory.",
    ("model",),
)  # fmt: skip
PREFIX_DISK = Metric(
    "stoker_prefix_disk_bytes", "gauge", "What prefixes take on the disk of the worker's home, when it looked last."
)
BATCH = Metric(
    "stoker_batch_size", "histogram", "Rows of one decoding pass, or texts of one embedding step.", _JOB, _ROWS
)
ENGINE_BUSY = Metric(
    "stoker_engine_busy_seconds_total", "counter", "Time that the engine worked for a lane; its rate is a share.", _JOB
)
KV_CACHE = Metric("stoker_kv_cache_bytes", "gauge", "What keys and values take now, kept prefixes too.", ("model",))
KV_LIMIT = Metric("stoker_kv_cache_limit_bytes", "gauge", "What they may take (STOKER_KV_CACHE).", ("model",))
KV_BITS = Metric("stoker_kv_bits", "gauge", "Bits of their numbers; 16: as the model computes them.", ("model",))
PREEMPTIONS = Metric(
    "stoker_preemptions_total", "counter", "Rows that were put back because memory ran short.", ("model",)
)
TRACES = Metric(
    "stoker_step_traces_total", "counter", "Passes, or parts of them, that were traced to be compiled.",
    ("model",),
)  # fmt: skip
ADAPTERS = Metric("stoker_adapters_held", "gauge", "Versions of adapters in memory.", ("model",))
TRAIN_LOSS = Metric("stoker_training_loss", "gauge", "Loss of the last training step, in nats a token.", ("model",))
TRAIN_STEP = Metric("stoker_training_step", "gauge", "The last training step.", ("model",))
TRAIN_STEPS = Metric("stoker_training_steps", "gauge", "Steps of the run that reported last.", ("model",))
TRAIN_SPEED = Metric("stoker_training_tokens_per_second", "gauge", "Speed of the run that reported last.", ("model",))
LANE_JOBS = Metric("stoker_lane_jobs", "gauge", "Jobs that the worker holds.", ("kind",))
LANE_LIMIT = Metric("stoker_lane_jobs_limit", "gauge", "Jobs that it can hold now.", ("kind",))
LEASE_RENEWALS = Metric(
    "stoker_lease_renewals_total", "counter", "Rounds that renewed the leases of all held messages: ok or failed.",
    ("result",),
)  # fmt: skip
PUBLISH_LAG = Metric(
    "stoker_publish_lag_seconds", "histogram", "From a step of the engine until the broker had what it made.",
    (), _LAGS,
)  # fmt: skip
UNPUBLISHED = Metric("stoker_unpublished_entries", "gauge", "Tokens and reports that the broker does not have yet.")
BROKER_LATENCY = Metric(
    "stoker_broker_latency_seconds", "histogram", "One round trip to the broker, measured at each report.",
    (), _ROUND_TRIPS,
)  # fmt: skip
MEMORY = Metric("stoker_memory_bytes", "gauge", "Memory that MLX holds.")
RANKS = Metric("stoker_ranks", "gauge", "Processes that train together as the worker.")
STARTED = Metric("stoker_worker_start_time_seconds", "gauge", "When the worker was started, seconds since the epoch.")

WORKER = (
    JOBS, ATTEMPTS, RESUMED, RETURNED, PASSED_ON, QUEUE_WAIT, DURATION, FIRST_TOKEN, INTER_TOKEN, INPUT_TOKENS,
    GENERATED_TOKENS, DRAFTED_TOKENS, ACCEPTED_TOKENS, PREFIX_HITS, PREFIX_TOKENS, PREFIX_DISK_HITS, PREFIX_DISK, BATCH,
    ENGINE_BUSY, KV_CACHE, KV_LIMIT, KV_BITS, PREEMPTIONS,
    TRACES, ADAPTERS, TRAIN_LOSS, TRAIN_STEP, TRAIN_STEPS, TRAIN_SPEED, LANE_JOBS, LANE_LIMIT, LEASE_RENEWALS,
    PUBLISH_LAG, UNPUBLISHED, BROKER_LATENCY, MEMORY, RANKS, STARTED,
)  # fmt: skip

# --- of a gateway: what its own `/metrics` has ---

_ENDPOINT = ("endpoint",)

HTTP_REQUESTS = Metric(
    "stoker_gateway_requests_total", "counter", "Requests that were answered; 499: the client had gone.",
    ("endpoint", "status"),
)  # fmt: skip
HTTP_DURATION = Metric(
    "stoker_gateway_request_duration_seconds", "histogram", "From a request's headers until its answer's end.",
    _ENDPOINT, _DURATIONS,
)  # fmt: skip
HTTP_FIRST = Metric(
    "stoker_gateway_first_byte_seconds", "histogram", "From a request's headers until its answer began.",
    _ENDPOINT, _FIRST_TOKENS,
)  # fmt: skip
HTTP_OPEN = Metric("stoker_gateway_requests_open", "gauge", "Requests that are being answered.", _ENDPOINT)

GATEWAY = (HTTP_REQUESTS, HTTP_DURATION, HTTP_FIRST, HTTP_OPEN)


def shown_labels(metric: Metric) -> tuple[str, ...]:
    """The labels under which a metric is scraped."""
    return metric.labels if metric in (*FLEET, *GATEWAY) else (WORKER_LABEL, *metric.labels)
