"""`stoker worker install`, with programs in place of systemctl and launchctl that note what they are asked."""

from __future__ import annotations

import itertools
import os
import plistlib
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest
from typer.testing import CliRunner

from stoker.cli import app
from stoker.errors import BrokerUnavailable, ConfigError, InvalidRequest, StokerError
from stoker.local import guard
from stoker.local.service import Service, launchd_agent, read_environment, systemd_unit
from stoker.local.service_manager import Launchd, Systemd, installed
from stoker.settings import Settings, settings_of

MODEL = Path(__file__).parent.parent / "goldens" / "architectures" / "bert"
SECRET = "rediss://worker:s3cret@broker.example:6379/0"

#: `launchctl`, which knows whether the agent runs; one that was booted out runs until it was looked at once more.
LAUNCHCTL = """\
case "$1" in
  print) case "$2" in
    */stoker.worker)
      [ -e "$STATE/runs" ] || exit 113
      if [ -e "$STATE/ends" ]; then rm "$STATE/runs" "$STATE/ends"; fi;;
  esac;;
  bootout) touch "$STATE/ends";;
  bootstrap) [ -e "$STATE/runs" ] && { echo "Bootstrap failed: 5" >&2; exit 5; }; touch "$STATE/runs";;
esac
exit 0
"""


#: What it says of an agent that is asked to end and has not ended.
IN_PROGRESS = 'echo "Boot-out failed: 36: Operation now in progress" >&2; exit 36'


