"""What installs a worker, to the letter: the definition of its service, and what its manager is asked."""

from __future__ import annotations

import plistlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker.errors import ConfigError
from stoker.local import guard, service_manager
from stoker.local.process import LogSize
from stoker.local.service import (
    LABEL,
    RESTART_PAUSE,
    UNIT,
    Service,
    launchd_agent,
    read_environment,
    systemd_unit,
    write_environment,
)
from stoker.local.service_manager import Launchd, Systemd, install, manager, uninstall


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(
        environment_file=tmp_path / 'x"$b\\100%.env', folder=tmp_path / "50%", log=tmp_path / "logs/worker.log",
        name="one", stop_limit=35, size=LogSize(1000, 2),
    )  # fmt: skip


class Commands:
    """In the place of the commands of the system. `fails`: words of a command → what it says on its way down."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.limits: list[float] = []
        self.fails: dict[str, Any] = {}

    def run(self, command: list[str], *, timeout: float, **_: Any) -> Any:
        self.asked.append(tuple(command))
        self.limits.append(timeout)
        said = next((said for words, said in self.fails.items() if words in " ".join(command)), None)
        if isinstance(said, Exception):
            raise said
        if callable(said):
            said = said()
        return SimpleNamespace(returncode=0 if said is None else 1, stdout="", stderr=said or "")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commands:
    made = Commands()
    exceptions = {"TimeoutExpired": subprocess.TimeoutExpired}
    monkeypatch.setattr(service_manager, "subprocess", SimpleNamespace(run=made.run, **exceptions))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return made


def test_a_unit_of_systemd_says_how_the_worker_runs_ends_and_comes_back(service: Service) -> None:
    lines = [line for line in systemd_unit(service).splitlines() if line and not line.startswith("#")]
    folder = str(service.folder).replace("%", "%%")
    home = service.environment_file.parent
    words = f'"{sys.executable}" "-m" "stoker.cli" "worker" "--env-file" "{home}/x\\"$$b\\\\100%%.env" "--name" "one"'
    assert lines == [
        "[Unit]", "Description=Stoker worker", "StartLimitIntervalSec=0", "[Service]", "Type=exec",
        f"WorkingDirectory={folder}", "Environment=PYTHONUNBUFFERED=1", f"ExecStart={words}", "KillMode=mixed",
        "TimeoutStopSec=35", "Restart=on-failure", f"RestartSec={RESTART_PAUSE}", "SuccessExitStatus=130", "UMask=0077",
        "NoNewPrivileges=yes", "[Install]", "WantedBy=default.target",
    ]  # fmt: skip


def test_an_agent_of_launchd_runs_the_worker_under_the_guard_that_keeps_its_log_small(service: Service) -> None:
    assert plistlib.loads(launchd_agent(service).encode()) == {
        "Label": LABEL,
        "ProgramArguments": [sys.executable, guard.__file__, "30", str(service.log), "1000", "2", *service.command],
        "WorkingDirectory": str(service.folder), "EnvironmentVariables": {"PYTHONUNBUFFERED": "1"}, "RunAtLoad": True,
        "KeepAlive": True, "ThrottleInterval": RESTART_PAUSE, "ExitTimeOut": 35, "ProcessType": "Interactive",
        "Umask": 0o077, "StandardOutPath": str(service.log), "StandardErrorPath": str(service.log),
    }  # fmt: skip


def test_systemd_is_asked_to_start_a_worker_anew_and_to_forget_it(
    commands: Commands, service: Service, tmp_path: Path
) -> None:
    system, service = Systemd(), replace(service, environment_file=service.folder / "worker.env")
    assert system.file == tmp_path / "config/systemd/user" / UNIT
    install(system, service, None)
    assert system.file.read_text() == systemd_unit(service)
    assert system.file.stat().st_mode & 0o777 == 0o600
    assert service.log.parent.is_dir()
    user = ("systemctl", "--user")
    assert commands.asked == [(*user, "daemon-reload"), (*user, "enable", UNIT), (*user, "restart", UNIT)]
    assert commands.limits == [65.0] * 3, "a worker that runs has time to drain"
    commands.asked.clear()
    service.folder.mkdir()
    service.environment_file.write_text("")
    gone = uninstall(system)
    assert gone is not None
    assert gone.folder == service.folder
    assert commands.asked == [(*user, "disable", "--now", UNIT), (*user, "daemon-reload")]
    assert not system.file.exists()
    assert not service.environment_file.exists()
    commands.asked.clear()
    assert uninstall(system) is None
    assert commands.asked == []
    follow = ["journalctl", "--user", f"--unit={UNIT}", "--lines=7"]
    assert [system.logs(service, 7, following) for following in (False, True)] == [follow, [*follow, "--follow"]]


def test_launchd_is_asked_to_end_an_agent_that_runs_before_another_starts(
    commands: Commands, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 501)
    slept: list[float] = []
    monkeypatch.setattr(
        service_manager, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: float(sum(slept)))
    )
    system, agent = Launchd(), f"gui/501/{LABEL}"
    looks = iter([None, None, None, "no such process"])
    commands.fails = {f"print {agent}": lambda: next(looks)}
    install(system, service, None)
    ends = [("launchctl", "print", agent), ("launchctl", "bootout", agent)]
    starts = [("launchctl", "enable", agent), ("launchctl", "bootstrap", "gui/501", str(system.file))]
    assert commands.asked == [*ends, *[ends[0]] * 3, *starts]
    assert len(slept) == 2
    commands.asked.clear()
    commands.fails = {f"print {agent}": "no such process"}
    system.start(service.stop_limit)
    assert commands.asked == [ends[0], *starts], "none runs"
    commands.fails = {}
    moments = iter([0.0, 65.0, 65.1, 65.2])
    monkeypatch.setattr(service_manager, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: next(moments)))
    with pytest.raises(ConfigError, match=f"launchd has not ended {LABEL} within 65 s"):
        system.stop(35)
    follow = ["tail", "-n", "7", str(service.log)]
    assert system.logs(service, 7, follow=False) == follow
    assert system.logs(service, 7, follow=True) == [*follow[:3], "-F", follow[3]]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("refused\n  by it ", "`systemctl --user disable --now {unit}` failed: refused by it."),
        ("x" * 400, "`systemctl --user disable --now {unit}` failed: " + "x" * 300 + "."),
        ("", "`systemctl --user disable --now {unit}` failed: exit code 1."),
        (FileNotFoundError(2, "no"), "this machine has no systemctl"),
        (OSError(13, "Permission denied"), "failed ([Errno 13] Permission denied)"),
        (subprocess.TimeoutExpired("systemctl", 5.0), "failed (Command 'systemctl' timed out after 5.0 seconds)"),
    ],
)
def test_what_a_manager_refuses_or_does_not_do_is_one_error(commands: Commands, said: Any, shown: str) -> None:
    commands.fails = {"disable": said}
    with pytest.raises(ConfigError) as refusal:
        Systemd().stop(5)
    assert shown.format(unit=UNIT) in str(refusal.value)


def test_a_file_that_cannot_be_deleted_is_named(
    commands: Commands, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = Systemd()
    install(system, service, None)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ConfigError, match=r"cannot be deleted \(Read-only"):
        uninstall(system)


@pytest.mark.parametrize(("system", "kind"), [("Linux", Systemd), ("Darwin", Launchd)])
def test_each_system_has_its_own_manager(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, system: str, kind: type
) -> None:
    monkeypatch.setattr(service_manager, "platform", SimpleNamespace(system=lambda: system))
    assert type(manager()) is kind
    manager().check()
    commands.fails = {"show": "no bus", "print": "no bus"}
    with pytest.raises(ConfigError, match="no bus"):
        manager().check()


# Settings in a file


def test_settings_are_read_back_as_they_were_written_and_by_their_user_alone(tmp_path: Path) -> None:
    file = tmp_path / "worker.env"
    values = {"STOKER_URL": "redis://:p=a#s@h:5/2", "B": "", "A_1": "é 日"}
    write_environment(file, values)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [line.partition("=")[0] for line in file.read_text("utf-8").splitlines()[1:]] == sorted(values)
    assert read_environment(file) == values
    file.write_text("# a note\n\n  NAME = of it \nLAST=x==y\n")
    with pytest.raises(ConfigError, match=f"{file}: line 3 is not of the form NAME=VALUE"):
        read_environment(file)
    file.write_text("# a note\n\n  NAME= of it \nLAST=x==y\n")
    assert read_environment(file) == {"NAME": " of it", "LAST": "x==y"}
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        with pytest.raises(ConfigError, match=f"other users may read it.*chmod 600 {file}"):
            read_environment(file)


@pytest.mark.parametrize(
    "spoil",
    [lambda file: file.unlink(), lambda file: file.write_bytes(b"A=\xff"), lambda file: file.write_text("secret\n")],
)
def test_settings_that_cannot_be_read_are_one_error_without_what_is_in_them(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    file = tmp_path / "worker.env"
    write_environment(file, {"A": "b"})
    spoil(file)
    with pytest.raises(ConfigError) as refusal:
        read_environment(file)
    assert str(file) in str(refusal.value)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("value", [" a", "a ", "a\nb", "a\x1bb", "\t"])
def test_a_value_that_no_line_can_hold_is_refused_by_its_name(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"^NAME: "):
        write_environment(tmp_path / "worker.env", {"NAME": value})
    assert not (tmp_path / "worker.env").exists()
