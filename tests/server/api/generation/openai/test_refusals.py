"""What both OpenAI routes refuse, with which status, field and words."""

from __future__ import annotations

import pytest

from tests.server.api.generation.openai.conftest import BASE, chat, complete

ASSISTANT = {"role": "assistant", "content": "x"}
IMAGE = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def refused(reply, status: int, param: str | None) -> str:
    assert reply.status_code == status, reply.text
    assert reply.json().keys() == {"error"}
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]
    return error["message"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": None}, 422, "prompt"),
        ({"prompt": []}, 422, "prompt"),
        ({"prompt": [[]]}, 422, "prompt"),
        ({"prompt": ["x", [1]]}, 422, "prompt"),
        ({"prompt": [1, True]}, 422, "prompt"),
        ({"prompt": [1.0]}, 422, "prompt"),
        ({"prompt": {"text": "x"}}, 422, "prompt"),
        ({"prompt": "\ud800"}, 422, "prompt"),
        ({"prompt": [320]}, 422, "prompt"),
        ({"prompt": [[5], [-1]]}, 422, "prompt"),
        ({"prompt": [2**70]}, 422, "prompt"),
        ({"prompt": [5] * 513}, 422, "prompt"),
        ({"prompt": ["x"] * 1025}, 422, "prompt"),
        ({"prompt": ["x"] * 200, "n": 8}, 422, "prompt"),
        ({"row": {"first": "x"}}, 400, "row"),
        ({"prompt": None, "row": {"first": "x"}}, 422, "row"),
        ({"prompt": None, "row": {"one": "x"}, "model": "pairs"}, 422, "row"),
        ({"max_tokens": 0}, 422, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "max_completion_tokens": 3}, 400, "max_completion_tokens"),
        ({"max_tokens": -1}, 422, "max_tokens"),
        ({"max_tokens": 600}, 422, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": 600}, 422, "max_completion_tokens"),
        ({"suffix": "x"}, 422, "suffix"),
        ({"logprobs": 21}, 422, "logprobs"),
        ({"logprobs": True}, 422, "logprobs"),
        ({"best_of": 9}, 422, "best_of"),
        ({"n": 3, "best_of": 2}, 422, "best_of"),
        ({"best_of": 2, "stream": True}, 422, "best_of"),
        ({"echo": "yes"}, 422, "echo"),
    ],
)
def test_completions(chatting, fields, status, param):
    refused(complete(chatting, **fields), status, param)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"messages": None}, 422, "messages"),
        ({"messages": []}, 422, "messages"),
        ({"messages": "x"}, 422, "messages"),
        ({"messages": [{"role": "user"}]}, 422, "messages.0.content"),
        ({"messages": [{"content": "x"}]}, 422, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 422, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, 422, "messages.0.content"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, 422, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, 422, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 422, "messages.0.content"),
        ({"messages": [ASSISTANT]}, 422, "messages"),
        ({"messages": [ASSISTANT | {"tool_calls": [{}]}]}, 422, "messages.0.tool_calls"),
        ({"messages": [ASSISTANT], "row": {"a": 1}}, 400, "row"),
        ({"messages": [ASSISTANT], "model": "complaints"}, 422, "messages"),
        ({"model": "pairs"}, 422, "messages"),
        ({"model": "complaints", "continue_final_message": True}, 422, "continue_final_message"),
        ({"model": "complaints", "add_generation_prompt": False}, 422, "add_generation_prompt"),
        ({"use_adapter_template": True}, 422, "use_adapter_template"),
        ({"use_adapter_template": True, "model": "plain"}, 422, "use_adapter_template"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            400,
            "continue_final_message",
        ),
        ({"chat_template": "{{ messages }}"}, 422, "chat_template"),
        ({"tools": TOOLS}, 422, "tools"),
        ({"tools": TOOLS, "tool_choice": "auto"}, 422, "tools"),
        ({"tool_choice": "required"}, 422, "tool_choice"),
        ({"functions": [{}]}, 422, "functions"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 422, "top_logprobs"),
        ({"logprobs": 5}, 422, "logprobs"),
        ({"max_tokens": 0}, 422, "max_tokens"),
        ({"max_tokens": 512}, 422, "max_tokens"),
    ],
)
def test_chat(chatting, fields, status, param):
    refused(chat(chatting, "x", **fields), status, param)


