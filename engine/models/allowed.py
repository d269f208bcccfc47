"""Which fields of a config.json are read, which change nothing, and which of their values are refused.

The reference is transformers: a field stands under what it does there, in the version that made `tests/goldens`. A
field that is in no table is refused, because nothing here knows what it asks for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.models.fields import KINDS, Kind, among
from stoker.contract.shown import as_json
from stoker.errors import ModelError


class Anything:
    """The values of a field that changes nothing: every value is allowed."""


ANYTHING = Anything()
#: Field -> the values with which it changes nothing. None always is one: transformers takes it for absent.
Inert = Mapping[str, Anything | tuple[object, ...]]


@dataclass(frozen=True)
class Table:
    """The fields of one kind of file. `used`: read by the code that asks, which checks what their kind leaves open.
    `kinds`: of fields, those of a config.json unless another file is meant that has the same names for other things."""

    used: Collection[str]
    inert: Inert = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=lambda: KINDS)

    def check(self, values: Mapping[str, Any], where: str) -> None:
        """Raise `ModelError` naming a field that has a value of a wrong kind, or asks for what is not implemented."""
        for name, value in values.items():
            if value is None:
                continue
            if name in self.used:
                if name in self.kinds:
                    self.kinds[name].check(value, name, where)
                continue
            allowed = self.inert.get(name)
            if allowed is None:
                raise ModelError(
                    f"{where}: the field {name} = {as_json(value)} is not supported: nothing here knows what it asks "
                    "for. If all is the same without it, remove it"
                )
            if not isinstance(allowed, Anything) and not among(value, allowed):
                only = f"; only {' or '.join(map(as_json, allowed))} is" if allowed else ""
                raise ModelError(f"{where}: {name} = {as_json(value)} is not supported{only}")


def _names(text: str) -> Inert:
    return dict.fromkeys(text.split(), ANYTHING)


#: Who made the file and how; tokens, which the tokenizer's code checks; what only training or generation reads.
_COMMON: Inert = {
    **_names(
        """
        architectures model_type transformers_version _name_or_path name_or_path _commit_hash torch_dtype dtype
        _attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled
        transformers.js_config unsloth_fixed unsloth_version use_cache initializer_range attention_dropout
        hidden_dropout_prob attention_probs_dropout_prob classifier_dropout gradient_checkpointing output_attentions
        output_hidden_states output_past return_dict torchscript use_bfloat16 finetuning_task problem_type id2label
        label2id num_labels prefix task_specific_params tokenizer_class tf_legacy_loss cross_attention_hidden_size
        bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id
        decoder_start_token_id assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens
        diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
        epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
        length_penalty max_length min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule
        num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
        return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p
        """
    ),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "auto_map": ({},),
}

_DECODER_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "original_max_position_embeddings",
)  # fmt: skip
_DECODER: Inert = {
    **_COMMON,
    **_names("pretraining_tp is_llama_config max_sequence_length chunk_size_feed_forward"),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_traditional": (False,),
    "rope_interleaved": (False,),
    "is_causal": (True,),
    "is_decoder": (False, True),
    "use_bidirectional_attention": (False,),
}
_WINDOW_FIELDS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_QWEN: Inert = {**_DECODER, "use_mrope": (False,)}

_ENCODER_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "layer_norm_eps",
)  # fmt: skip
_ENCODER: Inert = {
    **_COMMON,
    **_names("tie_word_embeddings matryoshka_dimensions is_matryoshka"),
    # Exact GELU under each of its names.
    "hidden_act": ("gelu", "gelu_python"),
    "is_decoder": (False,),
    # Another size makes transformers refuse texts whose length is no multiple of it.
    "chunk_size_feed_forward": (0,),
}

#: What Nomic's own code may do and its models do not.
_NOMIC: Inert = {
    **_names(
        """
        attn_pdrop embd_pdrop resid_pdrop dense_seq_output fused_bias_fc fused_dropout_add_ln max_trained_positions
        pad_vocab_size_multiple reorder_and_upcast_attn summary_activation summary_first_dropout summary_proj_to_labels
        summary_type summary_use_proj use_flash_attn use_xentropy
        """
    ),
    # The code that it names is never run.
    "auto_map": ANYTHING,
    "activation_function": ("swiglu",),
    "hidden_act": ("silu", "swish"),
    "rotary_emb_fraction": (1, 1.0),
    "scale_attn_weights": (True,),
    "rotary_emb_scale_base": (),
    "rotary_scaling_factor": (),
    **dict.fromkeys(
        (
            "causal", "mlp_fc1_bias", "mlp_fc2_bias", "parallel_block", "parallel_block_tied_norm", "prenorm",
            "qkv_proj_bias", "rotary_emb_interleaved", "scale_attn_by_inverse_layer_idx", "use_rms_norm",
        ),
        (False,),
    ),
}  # fmt: skip

#: `model_type` -> what its config.json, or an older form of it, calls fields that BERT's has too.
RENAMED: Mapping[str, Mapping[str, str]] = {
    "nomic_bert": {
        "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
        "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layer_norm_eps", "rotary_emb_base": "rope_theta",
    },
    "distilbert": {
        "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
        "hidden_dim": "intermediate_size",
    },
    "t5": {
        "d_model": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
        "d_kv": "head_dim",
    },
}  # fmt: skip

#: `model_type` -> its table.
TABLES: Mapping[str, Table] = {
    "llama": Table((*_DECODER_FIELDS, "layer_types"), _DECODER),
    "mistral": Table((*_DECODER_FIELDS, "sliding_window", "layer_types"), _DECODER),
    "qwen2": Table((*_DECODER_FIELDS, *_WINDOW_FIELDS), _QWEN),
    "qwen3": Table((*_DECODER_FIELDS, *_WINDOW_FIELDS), _QWEN),
    "bert": Table(
        (*_ENCODER_FIELDS, "type_vocab_size"),
        {
            **_ENCODER,
            **_names(
                "directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head "
                "pooler_type"
            ),
            "position_embedding_type": ("absolute",),
        },
    ),
    "modernbert": Table(
        (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "max_position_embeddings",
            "norm_eps",
            "norm_bias",
            "attention_bias",
            "mlp_bias",
            "local_attention",
            "layer_types",
            "global_attn_every_n_layers",
            "rope_parameters",
            "global_rope_theta",
            "local_rope_theta",
        ),
        {
            **_COMMON,
            **_names(
                "tie_word_embeddings matryoshka_dimensions is_matryoshka initializer_cutoff_factor embedding_dropout "
                "mlp_dropout decoder_bias classifier_bias classifier_pooling classifier_activation reference_compile "
                "deterministic_flash_attn repad_logits_with_grad sparse_prediction sparse_pred_ignore_index "
                "layer_norm_eps"
            ),
            "hidden_activation": ("gelu", "gelu_python"),
            # Files name one or another; all have rotary positions.
            "position_embedding_type": ("absolute", "rope", "sans_pos"),
            "is_decoder": (False,),
            "rope_scaling": ({},),
        },
    ),
    "gemma3_text": Table(
        (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
            "rms_norm_eps",
            "query_pre_attn_scalar",
            "sliding_window",
            "layer_types",
            "sliding_window_pattern",
            "_sliding_window_pattern",
            "rope_parameters",
            "rope_scaling",
            "rope_theta",
            "rope_local_base_freq",
            "use_bidirectional_attention",
        ),
        {
            **_COMMON,
            **_names("tie_word_embeddings matryoshka_dimensions is_matryoshka use_cache final_logit_softcapping"),
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attention_bias": (False,),
            "attn_logit_softcapping": (),
            "is_causal": (True, False),
            "is_decoder": (False, True),
        },
    ),
    "nomic_bert": Table(
        (*_ENCODER_FIELDS, "type_vocab_size", "head_dim", "rope_parameters", "rope_theta", *RENAMED["nomic_bert"]),
        {**_ENCODER, **_NOMIC},
    ),
    "gte": Table(
        (*_ENCODER_FIELDS, "type_vocab_size", "head_dim", "rope_parameters", "rope_theta"),
        {**_ENCODER, "position_embedding_type": ("rope",)},
    ),
    "distilbert": Table(
        [name for name in _ENCODER_FIELDS if name != "layer_norm_eps"],
        {
            **_ENCODER,
            **_names("dropout qa_dropout seq_classif_dropout sinusoidal_pos_embds tie_weights_"),
            "activation": ("gelu", "gelu_python"),
            # Nothing reads it: the norms have this one throughout.
            "layer_norm_eps": (1e-12,),
        },
    ),
    "electra": Table(
        (*_ENCODER_FIELDS, "type_vocab_size", "embedding_size"),
        {
            **_ENCODER,
            **_names("summary_activation summary_last_dropout summary_type summary_use_proj"),
            "position_embedding_type": ("absolute",),
        },
    ),
    "albert": Table(
        (*_ENCODER_FIELDS, "type_vocab_size", "embedding_size", "num_hidden_groups", "inner_group_num"),
        {
            **_ENCODER,
            **_names("classifier_dropout_prob down_scale_factor gap_size net_structure_type num_memory_blocks"),
            "layers_to_keep": ([],),
            "hidden_act": ("gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh"),
            "position_embedding_type": ("absolute",),
        },
    ),
    "deberta-v2": Table(
        (
            *_ENCODER_FIELDS,
            "type_vocab_size",
            "embedding_size",
            "attention_head_size",
            "relative_attention",
            "max_relative_positions",
            "position_buckets",
            "position_biased_input",
            "pos_att_type",
            "share_att_key",
            "norm_rel_ebd",
        ),
        {
            **_ENCODER,
            # The head reads those of the pooler.
            **_names("pooler_dropout pooler_hidden_act pooler_hidden_size cls_dropout legacy"),
            # Behind the first layer, in some models of version 2.
            "conv_kernel_size": (0,),
        },
    ),
    "t5": Table(
        (
            "d_model",
            "d_kv",
            "d_ff",
            "num_layers",
            "num_heads",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "vocab_size",
            "layer_norm_epsilon",
            "feed_forward_proj",
            "is_gated_act",
            "dense_act_fn",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
        ),
        {
            **_COMMON,
            **_names(
                "tie_word_embeddings matryoshka_dimensions is_matryoshka dropout_rate initializer_factor n_positions "
                "num_decoder_layers scale_decoder_outputs"
            ),
            "is_encoder_decoder": (True, False),
            "is_decoder": (False,),
        },
    ),
    **dict.fromkeys(
        ("xlm-roberta", "roberta", "camembert"),
        Table(
            (*_ENCODER_FIELDS, "type_vocab_size", "pad_token_id"),
            {**_ENCODER, "position_embedding_type": ("absolute",)},
        ),
    ),
    "mpnet": Table(_ENCODER_FIELDS, {**_ENCODER, "relative_attention_num_buckets": (32,)}),
}
#: Heads of keys and values where the file does not say, which is not where it says null: then as many as of queries.
KEY_VALUE_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
#: Positions where the file does not say.
CONTEXT = {
    "llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768, "bert": 512, "mpnet": 512, "xlm-roberta": 512,
    "roberta": 512, "modernbert": 8192, "gemma3_text": 131_072, "nomic_bert": 2048, "gte": 8192, "camembert": 512,
    "distilbert": 512, "electra": 512, "albert": 512, "deberta-v2": 512, "t5": 2048,
}  # fmt: skip
#: Mistral's window where the file does not say; null is none.
MISTRAL_WINDOW = 4096

#: Keys of GGUF metadata, without the architecture before them.
_GGUF_FIELDS = (
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "context_length", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor",
)  # fmt: skip
_GGUF: Inert = {
    **_names("vocab_size rope.scaling.finetuned rope.scaling.original_context_length attention.layer_norm_epsilon"),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
    "rope.scaling.attn_factor": (1.0,),
}


def gguf(architecture: str) -> Table:
    """The table of a GGUF file's keys that start with its architecture."""
    return Table(
        [f"{architecture}.{name}" for name in _GGUF_FIELDS],
        {f"{architecture}.{name}": values for name, values in _GGUF.items()},
    )
