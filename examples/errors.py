"""What goes wrong, and how it is reported: one class each, the same for what the client and what the worker finds."""

from stoker import Client, StokerError
from stoker.errors import TextTooLong

with Client() as client:
    try:
        client.embed(["word " * 400]).result(timeout=60)
    except TextTooLong as error:
        print(f"the worker says: {error}")

    for wrong in ({"max_tokens": 0}, {"temprature": 0.5}, {"model": "nope"}, {"adapter": "nope"}):
        try:
            client.generate("Once upon a time", **wrong).result(timeout=60)
        except StokerError as error:
            print(f"{type(error).__name__}: {error}")