@pytest.mark.parametrize("prompt", ["", ["x", ""]])
def test_a_text_without_a_token(chatting, server, prompt):
    refused(complete(server, prompt=prompt), 422, "prompt")
    # where the tokenizer puts one before every text there is something to go on from
    assert complete(chatting, prompt=prompt).status_code == 200


def test_tools_that_are_not_to_be_used_do_no_harm(chatting):
    plain = chat(chatting, "x").json()["choices"]
    for fields in ({"tools": TOOLS, "tool_choice": "none"}, {"tools": []}, {"tool_choice": "auto"}):
        assert chat(chatting, "x", **fields).json()["choices"] == plain


@pytest.mark.parametrize("send", [complete, chat])
@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": None}, 422, "model"),
        ({"model": 5}, 422, "model"),
        ({"model": " "}, 400, "model"),
        ({"model": "nobody"}, 404, "model"),
        ({"model": "Some/Body Else"}, 404, "model"),
        ({"model": "complaints@9"}, 404, "model"),
        ({"adapter": "complaints"}, 400, "adapter"),
        ({"lora_request": {}}, 400, "lora_request"),
        ({"n": 0}, 422, "n"),
        ({"n": 9}, 422, "n"),
        ({"temperature": -0.1}, 422, "temperature"),
        ({"temperature": 2.1}, 422, "temperature"),
        ({"temperature": "0"}, 422, "temperature"),
        ({"top_p": 0}, 422, "top_p"),
        ({"top_k": -2}, 422, "top_k"),
        ({"presence_penalty": 3}, 422, "presence_penalty"),
        ({"seed": 2**63}, 422, "seed"),
        ({"stop": ""}, 422, "stop.0"),
        ({"stop": ["x"] * 17}, 422, "stop"),
        ({"stop": 5}, 422, "stop"),
        ({"logit_bias": {"x": 1}}, 422, "logit_bias"),
        ({"logit_bias": {"320": 1}}, 422, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, 422, "logit_bias"),
        ({"logit_bias": {"5": 101}}, 422, "logit_bias.5"),
        ({"logit_bias": {str(i): 0 for i in range(1025)}}, 422, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"response_format": {"type": "yaml"}}, 422, "response_format.type"),
        ({"guided_choice": []}, 422, "guided_choice"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, 400, "guided_choice"),
    ],
)
def test_both(chatting, send, fields, status, param):
    refused(
        send(chatting, "x", **fields) if send is chat else send(chatting, **fields), status, param
    )


def test_refusals_say_what_was_expected_and_what_came(chatting):
    assert "'nobody'" in refused(complete(chatting, model="nobody"), 404, "model")
    assert BASE in refused(complete(chatting, model="nobody"), 404, "model")
    several = refused(chat(chatting, "x", model="pairs"), 422, "messages")
    assert "'first', 'second'" in several
    assert '"use_adapter_template": false' in several
    assert "the user speaks first" in refused(chat(chatting, messages=[ASSISTANT]), 422, "messages")
    long = refused(chat(chatting, "x", model="plain", max_tokens=512), 422, "max_tokens")
    assert "4 virtual tokens" in long


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_what_is_no_request_at_all(chatting, route):
    path = f"/v1/{route}"
    refused(chatting.post(f"{path}?adapter=complaints", json={"model": BASE}), 400, "adapter")
    refused(
        chatting.post(path, content=b"{", headers={"content-type": "application/json"}), 422, "body"
    )
    refused(chatting.post(path, content=b"x=1"), 415, "content-type")
    refused(chatting.get(path), 405, None)
    refused(chatting.post(f"{path}/"), 404, None)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_refusal_in_a_streamed_request_has_a_real_status(chatting, path):
    body = {"model": "nobody", "prompt": "x", "stream": True, "messages": [ASSISTANT]}
    refused(chatting.post(f"/v1/{path}", json=body), 404, "model")
