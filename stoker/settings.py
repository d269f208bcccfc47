"""Settings: environment variables that start with `STOKER_`, read once, with the reason each exists."""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, cast

from pydantic import Field, StringConstraints, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict
from typing_extensions import TypedDict, Unpack

from stoker.address import DEFAULT_URL, Address
from stoker.contract.base import NAME_PATTERN
from stoker.contract.kinds import ADAPTERS, EMBED, GENERATE, TRAIN
from stoker.contract.shown import brief
from stoker.contract.wording import refusal
from stoker.errors import BrokerUnavailable, ConfigError

ENV_PREFIX = "STOKER_"
#: Adapters that a worker takes in at once: each is a matter of milliseconds.
ADAPTER_JOBS = 2
KvBits: TypeAlias = Literal[16, 8, 4]


class Settings(BaseSettings):
    """The settings of a client, a worker and `stoker up`. Field `x` is the environment variable `STOKER_X`."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    #: Broker URL. Unset: the broker of a `stoker up` that runs with this home; none where none does.
    url: str | None = None
    #: Everything that Stoker keeps on disk: the embedded broker's data, adapters, logs, caches.
    home: Path = Field(default=Path("~/.stoker"), validate_default=True)
    #: Models that a worker keeps warm: names of the catalogue, or NAME=SOURCE. Comma-separated.
    models: Annotated[tuple[str, ...], NoDecode] = ("all-minilm-l6-v2", "smollm2-135m-instruct")
    #: Models that a worker loads when a job for one waits and nobody holds it, in the same forms. Comma-separated.
    on_demand: Annotated[tuple[str, ...], NoDecode] = ()
    #: Seconds without a job after which a model that was loaded so makes way. 0: it stays until others need its room.
    idle_unload: float = Field(default=300.0, ge=0, le=30 * 24 * 3600)
    #: Megabytes that the weights of a worker's models may take together when another is loaded. Unset: half of the
    #: memory that MLX may use.
    model_memory: int | None = Field(default=None, ge=1, le=4_194_304)
    #: Generation requests that a worker decodes at once.
    generate_slots: int = Field(default=16, ge=1, le=256)
    #: Megabytes for keys and values of each generating model: running requests, prompts on their way, kept prefixes.
    #: Unset: an eighth of the memory that MLX may use.
    kv_cache: int | None = Field(default=None, ge=16, le=1_048_576)
    #: Megabytes of the disk for prefixes, for the workers of one home together. 0: none is kept there. The default has
    #: room for sixteen beginnings of 2,000 tokens of an 8-billion-weight model, at 131 kB a token in 16 bits.
    prefix_disk: int = Field(default=4096, ge=0, le=4_194_304)
    #: Seconds that a job waits for the worker that has keys and values of its prompt's beginning, when another could
    #: begin with it. 0: none waits.
    placement: float = Field(default=0.25, ge=0, le=5)
    #: Seconds for which other work may hold up running streams between two of their tokens.
    stall: float = Field(default=0.25, ge=0.001, le=60)
    #: Whether generation requests draft that do not say it. Unset: on a CPU.
    lookup: bool | None = None
    #: Which model drafts for which: MODEL=DRAFT, a model of the worker's and a small one of its vocabulary, by the name
    #: of another of the worker's or of the catalogue, or by its source. Comma-separated.
    draft_models: Annotated[tuple[str, ...], NoDecode] = ()
    #: Embedding jobs that a worker takes at once; their texts share batches.
    embed_jobs: int = Field(default=16, ge=1, le=256)
    #: Training runs that a worker holds at once; they take turns.
    train_runs: int = Field(default=1, ge=1, le=8)
    #: Megabytes that they may keep in memory together between their turns. Unset: an eighth of the memory that MLX may
    #: use.
    train_memory: int | None = Field(default=None, ge=1, le=1_048_576)
    #: Seconds after which a job of a worker that went silent is given to another one.
    lease: int = Field(default=10, ge=3, le=3600)
    #: Seconds that a stopping worker gives to running jobs.
    grace: float = Field(default=30.0, ge=0, le=3600)
    #: Seconds that one step of the engine may take; then it counts as hung, and the worker ends. 0: no limit.
    step_limit: float = Field(default=300.0, ge=0, le=24 * 3600)
    #: Seconds for which a client bears a broker that does not answer before it gives up, and a request to the gateway a
    #: model that no worker serves.
    patience: float = Field(default=30.0, ge=0, le=3600)
    #: Who sends: clients of one queue share it fairly, and each has a limit of its own (`stoker jobs policy`).
    client_key: Annotated[str, StringConstraints(pattern=NAME_PATTERN)] = "default"
    #: Seconds that a client waits until a full queue accepts its job. 0: it gets `QueueFull` at once.
    queue_wait: float = Field(default=0.0, ge=0, le=24 * 3600)
    #: Share of a worker's time that training gets while generation waits too; alone it gets all.
    train_share: float = Field(default=0.2, ge=0.01, le=0.9)
    #: Megabytes that the adapters of one model may take in memory; those in use may take more.
    adapter_memory: int = Field(default=512, ge=1, le=65536)
    #: Where workers keep adapters for each other: a URL that fsspec knows. Unset: the broker. Gateways keep files of
    #: clients there too; unset: in `home`.
    artifacts: str | None = None
    #: Whether the checkpoints of training runs go there too, so that any worker can go on with a run. `auto`: except
    #: where this worker's broker is that of its own home, and no other worker trains the model.
    checkpoints: Literal["auto", "always", "never"] = "auto"
    #: Megabytes that the checkpoints of one run may take there; a run that needs more keeps its own on its disk.
    checkpoint_megabytes: int = Field(default=512, ge=1, le=1_048_576)
    #: Seconds at least between two uploads of one run.
    checkpoint_pause: float = Field(default=0.0, ge=0, le=24 * 3600)
    #: Folder whose files training jobs may name as their dataset. Unset: none may.
    data: Path | None = None
    #: What weights are computed in. Unset: float32 on a CPU, the file's own 16 bits on a GPU.
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    #: Weights of generating models: `4bit`, `8bit`, `keep` (as the file has them), `none` (dense). Unset: `none` on a
    #: CPU, whose quantized products are slow, `keep` on a GPU.
    quantize: Literal["4bit", "8bit", "keep", "none"] | None = None
    #: Weights that share a scale, when `quantize` is `4bit` or `8bit`.
    group_size: Literal[32, 64, 128] = 64
    #: Bits in which keys and values are kept: 16 as they are computed; 8 or 4, in groups, for more rows in the memory.
    kv_bits: KvBits = 16
    #: Processes of this machine that train together as one worker (`stoker worker --group-size`).
    ranks: int = Field(default=1, ge=1, le=64)
    #: Name of a worker whose ranks `mlx.launch` starts, on one host or several (`stoker worker --group`).
    group: Annotated[str, StringConstraints(pattern=NAME_PATTERN)] | None = None
    #: Whether the ranks of a group share its generating models, each with a part of the weights (`stoker worker
    #: --shard`). Else each has all of them.
    shard: bool = False
    #: Where a worker serves its metrics: a port of loopback, or HOST:PORT. Unset: nowhere; the monitor has them.
    metrics: str | None = None
    #: Fused kernels: `auto`, `off`, or names. Read by the engine.
    kernels: str = "auto"
    #: The log: for people (`human`), a JSON object a line (`json`), or by whether it goes to a terminal (`auto`).
    log: Literal["auto", "human", "json"] = "auto"
    #: The least level of what is logged.
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    #: Megabytes that one log file of `stoker up` may have, and how many that were full are kept of each.
    log_size: int = Field(default=8, ge=1, le=4096)
    log_files: int = Field(default=3, ge=1, le=100)
    #: Where a worker sends spans of its jobs: nowhere, to a collector (OpenTelemetry's own variables), to its log.
    traces: Literal["off", "otlp", "log"] = "off"
    #: How much is kept of training runs that ended: how many, for how many days, and with how many megabytes. The
    #: newest of each adapter stays, and those that are pinned.
    keep_runs: int = Field(default=200, ge=1, le=100_000)
    keep_days: int = Field(default=90, ge=1, le=36_500)
    keep_megabytes: int = Field(default=20_480, ge=1, le=1_048_576)
    #: Linux only: `off`, or the path of an OpenBLAS that MLX shall use.
    blas: str | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """No files: each further source looks through all fields, and a client is made in as long as that takes."""
        return init_settings, env_settings

    @field_validator("models", "on_demand", "draft_models", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if not value.strip():
            raise ValueError("it is blank; a comma alone is no model")
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("group_size", "kv_bits", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        # Superscripts are digits too, and Python reads no number of thousands of them.
        plain = isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10
        return int(str(value)) if plain else value

    @field_validator("metrics")
    @classmethod
    def _listenable(cls, value: str | None) -> str | None:
        if value is not None and _host_and_port(value) is None:
            raise ValueError("expected a port (9464), host:port or [ipv6]:port; ports go from 1 to 65535")
        return value

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        try:
            return value.expanduser().absolute()
        except (RuntimeError, OSError) as error:  # no such user, or a working folder that is gone
            raise ValueError(f"cannot be found ({error}); give a whole path") from None

    def __repr_args__(self) -> Iterator[tuple[str | None, object]]:
        """As pydantic's, without the logins of URLs: a repr may stand in any log."""
        for name, value in super().__repr_args__():
            yield name, _without_login(value) if name in ("url", "artifacts") and isinstance(value, str) else value

    @property
    def address(self) -> Address:
        """Raises `BrokerUnavailable` where no broker was chosen: what listens at the usual address may be that of
        another home, or another program's Redis."""
        url = self.chosen_url
        if url is None:
            raise BrokerUnavailable(
                f"no broker was chosen: STOKER_URL is not set, and no `stoker up` runs with STOKER_HOME={self.home}. "
                f"Start that, or name a broker that runs, as in STOKER_URL={DEFAULT_URL}."
            )
        return Address.parse(url, self.url_name)

    @property
    def shown_address(self) -> str:
        """Where the broker is, for people; also where none was chosen, or it has ended."""
        url = self.chosen_url
        return (
            f"`stoker up` with STOKER_HOME={self.home}, which has ended,"
            if url is None
            else Address.parse(url, self.url_name).shown
        )

    @property
    def chosen_url(self) -> str | None:
        """The broker that was chosen: by `STOKER_URL`, or by a `stoker up` that runs. None: no broker was."""
        if self.url:
            return self.url
        running = self.running_broker
        return None if running is None else running.url

    @property
    def url_name(self) -> str:
        """What named `url`, as errors say it: the variable, or else the option or the argument of that name."""
        return "url" if self.url and os.environ.get("STOKER_URL") != self.url else "STOKER_URL"

    @property
    def url_option(self) -> str:
        """`url_name`, in a command's errors."""
        return self.url_name if self.url_name == "STOKER_URL" else "--url"

    @property
    def running_broker(self) -> RunningBroker | None:
        """That of a `stoker up` that runs with this home."""
        return _running_broker(self.broker_file, self.broker_lock)

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Host and port; None: metrics are not served."""
        return None if self.metrics is None else _host_and_port(self.metrics)

    @property
    def slots(self) -> dict[str, int]:
        """Kind of job → how many of it a worker holds at once."""
        return {
            GENERATE.name: self.generate_slots,
            EMBED.name: self.embed_jobs,
            TRAIN.name: self.train_runs,
            ADAPTERS.name: ADAPTER_JOBS,
        }

    @property
    def extra_slots(self) -> int:
        """Generation jobs that a worker may hold beyond its slots while those have jobs of a worse priority."""
        return max(1, self.generate_slots // 4)

    def environment(self) -> dict[str, str]:
        """These settings as environment variables, for a child process, over all that it would inherit."""
        # An empty variable says nothing. So it is what has no value, and of a list without entries it would be the
        # default.
        return {
            ENV_PREFIX + name.upper(): (",".join(value) or ",") if isinstance(value, tuple) else _written(value)
            for name, value in self.model_dump().items()
        }

    def alone(self) -> Settings:
        """These, for a broker and workers of their own that share nothing with others of this machine or fleet: no
        store, port, group or data, and no other models."""
        return self.model_copy(
            update={
                "url": None, "artifacts": None, "metrics": None, "data": None, "group": None, "ranks": 1,
                "shard": False, "on_demand": (), "draft_models": (),
            }
        )  # fmt: skip

    @property
    def adapters(self) -> Path:
        return self.home / "adapters"

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    @property
    def prefixes(self) -> Path:
        return self.home / "prefixes"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def broker_file(self) -> Path:
        """Where `stoker up` writes the address of the broker that it started, for other shells to find it."""
        return self.home / "broker.json"

    @property
    def broker_lock(self) -> Path:
        """What a `stoker up` has locked for as long as its broker runs."""
        return self.home / "broker" / "lock"


class Overrides(TypedDict, total=False):
    """What a caller may say instead of the environment: the fields of `Settings`; None says nothing."""

    url: str | None
    home: Path | None
    models: Sequence[str] | None
    on_demand: Sequence[str] | None
    idle_unload: float | None
    model_memory: int | None
    generate_slots: int | None
    kv_cache: int | None
    prefix_disk: int | None
    placement: float | None
    stall: float | None
    lookup: bool | None
    draft_models: Sequence[str] | None
    embed_jobs: int | None
    train_runs: int | None
    train_memory: int | None
    lease: int | None
    grace: float | None
    step_limit: float | None
    patience: float | None
    client_key: str | None
    queue_wait: float | None
    train_share: float | None
    adapter_memory: int | None
    artifacts: str | None
    checkpoints: Literal["auto", "always", "never"] | None
    checkpoint_megabytes: int | None
    checkpoint_pause: float | None
    data: Path | None
    dtype: Literal["float32", "float16", "bfloat16"] | None
    quantize: Literal["4bit", "8bit", "keep", "none"] | None
    group_size: Literal[32, 64, 128] | None
    kv_bits: KvBits | None
    ranks: int | None
    group: str | None
    shard: bool | None
    metrics: str | None
    kernels: str | None
    log: Literal["auto", "human", "json"] | None
    log_level: Literal["debug", "info", "warning", "error"] | None
    log_size: int | None
    log_files: int | None
    traces: Literal["off", "otlp", "log"] | None
    keep_runs: int | None
    keep_days: int | None
    keep_megabytes: int | None
    blas: str | None


def _host_and_port(text: str) -> tuple[str, int] | None:
    """`9464`, `127.0.0.1:9464`, `localhost:9464` or `[::1]:9464`; None for anything else."""
    found = re.fullmatch(r"(?:(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9.-]+)):)?([0-9]{1,5})", text)
    if found is None or not 1 <= int(found[3]) <= 65535:
        return None
    return found[1] or found[2] or "127.0.0.1", int(found[3])


def _written(value: object) -> str:
    return "" if value is None else str(value)


def _without_login(url: str) -> str:
    """A URL up to its query, with stars for a login."""
    scheme, separator, rest = url.partition("://")
    _, at, host = rest.partition("?")[0].rpartition("@")
    return f"{scheme}{separator}{'***@' if at else ''}{host}"


def load_settings(**overrides: Unpack[Overrides]) -> Settings:
    """Read the environment; `overrides` that are not None win. Raises `ConfigError` for any wrong value or name."""
    _refuse_unknown_names(os.environ)
    try:
        return Settings.model_validate({name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ENV_PREFIX + "_".join(str(part) for part in first["loc"]).upper()
        # Validators of settings say what is wrong alone.
        given = f"{brief(first['input'])} given; " if first["type"] == "value_error" else ""
        raise ConfigError(f"{name}: {given}{refusal(first)}.") from None


def settings_of(environment: Mapping[str, str]) -> Settings:
    """What `load_settings` is in a process with these variables in addition to this one's, which they replace."""
    _refuse_unknown_names(environment)
    settings = {name: value for name, value in environment.items() if _is_setting(name) and value}
    said = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in settings.items()}
    return load_settings(**cast(Overrides, said))


