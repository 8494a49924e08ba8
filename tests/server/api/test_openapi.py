"""The OpenAPI page is complete, and true: a running server answers as it says.

Whoever adds a route says in its decorator what it answers and refuses, describes its fields, and adds a
request to `requests` below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from server.api import error_replies as errors
from server.app import create_app
from server.cli.main import app as command_line
from server.config.limits import Limits
from server.config.settings import Settings
from tests.documentation import hooks
from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_prefix_adapter, save_tiny_base, upload

JSON = "application/json"
EVENTS = "text/event-stream"
BASE = "SmolLM2-135M-Instruct"
CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message.content }}</s>{% endfor %}"
# Classes of refusals that are always told by one below them, or never to a client of a route.
NOT_TOLD = {
    "adapter_invalid",
    "checkpoint_invalid",
    "registry_refused",
    "training_refused",
    "training_diverged",
    "refused",
    "merge_invalid",  # the command line's
    "base_unsupported",  # a server's that does not start
    "engine_start_failed",
    "response_not_found",  # of routes that do nothing else, and are not on the page
    "no_embeddings",
    "url_too_long",  # before a route is known, as the next two
    "headers_too_large",
    "too_many_connections",
}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> dict[str, Any]:
    return create_app(make_settings(Path("base"), tmp_path_factory.mktemp("page"))).openapi()


def operations(page) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def content(part: dict[str, Any]) -> dict[str, Any]:
    return part.get("content", {})


# --- complete --------------------------------------------------------------------------------------


def test_every_route_and_every_parameter_is_described(page):
    missing = []
    for method, path, operation in operations(page):
        missing += [(method, path, what) for what in ("summary", "description", "tags")
                    if not operation.get(what)]  # fmt: skip
        for parameter in operation.get("parameters", []):
            if not parameter.get("description"):
                missing.append((method, path, parameter["name"]))
    assert missing == []


def fields_without_words(
    schema: Any, where: str, described: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Properties anywhere in a schema that have no description, there or above."""
    if isinstance(schema, list):
        for part in schema:
            yield from fields_without_words(part, where, described)
    if not isinstance(schema, dict):
        return
    for name, field in schema.get("properties", {}).items():
        if not field.get("description") and name not in described:
            yield f"{where}.{name}"
        yield from fields_without_words(field, f"{where}.{name}")
    described |= schema.get("properties", {}).keys()
    for key in ("items", "anyOf", "oneOf", "allOf", "prefixItems", "additionalProperties"):
        same = described if key.endswith("Of") else frozenset[str]()
        yield from fields_without_words(schema.get(key), where, same)


def test_every_field_of_every_body_and_reply_is_described(page):
    missing = []
    for name, schema in page["components"]["schemas"].items():
        if not schema.get("description"):
            missing.append(name)
        missing += fields_without_words(schema, name)
    for method, path, operation in operations(page):
        for body in (operation.get("requestBody", {}), *operation["responses"].values()):
            for kind in content(body).values():
                missing += fields_without_words(kind.get("schema"), f"{method} {path}")
    assert missing == []


def test_every_body_has_an_example_and_every_reply_a_schema_and_an_example(page):
    missing = []
    for method, path, operation in operations(page):
        for kind, media in content(operation.get("requestBody", {})).items():
            if not body_example(page, media):
                missing.append((method, path, kind))
        for status, reply in operation["responses"].items():
            assert reply["description"], (method, path, status)
            for kind, media in content(reply).items():
                has_example = "example" in media or media.get("examples")
                if not media.get("schema") or not (has_example or "zip" in kind or "octet" in kind):
                    missing.append((method, path, status, kind))
    assert missing == []


def body_example(page, media: dict[str, Any]) -> Any:
    """An example of a body: beside its schema, or in it."""
    if "example" in media:
        return media["example"]
    schema = resolved(page, media["schema"])
    return schema.get("example") or next(iter(schema.get("examples", ())), None)


def resolved(page, schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    return page["components"]["schemas"][schema["$ref"].rpartition("/")[2]]


def test_every_reference_leads_somewhere(page):
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(page)))
    assert named <= set(page["components"]["schemas"])
    assert not re.search(r'"\$ref": "(?!#/components/schemas/)', json.dumps(page))


