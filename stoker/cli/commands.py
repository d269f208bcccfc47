"""The command tree."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated

import typer

import stoker
from stoker.cli import adapters as adapters_commands
from stoker.cli import (
    chat,
    demo,
    doctor,
    embed,
    generate,
    housekeeping,
    init,
    jobs,
    kernels,
    keys,
    machine,
    policy,
    rerank,
    runs,
    serve,
    service,
    train,
    verify,
)
from stoker.cli import models as models_commands
from stoker.cli import prefixes as prefixes_commands

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    # rich cuts the names of options off where they are long or the terminal is narrow.
    rich_markup_mode=None,
    help="A job queue that keeps a language model hot: embed, generate and train on one warm base.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"stoker {stoker.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def _add(parent: typer.Typer, *commands: Callable[..., None], name: str | None = None) -> None:
    """The first sentence of each, whole, is its line in the list of commands. `name`: of one that is called otherwise
    than its function."""
    for command in commands:
        said = " ".join((inspect.getdoc(command) or "").split())
        parent.command(name, short_help=said.partition(". ")[0].removesuffix(".") + ".")(command)


def _group(name: str, said: str) -> typer.Typer:
    group = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help=said)
    app.add_typer(group, name=name, short_help=said)
    return group


_add(
    app,
    embed.embed,
    rerank.rerank,
    generate.generate,
    chat.chat,
    train.train,
    jobs.cancel,
    machine.status,
    machine.up,
    machine.flower,
    serve.serve,
    doctor.doctor,
    verify.verify,
    housekeeping.clean,
    housekeeping.backup,
    housekeeping.restore,
    init.init,
    demo.demo,
)

workers = typer.Typer(rich_markup_mode=None, invoke_without_command=True, callback=machine.worker)
_add(workers, service.install, service.uninstall, service.logs)
app.add_typer(workers, name="worker")

queue = _group("jobs", "Jobs that wait or run, and dead letters.")
_add(queue, jobs.list_jobs, name="list")
_add(queue, jobs.list_dead, name="dead")
_add(queue, jobs.retry)
_add(queue, jobs.cancel_many, name="cancel")
_add(queue, jobs.purge)
_add(queue, policy.show_or_set, name="policy")

access = _group("keys", "Keys for the gateway.")
_add(access, keys.create)
_add(access, keys.list_keys, name="list")
_add(access, keys.revoke)

models = _group("models", "Models that a worker can serve.")
_add(models, models_commands.list_models, name="list")
_add(
    models,
    models_commands.pull,
    models_commands.inspect,
    models_commands.quantize,
    models_commands.verify,
    models_commands.load,
    models_commands.unload,
    models_commands.pin,
    models_commands.unpin,
)

adapters = _group("adapters", "Adapters: their versions, and which one serves.")
_add(adapters, adapters_commands.list_adapters, name="list")
_add(
    adapters,
    adapters_commands.show,
    adapters_commands.load,
    adapters_commands.promote,
    adapters_commands.rollback,
    adapters_commands.deactivate,
    adapters_commands.unload,
    adapters_commands.remove,
    adapters_commands.export,
)

prefix = _group("prefix", "System prompts, and other beginnings, that workers keep ready.")
_add(prefix, prefixes_commands.pin)
_add(prefix, prefixes_commands.list_prefixes, name="list")
_add(prefix, prefixes_commands.unpin)

training = _group("runs", "Training runs whose folders are on this machine.")
_add(training, runs.list_runs, name="list")
_add(training, runs.show, runs.plot, runs.attach, runs.remove, runs.pin)

_add(_group("kernels", "Fused kernels of this machine."), kernels.check, kernels.bench)
