"""Log-probabilities, echo and offsets on `/v1/completions`, and what lm-eval reads of them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.server.api.generation.openai.conftest import complete, frames
from tests.server.api.generation.openai.test_completions import TOKENIZER, ids_of

TEXT = "the tweet — 漢字 🙂 is a complaint"


@pytest.fixture(scope="module")
def model(chatting_base):
    return AutoModelForCausalLM.from_pretrained(chatting_base, dtype=torch.float32).eval()


def logprobs_of(model, ids: list[int]) -> torch.Tensor:
    """(T, V): row t is what the base says of token t + 1."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_what_lm_eval_sends(chatting, model):
    ids = ids_of(TEXT, bos=False)  # what the tokenizer would add is not added to ids
    reply = complete(chatting, prompt=[ids], echo=True, logprobs=1, max_tokens=1)
    found = reply.json()["choices"][0]["logprobs"]
    lists = [found[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")]
    assert [len(one) for one in lists] == [len(ids) + 1] * 4
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    want = logprobs_of(model, ids)
    for place in range(1, len(ids)):
        row = want[place - 1]
        assert found["token_logprobs"][place] == pytest.approx(float(row[ids[place]]), abs=1e-4)
        top = found["top_logprobs"][place]
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
        # lm-eval asks whether a token is the likeliest by comparing these very numbers
        is_best = found["token_logprobs"][place] == max(top.values())
        assert is_best == (int(row.argmax()) == ids[place])
    assert found["token_logprobs"][-1] == max(found["top_logprobs"][-1].values())


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [(TEXT, TEXT), (ids_of(TEXT, bos=False), TEXT), (ids_of(TEXT), "<s>" + TEXT)],
    ids=["text", "ids", "ids-with-bos"],
)
@pytest.mark.parametrize("max_tokens", [0, 1, 12])
def test_echo_begins_with_the_prompt(chatting, prompt, shown, max_tokens):
    asked = {"prompt": prompt, "echo": True, "max_tokens": max_tokens}
    reply = complete(chatting, **asked, logprobs=2).json()
    choice = reply["choices"][0]
    assert choice["text"].startswith(shown)
    assert reply["usage"]["completion_tokens"] == max_tokens
    num_prompt = len(ids_of(prompt) if isinstance(prompt, str) else prompt)
    assert reply["usage"]["prompt_tokens"] == num_prompt
    assert choice["finish_reason"] == "length"
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    assert len(offsets) == num_prompt + max_tokens
    # whole tokens stand where their offset says; bytes that come to nothing are known a token later
    tokens = choice["logprobs"]["tokens"]
    if prompt == TEXT:  # what the tokenizer adds to a text is a token, and not shown
        assert tokens.pop(0) == "<s>"
        assert offsets.pop(0) == 0
    for before, token, offset in zip(["", *tokens], tokens, offsets, strict=False):
        if not before.startswith("bytes:") and not token.startswith("bytes:"):
            assert choice["text"][offset : offset + len(token)] == token
    plain = complete(chatting, **asked).json()
    assert plain["choices"][0] == {**choice, "logprobs": None}
    if max_tokens == 0:
        assert choice["text"] == shown


def test_tokens_are_told_apart_by_their_bytes(chatting):
    ids = ids_of(TEXT)
    reply = complete(chatting, prompt=ids, echo=True, logprobs=20, max_tokens=30)
    found = reply.json()["choices"][0]["logprobs"]
    data = b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        if token.startswith("bytes:")
        else token.encode()
        for token in found["tokens"]
    )
    assert data.decode(errors="replace") == reply.json()["choices"][0]["text"]
    # the token itself stands among its alternatives, once more where it is not one of the likeliest
    for token, value, top in zip(
        found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True
    ):
        assert top[token] == value
        assert len(top) in (20, 21)


