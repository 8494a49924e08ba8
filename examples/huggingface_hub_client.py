"""Use huggingface_hub's InferenceClient with a Graftwork server.

Start a server first (`make serve`), and `pip install huggingface_hub`, then:

    python examples/huggingface_hub_client.py --adapter complaints
"""

import argparse

from huggingface_hub import InferenceClient

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--adapter", default="complaints")
parser.add_argument("--url", default="http://127.0.0.1:8000")
args = parser.parse_args()

client = InferenceClient(args.url)
prompt = "Tweet text : My parcel is late again. Label :"

# `adapter_id` chooses the adapter; without it the base answers.
print("adapter:", client.text_generation(prompt, adapter_id=args.adapter, max_new_tokens=8))
print("base:", client.text_generation(prompt, max_new_tokens=8))

# Details: why the text ended, and each token with its log-probability.
output = client.text_generation(prompt, adapter_id=args.adapter, max_new_tokens=8, details=True)
print("ended by:", output.details.finish_reason)
for token in output.details.tokens:
    print(f"  {token.text!r} {token.logprob:.3f}")

# A stream of pieces.
for piece in client.text_generation(prompt, adapter_id=args.adapter, max_new_tokens=8, stream=True):
    print(piece, end="", flush=True)
print()
