"""Reranking jobs of one model: each pair of a query and a text becomes a vector of one number, its score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.embedding.forward import Tokens, Vectors
from engine.embedding.lane import EmbedLane, EmbedWork
from engine.text.pairs import Pairing
from engine.ticket import Ticket
from stoker.contract import EmbedRequest
from stoker.contract.vectors import Embedded
from stoker.errors import InvalidRequest, StokerError, TextTooLong


class RerankLane(EmbedLane):
    """Pairs share batches as texts do that are embedded, and take turns as they do."""

    def prepare(self, ticket: Ticket[Embedded], request: EmbedRequest, data: None) -> EmbedWork:
        pairing = self._model.pairing
        assert pairing is not None, "a reranking lane needs a model that reranks"
        if request.query is None:
            raise InvalidRequest(
                f"query: missing; {request.model} scores texts against a query, and makes no vectors. Rerank with it, "
                "or embed with another model."
            )
        rows = paired(pairing, request, request.query, self._instruction(request), self._spec.max_tokens)
        return EmbedWork(ticket, request, rows, np.zeros((len(rows), 1), dtype=np.float32))

    def _instruction(self, request: EmbedRequest) -> str | None:
        pairing, asked = self._model.pairing, request.prompt
        if asked is not None and pairing is not None and not pairing.instructs:
            raise InvalidRequest(f"prompt: given, and {request.model} takes no instruction. Leave it out.")
        name = self._spec.default_prompt if asked is None else asked
        return None if name is None else self._spec.prompts.get(name, name) or None

    def _finished(self, work: EmbedWork) -> Vectors:
        asked = work.request.normalize
        squashed = self._spec.normalize if asked is None else asked
        return sigmoid(work.vectors) if squashed else work.vectors


def sigmoid(scores: Vectors) -> Vectors:
    """Each score between 0 and 1."""
    # By the side on which no exponential is beyond float64.
    small = np.exp(-np.abs(scores.astype(np.float64)))
    return np.where(scores >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


def paired(pairing: Pairing, request: EmbedRequest, query: str, instruction: str | None, longest: int) -> list[Tokens]:
    """The tokens of each text with the query, at most `longest`.

    Raises `TextTooLong`, or `InvalidRequest` for what cannot be encoded, with the index of the text.
    """
    found = []
    for row, tokens in enumerate(_encoded(pairing, query, request.texts, instruction)):
        if len(tokens) > longest and request.truncation == "error":
            raise TextTooLong(
                f"texts.{row}: {len(tokens)} tokens given with the query; {request.model} takes {longest}. "
                'Shorten it, or pass truncation="end" to cut it.'
            )
        if len(tokens) > longest:
            tokens = pairing.cut(query, request.texts[row], instruction, longest)
        if not tokens:
            raise InvalidRequest(f"texts.{row}: {request.model} sees no token of it, nor of the query.")
        found.append(np.array(tokens, dtype=np.int32))
    return found


def _encoded(pairing: Pairing, query: str, texts: Sequence[str], instruction: str | None) -> list[list[int]]:
    try:
        return pairing.encode(query, texts, instruction)
    except Exception as error:
        for row, (first, second) in enumerate([("", query), *((query, text) for text in texts)], -1):
            where = "query" if row < 0 else f"texts.{row}"
            try:
                pairing.encode(first, [second], instruction)
            except StokerError as found:
                raise InvalidRequest(f"{where}: {found}") from found
            except Exception as found:
                raise InvalidRequest(f"{where}: the tokenizer cannot encode it ({found})") from found
        raise InvalidRequest(f"texts: the tokenizer cannot encode them ({error})") from error
