"""Logits that peft gives with an adapter's folder on the tiny Llama: `python peft_logits.py FOLDER OUT.npy TOKEN…`."""

from __future__ import annotations

import sys

import numpy as np
import torch
from peft import PeftModel
from peft_runs import base

if __name__ == "__main__":
    folder, out, *tokens = sys.argv[1:]
    model = PeftModel.from_pretrained(base(), folder).eval()
    with torch.inference_mode():
        np.save(out, model(torch.tensor([[int(token) for token in tokens]])).logits[0].numpy())
