"""The model that a job goes to: the one that was named, or the only one that is warm."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from pydantic import ValidationError

from stoker.broker import keys
from stoker.catalogue import CATALOGUE, model_name
from stoker.contract import CONTRACT, ModelCard, Presence
from stoker.contract.shown import brief
from stoker.contract.wording import Show
from stoker.errors import InvalidRequest, UnknownModel

N = TypeVar("N", ModelCard, Presence)


def parse_cards(raw: Mapping[bytes, bytes], now: float | None = None) -> dict[str, ModelCard]:
    """The cards of models that were served lately; the hash as a whole lives as long as any of them is. `now`: the
    broker's time, by which workers date their cards; None: this machine's.

    Of two generations of workers the one that this client understands counts.
    """
    oldest = (time.time() if now is None else now) - keys.MODEL_TTL
    cards = [card for card in _readable(ModelCard, raw.values()) if card.seen >= oldest]
    return {card.model: card for card in sorted(cards, key=lambda card: card.contract == CONTRACT)}


def parse_presences(raw: Iterable[bytes | None]) -> list[Presence]:
    """The workers that reported lately."""
    return _readable(Presence, raw)


def _readable(notice: type[N], raw: Iterable[bytes | None]) -> list[N]:
    """Without those that have expired, and those of a release whose form is another."""
    found = []
    for value in raw:
        with suppress(ValidationError):
            found += [notice.model_validate_json(value)] if value is not None else []
    return found


def is_served(model: str, kind: str, workers: Iterable[Presence]) -> bool:
    """Whether one of the workers takes jobs of that model and kind from this client, or will once it has loaded it."""
    cards = (card for worker in workers for card in (*worker.models, *worker.offers))
    return any(card.takes(model, kind) for card in cards)


def has_worker(model: str, ability: str, workers: Sequence[Presence]) -> bool:
    """Whether one of the workers runs such jobs of the model, loads it at this moment, or will once a job waits."""
    cards = (card for worker in workers for card in (*worker.models, *worker.offers))
    if any((card.model, card.contract) == (model, CONTRACT) and ability in card.abilities for card in cards):
        return True
    return any((state.model, state.state) == (model, "loading") for worker in workers for state in worker.states)


def describe_absence(model: str, ability: str, workers: Iterable[Presence], waited: float) -> str:
    """For people: no worker has been there for jobs of the model for `waited` seconds. Begins with what was given."""
    warm = _warm(_able(ability, workers))
    return (
        f"model {brief(model, 160)} given; it was served lately, and for {waited:g} s no worker has been there for it; "
        f"{_listed(warm)} can {ability}. Start its worker again, or ask for another model."
    )


def _able(ability: str, workers: Iterable[Presence]) -> list[ModelCard]:
    return [card for worker in workers for card in worker.models if ability in card.abilities]


def _warm(cards: Iterable[ModelCard]) -> set[str]:
    return {card.model for card in cards if card.contract == CONTRACT}


def choose_model(model: str | None, ability: str, known: Mapping[str, ModelCard], workers: Sequence[Presence]) -> str:
    """The model to send to: the one asked for, if some worker serves or lately served it, or the only one warm.

    A path stands for the name that a worker started with it gives it. A model that was served lately and is not warm
    now is accepted: its worker may be restarting, and the job waits. Not so if workers of another generation serve it
    by now, or if it was unloaded and nobody may load it: the job might wait for ever. One that a worker may load is as
    good as one that is warm, except that a warm one is meant where none is named.
    """
    cards = _able(ability, workers)
    warm = _warm(cards)
    offered = {card.model for worker in workers for card in worker.offers if ability in card.abilities} - warm
    if model is None:
        meant = warm or offered
        if len(meant) == 1:
            return meant.pop()
        raise UnknownModel(
            f"no model given, and {_listed(warm)} can {ability}. {_offered(offered)}"
            + ("Name one with model=…." if meant else _beginning(workers))
        )
    model = model_name(model)
    if model in warm | offered:
        # The list of models may be damaged, or have been made anew a moment before: the workers themselves know better.
        return model
    if model not in known:
        raise UnknownModel(f"model {brief(model, 160)} given; {_listed(warm)} can {ability}. {_remedy(model, warm)}")
    if known[model].gone:
        raise UnknownModel(f"model {model!r} given; {_listed(warm)} can {ability}. {known[model].gone}")
    others = {card.contract for card in cards if card.model == model and model not in warm}
    if others or known[model].contract != CONTRACT:
        spoken = max(others, default=known[model].contract)
        raise UnknownModel(
            f"model {model!r} is served by workers that speak version {spoken} of the contract alone; "
            f"this client speaks version {CONTRACT}. Run the same release of Stoker on both sides."
        )
    if ability not in known[model].abilities:
        able = ", ".join(known[model].abilities)
        raise UnknownModel(f"model {model!r} cannot {ability}: it can {able}; {_listed(warm)} can {ability}.")
    return model


def named_model(model: str | None, show: Show = brief) -> str | None:
    """`model`. Raises `InvalidRequest` for one that is no text. `show`: how the error spells values."""
    if not isinstance(model, str | None):
        raise InvalidRequest(
            f"model: {show(model)} given; expected a name, or {show(None)} for the only model there is."
        )
    return model


class Choices:
    """What `choose_model` chose lately, so that a client of many jobs asks no more often than workers report."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str | None, str], tuple[str, float]] = {}

    def get(self, model: str | None, ability: str) -> str | None:
        """The model that was chosen lately; None if none was. Raises `InvalidRequest` for a `model` that is no text."""
        named_model(model)
        chosen, until = self._kept.get((model, ability), ("", 0.0))
        return chosen if time.monotonic() < until else None

    def forget(self) -> None:
        """What is warm has changed."""
        self._kept.clear()

    def keep(self, model: str | None, ability: str, chosen: str) -> str:
        if self.get(model, ability) is None:
            self._kept[model, ability] = (chosen, time.monotonic() + keys.PRESENCE_EVERY)
        return chosen


def _listed(models: Iterable[str]) -> str:
    names = sorted(models)
    return f"of the models warm now {', '.join(names)}" if names else "no model that is warm now"


def _offered(models: Iterable[str]) -> str:
    names = sorted(models)
    return f"Workers may load {', '.join(names)}. " if names else ""


def _beginning(workers: Sequence[Presence]) -> str:
    """What to do where no model is meant that a worker has, or may load."""
    if workers:
        return "Give a worker one that can: `stoker models load MODEL`, or `stoker worker --model MODEL`."
    return "Start a worker with `stoker up`."


def _remedy(model: str, warm: Iterable[str]) -> str:
    """What to do about a model that no worker serves."""
    if model in CATALOGUE:
        return f"Start a worker that serves it: `stoker worker --model {model}`."
    shown = brief(model, 160).strip("'\"")
    serve = f"a worker serves a model of your own under that name with `stoker worker --model {shown}=SOURCE`."
    close = difflib.get_close_matches(model[:160], {*warm, *CATALOGUE}, n=1)
    return f"Did you mean {close[0]}? Else {serve}" if close else serve[0].upper() + serve[1:]
