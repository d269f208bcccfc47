"""What keeps a worker running for its user: systemd on Linux, launchd on macOS, each asked by its own command."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from stoker.errors import ConfigError
from stoker.files.durable import write_whole
from stoker.local.service import (
    LABEL,
    UNIT,
    Service,
    home_of_agent,
    home_of_unit,
    launchd_agent,
    read_environment,
    systemd_unit,
)
from stoker.settings import load_settings, settings_of

#: Seconds that a command may take which stops nothing.
_QUICK = 30.0
#: Seconds between two looks at an agent that ends.
_POLL = 0.1


class Manager(Protocol):
    #: Where the definition of the service lies.
    file: Path
    #: What the user should know about a service that was installed.
    note: str

    def definition(self, service: Service) -> str: ...

    def home(self, definition: str) -> Path | None:
        """STOKER_HOME of the worker that this defines; None where it does not say."""

    def check(self) -> None:
        """Raises `ConfigError` if this user has no manager that answers."""

    def start(self, limit: float) -> None:
        """Start what `file` defines, instead of what runs. `limit`: seconds that its end may take."""

    def stop(self, limit: float) -> None:
        """Stop it, so that it does not come back. `limit`: seconds that it may take."""

    def forget(self) -> None:
        """The definition was deleted."""

    def logs(self, service: Service, lines: int, follow: bool) -> list[str]:
        """The command that shows what the service wrote."""


class Systemd:
    note = "It runs while you are logged in, and from the machine's start on after: loginctl enable-linger"

    def __init__(self) -> None:
        config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
        self.file = Path(config).expanduser() / "systemd" / "user" / UNIT

    def definition(self, service: Service) -> str:
        return systemd_unit(service)

    def home(self, definition: str) -> Path | None:
        return home_of_unit(definition)

    def check(self) -> None:
        said = _run(["systemctl", "--user", "show", "--property=Version"], _NO_SYSTEMD)
        if said:
            raise ConfigError(
                f"no systemd of this user answers ({said}). Log in as the user itself, not by su or sudo, or let its "
                "systemd run without a login: loginctl enable-linger"
            )

    def start(self, limit: float) -> None:
        for words in (["daemon-reload"], ["enable", UNIT], ["restart", UNIT]):
            _must(["systemctl", "--user", *words], _NO_SYSTEMD, limit + _QUICK)

    def stop(self, limit: float) -> None:
        _must(["systemctl", "--user", "disable", "--now", UNIT], _NO_SYSTEMD, limit + _QUICK)

    def forget(self) -> None:
        _must(["systemctl", "--user", "daemon-reload"], _NO_SYSTEMD)

    def logs(self, service: Service, lines: int, follow: bool) -> list[str]:
        return ["journalctl", "--user", f"--unit={UNIT}", f"--lines={lines}", *(["--follow"] if follow else [])]


class Launchd:
    note = "It runs while you are logged in: a Mac without a screen needs automatic login."

    def __init__(self) -> None:
        self.file = Path("~/Library/LaunchAgents").expanduser() / f"{LABEL}.plist"
        self._domain = f"gui/{os.getuid()}"

    def definition(self, service: Service) -> str:
        return launchd_agent(service)

    def home(self, definition: str) -> Path | None:
        return home_of_agent(definition)

    def check(self) -> None:
        said = _run(["launchctl", "print", self._domain], _NO_LAUNCHD)
        if said:
            raise ConfigError(f"launchd has no session of this user ({said}). Log in at the Mac's screen first.")

    def start(self, limit: float) -> None:
        self.stop(limit)
        # Agents that a user disabled once cannot be started.
        _must(["launchctl", "enable", self._agent], _NO_LAUNCHD)
        _must(["launchctl", "bootstrap", self._domain, str(self.file)], _NO_LAUNCHD)

    def stop(self, limit: float) -> None:
        if not self._runs():
            return
        _must(["launchctl", "bootout", self._agent], _NO_LAUNCHD, limit + _QUICK, _GOING)
        # launchctl does not wait for the agent's end, and refuses another of its name until then.
        end = time.monotonic() + limit + _QUICK
        while self._runs():
            if time.monotonic() > end:
                raise ConfigError(f"launchd has not ended {LABEL} within {limit + _QUICK:.0f} s. Try again.")
            time.sleep(_POLL)

    def forget(self) -> None:
        pass

    def logs(self, service: Service, lines: int, follow: bool) -> list[str]:
        return ["tail", "-n", str(lines), *(["-F"] if follow else []), str(service.log)]

    @property
    def _agent(self) -> str:
        return f"{self._domain}/{LABEL}"

    def _runs(self) -> bool:
        return not _run(["launchctl", "print", self._agent], _NO_LAUNCHD)


#: What launchctl ends with where an agent is ending (EINPROGRESS of macOS), or has ended in this moment (ESRCH).
_GOING = (36, 3)
_NO_SYSTEMD = "this machine has no systemctl. Run `stoker worker` under what starts its services"
_NO_LAUNCHD = "this machine has no launchctl, which every macOS has"
_MANAGERS: dict[str, Callable[[], Manager]] = {"Linux": Systemd, "Darwin": Launchd}


def manager() -> Manager:
    """The one of this system. Raises `ConfigError`."""
    system = platform.system()
    if system not in _MANAGERS:
        raise ConfigError(f"{system} given; workers are installed on Linux (systemd) and macOS (launchd) alone.")
    return _MANAGERS[system]()


def installed(by: Manager) -> Service | None:
    """The worker that is installed, which may be of another STOKER_HOME than this shell's; None if there is none.
    Raises `ConfigError`."""
    try:
        definition = by.file.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{by.file}: the service cannot be read ({error.strerror}).") from None
    return _service_in(by.home(definition))


def _service_in(home: Path | None) -> Service:
    """The worker with its own settings: they say how long it may drain."""
    here = Service.of(load_settings(home=home), None)
    try:
        return Service.of(settings_of(read_environment(here.environment_file)), None)
    except ConfigError:
        # One whose settings are gone, or wrong, never starts; it can be uninstalled all the same.
        return here


def install(to: Manager, service: Service, former: Service | None) -> None:
    """Write the definition and start the service in the place of the `former`, whose settings are deleted if they are
    in another STOKER_HOME. Raises `ConfigError`."""
    try:
        to.file.parent.mkdir(parents=True, exist_ok=True)
        service.log.parent.mkdir(parents=True, exist_ok=True)
        write_whole(to.file, lambda draft: draft.write_text(to.definition(service), encoding="utf-8"), mode=0o600)
    except OSError as error:
        raise ConfigError(f"{to.file}: the service cannot be written ({error.strerror}).") from None
    to.start(service.stop_limit if former is None else max(former.stop_limit, service.stop_limit))
    if former is not None and former.environment_file != service.environment_file:
        # It may hold a password, and no uninstall would find it any more.
        _delete(former.environment_file)


def uninstall(of: Manager) -> Service | None:
    """Stop the service, and delete what defines it; None if none was installed. Raises `ConfigError`."""
    service = installed(of)
    if service is None:
        return None
    of.stop(service.stop_limit)
    _delete(of.file)
    _delete(service.environment_file)
    of.forget()
    return service


def _delete(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be deleted ({error.strerror}).") from None


def _run(command: list[str], missing: str, limit: float = _QUICK, fine: Collection[int] = ()) -> str:
    """What a command that failed said; nothing if it did not fail, or ended with one of the codes `fine`. `missing`:
    what to say if there is no such one."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{missing}; --dry-run prints the definition.") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"`{' '.join(command)}` failed ({error}).") from None
    if done.returncode == 0 or done.returncode in fine:
        return ""
    said = " ".join((done.stderr.strip() or done.stdout.strip()).split())
    return said[:300] or f"exit code {done.returncode}"


def _must(command: list[str], missing: str, limit: float = _QUICK, fine: Collection[int] = ()) -> None:
    said = _run(command, missing, limit, fine)
    if said:
        raise ConfigError(f"`{' '.join(command)}` failed: {said}.")
