"""`/v1/responses`: OpenAI's own client, the events of a stream, and what is refused by name."""

from __future__ import annotations

import json
import os
import signal

import openai
import pytest

from tests.server.api.generation.openai.conftest import BASE, chat, complete
from tests.server.conftest import make_settings
from tests.server.http_server import running_server

TALK = [
    {"role": "user", "content": "the tweet"},
    {"role": "assistant", "content": [{"type": "output_text", "text": "a complaint"}]},
    {"role": "user", "type": "message", "content": [
        {"type": "input_text", "text": "no "}, {"type": "input_text", "text": "complaint"}]},
]  # fmt: skip
GREEDY = {"temperature": 0, "max_output_tokens": 8}


def respond(server, **fields):
    return server.post("/v1/responses", json={"model": BASE, "input": "x", **GREEDY, **fields})


def text_of(reply) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["output"][0]["content"][0]["text"]


def chatted(server, messages, **fields) -> str:
    """The same conversation by the other route."""
    body = {"model": BASE, "messages": messages, "temperature": 0, "max_tokens": 8, **fields}
    reply = server.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_openais_client(chatting, client):
    plain = client.responses.create(model=BASE, input="the tweet", **GREEDY)
    want = chatted(chatting, [{"role": "user", "content": "the tweet"}])
    assert plain.output_text == want
    assert (plain.status, plain.object) == ("incomplete", "response")
    assert plain.incomplete_details.reason == "max_output_tokens"
    assert plain.usage.total_tokens == plain.usage.input_tokens + 8
    assert (plain.temperature, plain.store) == (0, False)

    instructed = client.responses.create(
        model=BASE, instructions="Be brief.", input=TALK, metadata={"a": "b"}, store=False, **GREEDY
    )
    texts = ["the tweet", "a complaint", "no complaint"]
    talk = [{**one, "content": text} for one, text in zip(TALK, texts, strict=True)]
    assert instructed.output_text == chatted(
        chatting, [{"role": "system", "content": "Be brief."}, *talk]
    )
    assert (instructed.instructions, instructed.metadata) == ("Be brief.", {"a": "b"})

    # What came can be sent back, as in OpenAI's guide.
    again = [{"role": "user", "content": "x"}, *plain.output, {"role": "user", "content": "y"}]
    third = client.responses.create(model="plain", input=again, **GREEDY)
    assert third.output_text == chatted(
        chatting,
        [again[0], {"role": "assistant", "content": plain.output_text}, again[2]],
        model="plain",
    )


def test_openais_client_streams(chatting, client):
    want = client.responses.create(model="plain", input="x", **GREEDY)
    events = list(client.responses.create(model="plain", input="x", stream=True, **GREEDY))
    kinds = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert len(deltas) > 1
    assert "".join(deltas) == events[-1].response.output_text == want.output_text
    assert events[-1].response.usage.output_tokens == 8
    assert {events[-1].response.id} == {e.response.id for e in events if hasattr(e, "response")}
    stop = want.output_text[3:5]
    fields = {"model": "plain", "input": "x", **GREEDY, "extra_body": {"stop": stop}}
    with client.responses.stream(**fields) as helped:
        final = helped.until_done().get_final_response()
    assert final.output_text == want.output_text[: want.output_text.index(stop)]


def test_a_response_ends_where_a_stop_string_is(chatting):
    text = text_of(respond(chatting))
    reply = respond(chatting, stop=text[2:4])
    assert text_of(reply) == text[: text.index(text[2:4])]
    assert (reply.json()["status"], reply.json()["incomplete_details"]) == ("completed", None)


def test_an_adapters_template_makes_the_prompt(chatting):
    fields = {"model": "complaints"}
    want = chat(chatting, "late again", **fields).json()["choices"][0]["message"]["content"]
    assert text_of(respond(chatting, input="late again", **fields)) == want
    row = {"Tweet text": "late again"}
    reply = respond(chatting, input=None, row=row, temperature=None, **fields)
    assert text_of(reply) == want
    assert reply.json()["temperature"] == 0  # it has labels
    assert reply.headers["x-adapter-id"] == "complaints"
    as_chat = {**fields, "use_adapter_template": False}
    assert text_of(respond(chatting, **as_chat)) == chatted(
        chatting, [{"role": "user", "content": "x"}], **as_chat
    )


