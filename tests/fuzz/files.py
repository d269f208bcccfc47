"""Models and adapters whose files are damaged. Models are loaded as a worker loads them, in a process of their own;
adapters by the worker itself, which then uses what it took."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from typing import Any

from tests.chaos.fleet import GENERATE
from tests.endless import CHECKPOINTS
from tests.fuzz import odd
from tests.fuzz.input import Input
from tests.fuzz.world import World

MODELS = ("bert", "llama-linear", "llama-llama3", "mistral", "mpnet", "qwen2-tied", "qwen3")
#: Files that may stand next to a model's own, and what they may begin as.
NEXT_TO_A_MODEL: dict[str, Any] = {
    "tokenizer_config.json": {"added_tokens_decoder": {"5": {"content": "ab", "special": True}}, "model_max_length": 64,
        "bos_token": "<s>", "chat_template": "{{ messages }}", "do_lower_case": True, "padding_side": "left"},
    "special_tokens_map.json": {"eos_token": {"content": "</s>", "lstrip": True}, "additional_special_tokens": ["ab"]},
    "added_tokens.json": {"ab": 5},
    "generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.5},
    "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": True},
    "config_sentence_transformers.json": {"prompts": {"query": "q: "}, "default_prompt_name": "query"},
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}],
    "model.safetensors.index.json": {"metadata": {}, "weight_map": {"a": "model.safetensors"}},
}  # fmt: skip
#: Numbers in headers: counts, lengths, offsets.
NUMBERS = (0, 1, 2, 3, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def draw(chance: random.Random, number: int) -> Input:
    return chance.choices((_model, _gguf, _adapter), (5, 2, 4))[0](chance, number)


def _model(chance: random.Random, number: int) -> Input:
    name = chance.choice(MODELS)
    source = CHECKPOINTS / name
    own = [path.name for path in sorted(source.iterdir())]
    file = chance.choice((*own, *own, *NEXT_TO_A_MODEL))
    whole = (source / file).read_bytes() if file in own else json.dumps(NEXT_TO_A_MODEL[file]).encode()
    damaged = _damaged(chance, file, whole)

    def act(world: World) -> list[str]:
        folder = world.own_folder(number) / name
        shutil.copytree(source, folder)
        (folder / file).write_bytes(damaged)
        wrong = world.loader.load(folder)
        shutil.rmtree(folder)
        return wrong

    return Input(f"{file} of {name}: {_difference(whole, damaged)}", act)


def _gguf(chance: random.Random, number: int) -> Input:
    """The sound file is made once and lies in the world's folder."""
    spots = [(chance.random(), chance.choice((1, 4, 8)), chance.choice(NUMBERS)) for _ in range(chance.randint(1, 3))]
    cut = chance.choice((1.0, 1.0, 1.0, 0.999, 0.5, 0.1))

    def act(world: World) -> list[str]:
        content = bytearray(world.gguf.read_bytes())
        head = content.find(b"blk.0.ffn_norm") + 100
        for where, width, value in spots:
            at = int(where * head)
            content[at : at + width] = (value % 256**width).to_bytes(width, "little")
        path = world.own_folder(number) / "damaged.gguf"
        path.write_bytes(content[: int(cut * len(content))])
        wrong = world.loader.load(path)
        path.unlink()
        return wrong

    return Input(f"a GGUF file with {spots}, cut to {cut:g} of it", act)


def _adapter(chance: random.Random, number: int) -> Input:
    file, layout = chance.choice(("adapter_config.json", "adapter_model.safetensors")), chance.random()
    # What happens to the file is drawn when it is there: by the number alone, as everything else.
    later = random.Random(chance.random())
    name = f"f{number}"

    def act(world: World) -> list[str]:
        folder = world.own_folder(number) / "adapter"
        shutil.copytree(world.adapter_files, folder, ignore=shutil.ignore_patterns("stoker.json"))
        (folder / file).write_bytes(_damaged(later, file, (folder / file).read_bytes()))
        wrong = world.judged(lambda: world.client.adapters.load(name, folder, model=GENERATE, promote=layout < 0.8))
        used = world.judged(lambda: world.client.generate("ab", model=GENERATE, adapter=name, max_tokens=3))
        return wrong + [f"in use, {problem}" for problem in used]

    return Input(f"an adapter with a damaged {file}", act)


def _damaged(chance: random.Random, file: str, whole: bytes) -> bytes:
    if file.endswith(".safetensors") and chance.random() < 0.8:
        return _lying(chance, whole)
    if file.endswith(".json") and chance.random() < 0.7:
        document = odd.spoiled(chance, json.loads(whole))
        try:
            return json.dumps(document).encode()
        except RecursionError:
            return b"[" * 5000
    return odd.spoiled_bytes(chance, whole)


def _lying(chance: random.Random, whole: bytes) -> bytes:
    """Weights whose header says something else than is there."""
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    names = sorted(header.keys() - {"__metadata__"})
    name, other = chance.choice(names), chance.choice(names)
    start, end = header[name]["data_offsets"]
    by = chance.choice((-(2**40), -64, -1, 1, 64, 2**40, 2**62))
    changes: list[Callable[[], object]] = [
        lambda: header[name].update(data_offsets=header[other]["data_offsets"]),
        lambda: header[name].update(data_offsets=[start + by, end + by]),
        lambda: header[name].update(shape=[*header[name]["shape"], chance.choice((0, 1, 2, 2**31, 2**62))]),
        lambda: header[name].update(shape=header[name]["shape"][::-1]),
        lambda: header[name].update(dtype=chance.choice(("F16", "BF16", "U32", "I8", "F64", "F8_E4M3", "", "x" * 99))),
        lambda: header.pop(name),
        lambda: header.update({name + "x": header.pop(name)}),
        lambda: header.update({name: odd.json_value(chance)}),
        lambda: header.update({"__metadata__": odd.json_value(chance)}),
        lambda: header[name].update({chance.choice(("dtype", "shape", "data_offsets")): odd.json_value(chance)}),
    ]
    chance.choice(changes)()
    try:
        text = json.dumps(header).encode()
    except RecursionError:
        text = b"[" * 5000
    announced = max(0, len(text) + chance.choice((0, 0, 0, 0, -1, 1, 2**20, 2**62)))
    rest = whole[8 + length :]
    return struct.pack("<Q", announced) + text + rest[: chance.choice((len(rest), len(rest), len(rest) // 2))]


def _difference(whole: bytes, damaged: bytes) -> str:
    """The bytes around the first one that differs."""
    at = next(
        (at for at, (a, b) in enumerate(zip(whole, damaged, strict=False)) if a != b), min(len(whole), len(damaged))
    )
    return f"{len(damaged)} bytes instead of {len(whole)}, from byte {at} on {odd.shown(damaged[at : at + 80])}"