def _is_setting(name: str) -> bool:
    return name.startswith(ENV_PREFIX)


def _refuse_unknown_names(names: Iterable[str]) -> None:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(names):
        if _is_setting(name) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}."
            raise ConfigError(f"{name}: no such setting; {hint}")


@dataclass(frozen=True)
class RunningBroker:
    """An embedded broker; `pid`: of the `stoker up` that started it, and with which it ends."""

    url: str
    pid: int


def _running_broker(file: Path, lock: Path) -> RunningBroker | None:
    """The embedded broker of a `stoker up` that still runs, else None."""
    try:
        record = json.loads(_read_small(file))
        os.kill(record["pid"], 0)
        # After a power cut another process may have that number.
        if not _is_locked(lock):
            return None
        Address.parse(record["url"])
        return RunningBroker(str(record["url"]), int(record["pid"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, ConfigError):
        # No file, one that no `stoker up` wrote, or a process that is gone: then nobody runs a broker here.
        return None


def _is_locked(path: Path) -> bool:
    """Whether a process has the lock of this file. To ask is to share it for a moment, which hinders no other that
    asks. Raises `OSError` for a file that is not there, or where the file system has no locks."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _read_small(path: Path) -> bytes:
    """The beginning of a file; of a pipe or a device, nothing."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        return file.read(1 << 16) if stat.S_ISREG(os.fstat(handle).st_mode) else b""
