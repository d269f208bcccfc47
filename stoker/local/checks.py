"""What `stoker doctor` finds out without the engine: Python, STOKER_HOME, the disk, the broker."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker.broker.connection import connect, translated
from stoker.errors import StokerError
from stoker.local.home import ELSEWHERE, what_is_in_the_way
from stoker.settings import Settings

#: Bytes that should be free: a checkpoint of a run, and the append-only file while it is written anew.
ENOUGH_DISK = 2 * 2**30
#: Share of a broker's memory limit above which it is about to refuse jobs.
NEARLY_FULL = 0.95


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `detail`: what was found; `remedy`: what to do, "" where all is well."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""

    @property
    def text(self) -> str:
        """For people, with the remedy in a line of its own."""
        found = f"{'ok  ' if self.ok else 'FAIL'}  {self.name:10} {self.detail}"
        return f"{found}\n      {'':10} → {self.remedy}" if self.remedy else found


def check_python() -> Check:
    found = f"{platform.python_version()} on {platform.platform()}"
    return Check(
        "python", sys.version_info >= (3, 11), found, _unless(sys.version_info >= (3, 11), "use 3.11 or later")
    )


def check_home(settings: Settings) -> Check:
    """Whether files can be made in STOKER_HOME, or it can be made."""
    home = settings.home
    # A link to a disk that is not there is no free place for a folder.
    existing = next(path for path in (home, *home.parents) if os.path.lexists(path))
    if not existing.exists():
        found = f"{existing} leads to {os.readlink(existing)}, which is not there"
        return Check("home", False, found, "mount its disk, or set STOKER_HOME to another folder")
    ok = existing.is_dir() and os.access(existing, os.R_OK | os.W_OK | os.X_OK)
    if ok and existing == home and (what := what_is_in_the_way(home)):
        return Check("home", False, f"{home} {what}", f"set STOKER_HOME to another folder. {ELSEWHERE}")
    state = "is there" if existing == home else "will be made"
    detail = f"{home} {state}" if ok else f"{existing} is {'not writable' if existing.is_dir() else 'no folder'}"
    return Check("home", ok, detail, _unless(ok, f"make {existing} writable, or set STOKER_HOME to another folder"))


def check_disk(settings: Settings) -> Check:
    home = settings.home
    free = shutil.disk_usage(next(path for path in (home, *home.parents) if path.exists())).free
    ok = free >= ENOUGH_DISK
    remedy = "free some: `stoker status --disk` shows what Stoker keeps, `stoker clean` deletes what is old"
    return Check("disk", ok, f"{free / 2**30:.1f} GB free for {home}", _unless(ok, remedy))


def check_broker(settings: Settings) -> Check:
    """The broker that was chosen; without one, `stoker up` starts its own."""
    if settings.chosen_url is None:
        return Check("broker", True, "none chosen and no `stoker up` runs here; `stoker up` starts one")
    client = connect(settings, patient=True)
    try:
        with translated(settings):
            # INFO is answered by a broker that loads its data too; this waits for it.
            client.ping()
            info = client.info()
    except StokerError as error:
        return Check("broker", False, str(error), f"start it, or correct {settings.url_option}")
    finally:
        client.close()
    return judged(settings.address.shown, info)


def judged(address: str, info: Mapping[str, Any]) -> Check:
    """What a broker's INFO says: whether it drops jobs, is full, or cannot write."""
    version = info.get("valkey_version") or info.get("redis_version")
    policy, limit, used = info.get("maxmemory_policy", "unknown"), info.get("maxmemory", 0), info.get("used_memory", 0)
    of_limit = f" of {limit / 2**20:.0f}" if limit else ""
    found = f"{address}, version {version}, {policy}, {used / 2**20:.0f}{of_limit} MB"
    if policy != "noeviction":
        return Check("broker", False, f"{found}: a full broker would drop jobs", "set maxmemory-policy noeviction")
    if limit and used > NEARLY_FULL * limit:
        return Check("broker", False, f"{found}: it is about to refuse jobs", "raise maxmemory, or let jobs end")
    failed = [name for name in _WRITES if info.get(name, "ok") != "ok"]
    if failed:
        what = f"{found}: it cannot write to its disk ({', '.join(failed)})"
        return Check("broker", False, what, "free its disk; its log says more")
    return Check("broker", True, found)


#: INFO's fields that are `ok` while the broker can write to its disk.
_WRITES = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")


def check_compiler() -> Check:
    found = shutil.which("g++") or shutil.which("clang++")
    return Check("compiler", True, found or "none: elementwise kernels are not fused, and CPU jobs take longer")


def of_machine(settings: Settings) -> list[Check]:
    return [check_python(), check_home(settings), check_disk(settings), check_broker(settings)]


def _unless(ok: bool, remedy: str) -> str:
    return "" if ok else remedy
