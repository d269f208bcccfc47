"""The side of a rank behind the first one: it does what rank 0 says, and ends when that is gone."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation.followed import FollowedLane
from engine.generation.lane import GenerateLane
from engine.generation.leading import witness
from engine.models.shard import Shard
from engine.training.followed import FollowedRun
from engine.training.ranks import MlxRanks, text_of_rank_0
from stoker.errors import ConfigError
from stoker.settings import Settings
from workers.ending import EXIT_CODE, end_process
from workers.group import meeting
from workers.group.channel import Channel
from workers.group.plan import (
    Admit,
    Advance,
    Begin,
    Command,
    Done,
    Drop,
    Forget,
    Holds,
    Keep,
    Lend,
    Measured,
    NotOfThePlan,
    Open,
    Stop,
    Turn,
)
from workers.group.starting import Place

log = logging.getLogger(__name__)


class Follower:
    """The thread that calls is the one that touches MLX. `load`: the models of this process, or its part of them. `end`
    ends it."""

    def __init__(
        self,
        settings: Settings,
        place: Place,
        load: Callable[[Shard | None], Mapping[str, LoadedModel]],
        end: Callable[[int], object] = end_process,
    ) -> None:
        self._settings, self._place, self._load, self._end = settings, place, load, end
        self._ranks = MlxRanks(place.rank, place.size)
        self._commands: queue.SimpleQueue[Command | Stop] = queue.SimpleQueue()
        self._runs: dict[str, FollowedRun] = {}
        self._models: Mapping[str, LoadedModel] = {}
        self._lanes: dict[str, FollowedLane] = {}
        self._pools: dict[str, AdapterPool] = {}
        #: What rank 0's clock said and this one's has not yet.
        self._seconds: queue.SimpleQueue[float] = queue.SimpleQueue()
        self._adapters = AdapterStore(settings.adapters)

    def run(self) -> None:
        """Until rank 0 says that it is over. Raises what ends this rank before."""
        meeting.meet(self._ranks, self._place)
        channel = self._connected()
        try:
            self._models = self._load(self._ranks.shard if self._settings.shard else None)
            channel.say(Holds(models={name: model.digest for name, model in self._models.items()}))
            while not isinstance(command := self._commands.get(), Stop):
                channel.say(Done(number=command.number, witness=self._do(command)))
        except Exception as error:
            channel.say(Stop(why=f"{type(error).__name__}: {error}"[:1000]))
            raise
        if command.why:
            raise ConfigError(f"rank 0 has ended the group: {command.why}")

    def _connected(self) -> Channel:
        """The channel to rank 0, which has heard who this is."""
        address = meeting.Address.read(text_of_rank_0(self._ranks))
        try:
            connected = address.connect()
        except OSError as error:
            raise ConfigError(
                f"rank {self._place.rank} does not reach rank 0 ({error}). Its host must be reachable at every port, "
                f"at the address that the file of hosts names first: {self._place.host}."
            ) from None
        channel = Channel(connected)
        channel.say(meeting.introduction(self._settings, address.secret, self._place.rank))
        channel.keep_alive()
        threading.Thread(target=self._listen, args=(channel, address), name="rank 0", daemon=True).start()
        return channel

    def _do(self, command: Command) -> str:
        """A command of rank 0; the witness of a turn."""
        if isinstance(command, Begin):
            header = command.header
            self._runs[header.run] = FollowedRun(self._models[header.model].decoder, header, self._ranks)
        elif isinstance(command, Advance):
            return self._runs[command.run].advance()
        elif isinstance(command, Turn):
            return witness(self._lanes[command.model].turn(lookahead=command.lookahead))
        elif isinstance(command, Admit):
            self._lanes[command.model].admit(command.admission)
        elif isinstance(command, Drop):
            self._lanes[command.model].drop(command.jobs)
        elif isinstance(command, Keep):
            self._runs[command.run].keep()
        elif isinstance(command, Open):
            self._open(command)
        elif isinstance(command, Lend):
            self._keep(command)
        elif isinstance(command, Forget):
            self._lanes[command.model].forget(command.name, command.version)
        else:
            self._runs.pop(command.run, None)
        return ""

    def _open(self, command: Open) -> None:
        model = self._models[command.model]
        pool = AdapterPool(model, self._adapters, self._settings.adapter_memory << 20)
        lane = GenerateLane(model, pool, command.limits, clock=self._seconds.get, agreed=self._agreed)
        lane.warm()
        self._lanes[command.model], self._pools[command.model] = FollowedLane(lane), pool

    def _agreed(self, own: bool) -> bool:
        """What rank 0 found, where ranks may find something else."""
        return bool(self._seconds.get())

    def _keep(self, command: Lend) -> None:
        """Have the files of an adapter, whose version is the same wherever it lies."""
        lent, shapes = command.adapter, self._models[command.model].linear_shapes
        weights = lent.receive(self._ranks, shapes)
        self._adapters.adopt(command.model, lent.name, weights, {"name": lent.name}, lent.version, shapes)
        self._lanes[command.model].forget(lent.name, lent.version)
        self._pools[command.model].measure(lent.name, lent.version, weights)

    def _listen(self, channel: Channel, address: meeting.Address) -> None:
        """Until rank 0 is gone, and this process with it. In a thread of its own."""
        why = "it has closed its connection"
        try:
            for word in channel.words():
                if isinstance(word, Measured):
                    self._seconds.put(word.seconds)
                elif isinstance(word, Command | Stop):
                    self._commands.put(word)
                if isinstance(word, Stop):
                    return
        except TimeoutError:
            why = "no sign of life"
            address.kill()
        except (OSError, NotOfThePlan) as error:
            why = str(error)
        log.critical("rank 0 is gone (%s): this rank ends too (exit code %d)", why, EXIT_CODE)
        self._end(EXIT_CODE)
