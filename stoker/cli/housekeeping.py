"""Commands that keep a machine in order for a year: clean, backup, restore."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from stoker.broker.connection import connect as connect_redis
from stoker.broker.connection import translated
from stoker.cli.options import Json, Url, print_json
from stoker.errors import BrokerUnavailable, ConfigError, InvalidRequest
from stoker.local import backup as archives
from stoker.local import keeping, storage
from stoker.local.backup import Counted
from stoker.local.runs import DONE, StoredRun
from stoker.local.storage import Leftover
from stoker.settings import Settings, load_settings

_UNITS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


def clean(
    older_than: Annotated[str, typer.Option(help="Age: hours, days or weeks, as 12h, 30d or 8w.")] = "30d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; delete nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Delete runs that ended and logs that nothing writes, older than an age, runs beyond what is kept, and what dead
    processes left half. Runs that are pinned, and the newest of each adapter, stay."""
    settings, now = load_settings(), time.time()
    found = _leftovers(settings, now, now - seconds(older_than))
    halves = len(storage.drafts(settings)) if dry_run else storage.remove_drafts(settings)
    gone = []
    for leftover in found:
        if dry_run or _is_removed(leftover):
            gone.append(leftover)
            if not as_json:
                print(f"{leftover.path}: {leftover.reason}, {megabytes(leftover.bytes)}")
    total = sum(leftover.bytes for leftover in gone)
    if as_json:
        plain = [{**asdict(leftover), "path": str(leftover.path)} for leftover in gone]
        print_json({"deleted": not dry_run, "bytes": total, "drafts": halves, "found": plain})
    else:
        done = "would be deleted" if dry_run else "deleted"
        print(f"{len(gone)} runs and logs {done}, {megabytes(total)}; {halves} half-written drafts {done}")


def _is_removed(leftover: Leftover) -> bool:
    """False for a run that has begun anew since it was found, as one whose dead letter was sent again."""
    try:
        if leftover.path.is_dir():
            return keeping.remove_ended(leftover.path)
        storage.remove(leftover)
    except OSError as error:
        raise ConfigError(f"{leftover.path}: cannot be deleted ({error}).") from None
    return True


def _leftovers(settings: Settings, now: float, before: float) -> list[Leftover]:
    with closing(_Asked(settings)) as asked:
        old = keeping.ended_before(settings, before, asked.sent_again)
        named = {leftover.path for leftover in old}
        more = [each for each in keeping.over_limits(settings, now, asked.sent_again) if each.path not in named]
    return [*old, *more, *storage.old_logs(settings, before)]


class _Asked:
    """The broker, where one was chosen, asked for jobs of runs. Where it is away, a job may have been sent again."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._away = settings, False
        self._redis = None if settings.chosen_url is None else connect_redis(settings)

    def sent_again(self, run: StoredRun) -> bool:
        if self._redis is None or run.status == DONE:
            return False
        if not self._away:
            try:
                with translated(self._settings):
                    return keeping.sent_again(self._redis)(run)
            except BrokerUnavailable as error:
                self._away = True
                print(f"stoker: runs that failed stay, because they may have been sent again: {error}", file=sys.stderr)
        return True

    def close(self) -> None:
        if self._redis is not None:
            self._redis.close()


def backup(
    target: Annotated[Path, typer.Argument(help="File to be written: a gzipped tar archive.", metavar="FILE")],
    url: Url = None,
) -> None:
    """Write adapters, their registry, runs and the policy into one file. Workers may go on meanwhile."""
    settings = load_settings(url=url)
    with _broker(settings, f"{target}: the backup cannot be written") as redis:
        counted = archives.backup(settings, redis, target)
    print(f"{target}: {_described(counted)}, {megabytes(target.stat().st_size)}")


def restore(
    source: Annotated[Path, typer.Argument(help="File of `stoker backup`.", metavar="FILE")],
    gateway_keys: Annotated[
        bool, typer.Option(help="Put back the gateway's keys too, also those that were revoked since.")
    ] = True,
    url: Url = None,
) -> None:
    """Put back what a backup has and this machine or its broker lacks. What is there already stays."""
    settings = load_settings(url=url)
    with _broker(settings, f"{source}: the backup cannot be restored") as redis:
        counted = archives.restore(settings, redis, source, gateway_keys=gateway_keys)
    print(f"{source}: {_described(counted)} restored; {len(counted.kept)} were there already, and stay")
    if counted.api_keys:
        print(
            f"{len(counted.api_keys)} keys of the gateway count again: {', '.join(counted.api_keys)}. "
            "Revoke those that must not: `stoker keys list`, `stoker keys revoke ID`"
        )


@contextmanager
def _broker(settings: Settings, failed: str) -> Iterator[Any]:
    """A connection for the time of one command; `failed`: what a disk's error means inside."""
    redis = connect_redis(settings, patient=True)
    try:
        with translated(settings):
            yield redis
    except OSError as error:
        raise InvalidRequest(f"{failed} ({error}).") from None
    finally:
        redis.close()


def seconds(age: str) -> float:
    """The seconds of `12h`, `30d` or `8w`. Raises `InvalidRequest`."""
    match = re.fullmatch(r"(\d{1,6})([hdw])", age.strip())
    if match is None:
        raise InvalidRequest(f"--older-than: {age!r} given; a number of hours, days or weeks is needed: 12h, 30d, 8w.")
    return int(match[1]) * _UNITS[match[2]]


def megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MB"


def _described(counted: Counted) -> str:
    return f"{counted.files} files of adapters and runs, {counted.keys} keys of the broker"
