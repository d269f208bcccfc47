"""The models that the idle worker of `bench/idle_worker.py` serves. Importing them makes no Celery app: that asks for a
broker."""

from __future__ import annotations

import time

from stoker.contract import StreamToken

MODEL, ENCODER = "idle", "idle-encoder"


def token(index: int, last: bool) -> StreamToken:
    return StreamToken(
        index=index,
        token_id=7,
        text=" the",
        logit=time.time(),
        logprob=-1.0,
        probability=0.4,
        is_eos=False,
        finish_reason="length" if last else None,
    )
