"""Making this process write its log in Stoker's form."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import IO, Any

from stoker.logs.formatting import HumanLines, JsonLines
from stoker.logs.redaction import Redactor, secrets_of
from stoker.settings import Settings

log = logging.getLogger("stoker")

#: Loggers of libraries whose lines of each job, connection and request ours replace: only what is wrong is written.
QUIET = ("celery", "kombu", "amqp", "redis", "tornado", "flower", "urllib3", "httpx", "filelock", "huggingface_hub")


class LineHandler(logging.StreamHandler[IO[str]]):
    """Writes lines to a stream. A record that cannot be written is not printed as Python would: with its arguments."""

    def handleError(self, record: logging.LogRecord) -> None:
        try:
            kind = sys.exc_info()[0]
            self.stream.write(f"a line of {record.name} could not be written ({kind.__name__ if kind else ''})\n")
        except (OSError, ValueError):
            # The log itself is gone, or its disk full: a process does its work without one.
            return


def configure(settings: Settings, secrets: Iterable[str] = (), stream: IO[str] | None = None) -> None:
    """Write what this process logs to `stream`, by default standard error, as `STOKER_LOG` and `STOKER_LOG_LEVEL` say;
    what would end it with a traceback, too. `secrets`: what is never to be in a log, in addition to what the settings
    and the environment hold."""
    out = stream or sys.stderr
    redactor = Redactor([*secrets_of(settings), *secrets])
    human = settings.log == "human" or (settings.log == "auto" and out.isatty())
    handler = LineHandler(out)
    handler.setFormatter((HumanLines if human else JsonLines)(redactor))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    quiet = max(logging.WARNING, root.level)
    for name in QUIET:
        library = logging.getLogger(name)
        library.handlers[:], library.propagate = [], True
        library.setLevel(quiet)
    logging.captureWarnings(True)
    sys.excepthook, threading.excepthook = _ended, _thread_ended


def _ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    log.critical("the process ends by a defect", exc_info=(kind, error, trace))


def _thread_ended(arguments: Any) -> None:
    if arguments.exc_type is not SystemExit:
        known = (arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
        log.critical("a thread has ended by a defect", exc_info=known)
