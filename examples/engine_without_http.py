"""Use the engine in this process, without a server: several adapters in one batch.

python examples/engine_without_http.py --base .graftwork/base path/to/peft_folder ...
"""

import argparse
from pathlib import Path

from graftwork import Engine

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", help="folders that PEFT saved")
    parser.add_argument("--base", default=".graftwork/base", help="a Hugging Face directory")
    parser.add_argument("--prompt", default="Tweet text : My parcel is late again. Label :")
    args = parser.parse_args()

    engine = Engine(args.base)
    names = [Path(folder).name for folder in args.folders]
    for name, folder in zip(names, args.folders, strict=True):
        engine.add_adapter(name, folder)

    # One prompt for the base (None) and one for each adapter, generated together.
    asked = [None, *names]
    texts = engine.generate([(name, args.prompt) for name in asked], max_new_tokens=10)
    for name, text in zip(asked, texts, strict=True):
        print(f"{name or 'base'}: {text!r}")
    engine.close()
