"""The Celery app of a worker. Importing it loads no model and no MLX, so that Celery's own commands can use it too."""

from __future__ import annotations

from celery import Celery

from stoker.broker import keys
from stoker.celery_config import shared_config
from stoker.settings import load_settings
from workers.celery import boot, transport
from workers.context import WorkerContext

transport.install()
settings = load_settings()

app = Celery(
    "stoker",
    amqp="workers.celery.consumer:LaneAMQP",
    include=["tasks.adapters", "tasks.embed", "tasks.generate", "tasks.train"],
)
app.conf.update(shared_config(settings))
app.conf.update(
    result_backend=settings.address.celery,
    result_expires=keys.RESULT_TTL,
    # A job is acknowledged when it has ended: until then its message can go to another worker.
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    # A worker outlives its broker's absence, however long.
    broker_connection_max_retries=None,
    # A worker also outlives a broker that refuses a command: a replica in a fail-over, a full memory, a wrong key.
    broker_channel_error_retry=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    # Lanes say how much a worker holds; Celery's own reduction after a lost connection would close them.
    worker_enable_prefetch_count_reduction=False,
    # Flower turns events on while it watches; nobody else hears them, and they would cost a third of a short job.
    worker_send_task_events=False,
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
)
app.conf.broker_transport_options |= {
    # The lease: how long the message of a silent worker stays put (workers/celery/lease.py renews it), and how often
    # a worker looks for one that ran out. kombu's own 3600 s and 100 s would leave a dead worker's jobs for an hour.
    "visibility_timeout": settings.lease,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
    "unacked_mutex_expire": 5,
}
app.conf.result_backend_transport_options |= {
    # A result is worth waiting for: five minutes of tries before the job counts as failed.
    "retry_policy": {"max_retries": 300, "interval_start": 0, "interval_step": 0.2, "interval_max": 1},
}
boot.install(app, WorkerContext(settings))