def closed(schema: Any) -> Any:
    """A schema whose objects have the properties that it names and no others."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: closed(part) for key, part in schema.items()}
    return {**parts, "additionalProperties": False} if "properties" in schema else parts


def wrong(page, schema: dict[str, Any], value: Any, where: str = "") -> list[str]:
    """What of a value is not as a schema says; fields that it does not name are wrong."""
    root = {**closed(schema), "components": closed(page["components"])}
    found = Draft202012Validator(root).iter_errors(value)
    return [f"{where} {error.json_path}: {error.message}" for error in found]


def event_data(media: dict[str, Any]) -> dict[str, Any]:
    """The schema of the JSON in an event."""
    return media["schema"]["properties"]["data"]["anyOf"][1]["contentSchema"]


def test_examples_are_what_their_schemas_say(page):
    found = []
    for method, path, operation in operations(page):
        where = f"{method} {path}"
        for reply in operation["responses"].values():
            for kind, media in content(reply).items():
                if kind == JSON:
                    examples = [one["value"] for one in media.get("examples", {}).values()]
                    for example in examples or [media["example"]]:
                        found += wrong(page, media["schema"], example, where)
                if kind == EVENTS:
                    for data in events_of(media["example"]):
                        found += wrong(page, event_data(media), data, where)
    assert found == []


def test_every_schema_goes_by_the_name_of_its_class(page):
    # Of two classes with one name FastAPI makes longer names.
    assert [name for name in page["components"]["schemas"] if "__" in name] == []


# --- errors, settings ------------------------------------------------------------------------------


def codes_of(page) -> set[str]:
    return {
        code
        for _, _, operation in operations(page)
        for status, reply in operation["responses"].items()
        if int(status) >= 400
        for code in content(reply)[JSON]["examples"]
    }


def test_errors_have_the_shape_of_their_path_and_stand_in_the_documentation(page):
    for _, path, operation in operations(page):
        assert "500" in operation["responses"]
        for status, reply in operation["responses"].items():
            if int(status) < 400:
                continue
            name = content(reply)[JSON]["schema"]["$ref"].rpartition("/")[2]
            shape = "OpenAIErrorBody" if path.startswith("/v1/") else "ErrorBody"
            assert name == ("TgiErrorBody" if path in errors.TGI_PATHS else shape)
    assert codes_of(page) <= {code for _, code in hooks().error_meanings()}


def test_every_code_that_a_route_can_tell_stands_on_the_page(page):
    codes = {refusal.code for refusal in (*errors.TABLE.values(), *errors.FAILED.values())}
    told = codes_of(page)
    assert codes - told - NOT_TOLD == set()
    assert told & NOT_TOLD == set()


def test_every_setting_is_explained_by_graftwork_settings():
    said = CliRunner().invoke(command_line, ["settings"], env={"COLUMNS": "300"}).stdout
    unsaid = [
        name
        for name in Settings.model_fields
        if f"GRAFTWORK_{name.upper()}" not in said and name not in said
    ]
    assert unsaid == []


# --- true ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server on which every example works: its names are those of the examples."""
    home = tmp_path_factory.mktemp("documented")
    base = save_tiny_base(home / "base")
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (home / "runs").mkdir()
    settings = make_settings(
        base, home / "data", base_name=BASE, train_workers=0, load_dirs=[home / "runs"]
    )
    with running_server(settings) as client:
        for seed, name in ((1, "complaints"), (2, "refunds"), (3, "refunds")):
            folder = save_prefix_adapter(home / f"{name}-{seed}", seed=seed)
            assert upload(client, folder, name, template="{text} Label :").status_code == 201
        client.home = home
        yield client


def form(**fields) -> dict[str, Any]:
    """A form of plain fields and a file."""
    file, name = fields.pop("file"), fields.pop("part")
    return {"data": fields, "files": [(name, file)]}


