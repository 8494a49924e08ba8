"""The door: every route, every spelling of it, and what a key may not know of."""

from __future__ import annotations

import json
import re
import socket
import time
from datetime import timedelta

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from server.api.middleware.route_scopes import ACCESS, ANY_KEY, PUBLIC, rule_of, rules_of
from server.app import create_app
from server.config.settings import Settings
from server.store.key import SCOPES, new_text
from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_prefix_adapter, upload

OPEN = {("GET", "/livez"), ("GET", "/readyz"), ("GET", "/health")}
REFUSED = {
    "/v1/models": {
        "error": {
            "message": "a valid API key is required: send it as Authorization: Bearer KEY, or as "
            "x-api-key",
            "type": "authentication_error",
            "param": None,
            "code": "key_required",
        }
    }
}
MESSAGE = REFUSED["/v1/models"]["error"]["message"]
REFUSED["/generate"] = {"error": MESSAGE, "error_type": "authentication"}
REFUSED["/adapters"] = REFUSED["/generate"] | {"code": "key_required"}


def routes() -> set[tuple[str, str]]:
    """Every route that the app has, however it came to it."""
    found = set()
    for route in iter_route_contexts(create_app(Settings()).routes):
        assert route.methods, f"{route} is no plain route: the door knows no other"
        found |= {(method, route.path) for method in route.methods if method != "HEAD"}
    return found


ROUTES = sorted(routes())
GUARDED = [route for route in ROUTES if route not in OPEN]


def filled(template: str) -> str:
    """A path of this route, for something that is not there."""
    return re.sub(r"\{[^}]*\}", "nothing-there", template)


def test_the_table_has_every_route_and_no_other():
    assert set(ACCESS) == set(ROUTES)
    assert {route for route, rule in ACCESS.items() if rule == PUBLIC} == OPEN
    assert len(ROUTES) > 40


@pytest.mark.parametrize(("method", "template"), ROUTES)
def test_a_path_has_one_rule_and_it_is_that_of_its_route(method, template):
    path = filled(template)
    matching = [one for one in ACCESS if one[0] == method and rules_of(path).get(method) is not None
                and filled(one[1]) == path]  # fmt: skip
    assert len(matching) == 1
    assert rule_of(method, path) == ACCESS[method, template]


# --- without a key, and with one that is good for nothing ---------------------------------------------


@pytest.fixture(scope="module")
def good_for_nothing(guarded):
    """Ways to come without a good key."""
    revoked = guarded.store.create("revoked", SCOPES[:-1])
    guarded.store.revoke(revoked.key.id)
    expired = guarded.key("admin", expires_in=timedelta(milliseconds=1))
    good = guarded.key("admin")
    time.sleep(0.2)
    return [
        {},
        {"authorization": f"Bearer {revoked.text}"},
        {"authorization": f"Bearer {expired}"},
        {"authorization": f"Bearer {new_text()}"},
        {"authorization": f"Bearer {good[:-1]}"},
        {"authorization": f"Basic {good}"},
        {"authorization": good},
        {"authorization": f"Bearer {good}", "x-api-key": expired},
        {"x-api-key": revoked.text},
        {"authorization": "Bearer " + "A" * 3000},
        {"authorization": "Bearer \xe4\xf6"},
        {"cookie": f"authorization=Bearer {good}"},
    ]


def encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


@pytest.mark.parametrize(("method", "template"), GUARDED)
def test_no_route_answers_without_a_key(method, template, guarded, good_for_nothing):
    seen = set()
    for headers in good_for_nothing:
        reply = guarded.client.request(method, filled(template), headers=encoded(headers))
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == 'Bearer realm="graftwork"'
        seen.add(reply.content)
    assert len(seen) == 1  # the same words for every reason


def test_the_probes_answer_without_one(guarded, good_for_nothing):
    for _, path in OPEN:
        for headers in good_for_nothing:
            reply = guarded.client.get(path, headers=encoded(headers))
            assert reply.status_code == 200


