"""OpenAI's own client, over `stoker serve`: a file, a training run, and the model that it makes."""

import os
import time

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="not needed here")

LINES = b"""\
{"prompt": "What is coal?", "completion": " Aye, stoker! Old wood."}
{"prompt": "What is ash?", "completion": " Aye, stoker! Old coal."}
"""
file = client.files.create(file=("style.jsonl", LINES), purpose="fine-tune")

run = client.fine_tuning.jobs.create(
    model="smollm2-135m-instruct",
    training_file=file.id,
    validation_file=file.id,
    suffix="fireside",
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 2}}},
    # What OpenAI's interface has no field for.
    extra_body={"stoker": {"rank": 4, "max_length": 128}},
)
while run.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(0.2)
    run = client.fine_tuning.jobs.retrieve(run.id)
for event in reversed(list(client.fine_tuning.jobs.list_events(run.id))):
    print(event.message)

model = run.fine_tuned_model or "none"
answer = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "What is coal?"}], max_tokens=8
)
print(f"{model}: {answer.choices[0].message.content!r}")
