"""The beginnings of prompts that one lane keeps ready because they are pinned: prefilled before a job asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from engine.generation.prompt import of_ids
from engine.prefixes.pins import PINNED_PART, Beginning
from engine.prefixes.shelf import RunInEngine
from engine.ticket import Ticket, contained
from stoker.contract import GenerateRequest, GenerateResult
from stoker.contract.requests import LOWEST_PRIORITY
from stoker.errors import InvalidRequest

if TYPE_CHECKING:
    from engine.generation.lane import GenerateLane

#: Begins a job of which nothing is published.
SubmitQuietly: TypeAlias = Callable[[GenerateRequest], Ticket[GenerateResult]]


class Pinning:
    """For callers in other threads than the engine's. `run`: does something in the engine's thread, between two
    steps."""

    def __init__(self, lane: GenerateLane, run: RunInEngine, submit: SubmitQuietly) -> None:
        self._lane, self._run, self._submit = lane, run, submit

    def beginning(self, request: GenerateRequest) -> Beginning:
        """What all prompts have that go on from the request's. Raises `InvalidRequest` and `UnknownAdapter`."""
        try:
            return self._lane.beginning(request)
        except Exception:
            raise
        except BaseException as error:
            raise contained(error) from error

    def check(self, beginning: Beginning, before: Sequence[Beginning]) -> None:
        """Whether there is room for it next to those `before`. Raises `InvalidRequest`."""
        shortest, length = self._lane.prefixes.shortest, len(beginning.ids)
        if length < shortest:
            raise InvalidRequest(
                f"{length} tokens given that all prompts behind it share; at least {shortest} are kept here: fewer are "
                "prefilled as fast."
            )
        taken = self._lane.bytes_of(before)
        wanted = self._lane.bytes_of((*before, beginning)) - taken
        room = self._lane.prefixes.limit // PINNED_PART
        _check_room(length, wanted, taken, room, "of memory (an eighth of STOKER_KV_CACHE)")
        if (shelf := self._lane.shelf) is not None:
            taken = sum(shelf.size(each) for each in before)
            _check_room(
                length, shelf.size(beginning), taken, shelf.room_for_pins,
                "of the disk (half of STOKER_PREFIX_DISK, with those of the machine's other models)",
            )  # fmt: skip

    def pin(self, beginnings: Sequence[Beginning]) -> None:
        """From now on these stay where they are, in memory and on disk, and no others. Raises `OSError` for a disk that
        does not take it; memory has it then."""
        self._run(lambda: self._lane.pin(beginnings))
        if (shelf := self._lane.shelf) is not None:
            shelf.pin(beginnings)

    def in_memory(self, beginning: Beginning) -> bool:
        return self._lane.prefixes.has(beginning.adapter, beginning.ids)

    def on_disk(self, beginning: Beginning) -> bool:
        return self._lane.shelf is not None and self._lane.shelf.holds(beginning)

    def prefill(self, beginning: Beginning) -> Ticket[GenerateResult]:
        """Let memory have it: from the disk, or by a job of the lowest priority that makes a token for nobody. Raises
        what no job would be taken for."""
        name, version = beginning.adapter or ("", 0)
        asked = GenerateRequest(
            model=self._lane.model_name,
            prompt_ids=beginning.ids[:1],
            adapter=f"{name}@{version}" if name else None,
            max_tokens=1,
            ignore_eos=True,
            lookup=False,
            priority=LOWEST_PRIORITY,
        )
        return self._submit(of_ids(asked, beginning.ids))

    def save(self, beginning: Beginning) -> None:
        """Let the disk have what memory has, unless it is too short for that. Raises `OSError`."""
        if (shelf := self._lane.shelf) is not None:
            shelf.keep(beginning, self._lane.prefixes)


def _check_room(length: int, wanted: int, taken: int, room: int, of_what: str) -> None:
    if taken + wanted > room:
        raise InvalidRequest(
            f"{length} tokens given, which take {_megabytes(wanted)} {of_what}; pinned prefixes may take "
            f"{_megabytes(room)} there, and have {_megabytes(taken)}. Shorten it, unpin another, or raise the setting."
        )


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MB"
