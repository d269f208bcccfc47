"""The worker as a service of this user: its settings in a file, and its definition for systemd and for launchd.

These are the only definitions that there are: `stoker worker install` writes them, and `--dry-run` shows them.
"""

from __future__ import annotations

import plistlib
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.parsers.expat import ExpatError

from stoker.errors import ConfigError
from stoker.files.durable import write_whole
from stoker.local import guard
from stoker.local.process import LogSize
from stoker.settings import Settings

#: Seconds that a stopping worker has beyond `STOKER_GRACE`, until it is killed.
STOP_MARGIN = 60
#: Seconds between the end of a worker and its next start, so that a wrong setting does not spin.
RESTART_PAUSE = 10
#: What launchd calls the worker, and what systemd does.
LABEL, UNIT = "stoker.worker", "stoker-worker.service"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Service:
    """One worker: what the service's manager has to know of it."""

    environment_file: Path
    folder: Path
    log: Path
    name: str | None
    stop_limit: int
    size: LogSize

    @classmethod
    def of(cls, settings: Settings, name: str | None) -> Service:
        """`name`: what the worker is called; None: the name that `stoker worker` takes by itself."""
        return cls(
            environment_file=settings.home / "worker.env",
            folder=settings.home,
            log=settings.logs / "worker-service.log",
            name=name,
            stop_limit=int(settings.grace) + STOP_MARGIN,
            size=LogSize.of(settings),
        )

    @property
    def command(self) -> list[str]:
        """No setting stands here: what is on a command line, every user of the machine can read."""
        name = [] if self.name is None else ["--name", self.name]
        return [sys.executable, "-m", "stoker.cli", "worker", "--env-file", str(self.environment_file), *name]


def systemd_unit(service: Service) -> str:
    """For the user's own systemd."""
    return f"""\
[Unit]
Description=Stoker worker
# A worker whose broker is away for long is started again all the same.
StartLimitIntervalSec=0

[Service]
Type=exec
WorkingDirectory={_specifiers(str(service.folder))}
Environment=PYTHONUNBUFFERED=1
ExecStart={" ".join(_word(word) for word in service.command)}
# SIGTERM goes to the worker, which drains; SIGKILL follows after the timeout.
KillMode=mixed
TimeoutStopSec={service.stop_limit}
Restart=on-failure
RestartSec={RESTART_PAUSE}
# A worker that is stopped while it starts.
SuccessExitStatus=130
UMask=0077
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""


def home_of_unit(unit: str) -> Path | None:
    """STOKER_HOME of the worker that `systemd_unit` defined; None for text that is none of its units."""
    found = re.search(r"^WorkingDirectory=(.+)$", unit, re.MULTILINE)
    return None if found is None else Path(found[1].replace("%%", "%"))


def launchd_agent(service: Service) -> str:
    """A property list for an agent of the user's."""
    return plistlib.dumps(
        {
            "Label": LABEL,
            # launchd puts no log aside: the guard writes it, as for `stoker up`.
            "ProgramArguments": [sys.executable, guard.__file__, *_limits(service), *service.command],
            "WorkingDirectory": str(service.folder),
            "EnvironmentVariables": {"PYTHONUNBUFFERED": "1"},
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": RESTART_PAUSE,
            # SIGTERM drains; SIGKILL follows only after this many seconds.
            "ExitTimeOut": service.stop_limit,
            # Background jobs are throttled, which a warm model must not be.
            "ProcessType": "Interactive",
            "Umask": 0o077,
            "StandardOutPath": str(service.log),
            "StandardErrorPath": str(service.log),
        },
        sort_keys=False,
    ).decode()


def home_of_agent(agent: str) -> Path | None:
    """STOKER_HOME of the worker that `launchd_agent` defined; None for text that is none of its agents."""
    try:
        return Path(plistlib.loads(agent.encode())["WorkingDirectory"])
    except (ValueError, ExpatError, LookupError, TypeError):
        return None


def _limits(service: Service) -> list[str]:
    return [str(service.stop_limit - 5), str(service.log), str(service.size.bytes), str(service.size.files)]


def read_environment(file: Path) -> dict[str, str]:
    """The variables in a file of NAME=VALUE lines, each value as it stands. Raises `ConfigError`, also if other users
    may read the file."""
    try:
        mode = file.stat().st_mode
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the settings of the worker cannot be read ({error}).") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{file}: other users may read it, and it may hold a password. Run: chmod 600 {file}")
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, separator, value = line.strip().partition("=")
        if not name or name.startswith("#"):
            continue
        if not separator or not _VARIABLE.fullmatch(name):
            # The line is not shown: it may hold a password.
            raise ConfigError(f"{file}: line {number} is not of the form NAME=VALUE.")
        found[name] = value
    return found


def write_environment(file: Path, environment: Mapping[str, str]) -> None:
    """Raises `ConfigError` for a value that no line can hold, and `OSError`."""
    for name, value in environment.items():
        if not value.isprintable() or value != value.strip():
            raise ConfigError(f"{name}: it begins or ends with a space, or holds a character that cannot be printed.")
    lines = [
        "# Settings of the worker that `stoker worker install` installed. For its user alone: keep it at mode 600."
    ]
    lines += [f"{name}={value}" for name, value in sorted(environment.items())]
    write_whole(file, lambda draft: draft.write_text("\n".join(lines) + "\n", encoding="utf-8"), mode=0o600)


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _word(text: str) -> str:
    """A word of a command line, as systemd reads it."""
    return '"' + _specifiers(text).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$") + '"'
