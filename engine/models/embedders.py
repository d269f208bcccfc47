"""Which embedding models there are, by `model_type` of config.json, and how each is made of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.models.albert import Albert, AlbertArgs
from engine.models.bert import Bert, BertArgs
from engine.models.causal import CausalEncoder
from engine.models.deberta import Deberta, DebertaArgs
from engine.models.distilbert import DistilBert, DistilBertArgs
from engine.models.electra import Electra, ElectraArgs
from engine.models.encoder import Encoder
from engine.models.gemma3 import Gemma3Args, Gemma3Encoder
from engine.models.llama import LlamaArgs
from engine.models.mistral import MistralArgs
from engine.models.modernbert import ModernBert, ModernBertArgs
from engine.models.mpnet import MPNet, MPNetArgs
from engine.models.qwen2 import Qwen2Args
from engine.models.qwen3 import Qwen3Args
from engine.models.roberta import Roberta, RobertaArgs
from engine.models.rotary_bert import RotaryBert, RotaryBertArgs
from engine.models.t5 import T5, T5Args
from engine.weights.tensors import Tensors


def _roberta(config: Mapping[str, Any], tensors: Tensors) -> Encoder:
    return Roberta(RobertaArgs.from_config(config), tensors)


def _rotary(config: Mapping[str, Any], tensors: Tensors) -> Encoder:
    return RotaryBert(RotaryBertArgs.from_config(config), tensors)


_MADE: Mapping[str, Callable[[Mapping[str, Any], Tensors], Encoder]] = {
    "bert": lambda config, tensors: Bert(BertArgs.from_config(config), tensors),
    "mpnet": lambda config, tensors: MPNet(MPNetArgs.from_config(config), tensors),
    "modernbert": lambda config, tensors: ModernBert(ModernBertArgs.from_config(config), tensors),
    "xlm-roberta": _roberta,
    "roberta": _roberta,
    "camembert": _roberta,
    "distilbert": lambda config, tensors: DistilBert(DistilBertArgs.from_config(config), tensors),
    "electra": lambda config, tensors: Electra(ElectraArgs.from_config(config), tensors),
    "albert": lambda config, tensors: Albert(AlbertArgs.from_config(config), tensors),
    "deberta-v2": lambda config, tensors: Deberta(DebertaArgs.from_config(config), tensors),
    "nomic_bert": _rotary,
    "gte": _rotary,
}
ENCODERS = tuple(_MADE)
#: Those of `sentence_files.POOLED_DECODERS`.
_POOLED: Mapping[str, Callable[[Mapping[str, Any], Tensors], Encoder]] = {
    "llama": lambda config, tensors: CausalEncoder(LlamaArgs.from_config(config), tensors),
    "mistral": lambda config, tensors: CausalEncoder(MistralArgs.from_config(config), tensors),
    "qwen2": lambda config, tensors: CausalEncoder(Qwen2Args.from_config(config), tensors),
    "qwen3": lambda config, tensors: CausalEncoder(Qwen3Args.from_config(config), tensors),
    "gemma3_text": lambda config, tensors: Gemma3Encoder(Gemma3Args.from_config(config), tensors),
    "t5": lambda config, tensors: T5(T5Args.from_config(config), tensors),
}


def encoder(config: Mapping[str, Any], tensors: Tensors) -> Encoder:
    """The encoder, or the decoder that is used as one, that `config` describes, with its weights.

    Raises `ModelError` for what is not supported.
    """
    return {**_MADE, **_POOLED}[config["model_type"]](config, tensors)
