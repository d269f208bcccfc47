"""The command tree."""

from __future__ import annotations

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


_COMMANDS: tuple[Callable[..., None], ...] = (
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
for _command in _COMMANDS:
    app.command()(_command)

workers = typer.Typer(invoke_without_command=True, callback=machine.worker)
for _command in (service.install, service.uninstall, service.logs):
    workers.command()(_command)
app.add_typer(workers, name="worker")

queue = typer.Typer(no_args_is_help=True, help="Jobs that wait or run, and dead letters.")
queue.command("list")(jobs.list_jobs)
queue.command("dead")(jobs.list_dead)
queue.command("retry")(jobs.retry)
queue.command("cancel")(jobs.cancel_many)
queue.command("purge")(jobs.purge)
queue.command("policy")(policy.show_or_set)
app.add_typer(queue, name="jobs")

access = typer.Typer(no_args_is_help=True, help="Keys for the gateway.")
access.command("create")(keys.create)
access.command("list")(keys.list_keys)
access.command("revoke")(keys.revoke)
app.add_typer(access, name="keys")

models = typer.Typer(no_args_is_help=True, help="Models that a worker can serve.")
models.command("list")(models_commands.list_models)
for _command in (
    models_commands.pull,
    models_commands.inspect,
    models_commands.quantize,
    models_commands.verify,
    models_commands.load,
    models_commands.unload,
    models_commands.pin,
    models_commands.unpin,
):
    models.command()(_command)
app.add_typer(models, name="models")

adapters = typer.Typer(no_args_is_help=True, help="Adapters: their versions, and which one serves.")
adapters.command("list")(adapters_commands.list_adapters)
for _command in (
    adapters_commands.show,
    adapters_commands.load,
    adapters_commands.promote,
    adapters_commands.rollback,
    adapters_commands.deactivate,
    adapters_commands.unload,
    adapters_commands.remove,
    adapters_commands.export,
):
    adapters.command()(_command)
app.add_typer(adapters, name="adapters")

prefix = typer.Typer(no_args_is_help=True, help="System prompts, and other beginnings, that workers keep ready.")
prefix.command("pin")(prefixes_commands.pin)
prefix.command("list")(prefixes_commands.list_prefixes)
prefix.command("unpin")(prefixes_commands.unpin)
app.add_typer(prefix, name="prefix")

training = typer.Typer(no_args_is_help=True, help="Training runs whose folders are on this machine.")
training.command("list")(runs.list_runs)
training.command("show")(runs.show)
training.command("plot")(runs.plot)
training.command("attach")(runs.attach)
training.command("remove")(runs.remove)
training.command("pin")(runs.pin)
app.add_typer(training, name="runs")

kernels = typer.Typer(no_args_is_help=True, help="Fused kernels of this machine.")
kernels.command("check")(machine.check_kernels)
kernels.command("bench")(machine.bench_kernels)
app.add_typer(kernels, name="kernels")
