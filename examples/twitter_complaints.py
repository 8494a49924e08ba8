"""RAFT's twitter_complaints with prefix tuning, by the recipe that was published for bloomz-560m.

The recipe: the prompt `Tweet text : {Tweet text} Label : `, 20 virtual tokens, AdamW with a rate of
3e-2 that falls to 0 as a line, 50 epochs, 8 rows a step, 64 tokens a row at most.

The data is a CSV file with the columns `Tweet text` and `Label`; RAFT is `ought/raft` on the Hugging
Face Hub. No server is needed:

    python examples/twitter_complaints.py --base path/to/bloomz-560m --data train.csv --out adapter
"""

import argparse
import csv
import json
import subprocess
import sys

from graftwork import Engine

TEMPLATE = "Tweet text : {Tweet text} Label : "
RECIPE = {
    "optimizer": "adamw",
    "weight_decay": 0.01,  # torch's default for AdamW
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "max_grad_norm": 0.0,  # gradients are not clipped
}


def train(base: str, data: str, out: str, epochs: int) -> None:
    """Write the trained adapter into the folder `out`, in PEFT's format."""
    options = {
        "--method": "prefix_tuning",
        "--base": base,
        "--data": data,
        "--out": out,
        "--template": TEMPLATE,
        "--target": "Label",
        "--config": json.dumps({"num_virtual_tokens": 20, "prefix_projection": False}),
        "--lr": "3e-2",
        "--epochs": str(epochs),
        "--batch-size": "8",
        "--hyperparameters": json.dumps(RECIPE),
        "--max-length": "64",
        "--on-too-long": "truncate",
        # The recipe leaves the space at the prompt's end where it is.
        "--tokenization": "as_written",
    }
    words = [word for option in options.items() for word in option]
    subprocess.run([sys.executable, "-m", "server", "train", *words], check=True)


def main() -> None:
    """Train, then answer the first rows of the data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="a Hugging Face directory")
    parser.add_argument("--data", required=True, help="a CSV file: Tweet text, Label")
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--epochs", type=int, default=50)
    args = parser.parse_args()

    train(args.base, args.data, args.out, args.epochs)

    with open(args.data, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:8]
    engine = Engine(args.base)
    engine.add_adapter("complaints", args.out)
    prompts = [("complaints", TEMPLATE.format_map(row)) for row in rows]
    for row, text in zip(rows, engine.generate(prompts, max_new_tokens=10), strict=True):
        print(f"{row['Tweet text']!r}: {text.strip()!r}, expected {row['Label']!r}")
    engine.close()


if __name__ == "__main__":
    main()