def test_logprobs_of_the_output(chatting, model):
    reply = complete(chatting, max_tokens=6, logprobs=3, temperature=1, seed=5).json()
    found = reply["choices"][0]["logprobs"]
    names = {one: token for token in range(len(TOKENIZER)) for one in [name_of(token)]}
    ids = ids_of("the tweet")
    for name, value, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        row = logprobs_of(model, ids)[-1]
        assert value == pytest.approx(float(row[names[name]]), abs=1e-4)
        best = row.topk(3)
        assert list(top)[:3] == [name_of(int(token)) for token in best.indices]
        assert list(top.values())[:3] == pytest.approx(best.values.tolist(), abs=1e-4)
        ids.append(names[name])


def name_of(token_id: int) -> str:
    text = TOKENIZER.decode([token_id])
    if "\ufffd" not in text:
        return text
    letters = TOKENIZER.convert_ids_to_tokens(token_id)
    data = bytes(byte_of(letter) for letter in letters)
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def byte_of(letter: str) -> int:
    """GPT-2's table, undone the slow way."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in printable]
    return ord(letter) if ord(letter) < 256 else others[ord(letter) - 256]


def test_echo_with_many_samples_asks_for_the_prompt_once(chatting):
    asked = {"echo": True, "logprobs": 1, "max_tokens": 4, "temperature": 1, "seed": 1}
    many = complete(chatting, prompt=["the tweet", "Label :"], n=2, **asked).json()
    for number, prompt in enumerate(["the tweet", "Label :"]):
        for sample in range(2):
            alone = complete(chatting, prompt=prompt, **{**asked, "seed": 1 + sample}).json()
            choice = many["choices"][2 * number + sample]
            assert choice["text"] == alone["choices"][0]["text"]
            assert choice["logprobs"]["tokens"] == alone["choices"][0]["logprobs"]["tokens"]
            assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
                alone["choices"][0]["logprobs"]["token_logprobs"][1:], abs=1e-4
            )


@pytest.mark.parametrize("asked", [{"max_tokens": 6}, {"max_tokens": 0}, {"max_tokens": 5, "n": 2}])
def test_an_echo_streams(chatting, asked):
    asked = {"echo": True, "logprobs": 2, **asked}
    whole = complete(chatting, **asked).json()
    options = {"include_usage": True}
    stream = frames(complete(chatting, **asked, stream=True, stream_options=options))
    for want in whole["choices"]:
        parts = [
            choice
            for frame in stream
            for choice in frame["choices"]
            if choice["index"] == want["index"]
        ]
        assert "".join(part["text"] for part in parts) == want["text"]
        assert parts[-1]["finish_reason"] == want["finish_reason"]
        for name in ("tokens", "text_offset"):
            joined = [one for part in parts for one in part["logprobs"][name]]
            assert joined == want["logprobs"][name]
    assert stream[-1]["usage"] == whole["usage"]


def test_an_adapters_virtual_tokens_never_appear(chatting):
    ids = ids_of("the tweet")
    reply = complete(
        chatting, model="plain", prompt=ids, echo=True, logprobs=1, max_tokens=1
    ).json()
    assert len(reply["choices"][0]["logprobs"]["tokens"]) == len(ids) + 1
    assert reply["usage"]["prompt_tokens"] == len(ids)
    base = complete(chatting, prompt=ids, echo=True, logprobs=1, max_tokens=1).json()
    theirs = base["choices"][0]["logprobs"]["token_logprobs"][1:]
    assert reply["choices"][0]["logprobs"]["token_logprobs"][1:] != pytest.approx(theirs, abs=1e-3)


def test_a_row_is_echoed_as_it_was_rendered(chatting):
    row = {"first": "<s>", "second": "é"}
    reply = complete(
        chatting, model="pairs", prompt=None, row=row, echo=True, logprobs=0, max_tokens=0
    ).json()
    choice = reply["choices"][0]
    assert choice["text"] == "<s> and é :"
    assert len(choice["logprobs"]["tokens"]) == reply["usage"]["prompt_tokens"]
    # names of special tokens in a row are text
    assert choice["logprobs"]["tokens"][:3] == ["<s>", "<", "s"]
    assert choice["logprobs"]["text_offset"][:4] == [0, 0, 1, 2]
