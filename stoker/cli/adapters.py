"""`stoker adapters`: the registry."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from stoker.adapters import facts
from stoker.broker.registry import AdapterEntry, wanted
from stoker.catalogue import model_name, parse_model
from stoker.cli.engine_tool import ask_engine
from stoker.cli.options import Json, Model, Url, connect, print_json
from stoker.contract.names import Rule, checked, follows
from stoker.contract.shown import printable
from stoker.errors import ConfigError, UnknownAdapter
from stoker.files.durable import remove_folder
from stoker.settings import load_settings

Version = Annotated[str, typer.Argument(help="NAME@VERSION.", metavar="ADAPTER")]
Adapter = Annotated[str, typer.Argument(help="NAME.", metavar="ADAPTER")]


def list_adapters(model: Model = None, as_json: Json = False, url: Url = None) -> None:
    """List the adapters of a model, their versions, and which one serves."""
    with connect(url) as client:
        # The registry keeps the names of those that were removed, for the numbers of their versions.
        found = [entry for entry in client.adapters.list(model) if entry.versions]
    if as_json:
        print_json([_plain(entry) for entry in found])
        return
    for entry in found:
        _show(entry)


def show(adapter: Adapter, model: Model = None, as_json: Json = False, url: Url = None) -> None:
    """Show one adapter: its versions, which one serves, and which ones did."""
    wanted(adapter, version=False)
    with connect(url) as client:
        entry = client.adapters.get(adapter, model)
    print_json(_plain(entry)) if as_json else _show(entry)


def load(
    name: Annotated[str, typer.Argument(help="The name that it shall have.")],
    folder: Annotated[Path, typer.Argument(help="PEFT's folder, mlx-lm's, or a checkpoint of a run.")],
    model: Model = None,
    promote: Annotated[bool, typer.Option(help="Serve it at once.")] = True,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Take an adapter that was made elsewhere into the registry."""
    with connect(url) as client:
        result = client.adapters.load(name, folder, model=model, promote=promote).result()
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        print(f"adapter {result.adapter}@{result.version}: {result.method}, rank {result.rank}")


def promote(adapter: Version, model: Model = None, url: Url = None) -> None:
    """Let a version serve every request for the name."""
    with connect(url) as client:
        _say(client.adapters.promote(adapter, model))


def rollback(adapter: Adapter, model: Model = None, url: Url = None) -> None:
    """Let the version serve that served before."""
    with connect(url) as client:
        _say(client.adapters.rollback(adapter, model))


def deactivate(adapter: Adapter, model: Model = None, url: Url = None) -> None:
    """Let no version serve the bare name."""
    with connect(url) as client:
        _say(client.adapters.deactivate(adapter, model))


def unload(adapter: Version, model: Model = None, url: Url = None) -> None:
    """Take a version that does not serve out of the registry."""
    with connect(url) as client:
        client.adapters.unload(adapter, model)
    print(f"{adapter}: unloaded")


def remove(
    adapter: Adapter,
    model: Model = None,
    url: Url = None,
) -> None:
    """Take all versions of an adapter out of the registry and off this machine's disk."""
    wanted(adapter, version=False)
    with connect(url) as client:
        entry = client.adapters.get(adapter, model)
        if entry.serving is not None:
            client.adapters.deactivate(adapter, entry.model)
        for version in entry.versions:
            client.adapters.unload(f"{adapter}@{version}", entry.model)
    folder = load_settings().adapters / entry.model / entry.name
    try:
        for gone in _of_those(folder, max(entry.versions, default=0)):
            remove_folder(gone)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be deleted ({error}). The registry has let go of it.") from None
    print(f"{adapter}: {len(entry.versions)} versions removed")


def _of_those(folder: Path, newest: int) -> list[Path]:
    """What there is of versions up to `newest`. A job may make a newer one meanwhile, which stays."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    if any(int(path.name) > newest for path in found if follows(Rule.VERSION, path.name)):
        return [path for path in found if follows(Rule.VERSION, path.name) and int(path.name) <= newest]
    return [folder] if found else []


def export(
    adapter: Version,
    base: Annotated[str, typer.Argument(help="The base: a folder with config.json and safetensors, or its name.")],
    target: Annotated[Path, typer.Argument(help="Folder to be written; must not exist.")],
    model: Annotated[str | None, typer.Option(help="The name under which workers serve the base.")] = None,
    as_json: Json = False,
) -> None:
    """Write a copy of the base with the adapter merged in, from this machine's disk."""
    name, version = wanted(adapter, version=True)
    served, sources = parse_model(base)
    served = served if model is None else checked(Rule.NAME, "model", model_name(model))
    versions = load_settings().adapters / served / name
    store = versions / str(version)
    if not store.is_dir():
        raise UnknownAdapter(
            f"adapter '{adapter}' given; of those of {name} for {served} this machine's disk has: {_listed(versions)}. "
            f"Another base goes by --model; a worker that generates with {adapter} here puts it on this disk."
        )
    found = ask_engine("export", sources=sources, adapter=str(store), target=str(target))
    print_json(found) if as_json else print(f"{found['path']}: {found['layers']} layers merged")


def _listed(versions: Path) -> str:
    found = versions.iterdir() if versions.is_dir() else ()
    return ", ".join(sorted((path.name for path in found if follows(Rule.VERSION, path.name)), key=int)) or "none"


def _plain(entry: AdapterEntry) -> dict[str, Any]:
    return {**asdict(entry), "versions": {str(number): dict(known) for number, known in entry.versions.items()}}


def _say(entry: AdapterEntry) -> None:
    print(f"{entry.name}: " + (f"version {entry.serving} serves" if entry.serving else "no version serves"))


def _show(entry: AdapterEntry) -> None:
    print(f"{entry.name}  ({entry.model})")
    for number, known in entry.versions.items():
        mark = "serves" if number == entry.serving else ""
        line = f"  {entry.name}@{number:<4} {_moment(known.get('time', 0)):16}  {facts(known):44} {mark}"
        print(printable(line).rstrip())


def _moment(seconds: Any) -> str:
    """When a version was made; another program may have written anything there."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return "?"
