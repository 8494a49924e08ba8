"""Use OpenAI's client with a Graftwork server. An adapter is a model: give its name as `model`.

Start a server first (`make serve`), and `pip install openai`, then:

    python examples/openai_client.py --adapter complaints
"""

import argparse

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--adapter", default="complaints")
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--api-key", default="none", help="a server on this machine asks for none")
args = parser.parse_args()

client = OpenAI(base_url=f"{args.url}/v1", api_key=args.api_key)

# The base comes first, then the adapters.
models = [model.id for model in client.models.list()]
print("models:", ", ".join(models))

# A completion by the adapter.
prompt = "Tweet text : My parcel is late again. Label :"
completion = client.completions.create(model=args.adapter, prompt=prompt, max_tokens=8)
print("completion:", completion.choices[0].text)

# The same, token by token.
print("stream:", end="", flush=True)
for chunk in client.completions.create(
    model=args.adapter, prompt=prompt, max_tokens=8, stream=True
):
    print(chunk.choices[0].text, end="", flush=True)
print()

# A chat with the base. This needs a base with a chat template.
chat = client.chat.completions.create(
    model=models[0],
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    max_tokens=16,
)
print("chat:", chat.choices[0].message.content)
