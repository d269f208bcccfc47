"""How a reranker's pairs are put together, by its tokenizer and its chat template."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoints.vocabulary import check_pair_types
from engine.models.bert import Bert
from engine.models.causal import CausalEncoder
from engine.models.encoder import Encoder
from engine.models.rerank_files import RerankFiles
from engine.text.pairs import FormPairs, Pairing, SidePairs, forms_of
from engine.text.tokenizer import Tokenizer
from stoker.errors import ModelError


def pairing_of(folder: Path, files: RerankFiles, model: Encoder, tokenizer: Tokenizer) -> Pairing:
    """Raises `ModelError` where it is not known."""
    if isinstance(model, CausalEncoder):
        forms = forms_of(tokenizer, named=files.named)
        if forms is not None:
            return FormPairs(tokenizer, forms)
        if files.form == "judge":
            raise ModelError(f"{folder}: it has no chat template, so it is not known how a pair is put to it")
    elif isinstance(model, Bert) and model.args.types:
        check_pair_types(folder, tokenizer, model.args.types)
        return SidePairs(tokenizer, model.args.vocab)
    return SidePairs(tokenizer, None)
