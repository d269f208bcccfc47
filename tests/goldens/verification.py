"""What `stoker verify` compares with, out of the goldens of torch: `python -m tests.goldens.verification` writes
`stoker/data/verification.json`.

Other floats than float32 round a logit by up to 1/16, so that a token is certain as long as it led by a whole logit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
FILE = HERE.parent.parent / "stoker" / "data" / "verification.json"
PROMPTS = ("list", "fact", "chat-short")
TEXTS = ("a warm model", "Interest rates rose", "東京の夏", "Bread needs only")
#: Logits by which a token led.
LEAD = 1.0


def made() -> dict[str, Any]:
    told, numbers = json.loads((HERE / "smollm2.json").read_text("utf-8")), np.load(HERE / "smollm2.npz")
    prompts = []
    for index, prompt in enumerate(told["prompts"]):
        if prompt["name"] in PROMPTS:
            margins = numbers[f"margins_{index}"]
            unsure = np.flatnonzero(margins < LEAD)
            certain = int(unsure[0]) if len(unsure) else len(margins)
            prompts.append(
                {"name": prompt["name"], "prompt_ids": prompt["prompt_ids"], "token_ids": prompt["token_ids"][:certain]}
            )
    texts, vectors = json.loads((HERE / "minilm.json").read_text("utf-8"))["texts"], np.load(HERE / "minilm.npz")
    chosen = [number for number, text in enumerate(texts) if text["text"].startswith(TEXTS)]
    return {
        "prompts": prompts,
        "texts": [texts[number]["text"] for number in chosen],
        "vectors": [[round(float(value), 5) for value in vectors["alone"][number]] for number in chosen],
    }


def text() -> str:
    return json.dumps(made(), ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
