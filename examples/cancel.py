"""Three ways to stop a job: by leaving its stream, by its handle, and by its id from anywhere else."""

from stoker import Client
from stoker.errors import JobCancelled

with Client() as client:
    left = client.generate("Once upon a time", max_tokens=2000)
    for token in left.stream(timeout=60):
        if token.index == 3:
            break  # leaving the loop cancels the job; stream(cancel_on_close=False) would let it go on

    asked = client.generate("Once upon a time", max_tokens=2000)
    asked.cancel()

    found = client.generate("Once upon a time", max_tokens=2000)
    client.job(found.id).cancel()

    for job in (left, asked, found):
        try:
            job.result(timeout=60)
        except JobCancelled as error:
            print(error, job.status())
