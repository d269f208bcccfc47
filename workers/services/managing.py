"""What manages the models of a worker, made of its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stoker.catalogue import parse_models
from workers.deliveries import Deliveries
from workers.machine import model_limit
from workers.residents import Origin, Residents
from workers.services.demand import Demand
from workers.services.keeper import Doors, ModelKeeper
from workers.services.model_commands import ModelCommands
from workers.services.orphans import Orphans
from workers.services.runtime import Runtime


@dataclass(frozen=True)
class ModelManagement:
    keeper: ModelKeeper
    commands: ModelCommands
    demand: Demand


def model_management(
    runtime: Runtime, deliveries: Deliveries, doors: Doors, beat: Callable[[], object]
) -> ModelManagement:
    """Of a worker whose configured models are warm. `beat`: reports its presence."""
    settings, orphans = runtime.settings, Orphans(runtime)
    started, on_demand = parse_models(settings.models), parse_models(settings.on_demand)
    known = parse_models((*settings.models, *settings.on_demand))
    residents = Residents(model_limit(settings))
    for name, loaded in runtime.engine.models.items():
        residents.add(name, started[name], Origin.STARTED, loaded.bytes)
    keeper = ModelKeeper(runtime, residents, deliveries, doors, beat, orphans)
    demand = Demand(runtime, keeper, orphans, on_demand, settings.idle_unload)
    return ModelManagement(keeper, ModelCommands(runtime, keeper, demand, known), demand)
