"""The models of the in-memory worker: which are warm, which may be loaded, which are pinned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from stoker.catalogue import parse_model
from stoker.client.in_memory.answers import DIM, WORKER
from stoker.contract import ModelCard
from stoker.contract.control import ModelCommand, ModelReport
from stoker.contract.kinds import ABILITIES
from stoker.contract.names import Rule, checked
from stoker.contract.presence import ModelState
from stoker.contract.requests import RERANK
from stoker.errors import ConfigError, InvalidRequest, ModelError, StokerError, UnknownModel

#: Model → what it can do, unless a test says otherwise: the models of a worker that was started without options.
MODELS: Mapping[str, tuple[str, ...]] = {
    "all-minilm-l6-v2": ("embed",),
    "smollm2-135m-instruct": ("generate", "train", "adapters"),
}


class Models:
    """`may_load`: model → what it can do once it is loaded. `running`: how many jobs of a model run; `refuse`: ends
    those that wait for it."""

    def __init__(
        self,
        models: Mapping[str, Iterable[str]] | None,
        may_load: Mapping[str, Iterable[str]],
        running: Callable[[str], int],
        refuse: Callable[[str, StokerError], None],
    ) -> None:
        self._warm = {name: _card(name, tuple(kinds)) for name, kinds in (MODELS if models is None else models).items()}
        self._may_load = {name: _card(name, tuple(kinds)) for name, kinds in {**MODELS, **may_load}.items()}
        self._gone: dict[str, ModelCard] = {}
        self._pinned: set[str] = set()
        self._running, self._refuse = running, refuse

    @property
    def warm(self) -> tuple[ModelCard, ...]:
        return tuple(self._warm.values())

    @property
    def states(self) -> tuple[ModelState, ...]:
        return tuple(ModelState(model=name, state="warm", pinned=name in self._pinned) for name in self._warm)

    @property
    def known(self) -> dict[str, ModelCard]:
        return {**self._gone, **self._warm}

    def follow(self, command: ModelCommand) -> ModelReport:
        """As a worker would; raises what it would fail of."""
        name = self._load(command.model) if command.verb == "load" else command.model
        if name not in self._warm:
            raise UnknownModel(f"model {name!r} given; this worker holds {', '.join(sorted(self._warm)) or 'none'}.")
        if command.verb == "pin":
            self._pinned.add(name)
        elif command.verb == "unpin":
            self._pinned.discard(name)
        elif command.verb == "unload":
            self._unload(name)
        return ModelReport(id=command.id, worker=WORKER, verb=command.verb, model=command.model, phase="done")

    def _load(self, text: str) -> str:
        name = text if text in self._may_load else parse_model(text)[0]
        if name not in self._warm:
            if name not in self._may_load:
                raise ModelError(f"model {name}: not there. may_load={{{name!r}: [...]}} says what it can do.")
            self._warm[name] = self._may_load[name]
            self._gone.pop(name, None)
        return name

    def _unload(self, name: str) -> None:
        if name in self._pinned:
            raise InvalidRequest(f"model {name!r} is pinned. `stoker models unpin {name}` lets it be unloaded.")
        if count := self._running(name):
            raise InvalidRequest(f"model {name!r} is in use: {count} jobs of it here. Wait for them, or cancel them.")
        why = f"model {name!r} was unloaded, and no worker holds it or may load it."
        self._gone[name] = self._warm.pop(name).model_copy(update={"gone": why})
        self._refuse(name, UnknownModel(why))


def _card(model: str, abilities: tuple[str, ...]) -> ModelCard:
    checked(Rule.NAME, "models", model)
    unknown = sorted(set(abilities) - set(ABILITIES))
    if unknown:
        raise ConfigError(f"models: {unknown[0]!r} given for {model}; the kinds of jobs are {', '.join(ABILITIES)}.")
    reranks = RERANK in abilities
    if reranks and "embed" in abilities:
        raise ConfigError(f"models: embed and rerank given for {model}; a model makes vectors or scores. Name one.")
    kinds = tuple(ABILITIES[ability].name for ability in abilities)
    dim = (1 if reranks else DIM) if "embed" in kinds else 0
    return ModelCard(
        model=model, architecture="in-memory", kinds=kinds, context=2048, parameters=0, dim=dim, reranks=reranks,
        seen=time.time(),
    )  # fmt: skip
