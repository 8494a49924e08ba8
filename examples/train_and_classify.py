"""Train an adapter on a running server, and classify with it.

Start a server first (`make serve`), then:

    python examples/train_and_classify.py
"""

import argparse

from graftwork import Client

ROWS = [
    {"text": "My parcel is late again", "label": "complaint"},
    {"text": "The app crashes every time I open it", "label": "complaint"},
    {"text": "I was charged twice for one ticket", "label": "complaint"},
    {"text": "Your support line does not answer", "label": "complaint"},
    {"text": "Thank you for the quick delivery", "label": "no complaint"},
    {"text": "Do you open on Sundays?", "label": "no complaint"},
    {"text": "The new menu looks great", "label": "no complaint"},
    {"text": "See you at the conference tomorrow", "label": "no complaint"},
]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--name", default="my-complaints", help="what the adapter will be called")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--url", default="http://127.0.0.1:8000")
args = parser.parse_args()

with Client(args.url) as client:
    # The template makes a prompt of each row. It is stored with the adapter, as the labels are.
    job = client.train(
        args.name,
        ROWS,
        method="ia3",
        template="Tweet text : {text} Label :",
        target="label",
        labels=["complaint", "no complaint"],
        hyperparameters={"epochs": args.epochs},
    )
    done = client.wait_for_job(job)
    print(f"{args.name} is version {done['adapter_version']}")

    # `scores` are probabilities of the labels, given that the answer is one of them.
    for text in ("Still no refund after three weeks", "Have a nice weekend"):
        answer = client.classify({"text": text}, adapter=args.name)
        print(f"{text}: {answer['label']} {answer['scores']}")
