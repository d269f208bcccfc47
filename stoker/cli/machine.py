"""Commands about this machine: up, worker, flower, status."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn, cast, get_args

import typer

from stoker.catalogue import drafts_of
from stoker.cli.options import Json, Url, connect, print_json, progress_shown
from stoker.contract import ModelCard, Presence
from stoker.contract.kinds import EMBED, GENERATE, TRAIN
from stoker.contract.names import Rule, checked, follows
from stoker.contract.presence import describe_prefix, describe_state
from stoker.contract.shown import brief, printable
from stoker.errors import BrokerUnavailable, ConfigError, UnknownModel
from stoker.local.home import make_home
from stoker.local.interrupts import hold_back
from stoker.local.storage import disk_use
from stoker.settings import KvBits, Settings, load_settings

Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Model to keep warm, a catalogue name or NAME=SOURCE; may be repeated."),
]


def up(
    model: Models = None,
    flower: Annotated[bool, typer.Option(help="Start Flower too, if it is installed.")] = True,
    gateway: Annotated[bool, typer.Option(help="Start the gateway on loopback too, if it is installed.")] = True,
    url: Url = None,
) -> None:
    """Start everything on this machine: a broker if none was chosen, a worker, Flower and the gateway. Ctrl-C ends
    all."""
    from stoker.local.stack import Stack
    from stoker.monitor.access import USER

    settings = _settings(model, url)
    with ExitStack() as leaving:
        with progress_shown("starting the broker") as report:
            stack = leaving.enter_context(Stack(settings, flower=flower, gateway=gateway, report=report))
            presence = stack.wait_until_warm()
        joined = "" if stack.joined is None else f"  (of the `stoker up` that runs already, process {stack.joined})"
        print(f"broker  {stack.settings.address.shown}{joined}")
        print(f"worker  {', '.join(card.model for card in presence.models) or 'no model'} warm on {presence.place}")
        if stack.flower_url:
            print(f"flower  {stack.flower_url}  (user {USER}, password {stack.flower_password})")
        if stack.gateway_url:
            print(f"gateway {stack.gateway_url}")
        print(f"logs    {stack.settings.logs}")
        print("\nTry in another shell:")
        for command in suggestions(presence.models):
            print(f"  {command}")
        print(at_the_end(stack.joined), flush=True)
        try:
            stack.watch(_say)
        except KeyboardInterrupt:
            print("\nstopping", flush=True)


def _say(text: str) -> None:
    """What happens meanwhile. A terminal that has closed, or a full disk, does not end what runs."""
    with suppress(OSError):
        print(text, flush=True)


def at_the_end(joined: int | None) -> str:
    """What Ctrl-C does. `joined`: the process of the `stoker up` whose broker this one uses."""
    if joined is None:
        return "Ctrl-C ends all."
    return (
        "This `stoker up` has joined the one that runs, with a worker more. Ctrl-C ends this worker alone; "
        "when the first one ends, so does this."
    )


def suggestions(models: Sequence[ModelCard]) -> list[str]:
    """Three commands that work with these models as they stand."""
    found = []
    for kind, command in (
        (EMBED, 'stoker embed "a warm model" "a cold start"'),
        (GENERATE, 'stoker generate "Why is the sky blue?"'),
        (TRAIN, "stoker init && stoker train house-style --dataset style.jsonl --steps 12 --learning-rate 0.004"),
    ):
        able = [card for card in models if kind.name in card.abilities]
        if kind is TRAIN:
            # The dataset of `stoker init` has conversations.
            able = [card for card in able if card.chat]
        if able:
            found.append(command + (f" --model {able[0].model}" if len(able) > 1 else ""))
    return [*found, "stoker status", "stoker jobs list"][:3]


def _group_name(group: str | None) -> str | None:
    """As a setting a wrong one would be blamed on the environment."""
    if group is not None and not follows(Rule.NAME, group):
        raise typer.BadParameter(f"{brief(group)} given; allowed: {Rule.NAME.allowed}.")
    return group


def _bits(bits: int | None) -> int | None:
    """The same."""
    if bits is not None and bits not in get_args(KvBits):
        raise typer.BadParameter(f"{bits} given; allowed: {', '.join(map(str, get_args(KvBits)))}.")
    return bits


def worker(
    context: typer.Context,
    model: Models = None,
    name: Annotated[
        str | None, typer.Option(help="Name of this worker; default: one of this machine and these models.")
    ] = None,
    env_file: Annotated[
        Path | None,
        typer.Option(help="File of NAME=VALUE lines, for this user alone: settings that win over the shell's."),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            callback=_group_name,
            help="Name of a worker of several ranks, each started by mlx.launch with this same command.",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Processes of this machine that train together as this worker.", min=1, max=64),
    ] = None,
    shard: Annotated[
        bool | None,
        typer.Option(
            "--shard", help="Let each rank have a part of the generating models, for those too large for one."
        ),
    ] = None,
    kv_bits: Annotated[
        int | None,
        typer.Option(
            callback=_bits,
            help="Bits in which keys and values are kept: 16 as they are computed, 8 or 4 for more rows.",
        ),
    ] = None,
    url: Url = None,
) -> None:
    """Run one worker in the foreground. `install` lets it start by itself."""
    from stoker.local.naming import take_name
    from stoker.local.service import read_environment
    from stoker.local.stack import rank_command, wait_for_broker, worker_command

    if context.invoked_subcommand is not None:
        if model or name or env_file or group or group_size or shard or kv_bits or url:
            raise typer.BadParameter(f"options stand behind the command: stoker worker {context.invoked_subcommand} …")
        return
    if env_file is not None:
        os.environ |= read_environment(env_file)
    settings = _settings(model, url, group=group, ranks=group_size, shard=shard, kv_bits=kv_bits)
    if settings.group is not None and settings.ranks > 1:
        raise ConfigError(
            "a group and a group size given; mlx.launch says how many ranks a group has. Give --group or --group-size."
        )
    make_home(settings.home)
    if settings.group is not None and os.environ.get("MLX_RANK", "0") != "0":
        _become(rank_command(), settings.environment())
    name = name or settings.group
    if name is None:
        node, lock = take_name(settings)
        # The worker that this process becomes keeps the name for as long as it lives.
        os.set_inheritable(lock.fileno(), True)
    else:
        node = f"{checked(Rule.JOB_ID, 'name', name)}@{platform.node()}"
    command = worker_command(settings, node)
    with progress_shown("looking for the broker") as report:
        wait_for_broker(settings, report)
    _become(command, settings.environment() | {"STOKER_URL": settings.address.url})


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    os.environ |= environment
    hold_back()
    os.execv(command[0], command)


def flower(
    port: Annotated[int, typer.Option(help="Port; 0: a free one.", min=0, max=65535)] = 5555,
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name that browsers reach it by, in addition to addresses and localhost; may be repeated."),
    ] = None,
    url: Url = None,
) -> None:
    """Run the monitor in the foreground: Flower with every job in it, and Stoker's own page."""
    _serve_flower(load_settings(url=url), address, port, host or [])


