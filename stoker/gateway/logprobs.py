"""Log-probabilities of tokens, as `/v1/chat/completions` and `/v1/completions` say them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stoker.contract import StreamToken


def logprobs_of(tokens: Iterable[StreamToken]) -> dict[str, object]:
    """Of a chat's answer."""
    return {"content": [_said(token) for token in tokens], "refusal": None}


def all_logprobs(tokens: Iterable[StreamToken]) -> dict[str, object]:
    """Of a chat's answer that is sent as a whole: each token is said as it is written."""
    return {"content": map(_said, tokens), "refusal": None}


def _said(token: StreamToken) -> dict[str, object]:
    likeliest = [_one(other.text, other.logprob) for other in token.alternatives]
    return {**_one(token.text, token.logprob), "top_logprobs": likeliest}


def _one(text: str, logprob: float) -> dict[str, object]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def legacy_logprobs(tokens: Sequence[StreamToken], offset: int = 0) -> dict[str, object]:
    """Of a completion. `offset`: characters of the answer before these tokens."""
    return {**_legacy(tokens, offset), "top_logprobs": [_likeliest(token) for token in tokens]}


def _legacy(tokens: Sequence[StreamToken], offset: int) -> dict[str, object]:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "text_offset": offsets,
    }


def all_legacy_logprobs(tokens: Sequence[StreamToken]) -> dict[str, object]:
    """Of a completion that is sent as a whole: alternatives are said as they are written."""
    return {**_legacy(tokens, 0), "top_logprobs": map(_likeliest, tokens)}


def _likeliest(token: StreamToken) -> dict[str, float]:
    """Of several that have one text, as parts of a character do, the likeliest."""
    found: dict[str, float] = {}
    for other in token.alternatives:
        found[other.text] = max(other.logprob, found.get(other.text, other.logprob))
    return found
