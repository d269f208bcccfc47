"""What makes one number of a pair: the heads of cross-encoders, and the logits of a decoder that answers yes or no."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import mlx.core as mx

from engine.models.causal import CausalEncoder
from engine.models.encoder import Encoder
from engine.models.fields import Fields
from engine.models.heads import Layer
from engine.models.layers import Linear
from engine.models.modernbert import ModernBert, norm_of
from engine.models.rerank_files import DECODERS, RerankFiles
from engine.models.sentence import EmbeddingSpec
from engine.text.tokenizer import Tokenizer
from engine.weights.tensors import Tensors
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: What DeBERTa's files call an activation of its pooler.
_POOLER_ACTIVATIONS = {"gelu": "GELU", "tanh": "Tanh", "relu": "ReLU"}


def spec_of(files: RerankFiles, config: Mapping[str, Any], encoder: Encoder) -> EmbeddingSpec:
    """A pair becomes a vector of one number. `normalize`: whether a sigmoid puts it between 0 and 1."""
    longest = files.sentence.max_tokens(encoder.args.context)
    return EmbeddingSpec(
        longest, _pooling(config), files.sigmoid, 1, files.prompts, files.default_prompt,
        lowercase=files.sentence.lowercase,
    )  # fmt: skip


def _pooling(config: Mapping[str, Any]) -> str:
    """Which token's hidden state the score is made of, or that it is the mean of all."""
    architecture = config["model_type"]
    if architecture == "modernbert":
        stated = config.get("classifier_pooling", "cls")
        if stated not in ("cls", "mean"):
            raise ModelError(f"config.json: classifier_pooling = {as_json(stated)} is not supported; cls and mean are")
        return str(stated)
    return "lasttoken" if architecture in DECODERS else "cls"


def score_heads(
    files: RerankFiles, config: Mapping[str, Any], encoder: Encoder, tokenizer: Tokenizer, tensors: Tensors
) -> list[Layer]:
    """What the pooled hidden states go through, from the tensors that the encoder left. Raises `ModelError`."""
    if files.form == "judge":
        return [_judging(files, config, cast(CausalEncoder, encoder), tokenizer)]
    return _CLASSIFIERS[config["model_type"]](config, encoder, tensors)


def _linear(tensors: Tensors, name: str, inputs: int, outputs: int, *, bias: bool = True) -> Linear:
    return Linear.take(tensors, name, "", inputs, outputs, bias=bias)


def _bert(config: Mapping[str, Any], encoder: Encoder, tensors: Tensors) -> list[Layer]:
    dim = encoder.args.dim
    pooler = Layer(_linear(tensors, "pooler.dense", dim, dim), "Tanh")
    return [pooler, Layer(_linear(tensors, "classifier", dim, 1))]


def _roberta(config: Mapping[str, Any], encoder: Encoder, tensors: Tensors, activation: str = "Tanh") -> list[Layer]:
    dim = encoder.args.dim
    dense = Layer(_linear(tensors, "classifier.dense", dim, dim), activation)
    return [dense, Layer(_linear(tensors, "classifier.out_proj", dim, 1))]


def _electra(config: Mapping[str, Any], encoder: Encoder, tensors: Tensors) -> list[Layer]:
    return _roberta(config, encoder, tensors, "GELU")


def _distilbert(config: Mapping[str, Any], encoder: Encoder, tensors: Tensors) -> list[Layer]:
    dim = encoder.args.dim
    return [Layer(_linear(tensors, "pre_classifier", dim, dim), "ReLU"), Layer(_linear(tensors, "classifier", dim, 1))]


def _albert(config: Mapping[str, Any], encoder: Encoder, tensors: Tensors) -> list[Layer]:
    dim = encoder.args.dim
    return [Layer(_linear(tensors, "pooler", dim, dim), "Tanh"), Layer(_linear(tensors, "classifier", dim, 1))]


def _deberta(config: Mapping[str, Any], encoder: Encoder, tensors: Tensors) -> list[Layer]:
    dim, activation = encoder.args.dim, config.get("pooler_hidden_act")
    activation = "gelu" if activation is None else activation
    Fields(config, "config.json").only("pooler_hidden_size", dim)
    if str(activation) not in _POOLER_ACTIVATIONS:
        raise ModelError(
            f"config.json: pooler_hidden_act = {as_json(activation)} is not supported; "
            f"{', '.join(_POOLER_ACTIVATIONS)} are"
        )
    pooler = Layer(_linear(tensors, "pooler.dense", dim, dim), _POOLER_ACTIVATIONS[str(activation)])
    return [pooler, Layer(_linear(tensors, "classifier", dim, 1))]


def _modernbert(config: Mapping[str, Any], encoder: Encoder, tensors: Tensors) -> list[Layer]:
    args = cast(ModernBert, encoder).args
    activation = config.get("classifier_activation", "gelu")
    if activation not in ("gelu", "gelu_python"):
        raise ModelError(f"config.json: classifier_activation = {as_json(activation)} is not supported; only gelu is")
    bias = Fields(config, "config.json").flag("classifier_bias")
    dense = _linear(tensors, "head.dense", args.dim, args.dim, bias=bias)
    head = Layer(dense, "GELU", norm_of(tensors, "head.norm", args))
    return [head, Layer(_linear(tensors, "classifier", args.dim, 1))]


def _qwen(config: Mapping[str, Any], encoder: Encoder, tensors: Tensors) -> list[Layer]:
    return [Layer(_linear(tensors, "score", encoder.args.dim, 1, bias=False))]


_CLASSIFIERS: Mapping[str, Callable[[Mapping[str, Any], Encoder, Tensors], list[Layer]]] = {
    "bert": _bert,
    "xlm-roberta": _roberta,
    "roberta": _roberta,
    "camembert": _roberta,
    "mpnet": _roberta,
    "electra": _electra,
    "distilbert": _distilbert,
    "albert": _albert,
    "deberta-v2": _deberta,
    "modernbert": _modernbert,
    "qwen2": _qwen,
    "qwen3": _qwen,
}


def _judging(files: RerankFiles, config: Mapping[str, Any], encoder: CausalEncoder, tokenizer: Tokenizer) -> Layer:
    """The difference of two logits is one product: that of the hidden state with the difference of two rows."""
    rows = [_token(files.yes, tokenizer, encoder.args.vocab)]
    rows += [] if files.no is None else [_token(files.no, tokenizer, encoder.args.vocab)]
    if encoder.without_head:
        raise ModelError("the tensor 'lm_head.weight' is missing, and tie_word_embeddings is false")
    yes, *no = encoder.output_rows(rows)
    weight = (yes - no[0] if no else yes)[:, None]
    mx.eval(weight)
    return Layer(Linear("yes-no", weight))


def _token(named: int | str, tokenizer: Tokenizer, rows: int) -> int:
    """The id of a token that is given by its id or its text."""
    if isinstance(named, int):
        if named >= rows:
            raise ModelError(f"the token {named} that scores are read from is none of the model's {rows}")
        return named
    found = tokenizer.inner.token_to_id(named)
    if found is None:
        raise ModelError(f"its vocabulary has no token {named!r}, whose logit a score is made of")
    return int(found)
