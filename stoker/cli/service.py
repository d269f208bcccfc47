"""The worker as a service that starts by itself: install, uninstall, logs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Annotated
from urllib.parse import parse_qsl, urlencode

import typer

from stoker.address import FILES, Address
from stoker.catalogue import draft_from_anywhere, drafts_of, from_anywhere
from stoker.cli.options import readable
from stoker.contract.names import Rule, checked
from stoker.errors import ConfigError
from stoker.local.home import make_home
from stoker.local.service import Service, read_environment, write_environment
from stoker.local.service_manager import install as install_service
from stoker.local.service_manager import installed, manager
from stoker.local.service_manager import uninstall as uninstall_service
from stoker.settings import ENV_PREFIX, load_settings, settings_of

Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Model to keep warm, a catalogue name or NAME=SOURCE; may be repeated."),
]


def install(
    model: Models = None,
    name: Annotated[str | None, typer.Option(help="Name of this worker; default: as of `stoker worker`.")] = None,
    url: Annotated[
        str | None, typer.Option(callback=readable, help="Broker, without a password; default: STOKER_URL.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the service's definition; change nothing.")] = False,
) -> None:
    """Let a worker start by itself and come back: an agent of launchd, a user unit of systemd. Settings of this shell
    (STOKER_…) are kept for it, in a file that other users cannot read. Again: it takes the new ones and starts anew."""
    from stoker.local.stack import require_workers

    found = load_settings()
    environment = _environment(Service.of(found, name), model, url)
    settings = settings_of(environment)
    drafts_of(settings)
    if name is not None:
        checked(Rule.JOB_ID, "name", name)
    require_workers()
    service, of = Service.of(settings, name), manager()
    print(f"{of.file}; settings in {service.environment_file}: {', '.join(sorted(environment))}", file=sys.stderr)
    if dry_run:
        print(of.definition(service), end="")
        return
    of.check()
    # Without a broker it would end at each start.
    shown = settings.address.shown
    make_home(settings.home)
    # By its own settings, which are written over.
    former = installed(of)
    try:
        write_environment(service.environment_file, environment)
    except OSError as error:
        raise ConfigError(f"{service.environment_file}: cannot be written ({error.strerror}).") from None
    install_service(of, service, former)
    print(f"a worker of {shown} is installed, and starts now: `stoker worker logs --follow` shows it")
    print(of.note)


def uninstall() -> None:
    """Stop the worker that was installed (it drains first), and delete its service and its settings. Its log stays."""
    of = manager()
    service = uninstall_service(of)
    if service is None:
        print(f"no worker is installed: there is no {of.file}")
    else:
        print(f"the worker of STOKER_HOME={service.folder} is uninstalled")


def logs(
    lines: Annotated[int, typer.Option(help="Lines to begin with.", min=1, max=1_000_000)] = 100,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes, until Ctrl-C.")] = False,
) -> None:
    """Show what the installed worker wrote."""
    of = manager()
    service = installed(of)
    if service is None:
        raise ConfigError(f"no worker is installed: there is no {of.file}. `stoker worker install` does it.")
    command = of.logs(service, lines, follow)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise ConfigError(f"`{' '.join(command)}` cannot be run ({error.strerror}).") from None


def _environment(service: Service, model: list[str] | None, url: str | None) -> dict[str, str]:
    """The worker's variables: what an earlier install wrote, the settings of this shell, and the options."""
    file = service.environment_file
    if url is not None and "***" in Address.parse(url).shown:
        raise ConfigError(
            f"--url: a password on a command line can be read by every user of this machine. Write it as STOKER_URL "
            f"into {file}, or set it for this shell."
        )
    found = read_environment(file) if file.exists() else {}
    found |= {key: value for key, value in os.environ.items() if key.startswith(ENV_PREFIX) and value}
    found[f"{ENV_PREFIX}HOME"] = str(service.folder)
    if model:
        found[f"{ENV_PREFIX}MODELS"] = ",".join(model)
    if url is not None:
        found[f"{ENV_PREFIX}URL"] = url
    return found | _from_anywhere(found)


def _from_anywhere(environment: dict[str, str]) -> dict[str, str]:
    """The settings among these that name files, as they are in any folder: the service does not run in this one."""
    said = {key: value for name in _MEANT if (value := environment.get(key := f"{ENV_PREFIX}{name}"))}
    return {key: _MEANT[key.removeprefix(ENV_PREFIX)](value) for key, value in said.items()}


def _models(value: str) -> str:
    return _each(value, from_anywhere)


def _drafts(value: str) -> str:
    return _each(value, draft_from_anywhere)


def _each(value: str, meant: Callable[[str], str]) -> str:
    """A comma alone is no model, where nothing would be the default."""
    return ",".join(meant(part.strip()) for part in value.split(",") if part.strip()) or ","


def _path(value: str) -> str:
    return os.path.abspath(os.path.expanduser(value))


def _store(value: str) -> str:
    """A URL says by itself where it leads; fsspec takes anything else for a folder."""
    return value if "://" in value or "::" in value else _path(value)


def _broker(value: str) -> str:
    """A URL names files for TLS, where it names any."""
    where, _, query = value.partition("?")
    options = parse_qsl(query, keep_blank_values=True)
    if not any(name in FILES for name, _ in options):
        return value
    return f"{where}?{urlencode([(name, _path(said) if name in FILES else said) for name, said in options])}"


def _library(value: str) -> str:
    """What is no path is a word (`off`), or is looked for by the system."""
    return _path(value) if "/" in value else value


#: The settings that name files, each with what it means in any folder.
_MEANT: Mapping[str, Callable[[str], str]] = {
    "MODELS": _models,
    "ON_DEMAND": _models,
    "DRAFT_MODELS": _drafts,
    "DATA": _path,
    "ARTIFACTS": _store,
    "BLAS": _library,
    "URL": _broker,
}
