"""The pinned prefixes of a model as clients see them: `client.prefixes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stoker.broker.prefixes import PrefixEntry, entries
from stoker.client import requests
from stoker.client._async.link import AsyncLink
from stoker.client.asynchronously import Chooser, sleep
from stoker.client.pinning import Verdict
from stoker.client.requests import Prompt
from stoker.contract.kinds import GENERATE
from stoker.contract.names import Rule, checked
from stoker.errors import InvalidRequest


class AsyncPrefixes:
    """Lists, pins and unpins beginnings of prompts, such as system prompts. `model` may be left out where just one
    model generates.

    Every worker of the model has the keys and values of a pinned prefix ready, also after it was started again: a job
    whose prompt begins so does not prefill them.
    """

    def __init__(self, link: AsyncLink, choose_model: Chooser) -> None:
        self._link, self._choose_model = link, choose_model

    async def list(self, model: str | None = None) -> list[PrefixEntry]:
        """Every pinned prefix of the model, the oldest first, and how far each worker is with it."""
        model = await self._model(model)
        pinned = await self._link.prefixes(model)
        return entries(model, pinned, await self._link.workers() if pinned else ())

    async def pin(
        self,
        name: str,
        prompt: Prompt,
        *,
        model: str | None = None,
        adapter: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        template: Mapping[str, object] | None = None,
        timeout: float | None = 10.0,
    ) -> PrefixEntry:
        """Keep what prompts have in common that go on from `prompt`: a text, token ids, or the first messages of a
        conversation, for which `tools` and `template` are as for `generate`.

        An adapter's keys and values are its own: a prefix without `adapter` serves the bare base alone. A name without
        a version is the version that serves, also after another was promoted. Waits until each worker that holds the
        model has said whether it can keep the prefix, and `timeout` seconds at most (None: no limit); it is prefilled
        when the worker is idle. Raises `InvalidRequest` for a name that is pinned already, a prefix too many or too
        long, and where every worker refuses it; then nothing is pinned.
        """
        model = await self._model(model)
        asked = requests.generate_request(
            model, prompt, 0, {"adapter": adapter, "tools": tools, "template": template, "max_tokens": 1}
        )
        prefix = requests.pinned_prefix(asked, self._link.settings.client_key)
        # Before anything is pinned: what is wrong with `timeout` is an error here.
        verdict = Verdict(model, prefix.id, timeout)
        prefix = await self._link.pin_prefix(model, checked(Rule.NAME, "name", name), prefix)
        while not verdict.heard(await self._link.workers()):
            await sleep(verdict.pause())
        if (why := verdict.refusal) is not None:
            await self._link.unpin_prefix(model, name)
            raise InvalidRequest(f"prefix {name!r}: {why}")
        return PrefixEntry(model, name, prefix, verdict.said)

    async def unpin(self, name: str, model: str | None = None) -> None:
        """Let a prefix go; jobs that have begun with it go on. Raises `InvalidRequest` where there is none of that
        name."""
        model = await self._model(model)
        if not await self._link.unpin_prefix(model, checked(Rule.NAME, "name", name)):
            there = ", ".join(await self._link.prefixes(model)) or "none"
            raise InvalidRequest(f"prefix: {name!r} given; {model} has: {there}.")

    async def _model(self, model: str | None) -> str:
        return await self._choose_model(model, GENERATE.name)