def _serve_flower(settings: Settings, address: str, port: int, hosts: list[str]) -> None:
    try:
        from stoker.monitor.command import serve
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        raise ConfigError(
            f"{name} is missing, which the monitor needs: pip install '.[monitor]', from a checkout."
        ) from None
    serve(settings, address, port, frozenset(name.lower() for name in hosts), lambda text: print(text, flush=True))


def _settings(
    models: list[str] | None,
    url: str | None,
    *,
    group: str | None = None,
    ranks: int | None = None,
    shard: bool | None = None,
    kv_bits: int | None = None,
) -> Settings:
    settings = load_settings(
        models=tuple(models) if models else None,
        url=url,
        group=group,
        ranks=ranks,
        shard=shard,
        kv_bits=cast(KvBits | None, kv_bits),
    )
    drafts_of(settings)
    return settings


def status(
    as_json: Json = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for a broker and a warm worker.")] = 0.0,
    disk: Annotated[bool, typer.Option("--disk", help="Show the disk that Stoker takes here instead.")] = False,
    url: Url = None,
) -> None:
    """Show the workers that are alive, and which models they hold warm. Exit code 2 if there is none."""
    if disk:
        _show_disk(as_json)
        return
    end = time.monotonic() + wait
    shown, workers = _alive(url, end)
    while not workers and time.monotonic() < end:
        time.sleep(0.1)
        shown, workers = _alive(url, end)
    if as_json:
        print_json([worker.model_dump(mode="json") for worker in workers])
    else:
        for worker in workers:
            print("\n".join(_describe(worker)))
    if not workers:
        raise UnknownModel(f"no worker is alive at {shown}. Start one with `stoker up` or `stoker worker`.")


def _alive(url: str | None, end: float) -> tuple[str, Sequence[Presence]]:
    """The broker, and its workers. Until `end` one that does not answer has none: a `stoker up` may just be starting
    it, and says where it is once it has."""
    try:
        with connect(url) as client:
            return client.settings.address.shown, client.workers()
    except BrokerUnavailable:
        if time.monotonic() >= end:
            raise
        return "", ()


def _show_disk(as_json: bool) -> None:
    settings = load_settings()
    found = disk_use(settings)
    if as_json:
        print_json([{**asdict(used), "path": str(used.path)} for used in found])
        return
    for used in found:
        kept = f"  at most {used.limit}" if used.limit else ""
        print(f"{used.bytes / 2**20:10.1f} MB  {used.files:7} files  {used.path if used.files else used.name}{kept}")
    print(
        f"{sum(used.bytes for used in found) / 2**20:10.1f} MB  in {settings.home}; `stoker clean` deletes what is old"
    )


def _describe(worker: Presence) -> Iterator[str]:
    yield (
        f"{worker.worker}  on {worker.place}, process {worker.pid}, up {worker.time - worker.started:.0f} s, "
        f"{worker.memory_bytes / 2**20:.0f} MB"
    )
    states = {state.model: state for state in worker.states}
    for card in worker.models:
        warmth = describe_state(states.get(card.model))
        yield f"  {card.model:24} {warmth}: {card.described}; takes {card.context} tokens"
    warm = {card.model for card in worker.models}
    for state in worker.states:
        if state.model not in warm:
            yield f"  {printable(state.model):24} {printable(describe_state(state))}"
    for model, names in worker.adapters.items():
        yield f"  {model:24} adapters in memory: {', '.join(names) or 'none'}"
    for prefix in worker.prefixes:
        yield f"  {prefix.model:24} pinned prefix {printable(prefix.name)}: {printable(describe_prefix(prefix))}"
    lanes = (f"{kind} {held} of {limit}" for kind, (held, limit) in worker.lanes.items())
    yield f"  jobs held: {', '.join(lanes)}"
    for kind, why in worker.held_back.items():
        yield f"  {printable(kind):24} holds no more for now: {printable(why)}"