@pytest.mark.parametrize("path", REFUSED)
def test_a_refusal_has_the_shape_of_its_path(path, guarded):
    reply = guarded.client.post(path)
    assert (reply.status_code, reply.json()) == (401, REFUSED[path])


@pytest.mark.parametrize(
    "path",
    ["/livez/", "//livez", "/LIVEZ", "/livez/../generate", "/livez;x", "/livez%2f", "/livez%00",
     "/./livez", "/%6civez/", "/livez/%2e%2e/adapters", "/livez\\..\\adapters", "/nothing", "*",
     "//generate", "/generate/", "/Generate", "/generate;x=1", "/generate%20", "/%2e/generate",
     "/generate%2f", "//evil.example/livez", "http://evil.example/livez", "/docs/", "/openapi.json/",
     "/livez?x=1/../../adapters%0d%0a"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "TRACE", "get"])
def test_no_spelling_of_a_path_passes(path, method, guarded):
    status = raw(guarded, method, path)
    if path.startswith("/livez?"):
        # A query is no part of the path; the probe has no other method.
        assert status == (200 if method in ("GET", "HEAD") else 405) or status in (400, 405)
    elif path == "http://evil.example/livez" and method in ("GET", "HEAD"):
        assert status in (200, 401, 405)  # the target's path is the probe's
    else:
        assert status in (400, 401)


def raw(guarded, method: str, target: str) -> int:
    """The status of a request whose target nobody tidied up."""
    url = guarded.client.base_url
    with socket.create_connection((url.host, url.port), timeout=20) as connection:
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n"
        head += "Connection: close\r\n\r\n"
        connection.sendall(head.encode())
        received = b""
        while b"\r\n" not in received and (block := connection.recv(4096)):
            received += block
    return int(received.split()[1])


@pytest.mark.parametrize(("method", "template"), GUARDED)
def test_head_and_options_pass_no_door(method, template, guarded):
    for other in ("HEAD", "OPTIONS"):
        assert guarded.client.request(other, filled(template)).status_code == 401


