"""The table is complete, and each of the three shapes is what its clients read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import pytest

from adapters import errors as library
from server import errors as ours
from server.api.error_replies import FAILED, TABLE, body_of, describe, reply_to
from server.engine import errors as engine
from server.engine import request


def classes(module):
    return [
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Exception) and kind.__module__ == module.__name__
    ]


@pytest.mark.parametrize("module", [library, ours, engine], ids=lambda module: module.__name__)
def test_every_error_class_is_in_the_table(module):
    found = classes(module)
    assert found
    missing = [kind.__name__ for kind in found if kind not in TABLE]
    assert not missing


def test_every_code_of_a_failed_request_is_in_the_table():
    words = request.FailedEvent.__doc__
    assert all(f'"{code}"' in words for code in FAILED)
    assert words.count('"') == 2 * len(FAILED)


def test_409_is_not_used_and_codes_differ():
    refusals = [*TABLE.values(), *FAILED.values()]
    assert all(refusal.status != 409 for refusal in refusals)
    codes = [refusal.code for refusal in TABLE.values() if refusal.code != "internal_error"]
    assert len(codes) == len(set(codes))


def test_the_three_shapes():
    error = library.TensorMismatch("wrong", field="t", expected="(1, 2)", came="(2, 1)")
    report = describe(error)
    assert body_of(report, "/generate") == {"error": "wrong", "error_type": "validation"}
    assert body_of(report, "/adapters") == {
        "error": "wrong",
        "error_type": "validation",
        "code": "tensor_mismatch",
        "field": "t",
        "expected": "(1, 2)",
        "came": "(2, 1)",
    }
    assert body_of(report, "/v1/models") == {
        "error": {
            "message": "wrong",
            "type": "invalid_request_error",
            "param": "t",
            "code": "tensor_mismatch",
        }
    }


def test_a_refusal_of_data_names_its_row():
    report = describe(library.DataInvalid("wrong", row=3, field="text"))
    assert body_of(report, "/train")["row"] == 3
    assert "row" not in body_of(describe(library.DataInvalid("none")), "/train")


def test_a_full_queue_says_when_to_come_back():
    reply = reply_to(engine.EngineOverloaded(3), "/generate")
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "3")


def test_failed_requests_go_by_their_code():
    assert describe(engine.RequestFailed("adapter_corrupt", "m")).refusal.status == 424
    assert describe(engine.RequestFailed("new", "m")).refusal.status == 500
    lost = reply_to(engine.RequestFailed("engine_unavailable", "m"), "/classify")
    assert (lost.status_code, lost.headers["retry-after"]) == (503, "5")
    assert "retry-after" not in reply_to(engine.RequestFailed("engine_error", "m"), "/").headers


def test_an_unforeseen_error_keeps_its_words_to_itself():
    assert "secret" not in describe(ValueError("secret prompt")).message


def test_what_utf8_cannot_say_is_escaped():
    reply = reply_to(ours.RequestInvalid("\ud800", field="\ud800", came="\ud800"), "/adapters")
    assert b"\\\\ud800" in reply.body
    assert reply_to(ours.RequestInvalid("\ud800", field="\ud800"), "/v1/x").body


def test_framework_errors_have_our_shape(server):
    assert server.get("/nowhere").json()["code"] == "route_not_found"
    reply = server.get("/generate")
    assert reply.status_code == 405
    assert set(reply.json()) == {"error", "error_type"}
    assert "error" in server.get("/v1/nowhere").json()
    assert server.get("/v1/nowhere").json()["error"]["code"] == "route_not_found"
    for path in ("/nowhere", "/generate", "/v1/nowhere"):
        assert server.get(path).headers["x-adapter-id"] == "-"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions? (an OpenAI client's base_url ends in /v1)"),
        ("/v1/v1/chat/completions", "/v1/chat/completions? (an OpenAI client's base_url ends in"),
        ("/v1/generate", "/generate?"),
        ("/adapter", "/adapters?"),
        ("/adapters/", "/adapters?"),
        ("/trian", "/train?"),
        ("/trian/job-1/cancel", "/train/{job_id}/cancel?"),
        ("/v1/chat/completion", "/v1/chat/completions?"),
    ],
)
def test_a_path_that_is_none_is_told_with_the_one_that_was_meant(server, path, meant):
    for method in ("GET", "POST"):
        reply = server.request(method, path)
        assert reply.status_code == 404
        told = reply.json()["error"]
        assert f"did you mean {meant}" in (told["message"] if path.startswith("/v1/") else told)


def test_a_path_that_resembles_none_and_a_method_that_is_none(server):
    for path in ("/qqqqqq", "/" + "a" * 5000):
        assert server.get(path).json()["error"].startswith("Not Found: there is no such path")
    reply = server.put("/adapters")
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET, POST")
    assert reply.json()["error"] == "Method Not Allowed: this path takes GET and POST"
    told = server.get("/v1/chat/completions").json()["error"]
    assert told["message"] == "Method Not Allowed: this path takes POST"


# --- wrong bodies ------------------------------------------------------------------------------------

# Words of pydantic, FastAPI and Python that no message may have.
FOREIGN = re.compile(
    r"Input should|Field required|Extra inputs|Value error|valid (dictionary|string|integer|list)|"
    r"\b(None|True|False|str|dict|int)\b|type_error|pydantic|https?://errors"
)


def json_bodies(app) -> Iterator[tuple[str, str, list[str]]]:
    """(method, path, fields) of every route with a JSON body."""
    page = app.openapi()
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema")
            if schema is not None:
                named = schema.get("$ref", "").rpartition("/")[2]
                schema = page["components"]["schemas"].get(named, schema)
                yield method, path, list(schema.get("properties", {}))


def test_no_body_s_refusal_has_the_framework_s_words(server):
    bodies = list(json_bodies(server.app))
    assert len(bodies) > 10
    wrong = []
    for method, path, fields in bodies:
        url = path.replace("{name}", "other").replace("{alias}", "stable")
        # A value that no field takes, for each field; and bodies that are no object.
        for value in ({}, [], None, *({one: {"no": [None, True]}} for one in fields)):
            reply = server.request(method, url, json=value)
            if reply.is_client_error and FOREIGN.search(reply.text):
                wrong.append((path, value, reply.text))
            assert reply.status_code < 500, (path, value, reply.text)
    assert wrong == []


def test_management_routes_say_what_was_meant(server):
    body = {"adapters": ["other"], "weight": [1], "name": "sum"}
    reply = server.post("/adapters/combine", json=body)
    assert reply.json()["error"] == (
        "unknown field 'weight'; did you mean 'weights'?; weights: missing"
    )
    assert reply.json()["field"] == "weight"
    reply = server.get("/adapters", params={"limits": 1})
    assert reply.json()["error"] == "unknown query parameter 'limits'; did you mean 'limit'?"
    reply = server.get("/adapters", params={"limit": "x"})
    assert reply.json()["error"] == "limit: expected a whole number, came 'x'"
