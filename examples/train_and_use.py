"""Train a LoRA adapter on the warm base, then generate with it and without it: no model is loaded again."""

from stoker import Client

EXAMPLES = [
    {"prompt": f"Q: What is {thing}?\nA:", "completion": f" Aye, stoker! {thing.capitalize()} it is."}
    for thing in ("coal", "steam", "iron", "water")
]

with Client() as client:
    run = client.train("aye", EXAMPLES, steps=8, learning_rate=4e-3, max_length=32)
    for report in run.progress(timeout=120):
        print(f"step {report.step}/{report.steps}  loss {report.loss:.3f}")
    result = run.result()
    print(f"{result.adapter}@{result.version}: {result.first_loss:.3f} to {result.last_loss:.3f}")

    question = "Q: What is fire?\nA:"
    jobs = [client.generate(question, max_tokens=10, adapter=adapter) for adapter in (None, "aye")]
    bare, adapted = (job.result(timeout=60).text for job in jobs)
    print(f"base:    {bare!r}\nadapter: {adapted!r}")
    assert adapted.startswith(" Aye, stoker!")
