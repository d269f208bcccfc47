"""Streaming: print each token as it is made, with what the model thought of it, then the whole with its timings."""

from stoker import Client

with Client() as client:
    job = client.generate("The furnace was", max_tokens=12, temperature=0.8, top_p=0.95, seed=1)
    for token in job.stream(timeout=60):
        print(f"{token.index:3}  {token.text!r:16} probability {token.probability:.2f}")
    result = job.result()
    print(result.text)
    print(f"{result.finish_reason} after {result.usage.completion_tokens} tokens on {result.usage.worker}")