def requests(client, example) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """One request or more for every route, each with the documented body where it has one."""

    def documented(method: str, path: str, url: str | None = None, **changes: Any):
        return method, path, {"url": url or path, "json": {**example(method, path), **changes}}

    def plain(method: str, path: str, url: str | None = None, **more: Any):
        return method, path, {"url": url or path, **more}

    openai = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
    for path in ("/generate", "/generate_stream", "/", *openai):
        yield documented("POST", path)
    reported = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    yield documented("POST", "/v1/responses", **reported)
    yield documented("POST", "/v1/responses", **reported, stream=True)
    stream = {"stream": True}
    for path in ("/generate", "/"):
        yield documented("POST", path, **stream)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    yield documented("POST", "/v1/completions", **usage, logprobs=2)
    yield documented("POST", "/v1/chat/completions", **usage, logprobs=True, top_logprobs=2)
    yield documented("POST", "/v1/completions", logprobs=2, echo=True)
    yield documented("POST", "/v1/chat/completions", logprobs=True, top_logprobs=2)
    details = {"details": True, "decoder_input_details": True, "top_n_tokens": 2, "best_of": 2}
    options = {**details, "do_sample": True, "return_k_alternatives": 2, "max_new_tokens": 3}
    yield documented("POST", "/generate", parameters=options)
    yield documented("POST", "/classify")
    yield documented("POST", "/classify", inputs="x")
    yield documented("POST", "/tokenize")
    yield plain("POST", "/tokenize", json={"inputs": "Tweet text"})
    yield documented("POST", "/detokenize")
    for path in ("/tokenizer_info", "/v1/models", "/info", "/methods", "/livez", "/readyz"):
        yield plain("GET", path)
    for path in ("/health", "/metrics", "/adapters"):
        yield plain("GET", path)
    for name in (BASE, "complaints"):
        yield plain("GET", "/v1/models/{name}", f"/v1/models/{name}")

    new = save_prefix_adapter(client.home / "new", seed=9)
    parts = [("files", (path.name, path.read_bytes())) for path in new.iterdir()]
    for _ in range(2):
        yield plain("POST", "/adapters", data={"name": "new"}, files=parts)
    name = "/adapters/{name}"
    yield plain("GET", name, "/adapters/complaints")
    yield plain("GET", f"{name}/download", "/adapters/complaints/download")
    yield plain("POST", f"{name}/preload", "/adapters/complaints/preload")
    yield plain("POST", f"{name}/unload", "/adapters/complaints/unload")
    yield documented("POST", f"{name}/rollback", "/adapters/refunds/rollback")
    aliases = f"{name}/aliases/{{alias}}"
    yield documented("PUT", aliases, "/adapters/refunds/aliases/stable")
    yield plain("DELETE", aliases, "/adapters/refunds/aliases/stable")
    yield documented("POST", "/adapters/combine")
    yield plain("DELETE", name, "/adapters/new")
    folder = save_prefix_adapter(client.home / "runs" / "more", seed=10)
    loaded = {"lora_name": "more", "lora_path": str(folder)}
    yield documented("POST", "/v1/load_lora_adapter", **loaded)
    yield documented("POST", "/v1/unload_lora_adapter", lora_name="more")

    yield documented("POST", "/train", "/train?dry_run=true")
    yield documented("POST", "/train")
    job = client.get("/train").json()["jobs"][0]["id"]
    one, events = "/train/{job_id}", f"/train/{job}/events"
    yield plain("GET", "/train")
    yield plain("GET", one, f"/train/{job}")
    yield plain("GET", f"{one}/log", f"/train/{job}/log")
    yield plain("POST", f"{one}/cancel", f"/train/{job}/cancel")
    yield plain("GET", f"{one}/events", events)
    yield plain("GET", f"{one}/events", events, headers={"last-event-id": "2"})
    yield plain("DELETE", one, f"/train/{job}")

    rows = b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'
    sent = form(purpose="fine-tune", part="file", file=("rows.jsonl", rows))
    yield plain("POST", "/v1/files", **sent)
    yield plain("GET", "/v1/files")
    file = client.get("/v1/files").json()["data"][0]["id"]
    yield plain("GET", "/v1/files/{file_id}", f"/v1/files/{file}")
    yield plain("GET", "/v1/files/{file_id}/content", f"/v1/files/{file}/content")
    yield documented("POST", "/v1/fine_tuning/jobs", training_file=file)
    yield plain("DELETE", "/v1/files/{file_id}", f"/v1/files/{file}")
    jobs = "/v1/fine_tuning/jobs"
    yield plain("GET", jobs)
    job = client.get(jobs).json()["data"][0]["id"]
    one = f"{jobs}/{{job_id}}"
    yield plain("GET", one, f"{jobs}/{job}")
    for end in ("events", "checkpoints"):
        yield plain("GET", f"{one}/{end}", f"{jobs}/{job}/{end}")
    yield plain("POST", f"{one}/cancel", f"{jobs}/{job}/cancel")
    yield plain("POST", "/drain", "/drain?seconds=0")
    yield plain("DELETE", "/drain")


