"""How a job ends early: what is written to the ledger for an error, and what Celery then does with the message."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from celery.exceptions import Ignore, Reject
from redis.exceptions import RedisError

from stoker.broker import ledger
from stoker.errors import JobCancelled, JobDead, JobFailed, OutOfMemory, StokerError, WorkerUnavailable, to_wire
from workers import disk, memory
from workers.account import DeliveryEnd
from workers.artifacts import StoreTrouble
from workers.capacity import DoesNotFit
from workers.delivery import Delivery
from workers.job_lease import PassedOn, Spoiled, is_the_brokers
from workers.services.runtime import Fenced

log = logging.getLogger(__name__)


@contextmanager
def recording_errors(delivery: Delivery) -> Iterator[None]:
    """End the job in the ledger with the error that ends it, which is raised as the one that its client gets."""
    try:
        yield
    except (WorkerUnavailable, Ignore, Spoiled):
        raise
    except JobCancelled:
        delivery.lease.complete(ledger.revoked(delivery.id))
        raise
    except StokerError as error:
        delivery.lease.complete(ledger.failure(delivery.id, error))
        raise
    except Exception as error:
        if is_the_brokers(error):
            raise
        known = _known(delivery, error)
        delivery.lease.complete(ledger.failure(delivery.id, known))
        raise known from error


def _known(delivery: Delivery, error: Exception) -> StokerError:
    """What the client gets for an error that is none of ours. Raises `WorkerUnavailable` if the job may try again."""
    if memory.is_out_of_memory(error):
        return _out_of_memory(delivery, error)
    if trouble := disk.trouble(error):
        return _dead_letter(delivery, f"the disk of {delivery.runtime.name} {trouble} ({error})")
    if isinstance(error, StoreTrouble):
        return _dead_letter(delivery, str(error))
    if isinstance(error, RedisError):
        return JobFailed(f"job {delivery.id}: {delivery.lease.blame(error)}.")
    # A defect: only its traceback says where. Its words go to the client alone: they may quote what was asked.
    log.error("job %s ends by a defect", delivery.id, exc_info=error)
    return to_wire(error)


def _out_of_memory(delivery: Delivery, error: Exception) -> OutOfMemory:
    """The job may try again, in a smaller lane, except if it has ended so too often."""
    delivery.context.lanes.shrink(delivery.kind.name)
    if delivery.lease.count_out_of_memory() < memory.TRIES:
        raise WorkerUnavailable(f"out of memory together with other jobs ({error}).") from error
    return OutOfMemory(f"job {delivery.id}: {memory.TRIES} times there was not memory enough for it ({error}).")


def _dead_letter(delivery: Delivery, what: str) -> JobDead:
    """Make a dead letter of a job that can go on once `what` is mended."""
    delivery.lease.dead_letter(delivery.runtime.name, what)
    return JobDead(
        f"job {delivery.id} is a dead letter: {what}. What was whole stays. Mend that, then "
        f"`stoker jobs retry {delivery.id}` lets it go on."
    )


#: The first that fits says how a delivery is over.
_ENDS: tuple[tuple[type[BaseException], DeliveryEnd], ...] = (
    (Fenced, DeliveryEnd.FENCED),
    (PassedOn, DeliveryEnd.PASSED_ON),
    (WorkerUnavailable, DeliveryEnd.RETURNED),
    (JobCancelled, DeliveryEnd.CANCELLED),
    (JobDead, DeliveryEnd.DEAD),
    (StokerError, DeliveryEnd.FAILED),
    (Spoiled, DeliveryEnd.FAILED),
    (Ignore, DeliveryEnd.DROPPED),
)


@contextmanager
def accounted(delivery: Delivery) -> Iterator[None]:
    """Report to the observers how the delivery was over."""
    account = delivery.account
    try:
        yield
    except BaseException as error:
        fits = (end for kind, end in _ENDS if isinstance(error, kind))
        account.over(next(fits, DeliveryEnd.RETURNED), error)
        raise
    else:
        account.over(DeliveryEnd.SUCCEEDED)
    finally:
        delivery.runtime.observers.ended(account)


@contextmanager
def answering_celery(delivery: Delivery) -> Iterator[None]:
    """Turn what ended the job, or this delivery of it, into what Celery does with its message."""
    try:
        with _answered(delivery):
            yield
    except (StokerError, Ignore, Reject):
        raise
    except Exception as error:
        # A defect outside the job itself, or a broker that does not take even that the job goes back. Its message
        # stays, and the next claim counts it as a crash: never lost, and after some of them a dead letter. Celery would
        # take the message away, and a job that a living worker owns is not looked for.
        log.exception("job %s could not be ended", delivery.id)
        raise Reject(str(error), requeue=True) from None


@contextmanager
def _answered(delivery: Delivery) -> Iterator[None]:
    try:
        yield
    except Fenced:
        # Neither result nor ack: another worker owns both.
        delivery.context.deliveries.fence(delivery.lease.token)
        raise Ignore from None
    except PassedOn as error:
        # Its new message is the other worker's, and this one's goes.
        log.info("job %s: %s", delivery.id, error)
        raise Ignore from None
    except WorkerUnavailable as error:
        if isinstance(error, DoesNotFit):
            delivery.context.lanes.hold_back(delivery.kind.name, error.others, str(error))
        log.info("job %s goes back to the queue: %s", delivery.id, error)
        _let_all_be_published(delivery)
        delivery.lease.release()
        raise Reject(str(error), requeue=True) from None
    except JobCancelled:
        # Flower shows STARTED for ever without this event.
        delivery.report("task-revoked", terminated=True, signum=None, expired=False)
        raise Ignore from None
    except Spoiled as trouble:
        _give_up(delivery, trouble)
        raise Ignore from None


def _let_all_be_published(delivery: Delivery) -> None:
    """The next owner goes on behind what the broker has. What came to it later would stand before tokens that were
    drawn without it: a GPU may draw others."""
    try:
        delivery.runtime.publisher.flush(delivery.id)
    except (JobFailed, WorkerUnavailable) as error:
        log.info("job %s goes back with less than it has published: %s", delivery.id, error)


def _give_up(delivery: Delivery, trouble: Spoiled) -> None:
    try:
        delivery.lease.give_up(trouble)
    except Spoiled as still:
        # What jobs share was spoiled again, a moment after it was mended: the message comes back.
        raise Reject(str(still), requeue=True) from None