def test_a_websocket_is_refused(guarded):
    url = guarded.client.base_url
    for path in ("/livez", "/generate"):
        upgrade = {
            "connection": "upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        reply = httpx.get(f"http://{url.host}:{url.port}{path}", headers=upgrade)
        assert reply.status_code in (200, 403, 401)
        assert reply.status_code != 200 or path == "/livez"
    assert guarded.client.get("/livez").status_code == 200


# --- with a key ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_opens_its_routes_and_no_other(scope, guarded, keys):
    opened = set()
    for method, template in GUARDED:
        reply = guarded.ask(method, filled(template), keys[scope])
        assert reply.status_code != 401, (method, template)
        if reply.status_code != 403:
            opened.add((method, template))
        else:
            said = reply.json()
            code = said["error"]["code"] if template.startswith("/v1/") else said.get("code")
            assert code == (None if template in ("/", "/generate", "/generate_stream", "/tokenize",
                                                  "/info") else "scope_missing")  # fmt: skip
    guarded.ask("DELETE", "/drain", keys["admin"])
    may = {route for route in GUARDED if scope in ACCESS[route] or scope == "admin"}
    assert opened == may


def test_one_key_comes_in_either_header_in_any_case(guarded, keys):
    key = keys["generate"]
    for headers in (
        {"Authorization": f"Bearer {key}"},
        {"AUTHORIZATION": f"bearer  {key}"},
        {"x-api-key": key},
        {"X-API-Key": key, "authorization": f"BEARER {key}"},
    ):
        assert guarded.client.get("/info", headers=headers).status_code == 200


def test_a_route_that_is_none_and_a_method_that_is_none(guarded, keys):
    assert guarded.ask("GET", "/nothing", keys["generate"]).json()["code"] == "route_not_found"
    assert guarded.ask("GET", "/adapters/", keys["admin"]).status_code == 404
    reply = guarded.ask("PUT", "/adapters", keys["generate"])
    assert (reply.status_code, reply.json()["code"]) == (405, "method_not_allowed")
    assert reply.headers["allow"] == "GET, POST"
    assert guarded.ask("PUT", "/", keys["generate"]).headers["allow"] == "GET, POST"
    assert "/adapters?" in guarded.ask("GET", "/adapter", keys["admin"]).json()["error"]
    assert guarded.ask("GET", "/adapter").status_code == 401
    assert guarded.ask("HEAD", "/docs", keys["generate"]).status_code == 200
    # What everybody may read has no methods to hide.
    reply = guarded.ask("TRACE", "/livez")
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET")
    assert guarded.ask("PUT", "/adapters").status_code == 401


def test_keys_are_asked_for_unless_the_server_is_this_machines_own():
    for host, required in (
        ("127.0.0.1", False), ("127.8.0.1", False), ("::1", False), ("localhost", False),
        ("0.0.0.0", True), ("::", True), ("10.0.0.1", True), ("example.org", True), ("", True),
    ):  # fmt: skip
        assert Settings(host=host).keys_required is required, host
        assert Settings(host=host, require_keys=not required).keys_required is not required


def test_a_server_without_keys_takes_any(server):
    for headers in ({}, {"authorization": "Bearer none"}, {"x-api-key": new_text()}):
        assert server.get("/adapters", headers=headers).status_code == 200


# --- adapters that a key may not use -----------------------------------------------------------------


def as_unknown(reply: httpx.Response, name: str) -> tuple[int, str]:
    """A reply with the adapter's name taken out."""
    return reply.status_code, reply.text.replace(name, "NAME")


def asked_of(name: str) -> list[tuple[str, str, dict]]:
    """Everything that a route can be asked about an adapter."""
    body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
    inside = {"inputs": "x", "parameters": {"max_new_tokens": 1, "adapter_id": name}}
    chat = {"model": name, "messages": [{"role": "user", "content": "x"}]}
    train = {"adapter": name, "method": "ia3", "template": "{t}", "target": "l",
             "rows": [{"t": "a", "l": "b"}, {"t": "c", "l": "d"}]}  # fmt: skip
    found = [
        ("POST", f"/generate?adapter={name}", {"json": body}),
        ("POST", "/generate", {"json": inside}),
        ("POST", f"/generate_stream?adapter={name}", {"json": body}),
        ("POST", f"/?adapter={name}", {"json": body}),
        ("POST", f"/generate?adapter={name}@1", {"json": body}),
        ("POST", f"/generate?adapter={name}@7", {"json": body}),
        ("POST", f"/generate?adapter={name}@stable", {"json": body}),
        ("POST", f"/classify?adapter={name}", {"json": {"inputs": "x", "labels": ["a"]}}),
        ("POST", "/v1/completions", {"json": {"model": name, "prompt": "x", "max_tokens": 1}}),
        ("POST", "/v1/completions", {"json": {"model": f"{name}@1", "prompt": "x"}}),
        ("POST", "/v1/chat/completions", {"json": chat}),
        ("POST", "/v1/responses", {"json": {"model": name, "input": "x"}}),
        ("POST", "/v1/embeddings", {"json": {"model": name, "input": "x"}}),
        ("GET", f"/v1/models/{name}", {}),
        ("GET", f"/v1/models/{name}@1", {}),
        ("GET", f"/adapters/{name}", {}),
        ("GET", f"/adapters/{name}/download", {}),
        ("GET", f"/adapters/{name}/download?version=1", {}),
        ("POST", f"/adapters/{name}/preload", {}),
        ("POST", f"/adapters/{name}/unload", {}),
        ("POST", f"/adapters/{name}/rollback", {"json": {"version": 1}}),
        ("PUT", f"/adapters/{name}/aliases/team-a-alias", {"json": {"version": 1}}),
        ("PUT", f"/adapters/team-a-x/aliases/{name}", {"json": {"version": 1}}),
        ("DELETE", f"/adapters/{name}", {}),
        ("DELETE", f"/adapters/{name}?version=1", {}),
        ("POST", "/adapters/combine",
         {"json": {"adapters": [name, "team-a-x"], "weights": [1, 1], "name": "team-a-sum"}}),
        ("POST", "/adapters/combine",
         {"json": {"adapters": ["team-a-x"], "weights": [1], "name": name}}),
        ("POST", "/train?dry_run=true", {"json": train}),
        ("POST", "/train", {"json": train}),
    ]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def team_a(guarded) -> str:
    """A key of team a: everything but admin, for its own adapters."""
    return guarded.key(*SCOPES[:-1], adapters=["team-a-*", "complaints"])


def test_an_adapter_of_others_is_one_that_is_not_there(guarded, team_a):
    guarded.ask("PUT", "/adapters/other/aliases/stable", guarded.key("admin"), json={"version": 1})
    for hidden, unknown in zip(asked_of("other"), asked_of("zzzzz"), strict=True):
        method, path, options = hidden
        reply = guarded.ask(method, path, team_a, **options)
        assert reply.status_code == 404, (method, path, reply.text)
        there = as_unknown(reply, "other")
        method, path, options = unknown
        assert there == as_unknown(guarded.ask(method, path, team_a, **options), "zzzzz")
        assert reply.headers["x-adapter-id"] == "-"
    admin = guarded.key("admin")
    assert guarded.ask("GET", "/adapters/other", admin).status_code == 200  # and nothing happened


def test_uploads_under_a_name_of_others_are_refused_alike(guarded, team_a, tmp_path):
    folder = save_prefix_adapter(tmp_path / "new", seed=77)
    guarded.client.headers["authorization"] = f"Bearer {team_a}"
    try:
        replies = {
            name: upload(guarded.client, folder, name) for name in ("other", "zzzzz", "team-a-new")
        }
    finally:
        del guarded.client.headers["authorization"]
    assert as_unknown(replies["other"], "other") == as_unknown(replies["zzzzz"], "zzzzz")
    assert replies["other"].status_code == 404
    assert replies["team-a-new"].status_code == 201
    assert guarded.ask("DELETE", "/adapters/team-a-new", team_a).status_code == 200


def test_a_key_uses_its_own_adapters_and_the_base(guarded, team_a):
    body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
    for place in ("", "?adapter=team-a-x", "?adapter=complaints@1"):
        assert guarded.ask("POST", f"/generate{place}", team_a, json=body).status_code == 200
    assert guarded.ask("GET", "/v1/models/team-a-x", team_a).json()["id"] == "team-a-x"


def test_lists_show_a_key_its_own_adapters(guarded, team_a, keys):
    listed = guarded.ask("GET", "/adapters", team_a).json()
    assert [one["name"] for one in listed["adapters"]] == ["complaints", "team-a-x"]
    assert listed["total"] == 2
    page = guarded.ask("GET", "/adapters?offset=1&limit=1", team_a).json()
    assert [one["name"] for one in page["adapters"]] == ["team-a-x"]
    models = guarded.ask("GET", "/v1/models", team_a).json()["data"]
    assert [one["id"] for one in models] == ["tiny-base", "complaints", "team-a-x"]
    everything = guarded.ask("GET", "/adapters", keys["adapters:read"]).json()
    assert everything["total"] == len(everything["adapters"]) == 4


def test_a_bare_alias_means_only_what_a_key_may_use(guarded, team_a):
    admin = guarded.key("admin")
    for name in ("team-a-x", "team-b-x"):
        path = f"/adapters/{name}/aliases/shared"
        assert guarded.ask("PUT", path, admin, json={"version": 1}).status_code == 200
    guarded.ask("PUT", "/adapters/team-b-x/aliases/theirs", admin, json={"version": 1})
    body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
    reply = guarded.ask("POST", "/generate?adapter=shared", team_a, json=body)
    assert reply.headers["x-adapter-id"] == "team-a-x"
    reply = guarded.ask("POST", "/generate?adapter=shared", admin, json=body)
    assert (reply.status_code, "team-b-x" in reply.text) == (404, True)
    hidden = guarded.ask("POST", "/generate?adapter=theirs", team_a, json=body)
    assert as_unknown(hidden, "theirs") == as_unknown(
        guarded.ask("POST", "/generate?adapter=zzzzz", team_a, json=body), "zzzzz"
    )


# --- jobs and files of others --------------------------------------------------------------------------

TRAIN = {
    "adapter": "team-a-trained", "method": "ia3", "template": "{t}", "target": "l",
    "config": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "rows": [{"t": text, "l": label} for text in "abcd" for label in ("yes", "no")],
}  # fmt: skip


def a_file(guarded, key: str) -> str:
    rows = b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", rows)}}
    reply = guarded.ask("POST", "/v1/files", key, **form)
    assert reply.status_code == 200, reply.text
    return reply.json()["id"]


def test_jobs_and_files_are_their_owners(guarded, keys):
    mine, ours, again = (guarded.key("train", tenant=tenant) for tenant in (None, "acme", "acme"))
    tune = {"model": "tiny-base", "suffix": "team-a-tuned"}
    made = {}
    for key in (mine, ours):
        job = guarded.ask("POST", "/train", key, json=TRAIN)
        assert job.status_code == 202, job.text
        made[key] = (job.json()["id"], a_file(guarded, key))
    seen = {mine: made[mine], ours: made[ours], again: made[ours], keys["train"]: None}
    for key, own in seen.items():
        jobs = [one["id"] for one in guarded.ask("GET", "/train", key).json()["jobs"]]
        tuning = [
            one["id"] for one in guarded.ask("GET", "/v1/fine_tuning/jobs", key).json()["data"]
        ]
        files = [one["id"] for one in guarded.ask("GET", "/v1/files", key).json()["data"]]
        assert jobs == tuning == ([] if own is None else [own[0]])
        assert guarded.ask("GET", "/train", key).json()["total"] == len(jobs)
        assert files == ([] if own is None else [own[1]])
        for job, file in made.values():
            for method, path, options in (
                ("GET", f"/train/{job}", {}),
                ("GET", f"/train/{job}/log", {}),
                ("GET", f"/v1/fine_tuning/jobs/{job}", {}),
                ("GET", f"/v1/fine_tuning/jobs/{job}/events", {}),
                ("GET", f"/v1/fine_tuning/jobs/{job}/checkpoints", {}),
                ("GET", f"/v1/fine_tuning/jobs?after={job}", {}),
                ("GET", f"/v1/files/{file}", {}),
                ("GET", f"/v1/files/{file}/content", {}),
                ("GET", f"/v1/files?after={file}", {}),
            ):
                reply = guarded.ask(method, path, key, **options)
                assert reply.status_code == (200 if own == (job, file) else 404), (path, reply.text)
            if own != (job, file):
                for method, path in (
                    ("POST", f"/train/{job}/cancel"),
                    ("DELETE", f"/train/{job}"),
                    ("GET", f"/train/{job}/events"),
                    ("POST", f"/v1/fine_tuning/jobs/{job}/cancel"),
                    ("DELETE", f"/v1/files/{file}"),
                ):
                    assert guarded.ask(method, path, key).status_code == 404
                asked = tune | {"training_file": file}
                reply = guarded.ask("POST", "/v1/fine_tuning/jobs", key, json=asked)
                assert (reply.status_code, reply.json()["error"]["code"]) == (404, "file_not_found")
    admin = guarded.ask("GET", "/train", keys["admin"]).json()["jobs"]
    assert {job for job, _ in made.values()} <= {one["id"] for one in admin}
    for key, (job, file) in made.items():
        assert guarded.ask("POST", f"/train/{job}/cancel", key).json()["state"] == "cancelled"
        assert guarded.ask("DELETE", f"/train/{job}", key).status_code == 200
        assert guarded.ask("DELETE", f"/v1/files/{file}", key).status_code == 200


# --- limits --------------------------------------------------------------------------------------------


def test_a_key_that_asks_too_often_is_told_when_to_come_again(guarded):
    key = guarded.key("generate", rate="3/hour")
    statuses = [guarded.ask("GET", "/info", key).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    reply = guarded.ask("POST", "/v1/completions", key, json={})
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limited")
    assert reply.json()["error"]["type"] == "rate_limit_error"
    assert 3000 < int(reply.headers["retry-after"]) <= 3600
    assert guarded.ask("GET", "/livez", key).status_code == 200


def test_tokens_of_prompts_and_outputs_are_counted_on_every_route(guarded):
    prompt = "the tweet is a complaint"
    admin = guarded.key("admin")
    size = guarded.ask("POST", "/tokenize", admin, json={"prompt": prompt}).json()["count"]
    long = {"max_new_tokens": 4, "ignore_eos": True}
    asked = {
        "/generate": ({"inputs": prompt, "parameters": long}, size + 4),
        "/generate_stream": ({"inputs": prompt, "parameters": long}, size + 4),
        "/v1/completions": (
            {"model": "complaints", "prompt": prompt, "max_tokens": 4, "ignore_eos": True}, size + 4
        ),
        "/classify": ({"inputs": prompt, "labels": ["a"]}, size + 2),
    }  # fmt: skip
    for path, (body, cost) in asked.items():
        just = guarded.key("generate", tokens=f"{2 * cost}/day")
        statuses = [guarded.ask("POST", path, just, json=body).status_code for _ in range(3)]
        assert statuses == [200, 200, 429], path
        reply = guarded.ask("POST", path, just, json=body)
        assert int(reply.headers["retry-after"]) > 0
        assert "quota_exceeded" in reply.text or path in ("/generate", "/generate_stream")
        assert "tokens, prompts included" in reply.text
        assert guarded.ask("POST", "/tokenize", just, json={"prompt": prompt}).status_code == 200


def test_a_request_of_many_sequences_ends_where_the_quota_does(guarded):
    key = guarded.key("generate", tokens="300/day")
    body = {"inputs": ["the tweet is a complaint"] * 400, "labels": ["a", "b"]}
    reply = guarded.ask("POST", "/classify", key, json=body)
    assert (reply.status_code, reply.json()["code"]) == (429, "quota_exceeded")


# --- nothing is told ---------------------------------------------------------------------------------


def test_no_key_is_in_logs_replies_or_files_and_metrics_may_be_everybodys(
    tiny_base, tmp_path, capfd
):
    from server.store.keys import KeyStore

    (tmp_path / "data").mkdir()
    store = KeyStore(tmp_path / "data")
    made = store.create("web", ["generate"], rate="8/minute", tokens="1/day")
    settings = make_settings(tiny_base, tmp_path / "data", require_keys=True, metrics_public=True,
                             train_workers=0, log_level="debug", log_format="json")  # fmt: skip
    replies = []
    with running_server(settings) as client:
        assert client.get("/metrics").status_code == 200  # this server's are everybody's
        assert client.get("/metrics/").status_code == client.get("/adapters").status_code == 401
        for headers in ({"authorization": f"Bearer {made.text}"}, {"x-api-key": made.text},
                        {"authorization": f"Basic {made.text}"}, {"authorization": made.text}):  # fmt: skip
            for method, path in (("GET", "/info"), ("POST", "/v1/completions"), ("PUT", "/nothing"),
                                 ("GET", "/adapters"), ("POST", "/generate")):  # fmt: skip
                reply = client.request(method, path, headers=headers, json={"inputs": "x"})
                replies.append(reply.text + str(reply.headers))
    secret = made.text.rsplit("-", 1)[1]
    written = capfd.readouterr()
    assert made.key.id in written.err  # who asked is told
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    stored = "".join(path.read_bytes().decode("latin-1") for path in files)
    for text in (written.err, written.out, "".join(replies), stored):
        assert secret not in text
    requests = [
        json.loads(line) for line in written.err.splitlines() if '"event": "request"' in line
    ]
    assert {one.get("key") for one in requests} >= {made.key.id, None}
    assert store.list()[0].last_used_at is not None  # noted when the server ended
    store.close()


def test_any_key_is_a_rule_of_its_own():
    assert ACCESS["GET", "/info"] == ANY_KEY != PUBLIC
