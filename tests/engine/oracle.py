"""What a request has to get, found the plain way: one sequence through the model without a cache, sampling in numpy.

It shares with the engine the model's layers and a tokenizer, and neither batch, cache, prefixes, adapter stacks nor
sampling. Of a model that packs its keys and values each layer sees what is left of them, of the whole sequence at
once. It follows the tokens that were given, and says of each whether it is the one that had to come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from engine.adapters.lora import LoraWeights
from engine.checkpoints.loading import LoadedModel
from engine.models.attention import Mask
from engine.models.decoder import Decoder
from engine.models.kv_sizes import KvSizes
from engine.models.layers import LayerAdapters
from stoker.contract import Completion, GenerateRequest, StreamToken
from tests.engine import tiny

#: How far float32 in another order may move a logit. Of a model that packs its keys and values a number between two
#: codes may take the other one.
LOGIT, LOGIT_PACKED = 1e-4, 1e-3


class Packed:
    """A `LayerCache` of one sequence, of which nothing is kept."""

    offset = 0
    mask: Mask = "causal"

    def __init__(self, sizes: KvSizes) -> None:
        self._sizes = sizes

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        sides = self._sizes.keys[layer], self._sizes.values[layer]
        first, second = (side.unpack(side.pack(x)) for side, x in zip(sides, (keys, values), strict=True))
        return first, second


def whole(model: Decoder, ids: Sequence[int], adapters: LayerAdapters | None = None) -> np.ndarray:
    """Logits (tokens, vocabulary), float32, of one sequence through the model."""
    cache = Packed(model.kv_sizes) if model.kv_sizes.packed else None
    return np.array(model.logits(model(mx.array([list(ids)]), cache, adapters))[0])


@dataclass
class Oracle:
    model: LoadedModel
    adapters: Mapping[str, LoraWeights]

    def check(self, request: GenerateRequest, completion: int, given: Sequence[StreamToken]) -> None:
        """Every token of a completion, as far as it came."""
        prompt = self.model.tokenizer.encode(request.prompt or "")
        ids = [token.token_id for token in given]
        logits = self._logits(request, [*prompt, *ids])
        bound = LOGIT_PACKED if self.model.decoder.kv_sizes.packed else LOGIT
        for position, token in enumerate(given):
            raw = logits[len(prompt) - 1 + position]
            assert abs(token.logit - raw[token.token_id]) < bound
            logprob = raw[token.token_id] - np.log(np.exp(raw - raw.max()).sum()) - raw.max()
            assert abs(token.logprob - logprob) < bound
            scores = adjusted(raw, request, prompt, ids[:position])
            uniform = np.random.Generator(
                np.random.Philox(key=request.seed, counter=position | completion << 64)
            ).random()
            assert chosen_rightly(scores, request, token, uniform, bound), (position, token)
            last = self._end(request, ids[: position + 1])
            assert token.finish_reason == last, (position, token, last)

    def check_result(self, request: GenerateRequest, found: Completion) -> None:
        text = tiny.text([token for token in found.token_ids if token not in self.model.tokenizer.eos_ids])
        places = [(text.index(stop), -len(stop)) for stop in request.stop if stop in text]
        assert found.text == (text[: min(places)[0]] if places else text)
        assert found.finish_reason == self._end(request, found.token_ids)

    def _logits(self, request: GenerateRequest, ids: Sequence[int]) -> np.ndarray:
        decoder = self.model.decoder
        adapter = tiny.trainable(self.model, self.adapters[request.adapter]) if request.adapter else None
        return whole(decoder, ids, adapter).astype(np.float64)

    def _end(self, request: GenerateRequest, ids: Sequence[int]) -> str | None:
        if ids[-1] in self.model.tokenizer.eos_ids:
            return "stop"
        if any(stop in tiny.text(ids) for stop in request.stop):
            return "stop_string"
        return "length" if len(ids) == request.max_tokens else None


def adjusted(raw: np.ndarray, request: GenerateRequest, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Bias, then repetition over prompt and answer, then presence and frequency over the answer alone."""
    scores = raw.copy()
    for token, bias in (request.logit_bias or {}).items():
        scores[token] += bias
    for token in {*prompt, *answer}:
        penalty = request.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for token in set(answer):
        scores[token] -= request.presence_penalty + request.frequency_penalty * answer.count(token)
    return scores


def chosen_rightly(
    scores: np.ndarray, request: GenerateRequest, token: StreamToken, uniform: float, bound: float
) -> bool:
    """`bound`: how far a logit may be moved, and a border between two tokens twice as far."""
    if request.temperature == 0:
        return bool(scores[token.token_id] >= scores.max() - bound) and token.probability == 1.0
    # Where top-p or min-p cuts, and how many top-k keeps of equals, hangs on the last bits too.
    border = 2 * bound
    for shift in (0.0, border, -border):
        shares = kept(scores / request.temperature, request, shift)
        above = float(shares[: token.token_id + 1].sum())
        below = above - shares[token.token_id]
        if shares[token.token_id] > 0 and below - border <= uniform <= above + border:
            return bool(abs(shares[token.token_id] - token.probability) < 10 * bound)
    return False


def kept(scaled: np.ndarray, request: GenerateRequest, shift: float) -> np.ndarray:
    """The distribution that is drawn from."""
    shares = np.exp(scaled - scaled.max())
    order = np.argsort(-scaled, kind="stable")
    if request.top_k:
        shares[order[request.top_k :]] = 0.0
    shares /= shares.sum()
    if request.top_p < 1.0:
        before = np.cumsum(shares[order]) - shares[order]
        shares[order[before >= request.top_p + shift]] = 0.0
    shares[shares < (request.min_p * (1 + shift)) * shares.max()] = 0.0
    final: np.ndarray = shares / shares.sum()
    return final
