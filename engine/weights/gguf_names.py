"""GGUF tensor names and row orders, translated to Hugging Face's: those of the Llama family, and of others like it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from stoker.errors import ModelError

#: Tensors outside the layers.
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
#: The middle of the names of a layer's tensors.
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def llama_name(name: str, parts: Mapping[str, str] = PARTS) -> str | None:
    """Hugging Face's name of the GGUF tensor `name`, or None if it has none (`rope_freqs.weight`).

    `parts`: those of another architecture.
    """
    if name in OUTER:
        return OUTER[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in parts:
        return None
    return f"model.layers.{match[1]}.{parts[match[2]]}.{match[3]}"


def unpermute(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo llama.cpp's row order of q and k (architecture `llama`), for rotary embedding by halves.

    `weight` (heads·d, …): within each head, llama.cpp interleaves row i of the first half with row i of the second.
    Codes, scales and biases of a quantized matrix are so ordered as well. Raises `ModelError` if the rows do not fit.
    """
    if weight.shape[0] % (2 * heads):
        raise ModelError(f"{weight.shape[0]} rows are no even number for each of {heads} heads")
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return rows.swapaxes(1, 2).reshape(weight.shape)
