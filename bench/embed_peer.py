"""sentence-transformers as a child process: one JSON line in (`texts`, `batch`), one out (`seconds`, `file`).

Runs in `.venv-peers`: `python -m bench.embed_peer FOLDER THREADS`.
"""

import json
import sys
import time

import numpy as np
import torch
from sentence_transformers import SentenceTransformer


def main() -> None:
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        vectors = model.encode(asked["texts"], batch_size=asked["batch"])
        seconds = time.perf_counter() - began
        if asked.get("file"):
            np.save(asked["file"], vectors)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
