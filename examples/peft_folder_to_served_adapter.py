"""Upload a folder that PEFT saved, and generate with it.

Start a server first (`make serve`), then:

    python examples/peft_folder_to_served_adapter.py path/to/peft_folder --name mine
"""

import argparse

from graftwork import Client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="what PEFT's save_pretrained wrote, or a .zip or .tar of it")
parser.add_argument("--name", default="mine", help="what the adapter will be called")
parser.add_argument("--prompt", default="Tweet text : My parcel is late again. Label :")
parser.add_argument("--url", default="http://127.0.0.1:8000")
args = parser.parse_args()

with Client(args.url) as client:
    # The server checks the folder against its base model; a refusal says what does not fit.
    adapter = client.add_adapter(args.name, args.folder)
    print(f"{adapter['name']} is version {adapter['version']}, {adapter['peft_type']}")

    # The same prompt with the adapter and without it. Both can run in one batch.
    print("adapter:", client.generate(args.prompt, adapter=args.name, max_new_tokens=10))
    print("base:   ", client.generate(args.prompt, max_new_tokens=10))
