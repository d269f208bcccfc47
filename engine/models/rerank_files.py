"""What a reranker's files say: whether a folder is one, and how a pair's score is made. MLX is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.models.allowed import Table
from engine.models.fields import Fields
from engine.models.sentence_files import SentenceFiles, inside, kind_of
from engine.platform.jsonfiles import read_object
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: `model_type` of the cross-encoders that are supported, and of the decoders that judge by their next token.
CLASSIFIERS = (
    "bert", "xlm-roberta", "roberta", "camembert", "distilbert", "electra", "albert", "deberta-v2", "mpnet",
    "modernbert", "qwen2", "qwen3",
)  # fmt: skip
JUDGES = ("qwen3",)
#: Those of both that are decoders, whose pairs may have an instruction.
DECODERS = ("qwen2", "qwen3")
_CLASSIFIES = "ForSequenceClassification"
#: Qwen3-Reranker's first files say nowhere that it is no chat model: this name in that of the folder, or of the
#: repository in the hub's cache, says it.
_NAMED = "qwen3-reranker"
#: What config.json may say of the score, under the names that sentence-transformers and vLLM give it.
_OWN = (
    "sentence_transformers", "sbert_ce_default_activation_function", "classifier_from_token",
    "is_original_qwen3_reranker", "method",
)  # fmt: skip
_SCORE = Table(("true_token_id", "false_token_id"), {"module_input_name": ("causal_logits",)})
#: Whether what torch calls so puts scores between 0 and 1.
_ACTIVATIONS = {"torch.nn.modules.activation.Sigmoid": True, "torch.nn.modules.linear.Identity": False}


@dataclass(frozen=True)
class RerankFiles:
    """`form`: a `classifier` has a head with one output; a `judge` says by its next token whether a text fits, and its
    score is the logit of `yes` less that of `no`. `sigmoid`: whether scores go through one unless a request says
    otherwise. `named`: whether it is a Qwen3-Reranker, by its name or its config.json."""

    sentence: SentenceFiles
    form: Literal["classifier", "judge"]
    sigmoid: bool
    named: bool
    yes: int | str = "yes"
    no: int | str | None = "no"
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    @classmethod
    def of(cls, root: Path, config: Mapping[str, Any]) -> RerankFiles | None:
        """Of a folder with this config.json; None for one that holds no reranker. Raises `ModelError` for one that is
        not supported."""
        sentence, architecture = SentenceFiles.of(root), config.get("model_type")
        named = architecture in JUDGES and _is_named(root)
        form = _form(sentence, config, named)
        if form is None:
            return None
        _check(form, config)
        prompts, default = sentence.prompts()
        if architecture not in DECODERS and default:
            raise ModelError(f"{root}: default_prompt_name {as_json(default)} is not supported for a cross-encoder")
        yes, no = _judgement(sentence, config)
        named = named or config.get("classifier_from_token") is not None
        return cls(sentence, form, _sigmoid(sentence, config), named, yes, no, prompts, default)


def without_own(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as the model itself reads it, without what is said there of the score."""
    return {name: value for name, value in config.items() if name not in _OWN}


def _is_named(root: Path) -> bool:
    names = (root.name, *(part for part in root.parts if part.startswith("models--")))
    return any(_NAMED in name.lower() for name in names)


def _form(sentence: SentenceFiles, config: Mapping[str, Any], named: bool) -> Literal["classifier", "judge"] | None:
    kinds = [kind_of(module) for module in sentence.modules]
    if kinds:
        if kinds == ["Transformer", "LogitScore"]:
            return "judge"
        lone = kinds == ["Transformer"] and sentence.settings.get("transformer_task") == "sequence-classification"
        return "classifier" if lone else None
    if config.get("classifier_from_token") is not None:
        return "judge"
    architectures = config.get("architectures")
    stated = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if stated.endswith(_CLASSIFIES):
        return "classifier"
    return "judge" if named else None


def _check(form: str, config: Mapping[str, Any]) -> None:
    architecture = config.get("model_type")
    known = CLASSIFIERS if form == "classifier" else JUDGES
    if architecture not in known:
        what = "cross-encoder" if form == "classifier" else "decoder that judges pairs"
        raise ModelError(
            f"config.json: a {what} of model_type {as_json(architecture)} is not supported; {', '.join(known)} are"
        )
    if form == "classifier" and (labels := _labels(config)) != 1:
        raise ModelError(
            f"config.json: {labels} labels (id2label); a reranker has one, the score. Classifiers are not supported"
        )


def _labels(config: Mapping[str, Any]) -> int:
    """As transformers counts them: two where the file says nothing."""
    named = config.get("id2label")
    return len(named) if isinstance(named, Mapping) else Fields(config, "config.json").count("num_labels", 2)


def _judgement(sentence: SentenceFiles, config: Mapping[str, Any]) -> tuple[int | str, int | str | None]:
    """The tokens of yes and no, by their ids or their texts."""
    for module in sentence.modules:
        if kind_of(module) == "LogitScore":
            path = inside(sentence.root, module["path"]) / "config.json"
            said = read_object(path)
            _SCORE.check(said, str(path))
            fields = Fields(said, str(path))
            no = None if said.get("false_token_id") is None else fields.index("false_token_id", 0)
            return fields.index("true_token_id", -1), no
    stated = config.get("classifier_from_token")
    if stated is None:
        return "yes", "no"
    if not isinstance(stated, list) or len(stated) != 2 or not all(isinstance(token, str) for token in stated):
        raise ModelError(f'config.json: classifier_from_token {as_json(stated)} is not a list like ["no", "yes"]')
    return stated[1], stated[0]


def _sigmoid(sentence: SentenceFiles, config: Mapping[str, Any]) -> bool:
    """By the first of the files that says it, as in sentence-transformers."""
    own = config.get("sentence_transformers")
    stated = (
        sentence.activation,
        own.get("activation_fn") if isinstance(own, Mapping) else None,
        config.get("sbert_ce_default_activation_function"),
    )
    named = next((name for name in stated if name is not None), "torch.nn.modules.activation.Sigmoid")
    if str(named) not in _ACTIVATIONS:
        raise ModelError(f"activation_fn {as_json(named)} is not supported; {' and '.join(_ACTIVATIONS)} are")
    return _ACTIVATIONS[str(named)]
