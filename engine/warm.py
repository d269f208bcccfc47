"""The models that an engine holds warm, with the lanes that run their jobs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.adapters.lane import AdapterLane
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.embedding.lane import EmbedLane
from engine.embedding.rerank_lane import RerankLane
from engine.fair import FairShare, weights_by_kind
from engine.generation.lane import GenerateLane
from engine.generation.leading import LeadingLane, Sharing
from engine.generation.limits import GenerationLoad, LaneLimits
from engine.lane import AnyLane
from engine.prefixes.disk import PrefixDisk
from engine.training.lane import TrainLane
from engine.training.ranks import ALONE, Group
from stoker.contract import GenerateRequest, ModelCard
from stoker.contract.kinds import KINDS

log = logging.getLogger(__name__)
Key = tuple[str, str]


class WarmModels:
    """`hold` and `let_go` run in the engine's thread; what they replace, any thread may be reading, so nothing is
    changed in place.

    `runs`: where training runs have their folders. `adapter_bytes`: what adapters of one model may take in memory.
    `group`: the ranks that share training runs; `sharing`: those that share models of which this process has a part.
    """

    def __init__(
        self,
        store: AdapterStore,
        runs: Path,
        limits: LaneLimits,
        adapter_bytes: int,
        train_share: float,
        prefixes: PrefixDisk | None = None,
        group: Group = ALONE,
        sharing: Sharing | None = None,
    ) -> None:
        self._prefixes, self._sharing = prefixes, sharing
        self._store, self._runs, self._limits, self._adapter_bytes = store, runs, limits, adapter_bytes
        self._group = group
        # While only generation and training wait, training gets just this share of the time.
        self._weights = weights_by_kind(train_share)
        #: (model, kind) → the lane that runs such jobs.
        self.lanes: Mapping[Key, AnyLane] = {}
        self.models: Mapping[str, LoadedModel] = {}
        self.pools: Mapping[str, AdapterPool] = {}
        #: Models that were held and are not now: a job of theirs was on its way here.
        self.gone: frozenset[str] = frozenset()
        self.share: FairShare[Key] = FairShare({}, (), limits.stall)

    def rehearsing(self, model: LoadedModel) -> Iterator[None]:
        """Let a lane that nobody uses generate or embed, in slices, so that kernels are compiled before the engine's
        thread needs them. In the caller's thread."""
        if model.kind == "embed":
            yield from self._embed_lane(model).warming()
        else:
            yield from GenerateLane(model, AdapterPool(model, self._store, self._adapter_bytes), self._limits).warming()

    def hold(self, model: LoadedModel) -> Iterator[None]:
        """Warm its lanes up, in slices, and take its jobs from then on."""
        lanes: list[AnyLane] = []
        pools = {}
        if model.kind == "embed":
            embeds = self._embed_lane(model)
            yield from embeds.warming()
            lanes = [embeds]
        else:
            pool = pools[model.name] = AdapterPool(model, self._store, self._adapter_bytes)
            generate = self._generate_lane(model, pool)
            yield from generate.warming()
            lanes = [generate, TrainLane(model, pool, self._runs, self._group.of(model.name)), AdapterLane(model, pool)]
        for lane in lanes:
            self.share.add((model.name, lane.kind), self._weights[lane.kind], urgent=KINDS[lane.kind].urgent)
        self.models, self.pools = {**self.models, model.name: model}, {**self.pools, **pools}
        self.lanes = {**self.lanes, **{(model.name, lane.kind): lane for lane in lanes}}
        self.gone -= {model.name}
        log.info("model %s is warm: %s", model.name, model.summary)

    def _embed_lane(self, model: LoadedModel) -> EmbedLane:
        embeds = EmbedLane if model.pairing is None else RerankLane
        return embeds(model, self._limits.stall, self._limits.cores)

    def _generate_lane(self, model: LoadedModel, pool: AdapterPool) -> GenerateLane:
        if model.shard is not None and self._sharing is not None:
            return LeadingLane(model, pool, self._limits, self._sharing)
        shelf = None if self._prefixes is None else self._prefixes.shelf(model)
        return GenerateLane(model, pool, self._limits, shelf)

    def holds(self, lane: AnyLane) -> bool:
        return any(lane is held for held in self.lanes.values())

    def let_go(self, name: str) -> bool:
        """Free all that a model holds; False, and nothing is changed, while one of its lanes has work."""
        if any(lane.busy for (model, _), lane in self.lanes.items() if model == name):
            return False
        for key in [key for key in self.lanes if key[0] == name]:
            self.share.remove(key)
        self.gone |= {name}
        self.lanes = {key: lane for key, lane in self.lanes.items() if key[0] != name}
        self.models = {model: loaded for model, loaded in self.models.items() if model != name}
        self.pools = {model: pool for model, pool in self.pools.items() if model != name}
        log.info("model %s is no longer warm", name)
        return True

    @property
    def cards(self) -> list[ModelCard]:
        lanes = self.lanes
        return [
            model.card(tuple(kind for lane_model, kind in lanes if lane_model == name), self._kv_tokens(name))
            for name, model in self.models.items()
        ]

    def _kv_tokens(self, model: str) -> int:
        lane = self.lanes.get((model, GenerateRequest.kind))
        return lane.budget.most_tokens if isinstance(lane, GenerateLane) else 0

    @property
    def adapters(self) -> dict[str, tuple[str, ...]]:
        """model → adapters in memory, as `name@version`."""
        return {name: pool.loaded for name, pool in self.pools.items()}

    @property
    def loads(self) -> dict[str, GenerationLoad]:
        """Generating model → how full its lane is."""
        return {model: lane.load for (model, _), lane in self.lanes.items() if isinstance(lane, GenerateLane)}
