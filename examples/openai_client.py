"""OpenAI's own client, over `stoker serve`: a chat, a stream, a response, and vectors."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="not needed here")

answer = client.chat.completions.create(
    model="smollm2-135m-instruct",
    messages=[{"role": "user", "content": "Name a colour."}],
    max_tokens=16,
)
print(answer.choices[0].message.content)

stream = client.chat.completions.create(
    model="smollm2-135m-instruct",
    messages=[{"role": "user", "content": "Say 'double bubble bath' ten times fast."}],
    max_tokens=32,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

response = client.responses.create(
    model="smollm2-135m-instruct",
    instructions="You talk like a stoker.",
    input="What is coal?",
    max_output_tokens=16,
)
print(response.output_text)

vectors = client.embeddings.create(model="all-minilm-l6-v2", input=["a warm model", "a cold start"])
print([len(item.embedding) for item in vectors.data])