class Machine:
    """A user's machine: their home, and what their service manager was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self._asked = folder, folder / "bin", folder / "asked"
        self.bin.mkdir()
        self.settings_file = folder / "home" / "worker.env"
        self.unit = folder / ".config/systemd/user/stoker-worker.service"
        self.agent = folder / "Library/LaunchAgents/stoker.worker.plist"

    def has(self, program: str, script: str = "exit 0") -> None:
        file = self.bin / program
        file.write_text(f'#!/bin/sh\necho {program} "$@" >> "{self._asked}"\nSTATE="{self.folder}"\n{script}\n')
        file.chmod(0o755)

    def asked(self) -> list[str]:
        """What was asked since the last call."""
        lines = self._asked.read_text().splitlines() if self._asked.exists() else []
        self._asked.unlink(missing_ok=True)
        return lines


BROKER = "redis://broker.example/0"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setenv("PATH", str(made.bin))
    (made.bin / "rm").symlink_to(shutil.which("rm", path="/bin:/usr/bin") or "/bin/rm")
    (made.bin / "touch").symlink_to(shutil.which("touch", path="/bin:/usr/bin") or "/usr/bin/touch")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STOKER_HOME", str(tmp_path / "home"))
    for name in ("XDG_CONFIG_HOME", "STOKER_URL", "STOKER_MODELS"):
        monkeypatch.delenv(name, raising=False)
    return made


On = Callable[[str], None]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> On:
    return lambda system: monkeypatch.setattr("platform.system", lambda: system)


def run(*words: str) -> str:
    """Standard output; raises what the command does."""
    return CliRunner().invoke(app, ["worker", *words], catch_exceptions=False).stdout


def test_a_worker_is_installed_with_systemd_and_goes_again(
    machine: Machine, on: On, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("Linux")
    machine.has("systemctl")
    monkeypatch.setenv("STOKER_URL", SECRET)
    said = run("install", "--model", str(MODEL), "--name", "left")
    assert "s3cret" not in said
    user = "systemctl --user"
    begin = [f"{user} show --property=Version", f"{user} daemon-reload"]
    unit = "stoker-worker.service"
    assert machine.asked() == [*begin, f"{user} enable {unit}", f"{user} restart {unit}"]
    text = machine.unit.read_text()
    assert (
        f'"{sys.executable}" "-m" "stoker.cli" "worker" "--env-file" "{machine.settings_file}" "--name" "left"' in text
    )
    assert "s3cret" not in text
    assert stat.S_IMODE(machine.settings_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(machine.settings_file.parent.stat().st_mode) == 0o700
    settings = settings_of(read_environment(machine.settings_file))
    assert (settings.url, settings.models) == (SECRET, (f"bert={MODEL}",))
    assert "is uninstalled" in run("uninstall")
    assert machine.asked() == [f"{user} disable --now {unit}", f"{user} daemon-reload"]
    assert not machine.unit.exists()
    assert not machine.settings_file.exists()
    assert "no worker is installed" in run("uninstall")
    assert machine.asked() == []


def test_installing_again_keeps_what_is_not_given_and_starts_the_worker_anew(
    machine: Machine, on: On, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("Linux")
    machine.has("systemctl")
    monkeypatch.setenv("STOKER_URL", SECRET)
    run("install", "--model", str(MODEL))
    monkeypatch.delenv("STOKER_URL")
    before, _ = machine.unit.read_text(), machine.asked()
    with machine.settings_file.open("a") as file:
        file.write("HF_HOME=/models\n")
    run("install")
    assert machine.unit.read_text() == before
    assert "systemctl --user restart stoker-worker.service" in machine.asked()
    kept = read_environment(machine.settings_file)
    assert (kept["STOKER_URL"], kept["HF_HOME"], kept["STOKER_MODELS"]) == (SECRET, "/models", f"bert={MODEL}")
    run("install", "--url", "redis://other.example:6379/0")
    assert read_environment(machine.settings_file)["STOKER_URL"] == "redis://other.example:6379/0"
    monkeypatch.setenv("STOKER_URL", "redis://third.example:6379/0")
    monkeypatch.setenv("STOKER_LEASE", "")
    run("install")
    kept = read_environment(machine.settings_file)
    assert kept["STOKER_URL"] == "redis://third.example:6379/0", "this shell's wins over what was installed"
    assert "STOKER_LEASE" not in kept, "an empty variable says nothing"
    assert kept["STOKER_HOME"] == str(machine.settings_file.parent)


def test_files_that_settings_name_are_found_from_any_folder(
    machine: Machine, on: On, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("Linux")
    machine.has("systemctl")
    monkeypatch.chdir(MODEL.parent)
    monkeypatch.setenv("STOKER_DATA", "qwen3")
    monkeypatch.setenv("STOKER_MODELS", "./bert, own=./mpnet")
    run("install", "--url", BROKER)
    kept = read_environment(machine.settings_file)
    assert kept["STOKER_DATA"] == str(MODEL.parent / "qwen3")
    assert settings_of(kept).models == (f"bert={MODEL}", f"own={MODEL.parent / 'mpnet'}")
    monkeypatch.setenv("STOKER_DATA", "~/rows")
    run("install")
    assert read_environment(machine.settings_file)["STOKER_DATA"] == str(machine.folder / "rows")


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("ON_DEMAND", "./bert, own=mpnet", f"bert={MODEL},own={MODEL.parent / 'mpnet'}"),
        ("MODELS", " , ", ","),
        ("DRAFT_MODELS", "a=./bert, b=smollm2-135m-instruct", f"a=bert={MODEL},b=smollm2-135m-instruct"),
        ("ARTIFACTS", "store", str(MODEL.parent / "store")),
        ("ARTIFACTS", "s3://bucket/stoker", "s3://bucket/stoker"),
        ("ARTIFACTS", "simplecache::memory://x", "simplecache::memory://x"),
        ("BLAS", "./libopenblas.so", str(MODEL.parent / "libopenblas.so")),
        ("BLAS", "libopenblas.so.0", "libopenblas.so.0"),
        ("BLAS", "off", "off"),
        (
            "URL",
            "rediss://b/0?ssl_ca_certs=ca.pem",
            f"rediss://b/0?ssl_ca_certs={quote_plus(str(MODEL.parent))}%2Fca.pem",
        ),
        ("URL", "rediss://b/0?ssl_ca_certs=%2Fca+%26.pem", "rediss://b/0?ssl_ca_certs=%2Fca+%26.pem"),
        ("URL", "redis://u:p%3F@b/0?protocol=3", "redis://u:p%3F@b/0?protocol=3"),
    ],
)
def test_every_setting_that_names_files_is_kept_as_it_is_meant_here(
    machine: Machine, on: On, monkeypatch: pytest.MonkeyPatch, name: str, given: str, kept: str
) -> None:
    on("Linux")
    machine.has("systemctl")
    monkeypatch.chdir(MODEL.parent)
    monkeypatch.setenv("STOKER_URL", BROKER)
    monkeypatch.setenv(f"STOKER_{name}", given)
    run("install")
    assert read_environment(machine.settings_file)[f"STOKER_{name}"] == kept


@pytest.mark.parametrize(("given", "said"), [("nope", "'nope' given"), (f"bert={MODEL.parent / 'mpnet'}", "is called")])
def test_a_worker_with_a_wrong_model_on_demand_is_not_installed(
    machine: Machine, on: On, monkeypatch: pytest.MonkeyPatch, given: str, said: str
) -> None:
    on("Linux")
    machine.has("systemctl")
    monkeypatch.setenv("STOKER_ON_DEMAND", given)
    with pytest.raises(ConfigError, match=said):
        run("install", "--url", BROKER, "--model", str(MODEL))
    assert machine.asked() == []
    assert not machine.settings_file.exists()


def test_an_installed_worker_knows_its_home_though_no_variable_said_it(
    machine: Machine, on: On, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("Linux")
    machine.has("systemctl")
    monkeypatch.delenv("STOKER_HOME")
    run("install", "--model", str(MODEL), "--url", BROKER)
    home = machine.folder / ".stoker"
    assert read_environment(home / "worker.env")["STOKER_HOME"] == str(home)


def test_a_worker_is_installed_with_launchd_and_an_agent_that_runs_ends_first(machine: Machine, on: On) -> None:
    on("Darwin")
    machine.has("launchctl", LAUNCHCTL)
    domain = f"gui/{os.getuid()}"
    agent = f"{domain}/stoker.worker"
    start = [f"launchctl enable {agent}", f"launchctl bootstrap {domain} {machine.agent}"]
    with pytest.raises(BrokerUnavailable, match="no broker was chosen"):
        run("install", "--model", str(MODEL))
    machine.asked()
    run("install", "--model", str(MODEL), "--url", BROKER)
    assert machine.asked() == [f"launchctl print {domain}", f"launchctl print {agent}", *start]
    run("install")
    again = machine.asked()
    assert again[:3] == [f"launchctl print {domain}", f"launchctl print {agent}", f"launchctl bootout {agent}"]
    assert again[-2:] == start
    run("uninstall")
    assert f"launchctl bootout {agent}" in machine.asked()
    assert not machine.agent.exists()
    assert "no worker is installed" in run("uninstall")


def test_an_agent_that_takes_its_time_to_drain_is_no_failure(machine: Machine, on: On) -> None:
    on("Darwin")
    machine.has("launchctl", LAUNCHCTL.replace('touch "$STATE/ends"', f'touch "$STATE/ends"; {IN_PROGRESS}'))
    run("install", "--model", str(MODEL), "--url", BROKER)
    run("install")
    assert "is uninstalled" in run("uninstall")
    assert not machine.agent.exists()
    assert not machine.settings_file.exists()


def test_a_service_of_another_home_is_uninstalled_with_its_own_settings_and_patience(
    machine: Machine, on: On, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("Linux")
    machine.has("systemctl")
    odd = machine.folder / "100% $mine"
    monkeypatch.setenv("STOKER_HOME", str(odd))
    monkeypatch.setenv("STOKER_GRACE", "3000")
    run("install", "--model", str(MODEL), "--url", BROKER)
    found = installed(Systemd())
    assert found is not None
    monkeypatch.setenv("STOKER_HOME", str(machine.folder / "home"))
    monkeypatch.delenv("STOKER_GRACE")
    assert installed(Systemd()) == found
    assert (found.folder, found.stop_limit) == (odd, 3060)
    assert str(odd) in run("uninstall")
    assert not (odd / "worker.env").exists()


def test_a_worker_that_is_installed_again_has_its_own_time_to_drain(
    machine: Machine, on: On, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("Linux")
    machine.has("systemctl")
    limits, run_ = list[float](), subprocess.run

    def noted(command: list[str], *, timeout: float, **options: Any) -> Any:
        limits.append(timeout)
        return run_(command, timeout=timeout, **options)

    monkeypatch.setattr(subprocess, "run", noted)
    monkeypatch.setenv("STOKER_GRACE", "3000")
    run("install", "--model", str(MODEL), "--url", BROKER)
    limits.clear()
    monkeypatch.setenv("STOKER_GRACE", "5")
    run("install")
    assert max(limits) > 3060
    limits.clear()
    run("uninstall")
    assert max(limits) < 100


@pytest.mark.parametrize(("system", "program"), [("Linux", "systemctl"), ("Darwin", "launchctl")])
def test_a_worker_that_is_installed_again_in_another_home_leaves_no_settings_in_the_first(
    machine: Machine, on: On, monkeypatch: pytest.MonkeyPatch, system: str, program: str
) -> None:
    on(system)
    machine.has(program, LAUNCHCTL)
    monkeypatch.setenv("STOKER_URL", SECRET)
    run("install", "--model", str(MODEL))
    monkeypatch.setenv("STOKER_HOME", str(machine.folder / "other"))
    run("install", "--model", str(MODEL))
    assert not machine.settings_file.exists()
    assert (machine.folder / "other" / "worker.env").exists()


def test_a_worker_whose_settings_are_gone_is_uninstalled(machine: Machine, on: On) -> None:
    on("Linux")
    machine.has("systemctl")
    run("install", "--model", str(MODEL), "--url", BROKER)
    machine.settings_file.unlink()
    assert "is uninstalled" in run("uninstall")
    assert not machine.unit.exists()


def test_an_agent_that_does_not_end_is_one_clear_error(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has("launchctl")
    looks = itertools.count(0, 100)
    monkeypatch.setattr("stoker.local.service_manager.time.monotonic", lambda: next(looks))
    with pytest.raises(ConfigError, match=r"launchd has not ended stoker\.worker within 120 s"):
        Launchd().stop(90)


def test_a_stop_may_take_as_long_as_the_worker_has_to_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def run(command: list[str], *, timeout: float, **options: object) -> subprocess.CompletedProcess[str]:
        limits.append(timeout)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    Systemd().stop(3600)
    assert min(limits) > 3600


def test_a_dry_run_prints_the_definition_and_changes_nothing(machine: Machine, on: On) -> None:
    on("Linux")
    assert run("install", "--dry-run", "--model", str(MODEL)).startswith("[Unit]\n")
    on("Darwin")
    plist = plistlib.loads(run("install", "--dry-run", "--model", str(MODEL)).encode())
    assert plist["ProgramArguments"][6:10] == [sys.executable, "-m", "stoker.cli", "worker"]
    assert plist["ProgramArguments"][1:6] == [guard.__file__, "85", plist["StandardOutPath"], str(8 * 2**20), "3"]
    assert (plist["ExitTimeOut"], plist["Umask"], plist["KeepAlive"]) == (90, 0o077, True)
    assert machine.asked() == []
    assert not machine.settings_file.exists()
    assert not machine.unit.exists()
    assert not machine.agent.exists()


def test_a_definition_bears_any_folder(tmp_path: Path) -> None:
    odd = Service.of(Settings(home=tmp_path / 'a "b" $c %h \\d <&>'), None)
    unit, agent = systemd_unit(odd), plistlib.loads(launchd_agent(odd).encode())
    assert agent["WorkingDirectory"] == str(odd.folder)
    assert agent["ProgramArguments"][11] == str(odd.environment_file)
    assert r"a \"b\" $$c %%h \\d <&>" in unit
    assert f'WorkingDirectory={tmp_path}/a "b" $c %%h \\d <&>' in unit
    assert "KillMode=mixed" in unit, "the worker drains; what it started goes with it"
    assert {"UMask=0077", "NoNewPrivileges=yes", "Restart=on-failure"} <= set(unit.splitlines())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_itself_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    file = tmp_path / "stoker-worker.service"
    home = tmp_path / "with a blank and %h"
    home.mkdir()
    file.write_text(systemd_unit(Service.of(Settings(home=home), "left")))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "SYSTEMD_LOG_LEVEL": "warning"}
    command = ["systemd-analyze", "--user", "verify", "--man=no", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    # Of other units, which this machine may have, it speaks too.
    assert file.name not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("system", "said"),
    [
        ("Linux", r"no systemctl\. Run `stoker worker` under .*--dry-run prints"),
        ("Darwin", r"no launchctl.*--dry-run prints"),
        ("Windows", r"Windows given; workers are installed on Linux \(systemd\) and macOS \(launchd\)"),
    ],
)
def test_a_machine_without_the_manager_gets_an_error_that_says_so(
    machine: Machine, on: On, system: str, said: str
) -> None:
    on(system)
    with pytest.raises(ConfigError, match=said):
        run("install", "--model", str(MODEL))
    assert not machine.settings_file.exists()


@pytest.mark.parametrize(
    ("system", "program", "said"),
    [
        ("Linux", "systemctl", r"no systemd of this user answers \(no bus\)\. Log in .*loginctl enable-linger"),
        ("Darwin", "launchctl", r"launchd has no session of this user \(no bus\)\. Log in at the Mac's screen"),
    ],
)
def test_a_user_without_a_session_gets_an_error_that_says_so(
    machine: Machine, on: On, system: str, program: str, said: str
) -> None:
    on(system)
    machine.has(program, "echo no bus >&2; exit 1")
    with pytest.raises(ConfigError, match=said):
        run("install", "--model", str(MODEL))
    assert not machine.settings_file.exists()


def test_a_folder_that_cannot_be_written_is_named(machine: Machine, on: On) -> None:
    on("Linux")
    machine.has("systemctl")
    (machine.folder / ".config").write_text("a file")
    with pytest.raises(ConfigError, match=r"stoker-worker\.service: the service cannot be written \("):
        run("install", "--model", str(MODEL), "--url", BROKER)


def test_what_the_manager_refuses_is_shown(machine: Machine, on: On) -> None:
    on("Linux")
    machine.has("systemctl", '[ "$2" = restart ] && { echo "Unit is masked" >&2; exit 1; }; exit 0')
    with pytest.raises(ConfigError, match=r"`systemctl --user restart stoker-worker\.service` failed: Unit is masked"):
        run("install", "--model", str(MODEL), "--url", BROKER)


WRONG = [
    (["install", "--url", SECRET], ConfigError, "a password on a command line"),
    (["install", "--model", "nope"], ConfigError, "model 'nope' given"),
    (["install", "--name", "a@b"], InvalidRequest, "name: 'a@b' given"),
    (["logs"], ConfigError, "no worker is installed"),
]


@pytest.mark.parametrize(("words", "kind", "said"), WRONG)
def test_wrong_words_change_nothing(
    machine: Machine, on: On, words: list[str], kind: type[StokerError], said: str
) -> None:
    on("Linux")
    machine.has("systemctl")
    with pytest.raises(kind, match=said) as refusal:
        run(*words)
    assert "s3cret" not in str(refusal.value)
    assert machine.asked() == []
    assert not machine.settings_file.exists()


def test_options_of_the_worker_before_one_of_its_commands_are_refused(machine: Machine) -> None:
    done = CliRunner().invoke(app, ["worker", "--name", "x", "uninstall"])
    assert done.exit_code == 2
    assert "options stand behind the command" in done.output


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("STOKER_URL=x\n", 0o644, "other users may read it, and it may hold a password. Run: chmod 600"),
        ("STOKER_URL=x\n", 0o640, "other users may read it"),
        ("# a comment\n\ns3cret\n", 0o600, "line 3 is not of the form NAME=VALUE"),
        ("a b=s3cret\n", 0o600, "line 1 is not of the form NAME=VALUE"),
        ("STOKER_MODLES=s3cret\n", 0o600, "STOKER_MODLES: no such setting; did you mean STOKER_MODELS"),
    ],
)
def test_a_wrong_file_of_settings_is_refused_without_showing_it(
    machine: Machine, on: On, text: str, mode: int, said: str
) -> None:
    on("Linux")
    machine.settings_file.parent.mkdir()
    machine.settings_file.write_text(text)
    machine.settings_file.chmod(mode)
    with pytest.raises(ConfigError, match=said) as refusal:
        run("install", "--model", str(MODEL))
    assert "s3cret" not in str(refusal.value)


def test_a_value_that_no_line_can_hold_is_refused(machine: Machine, on: On, monkeypatch: pytest.MonkeyPatch) -> None:
    on("Linux")
    machine.has("systemctl")
    monkeypatch.setenv("STOKER_KERNELS", "a\nSTOKER_URL=redis://elsewhere")
    with pytest.raises(ConfigError, match="STOKER_KERNELS: it begins or ends with a space, or holds a character"):
        run("install", "--model", str(MODEL), "--url", BROKER)


@pytest.mark.parametrize("system", ["Linux", "Darwin"])
def test_the_logs_are_shown_by_the_systems_own_program(
    machine: Machine, on: On, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(system)
    for file in (machine.unit, machine.agent):
        file.parent.mkdir(parents=True)
        file.write_text("x")
    shown: list[list[str]] = []
    monkeypatch.setattr("os.execvp", lambda program, words: shown.append(words))
    run("logs", "--lines", "7")
    run("logs", "--follow")
    if system == "Linux":
        begin = ["journalctl", "--user", "--unit=stoker-worker.service"]
        assert shown == [[*begin, "--lines=7"], [*begin, "--lines=100", "--follow"]]
    else:
        log = str(machine.folder / "home" / "logs" / "worker-service.log")
        assert shown == [["tail", "-n", "7", log], ["tail", "-n", "100", "-F", log]]


def test_a_worker_takes_its_settings_from_the_file(machine: Machine) -> None:
    machine.settings_file.parent.mkdir()
    machine.settings_file.write_text(f"STOKER_URL=redis://127.0.0.1:1/0\nSTOKER_MODELS=bert={MODEL}\n")
    machine.settings_file.chmod(0o600)
    command = [sys.executable, "-m", "stoker.cli", "worker", "--env-file", str(machine.settings_file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "no answer from the broker at redis://127.0.0.1:1/0" in done.stderr