def events_of(text: str) -> list[Any]:
    """The JSON of a stream's events."""
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"]


def test_a_running_server_answers_as_the_page_says(served):
    page = served.get("/openapi.json").json()

    def example(method: str, path: str) -> dict[str, Any]:
        operation = page["paths"][path][method.lower()]
        return body_example(page, content(operation["requestBody"])[JSON])

    asked, unsaid = set(), []
    for method, path, request in requests(served, example):
        reply = served.request(method, **request)
        asked.add((method, path))
        where = f"{method} {request['url']}"
        assert reply.status_code < 300, (where, reply.text)
        documented = page["paths"][path][method.lower()]["responses"][str(reply.status_code)]
        for name in ("x-request-id", "x-adapter-id", "x-adapter-version"):
            assert name in documented["headers"]
            assert name in reply.headers
        kind = reply.headers.get("content-type", "").partition(";")[0]
        assert kind in content(documented) or reply.content == b"", where
        if kind == JSON:
            unsaid += wrong(page, content(documented)[JSON]["schema"], reply.json(), where)
        if kind == EVENTS:
            for data in events_of(reply.text):
                unsaid += wrong(page, event_data(content(documented)[EVENTS]), data, where)
    assert unsaid == []
    assert asked == {(method, path) for method, path, _ in operations(page)}


def test_refusals_of_a_running_server_stand_on_the_page(served):
    page = served.get("/openapi.json").json()
    job = "job-" + "0" * 24
    for method, path, request in (
        ("POST", "/generate", {"url": "/generate?adapter=none", "json": {"inputs": "x"}}),
        ("POST", "/generate", {"url": "/generate", "json": {"inputs": ""}}),
        ("POST", "/v1/completions", {"url": "/v1/completions", "json": {"model": "none"}}),
        ("POST", "/v1/completions", {"url": "/v1/completions", "content": b"x" * (9 * 2**20)}),
        ("POST", "/classify", {"url": "/classify", "content": b"x"}),
        (
            "POST",
            "/classify",
            {"url": "/classify", "json": {"labels": ["x"] * (Limits().max_labels + 1)}},
        ),
        ("GET", "/adapters/{name}", {"url": "/adapters/none"}),
        ("GET", "/adapters", {"url": "/adapters?offset=-1"}),
        ("GET", "/train/{job_id}", {"url": f"/train/{job}"}),
        ("GET", "/train/{job_id}", {"url": f"/train/{job}?x=1"}),
        ("GET", "/v1/files/{file_id}", {"url": "/v1/files/none"}),
        ("POST", "/v1/files", {"url": "/v1/files", "json": {}}),
        ("POST", "/v1/fine_tuning/jobs", {"url": "/v1/fine_tuning/jobs", "json": {}}),
    ):
        reply = served.request(method, **request)
        body = reply.json()
        documented = page["paths"][path][method.lower()]["responses"][str(reply.status_code)]
        media = content(documented)[JSON]
        assert wrong(page, media["schema"], body, request["url"]) == []
        code = body["error"]["code"] if path.startswith("/v1/") else body.get("code")
        assert code is None or code in media["examples"], (request["url"], body)
