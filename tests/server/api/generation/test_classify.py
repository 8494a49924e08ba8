"""`/classify` on a real server, held to PEFT."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.server.http_server import save_prefix_adapter, upload

LABELS = ["complaint", "no complaint", "Übergröße"]
TEXTS = ["Tweet text : the fridge is late Label :", "x", "the tweet is a complaint"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    return save_prefix_adapter(tmp_path_factory.mktemp("classify") / "a", seed=71)


@pytest.fixture(scope="module")
def with_eos(server, adapter_folder):
    """The same bytes twice: with the end-of-sequence token and an empty separator, and without."""
    fields = {"labels": '["complaint", "no complaint"]', "template": "{a} and {b} :"}
    eos = {"append_eos": "true", "target_separator": ""}
    for name, more in (("ranked", {}), ("ranked-eos", eos)):
        reply = upload(server, adapter_folder, name, **fields, **more)
        assert reply.status_code == 201, reply.text
    yield
    for name in ("ranked", "ranked-eos"):
        server.delete(f"/adapters/{name}")


@pytest.fixture(scope="module")
def oracle(tiny_base, adapter_folder):
    """Log-likelihood of target ids after prompt ids, by transformers and PEFT."""
    import peft

    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), adapter_folder
        ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    def likelihood(text, target, *, adapted, eos):
        prompt = tokenizer(text)["input_ids"]
        wanted = tokenizer(target, add_special_tokens=False)["input_ids"]
        wanted += [tokenizer.eos_token_id] if eos else []
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = torch.tensor([prompt + wanted])
            logits = (model if adapted else base)(input_ids=ids).logits[0].float()
        # A prefix adds no logits; a prompt would.
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return rows[torch.arange(len(wanted)), torch.tensor(wanted)].sum().item(), len(wanted)

    return likelihood


@pytest.mark.parametrize("normalization", ["sum", "token_mean"])
@pytest.mark.parametrize(
    ("adapter", "separator", "eos"),
    [(None, " ", False), ("ranked", " ", False), ("ranked-eos", "", True)],
)
def test_scores_are_those_of_peft(server, with_eos, oracle, adapter, separator, eos, normalization):
    query = "" if adapter is None else f"?adapter={adapter}"
    body = {"inputs": TEXTS, "labels": LABELS, "normalization": normalization, "raw": True}
    reply = server.post(f"/classify{query}", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-adapter-id"] == (adapter or "tiny-base")
    assert len(reply.json()) == len(TEXTS)
    for text, got in zip(TEXTS, reply.json(), strict=True):
        want = {}
        for label in LABELS:
            total, num_tokens = oracle(
                text, separator + label, adapted=adapter is not None, eos=eos
            )
            want[label] = total if normalization == "sum" else total / num_tokens
        assert got["logprobs"] == pytest.approx(want, abs=TOLERANCE)
        assert got["label"] == max(want, key=want.get)
        mass = sum(math.exp(value) for value in want.values())
        shares = {label: math.exp(value) / mass for label, value in want.items()}
        assert got["scores"] == pytest.approx(shares, abs=TOLERANCE)


def near(one, other):
    """The same but for rounding: a beginning that was in the cache is not computed again."""
    return one["label"] == other["label"] and all(
        one[part] == pytest.approx(other[part], rel=1e-5) for part in ("scores", "logprobs")
    )


def test_a_row_is_the_text_of_the_stored_template(server, with_eos):
    rows = [{"a": "the tweet", "b": 5}, {"a": "late </s>", "b": True}]
    texts = ["the tweet and 5 :", "late </s> and true :"]
    by_row = server.post("/classify?adapter=ranked", json={"rows": rows}).json()
    by_text = server.post("/classify?adapter=ranked", json={"inputs": texts}).json()
    assert near(by_row[0], by_text[0])
    # Inside a row the name of a special token is plain text.
    assert by_row[1] != by_text[1]
    one = server.post("/classify?adapter=ranked", json={"row": rows[0]}).json()
    assert near(one, by_row[0])
    assert list(one["scores"]) == ["complaint", "no complaint"]


COLUMN = {
    "template": "Tweet text : {Tweet text} Label : ",
    "labels": '["complaint", "no complaint"]',
}
PUNCTUATED = {**COLUMN, "template": "{text} =>"}
MARKED = {**COLUMN, "template": "{text}?"}
BARE = {**COLUMN, "template": "{text}"}
OPTIONAL = {**COLUMN, "template": "Task: {text}\n{?input}\nAnswer:"}
CHINESE = {**COLUMN, "template": "评论:{text} 情感:"}


@pytest.fixture(scope="module")
def one_column(server, adapter_folder):
    templates = {"column": COLUMN, "punctuated": PUNCTUATED, "marked": MARKED, "bare": BARE,
                 "chinese": CHINESE, "optional": OPTIONAL}  # fmt: skip
    for name, fields in templates.items():
        reply = upload(server, adapter_folder, name, **fields)
        assert reply.status_code == 201, reply.text
    yield
    for name in templates:
        server.delete(f"/adapters/{name}")


@pytest.mark.parametrize(
    ("adapter", "text", "column"),
    [
        ("column", "late </s> again", "Tweet text"),
        ("column", "Tweet text : only the beginning", "Tweet text"),
        ("punctuated", "late again", "text"),
        ("marked", "late again?", "text"),  # one mark says nothing
        ("bare", "late </s> again", "text"),
        ("chinese", "太晚了", "text"),
        ("optional", "late again", "text"),
    ],
)
def test_a_text_fills_a_template_of_one_column(server, one_column, adapter, text, column):
    url = f"/classify?adapter={adapter}"
    by_row = server.post(url, json={"row": {column: text}}).json()
    assert near(server.post(url, json={"inputs": text}).json(), by_row)
    assert near(server.post(url, json={"inputs": ["x", text]}).json()[1], by_row)
    assert not near(server.post(url, json={"inputs": f"{text}</s>", "raw": True}).json(), by_row)


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ("column", "Tweet text : late again Label :"),
        ("column", "tweet text: late again\nlabel:"),
        ("column", "Tweet text : a Label : complaint\n\nTweet text : late Label :"),
        ("punctuated", "late again =>"),
        ("optional", "Task: late\nagain\nAnswer:"),
        ("optional", "Task: late Answer:"),
        ("chinese", "评论\uff1a太晚了情感\uff1a "),
        ("ranked", "the tweet and 5 :"),
        ("other", "no template at all"),
    ],
)
def test_a_text_in_the_words_of_the_template_stands_as_it_is(
    server, with_eos, one_column, adapter, text
):
    url, labels = f"/classify?adapter={adapter}", ["complaint", "no complaint"]
    mixed = server.post(url, json={"inputs": [text, text], "labels": labels}).json()
    raw = server.post(url, json={"inputs": text, "labels": labels, "raw": True}).json()
    assert near(mixed[0], raw)
    assert near(mixed[1], raw)


def test_texts_and_rendered_texts_keep_their_order(server, one_column):
    texts = ["late", "Tweet text : late Label :", "lovely", "Tweet text : lovely Label :"]
    got = server.post("/classify?adapter=column", json={"inputs": texts}).json()
    assert near(got[0], got[1])
    assert near(got[2], got[3])
    assert not near(got[0], got[2])


def test_one_text_cannot_fill_two_columns(server, with_eos):
    reply = server.post("/classify?adapter=ranked", json={"inputs": ["a and b :", "late again"]})
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid")
    assert all(said in reply.json()["error"] for said in ("'a', 'b'", '"row"', '"raw": true'))


def test_times_are_told_and_the_prompt_is_computed_once(server):
    def reused():
        return server.app_services().client.stats.prefix_hit_tokens

    text = (
        "Tweet text : the parcel of Tuesday came on a rainy Friday, and nobody said sorry. Label :"
    )
    length = len(server.post("/tokenize", json={"inputs": text}).json())
    before = reused()
    body = {"inputs": text, "labels": [f" answer {i}" for i in range(5)]}
    reply = server.post("/classify?adapter=other", json=body)
    assert {"x-queue-time", "x-time-to-first-token"} <= reply.headers.keys()
    # Four of five labels find the prompt, but for at most the tokens of a quarter of a block.
    assert reused() - before >= 4 * (length - 5)


def test_one_text_gives_one_object_and_more_than_run_at_once_are_taken(server):
    one = server.post("/classify", json={"inputs": "x", "labels": ["a"]}).json()
    assert (one["label"], one["scores"]) == ("a", {"a": 1.0})
    labels = [f"label {number}" for number in range(40)]  # five times what the engine runs
    many = server.post("/classify", json={"inputs": "x", "labels": labels})
    assert list(many.json()["scores"]) == labels
    assert server.app_services().client.num_in_flight == 0


@pytest.mark.parametrize(
    ("query", "body", "status", "code", "field"),
    [
        ("", {"inputs": "x"}, 422, "invalid", "labels"),
        ("?adapter=other", {"inputs": "x"}, 422, "invalid", "labels"),
        ("", {"labels": ["a"]}, 422, "invalid", "inputs"),
        ("", {"inputs": "x", "row": {"a": 1}, "labels": ["a"]}, 400, "contradiction", "row"),
        ("", {"inputs": "", "labels": ["a"]}, 422, "invalid", "inputs"),
        ("", {"inputs": [], "labels": ["a"]}, 422, "invalid", None),
        ("", {"inputs": "x", "labels": []}, 422, "invalid", "labels"),
        ("", {"inputs": "x", "labels": ["a", "a"]}, 422, "invalid", "labels"),
        ("", {"inputs": "x", "labels": [""]}, 422, "invalid", "labels.0"),
        ("", {"inputs": "\ud800", "labels": ["a"]}, 422, "invalid", None),
        ("", {"inputs": "x", "labels": ["a"], "normalization": "mean"}, 422, "invalid", "normalization"),
        ("", {"inputs": "x", "labels": ["a"], "top_k": 1}, 422, "invalid", "'top_k'"),
        ("", {"inputs": "x", "labels": ["a"], "adapter": "other"}, 400, "contradiction", "adapter"),
        ("", {"inputs": "x", "labels": ["a"], "model": "other"}, 400, "contradiction", "model"),
        ("?adapter=", {"inputs": "x", "labels": ["a"]}, 400, "contradiction", "adapter"),
        ("?lora=x", {"inputs": "x", "labels": ["a"]}, 400, "unknown_parameter", "lora"),
        ("?adapter=nobody", {"inputs": "x"}, 404, "adapter_not_found", "adapter"),
        ("", {"row": {"a": 1}, "labels": ["a"]}, 422, "invalid", "row"),
        ("?adapter=complaints", {"row": {"a": 1}}, 422, "template_invalid", "row"),
        ("?adapter=complaints", {"inputs": " "}, 422, "invalid", "inputs"),
        ("?adapter=complaints", {"row": {"a": 1}, "raw": True}, 400, "contradiction", "raw"),
        ("", {"inputs": "x " * 600, "labels": ["a"]}, 422, "too_long", "inputs"),
        ("", {"inputs": ["x"] * 101, "labels": [str(n) for n in range(100)]}, 422, "invalid", "inputs"),
    ],
)  # fmt: skip
def test_refusals(server, query, body, status, code, field):
    # Not httpx's own JSON, which cannot say a lone surrogate.
    headers = {"content-type": "application/json"}
    reply = server.post(f"/classify{query}", content=json.dumps(body), headers=headers)
    told = reply.json()
    assert (reply.status_code, told["code"]) == (status, code), reply.text
    assert field in (None, told["field"])
