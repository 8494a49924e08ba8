"""Outputs of an asked shape over HTTP, by the clients that ask for them in their own words."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Annotated, Literal

import openai
import pytest
from huggingface_hub import InferenceClient
from pydantic import BaseModel, Field

from tests.server.api.generation.openai.conftest import save_chatting_base
from tests.server.conftest import make_settings
from tests.server.engine.guided import PERSON, conforms
from tests.server.engine.test_grammar import ENDLESS_SCHEMA, chain
from tests.server.http_server import running_server, save_prefix_adapter, upload

BASE, ADAPTER = "tiny-base", "complaints"
MESSAGES = [{"role": "user", "content": "Who is it?"}]
REGEX = r"[a-c]{3}-\d{2}"
JSON = {"content-type": "application/json"}


class Person(BaseModel):
    """What `parse` asks for."""

    name: Annotated[str, Field(max_length=10)]
    age: Annotated[int, Field(ge=0, le=120)]
    kind: Literal["cat", "dog", "größer"]
    friends: Annotated[list[Annotated[str, Field(max_length=4)]], Field(max_length=2)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("structure")
    base = save_chatting_base(home / "base")
    with running_server(make_settings(base, home / "data")) as client:
        folder = save_prefix_adapter(home / ADAPTER)
        assert upload(client, folder, ADAPTER).status_code == 201
        yield client


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="any", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def hub(server):
    return InferenceClient(str(server.base_url).rstrip("/"))


def complete(server, **fields):
    body = {"model": BASE, "prompt": "Who?", "max_tokens": 200, "temperature": 0, **fields}
    # In ASCII: half a surrogate pair can be sent no other way.
    return server.post("/v1/completions", content=json.dumps(body), headers=JSON)


def generate(server, path="/generate", **parameters):
    body = {"inputs": "Who?", "parameters": {"max_new_tokens": 200, **parameters}}
    return server.post(path, json=body)


# --- OpenAI ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [BASE, ADAPTER])
def test_parse_gives_an_object_of_the_class(client, model):
    reply = client.chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Person, max_tokens=300, n=3, seed=1
    )
    assert [choice.finish_reason for choice in reply.choices] == ["stop"] * 3
    people = [choice.message.parsed for choice in reply.choices]
    assert all(isinstance(person, Person) for person in people)
    assert len({person.model_dump_json() for person in people}) > 1


def test_a_json_object_is_one(client):
    # Whatever it holds, and it holds gibberish: only the bias brings it to an end.
    reply = client.chat.completions.create(
        model=BASE,
        messages=MESSAGES,
        response_format={"type": "json_object"},
        logit_bias={str(id_): 100 for id_ in client_tokens(client, "}")},
        max_tokens=50,
    )
    assert json.loads(reply.choices[0].message.content) == {}


def client_tokens(client, text):
    url = str(client.base_url).replace("/v1/", "/tokenize")
    return [token["id"] for token in client._client.post(url, json={"inputs": text}).json()]


def test_text_asks_for_nothing(server):
    free = complete(server, max_tokens=9).json()["choices"]
    text = complete(server, max_tokens=9, response_format={"type": "text"})
    assert text.json()["choices"] == free


def test_a_stream_says_what_the_whole_reply_says(client):
    ask = {
        "model": ADAPTER,
        "messages": MESSAGES,
        "max_tokens": 300,
        "seed": 4,
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}},
    }
    whole = client.chat.completions.create(**ask).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    text = "".join(chunk.delta.content or "" for chunk in chunks)
    assert text == whole.message.content
    assert chunks[-1].finish_reason == whole.finish_reason == "stop"
    assert conforms(json.loads(text), PERSON)


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": PERSON},
        {"guided_json": json.dumps(PERSON)},
        {"structured_outputs": {"json": PERSON}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
    ],
    ids=["guided_json", "its text", "structured_outputs", "response_format"],
)  # fmt: skip
def test_the_names_of_a_schema_mean_the_same(server, fields):
    reply = complete(server, **fields)
    assert "x-ignored-parameters" not in reply.headers
    assert conforms(json.loads(reply.json()["choices"][0]["text"]), PERSON)


@pytest.mark.parametrize("prefix", ["guided_", None])
def test_regex_and_choice_by_openais_client(client, prefix):
    for kind, value in (("regex", REGEX), ("choice", ["yes", "yes, but", "no"])):
        extra = {f"guided_{kind}": value} if prefix else {"structured_outputs": {kind: value}}
        reply = client.completions.create(
            model=ADAPTER, prompt=["Is it?", "Who?"], max_tokens=30, n=2, extra_body=extra
        )
        assert len(reply.choices) == 4
        for choice in reply.choices:
            assert choice.finish_reason == "stop"
            assert re.fullmatch(REGEX, choice.text) if kind == "regex" else choice.text in value


def test_what_is_cut_off_says_so(server):
    [choice] = complete(server, max_tokens=4, guided_json=PERSON).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["text"].startswith("{")


# --- TGI and LoRAX -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        ({"type": "regex", "value": REGEX}, lambda text: re.fullmatch(REGEX, text)),
        ({"type": "json", "value": PERSON}, lambda text: conforms(json.loads(text), PERSON)),
        (
            {"type": "json_schema", "value": {"name": "p", "schema": PERSON}},
            lambda text: conforms(json.loads(text), PERSON),
        ),
    ],
    ids=["regex", "json", "json_schema"],
)
def test_grammar_by_huggingface_hub(hub, grammar, fits):
    whole = hub.text_generation("Who?", grammar=grammar, max_new_tokens=200, details=True)
    assert fits(whole.generated_text)
    assert whole.details.finish_reason == "eos_token"
    assert whole.details.tokens[-1].special
    chunks = list(
        hub.text_generation(
            "Who?",
            grammar=grammar,
            max_new_tokens=200,
            details=True,
            stream=True,
            adapter_id=ADAPTER,
        )
    )
    assert fits(chunks[-1].generated_text)


def test_response_format_by_huggingface_hub(hub):
    asked = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    reply = hub.chat_completion(MESSAGES, response_format=asked, max_tokens=300, seed=2)
    assert conforms(json.loads(reply.choices[0].message.content), PERSON)


def test_response_format_as_lorax_sends_it(server):
    asked = {"type": "json_object", "schema": PERSON}
    reply = generate(server, response_format=asked, do_sample=True, seed=3, best_of=2)
    assert conforms(json.loads(reply.json()["generated_text"]), PERSON)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_regex_that_cannot_be_followed_is_422_everywhere(server, stream):
    replies = {
        "openai": complete(server, guided_regex="(?=a)b", stream=stream),
        "tgi": generate(
            server,
            "/generate_stream" if stream else "/generate",
            grammar={"type": "regex", "value": "(?=a)b"},
        ),
    }
    assert [reply.status_code for reply in replies.values()] == [422, 422]
    error = replies["openai"].json()["error"]
    assert error["code"] == "grammar_invalid"
    assert error["type"] == "invalid_request_error"
    assert "look-around" in error["message"]
    assert "look-around" in replies["tgi"].json()["error"]
    assert replies["tgi"].json()["error_type"] == "validation"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, 400, "guided_regex"),
        ({"response_format": {"type": "json_schema"}}, 422, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "p"}}},
            422,
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "xml"}}, 422, "response_format.type"),
        ({"response_format": "json"}, 422, "response_format"),
        ({"guided_json": [1]}, 422, "guided_json"),
        ({"guided_json": '{"type": '}, 422, "guided_json"),
        ({"guided_json": {"$ref": "http://localhost/a"}}, 422, "guided_json"),
        ({"guided_json": {"enum": ["x" * 70_000]}}, 422, "guided_json"),
        ({"guided_json": {"const": "\ud800"}}, 422, "guided_json"),
        ({"guided_regex": "a" * 5_000}, 422, "guided_regex"),
        ({"guided_regex": ""}, 422, "guided_regex"),
        ({"guided_choice": []}, 422, "guided_choice"),
        ({"guided_choice": ["a", ""]}, 422, "guided_choice.1"),
        ({"guided_choice": ["a", "\ud800"]}, 422, "guided_choice.1"),
        ({"guided_choice": ["a" * 9_000] * 900}, 422, "guided_choice"),
        ({"structured_outputs": {"grammar": "start: x"}}, 422, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, 422, "structured_outputs"),
    ],
)
def test_what_is_malformed_is_refused_by_its_field(server, fields, status, param):
    reply = complete(server, **fields)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param
    assert len(reply.text) < 1_000


@pytest.mark.parametrize("levels", [150, 400])
def test_a_schema_too_deep_to_read_is_refused(server, levels):
    deep = '{"items": ' * levels + "{}" + "}" * levels
    for sent in (deep, json.dumps(deep)):
        body = f'{{"model": "{BASE}", "prompt": "a", "guided_json": {sent}}}'
        reply = server.post("/v1/completions", content=body, headers=JSON)
        assert reply.status_code == 422
        assert "100 levels" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("grammar", "param"),
    [
        ({"type": "json"}, "parameters.grammar.value"),
        ({"type": "regex", "value": 3}, "parameters.grammar.value"),
        ({"value": "a"}, "parameters.grammar.type"),
        ("a", "parameters.grammar"),
    ],
)
def test_tgis_grammar_is_refused_by_its_field(server, grammar, param):
    reply = generate(server, grammar=grammar)
    assert reply.status_code == 422
    assert reply.json()["error"].startswith(f"{param}: ")


def test_what_kills_the_compiler_does_not_kill_the_server(server):
    deep = chain(1400, lambda ref: {"allOf": [ref]})
    for _ in range(2):
        reply = complete(server, guided_json=deep)
        assert reply.status_code == 422
        assert "too deeply" in reply.json()["error"]["message"]
        assert complete(server, guided_choice=["yes"]).json()["choices"][0]["text"] == "yes"


def test_a_schema_without_end_is_refused_while_others_are_served(server):
    replies = []

    def ask():
        replies.append(complete(server, guided_json=ENDLESS_SCHEMA))

    asking = threading.Thread(target=ask)
    asking.start()
    served = 0
    while asking.is_alive():
        assert complete(server, guided_choice=["yes", "no"]).status_code == 200
        assert complete(server, max_tokens=4).status_code == 200
        served += 1
        time.sleep(0.02)
    asking.join()
    [reply] = replies
    assert reply.status_code == 422
    assert reply.json()["error"]["code"] == "grammar_invalid"
    assert "to compile" in reply.json()["error"]["message"]
    assert served >= 3


def test_who_hangs_up_while_a_grammar_is_compiled_leaves_nothing(server):
    schema = {**ENDLESS_SCHEMA, "title": "another"}
    with pytest.raises(openai.APITimeoutError), openai.OpenAI(
        base_url=f"{server.base_url}/v1", api_key="any", max_retries=0, timeout=0.3
    ) as hasty:  # fmt: skip
        hasty.completions.create(model=BASE, prompt="a", extra_body={"guided_json": schema})
    stats = server.app_services().client
    deadline = time.monotonic() + 20
    while stats.num_in_flight or stats.stats.num_waiting:
        assert time.monotonic() < deadline, "it still waits"
        time.sleep(0.05)
