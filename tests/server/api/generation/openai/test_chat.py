"""`/v1/chat/completions` as JSON: templates, messages, log-probabilities, streams."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from tests.server.api.generation.openai.conftest import BASE, chat, complete, frames, near

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the tweet"},
    {"role": "assistant", "content": "a complaint"},
    {"role": "user", "content": "no </s> complaint"},
]


@pytest.fixture(scope="module")
def tokenizer(chatting_base):
    return AutoTokenizer.from_pretrained(chatting_base)


def talk(server, messages, **fields):
    body = {"model": BASE, "messages": messages, "temperature": 0, "max_tokens": 8, **fields}
    return server.post("/v1/chat/completions", json=body)


def completed(server, ids, **fields):
    """What follows token ids, by the other route."""
    return complete(server, prompt=ids, max_tokens=8, **fields).json()["choices"][0]["text"]


def content_of(reply) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_a_chat_completion(chatting, tokenizer):
    reply = talk(chatting, TALK)
    body = reply.json()
    # exactly as transformers does it: a special token's name in a message is that token
    ids = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert tokenizer.eos_token_id in ids
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": completed(chatting, ids),
                "refusal": None,
            },
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    usage = body["usage"]
    assert 0 <= usage.pop("prompt_tokens_details")["cached_tokens"] < len(ids)
    assert usage == {
        "prompt_tokens": len(ids),
        "completion_tokens": 8,
        "total_tokens": len(ids) + 8,
    }
    assert int(reply.headers["x-time-to-first-token"]) >= 0


def test_left_out_max_tokens_are_what_fits(chatting):
    reply = chat(chatting, "x", max_tokens=None, ignore_eos=True)
    assert reply.json()["usage"]["total_tokens"] == 513  # the last new token takes no position
    assert reply.json()["choices"][0]["finish_reason"] == "length"


def test_both_names_of_max_tokens(chatting):
    newer = chat(chatting, "x", max_tokens=None, max_completion_tokens=3)
    assert newer.json()["usage"]["completion_tokens"] == 3
    assert chat(chatting, "x", max_tokens=3, max_completion_tokens=3).status_code == 200
    both = chat(chatting, "x", max_tokens=4, max_completion_tokens=3)
    assert both.status_code == 400
    assert both.json()["error"]["param"] == "max_completion_tokens"


def test_developer_is_system_and_parts_are_text(chatting):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "tweet"}]
    spelled = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": parts, "type": "text"},
        *TALK[2:],
    ]
    assert content_of(talk(chatting, spelled)) == content_of(talk(chatting, TALK))


def test_the_last_message_goes_on(chatting, tokenizer):
    begun = [TALK[1], {"role": "assistant", "content": "a comp"}]
    reply = talk(chatting, begun, continue_final_message=True)
    ids = tokenizer.apply_chat_template(begun, continue_final_message=True, return_dict=False)
    assert content_of(reply) == completed(chatting, ids)
    spelled = talk(chatting, begun, continue_final_message=True, add_generation_prompt=False)
    assert content_of(spelled) == content_of(reply)
    closed = talk(chatting, begun, add_generation_prompt=False)
    ids = tokenizer.apply_chat_template(begun, return_dict=False)
    assert content_of(closed) == completed(chatting, ids)


def test_n_samples_are_those_of_the_seeds_that_follow(chatting):
    sampled = {"temperature": 1.5, "seed": 3}
    many = chat(chatting, "x", **sampled, n=3).json()["choices"]
    alone = [content_of(chat(chatting, "x", temperature=1.5, seed=3 + i)) for i in range(3)]
    assert [choice["message"]["content"] for choice in many] == alone
    assert [choice["index"] for choice in many] == [0, 1, 2]


def test_stop_strings(chatting):
    text = content_of(chat(chatting, "x", max_tokens=20))
    reply = chat(chatting, "x", max_tokens=20, stop=text[4:7]).json()["choices"][0]
    assert reply["message"]["content"] == text[: text.index(text[4:7])]
    assert reply["finish_reason"] == "stop"


def test_logprobs(chatting):
    asked = {"max_tokens": 20, "logprobs": True, "top_logprobs": 3}
    choice = chat(chatting, "x", **asked).json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == 20
    data = b"".join(bytes(token["bytes"]) for token in tokens)
    assert data.decode(errors="replace") == choice["message"]["content"]
    for token in tokens:
        assert len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0] == {
            name: token[name] for name in ("token", "bytes", "logprob")
        }
    none = chat(chatting, "x", logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in none] == [[]] * 8
    assert [token["token"] for token in none] == [token["token"] for token in tokens[:8]]


@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": 20},
        {"n": 2, "temperature": 1.5, "seed": 1},
        {"logprobs": True, "top_logprobs": 2},
        {"temperature": 2, "seed": 4, "max_tokens": 40},
    ],
)
def test_a_stream_says_what_the_whole_reply_says(chatting, asked):
    whole = chat(chatting, "the tweet", **asked).json()
    options = {"include_usage": True}
    stream = frames(chat(chatting, "the tweet", **asked, stream=True, stream_options=options))
    assert all(frame["object"] == "chat.completion.chunk" for frame in stream)
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"] == whole["usage"]
    for want in whole["choices"]:
        parts = [
            choice
            for frame in stream
            for choice in frame["choices"]
            if choice["index"] == want["index"]
        ]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in part["delta"] for part in parts[1:])
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == want["message"]["content"]
        reasons = [part["finish_reason"] for part in parts]
        assert reasons == [None] * (len(parts) - 1) + [want["finish_reason"]]
        if want["logprobs"]:
            tokens = [one for part in parts[1:] for one in part["logprobs"]["content"]]
            assert near(tokens, want["logprobs"]["content"])


# --- adapters ------------------------------------------------------------------------------


def test_an_adapters_own_template_makes_the_prompt(chatting):
    reply = chat(chatting, "late <s> again", model="complaints")
    row = chatting.post(
        "/generate?adapter=complaints",
        json={"row": {"Tweet text": "late <s> again"}, "parameters": {"max_new_tokens": 8}},
    )
    assert content_of(reply) == row.json()["generated_text"]
    assert reply.headers["x-adapter-id"] == "complaints"
    said = chat(chatting, "late <s> again", model="complaints", use_adapter_template=True)
    assert content_of(said) == content_of(reply)
    by_row = chat(chatting, model="complaints", row={"Tweet text": "late <s> again"})
    assert content_of(by_row) == content_of(reply)


def test_the_bases_template_where_it_is_asked_for(chatting, tokenizer):
    reply = talk(chatting, TALK, model="complaints", use_adapter_template=False)
    ids = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert content_of(reply) == completed(chatting, ids, model="complaints")


def test_the_bases_template_where_an_adapter_has_none(chatting, tokenizer):
    reply = talk(chatting, TALK, model="plain")
    ids = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert content_of(reply) == completed(chatting, ids, model="plain")
    assert content_of(reply) != content_of(talk(chatting, TALK))


def test_a_row_for_a_template_of_several_columns(chatting):
    reply = chat(chatting, model="pairs", row={"first": "a", "second": True})
    want = complete(chatting, model="pairs", prompt="a and true :", max_tokens=8).json()
    assert content_of(reply) == want["choices"][0]["text"]


def test_a_base_without_a_template_says_so(server):
    reply = chat(server, "x", model="tiny-base")
    assert reply.status_code == 422
    assert "chat template" in reply.json()["error"]["message"]
    # an adapter that brings its own is enough
    assert chat(server, "late", model="complaints").status_code == 200


@pytest.mark.parametrize(("model", "default"), [("complaints", 0), ("plain", None), (BASE, None)])
def test_an_adapter_with_labels_is_greedy_unless_a_temperature_is_given(chatting, model, default):
    assert chatting.get(f"/v1/models/{model}").json().get("default_temperature") == default

    def drawn(**fields):
        """What a chat and a completion say by eight seeds, and at a temperature of 0."""
        body = {"model": model, "max_tokens": 8, "ignore_eos": True, **fields}
        chats = {"messages": [{"role": "user", "content": "x"}], "use_adapter_template": None}
        for seed in range(8):
            said = chatting.post("/v1/chat/completions", json={**body, **chats, "seed": seed})
            text = chatting.post("/v1/completions", json={**body, "prompt": "x", "seed": seed})
            yield content_of(said), text.json()["choices"][0]["text"]

    (greedy,) = set(drawn(temperature=0))
    assert len(set(drawn(temperature=1))) > 1
    for unsaid in ({}, {"temperature": None, "top_p": 0.9}):
        said = set(drawn(**unsaid))
        assert (said == {greedy}) == (default == 0)
        assert len(said) == 1 or default is None
