"""A decoder of a few thousand random weights that never says that it is done: warm at once, with streams of seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "goldens" / "architectures"
MODEL = "tiny-decoder"
#: Tokens that it takes.
CONTEXT = 4096


def write(folder: Path) -> Path:
    """Its files, in a new folder of this one."""
    decoder = folder / MODEL
    shutil.copytree(CHECKPOINTS / "qwen3", decoder)
    (decoder / "generation_config.json").unlink()
    config = json.loads((decoder / "config.json").read_text())
    del config["eos_token_id"]
    (decoder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    words = (decoder / "tokenizer.json").read_text()
    (decoder / "tokenizer.json").write_text(words.replace("</s>", "<word>"))
    (decoder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    return decoder