def test_logprobs_and_shapes(chatting):
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = respond(chatting, **asked).json()["output"][0]["content"][0]
    body = {"logprobs": True, "top_logprobs": 2}
    want = chat(chatting, "x", **body).json()["choices"][0]["logprobs"]["content"]
    assert part["logprobs"] == want
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    shape = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    text = text_of(respond(chatting, text={"format": shape}, max_output_tokens=60))
    assert json.loads(text) == {"a": 1}


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": None}, 422, "input"),
        ({"input": []}, 422, "input"),
        ({"input": 7}, 422, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, 422, "input.0.type"),
        ({"input": [{"role": "tool", "content": "x"}]}, 422, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 422,
         "input.0.content.0.type"),
        ({"input": "\ud800"}, 422, "input"),
        ({"row": {"a": "b"}}, 400, "row"),
        ({"previous_response_id": "resp_1"}, 422, "previous_response_id"),
        ({"conversation": "conv_1"}, 422, "conversation"),
        ({"tools": [{"type": "web_search"}]}, 422, "tools"),
        ({"tool_choice": "required"}, 422, "tool_choice"),
        ({"background": True}, 422, "background"),
        ({"reasoning": {"effort": "high"}}, 422, "reasoning"),
        ({"truncation": "auto"}, 422, "truncation"),
        ({"include": ["reasoning.encrypted_content"]}, 422, "include.0"),
        ({"text": {"format": {"type": "xml"}}}, 422, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, 422, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"$ref": "http://x"}}}}, 422,
         "text.format.schema"),
        ({"input": None, "row": {"a": "b"}, "instructions": "x"}, 422, "instructions"),
        ({"max_output_tokens": 600}, 422, "max_output_tokens"),
        ({"max_output_tokens": 0}, 422, "max_output_tokens"),
        ({"temperature": 3}, 422, "temperature"),
        ({"model": "nobody"}, 404, "model"),
        ({"adapter": "plain"}, 400, "adapter"),
        ({"model": "pairs"}, 422, "input"),
        ({"model": "complaints", "instructions": "Be brief."}, 422, "input"),
    ],
)  # fmt: skip
def test_refusals(chatting, fields, status, param):
    body = json.dumps({"model": BASE, "input": "x", **fields})
    headers = {"content-type": "application/json"}
    reply = chatting.post("/v1/responses", content=body, headers=headers)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param


def test_what_has_no_effect_is_named(chatting):
    fields = {"store": True, "user": "u", "text": {"verbosity": "low"}, "service_tier": "auto"}
    reply = respond(chatting, reasoning={"effort": None}, tools=[], tool_choice="none", **fields)
    assert text_of(reply) == text_of(respond(chatting, store=False))
    assert reply.headers["x-ignored-parameters"] == "service_tier, store, text_verbosity, user"


def test_responses_are_not_stored(client):
    made = client.responses.create(model=BASE, input="x", max_output_tokens=1)
    for ask in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="not stored"):
            ask(made.id)


def test_a_stream_that_breaks_off_says_so(chatting_base, tmp_path):
    with running_server(make_settings(chatting_base, tmp_path / "data")) as server:
        url = f"{server.base_url}/v1"
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            stream = client.responses.create(
                model=BASE, input="x", stream=True, extra_body={"ignore_eos": True}
            )
            kinds = [next(stream).type]
            os.kill(server.app_services().client.pid, signal.SIGKILL)
            with pytest.raises(openai.APIError) as caught:
                kinds.extend(event.type for event in stream)
            assert kinds[-1] == "response.failed"
            assert caught.value.code == "engine_unavailable"
            body = {"model": BASE, "input": "x"}
            assert server.post("/v1/responses", json=body).status_code == 503


def test_embeddings_say_what_would_serve_them(chatting, client):
    with pytest.raises(openai.BadRequestError, match="an encoder, such as a BERT") as caught:
        client.embeddings.create(model=BASE, input="x")
    assert caught.value.code == "no_embeddings"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nobody", input="x")
    assert complete(chatting, prompt="x").status_code == 200
