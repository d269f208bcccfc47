"""Deleting what stored files have left that are gone, while a gateway runs."""

from __future__ import annotations

import asyncio
import logging

from stoker.errors import StokerError
from stoker.gateway.stored import Store

log = logging.getLogger(__name__)
#: Seconds between two looks.
SWEEP_EVERY = 60.0


async def sweep_for_ever(store: Store) -> None:
    while True:
        await asyncio.sleep(SWEEP_EVERY)
        try:
            await store.sweep()
        except (StokerError, OSError) as error:
            log.warning("parts of files that are gone are not deleted now: %s", error)
