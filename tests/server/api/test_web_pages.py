"""What a web page of another site makes a browser send is refused, and so is a foreign Host."""

from __future__ import annotations

import json

import httpx
import pytest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from server.api.middleware.web_pages import WebPages, host_names
from server.config.settings import Settings
from tests.server.http_server import save_prefix_adapter

EVIL = "http://evil.example"
TRAIN = {
    "adapter": "planted",
    "method": "prompt_tuning",
    "config": {"num_virtual_tokens": 2},
    "rows": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
    "template": "{text} :",
    "target": "label",
    "hyperparameters": {"max_steps": 1},
}


@pytest.fixture(scope="module")
def own(server) -> str:
    """The server's own origin, as a browser sends it."""
    return str(server.base_url).rstrip("/")


# What a page can send without asking first: forms, plain text, nothing at all.
PLAIN = {"content-type": "text/plain;charset=UTF-8;application/json"}


def form(folder) -> dict[str, object]:
    parts = ("adapter_config.json", "adapter_model.safetensors")
    files = [("files", (part, (folder / part).read_bytes())) for part in parts]
    return {"data": {"name": "planted"}, "files": files}


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": EVIL},
        {"origin": "null"},
        {"origin": EVIL, "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},  # another port of this machine
        {"origin": "http://localhost:1"},
        {"origin": "file://"},
        {"origin": "chrome-extension://abcdef"},
    ],
    ids=lambda headers: " ".join(headers.values()),
)
def test_a_page_of_another_site_changes_nothing(server, tmp_path, headers):
    folder = save_prefix_adapter(tmp_path / "planted", seed=9)
    asked = [
        ("POST", "/adapters", form(folder)),
        ("POST", "/train", {"content": json.dumps(TRAIN), "headers": PLAIN}),
        ("POST", "/v1/files", {"data": {"purpose": "fine-tune"}, "files": {"file": b"{}"}}),
        ("POST", "/drain", {}),
        ("POST", "/adapters/complaints/unload", {}),
        ("DELETE", "/adapters/complaints", {}),
        ("PUT", "/adapters/complaints/aliases/stable", {}),
        ("POST", "/v1/completions", {"json": {"model": "complaints", "prompt": "a"}}),
        ("POST", "/generate", {"json": {"inputs": "a"}}),
        ("POST", "/nowhere", {}),
    ]
    before = server.get("/adapters").json()
    for method, path, options in asked:
        sent = {**options.pop("headers", {}), **headers}
        reply = server.request(method, path, headers=sent, **options)
        assert reply.status_code == 403, (method, path, reply.text)
        told = reply.json()
        if path.startswith("/v1/"):
            assert told["error"]["code"] == "origin_refused"
            assert told["error"]["type"] == "permission_error"
        elif path == "/generate":
            assert set(told) == {"error", "error_type"}
        else:
            assert (told["code"], told["field"] in headers) == ("origin_refused", True)
            assert "GRAFTWORK_ALLOWED_ORIGINS" in told["error"]
        assert "x-request-id" in reply.headers
    assert server.get("/adapters").json() == before
    assert server.get("/readyz").status_code == 200
    # Reading is no harm: the browser shows the reply to no page of another site.
    assert server.get("/adapters", headers=headers).status_code == 200


def test_the_servers_own_pages_and_other_clients_may(server, own):
    port = server.base_url.port
    local = {"origin": f"http://localhost:{port}", "host": f"localhost:{port}"}
    for headers in (
        {},
        {"origin": own},
        {"origin": own, "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        local,
        {"origin": f"https://localhost:{port}", "host": f"LOCALHOST:{port}"},  # behind TLS
    ):
        reply = server.post("/tokenize", json={"inputs": "a"}, headers=headers)
        assert reply.status_code == 200, (headers, reply.text)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "a@localhost"],
)
def test_a_name_that_points_to_loopback_is_none_of_the_servers(server, host):
    for method, path in (("GET", "/livez"), ("GET", "/v1/models"), ("POST", "/generate")):
        # As such a page's own requests look: of the same origin.
        headers = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
        reply = server.request(method, path, headers=headers)
        assert reply.status_code == 403, (host, path)
        assert "GRAFTWORK_ALLOWED_HOSTS" in reply.text
    assert reply.json()["error_type"] == "authentication"


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1", "127.0.0.1", "127.0.0.1:80", "[::1]:9"]
)
def test_the_names_of_loopback_pass(server, host):
    assert server.get("/livez", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/adapters", "/adapters/complaints", "/v1/models", "/"])
def test_a_path_that_ends_with_a_line_break_is_none(server, path):
    for method in ("GET", "POST", "DELETE"):
        assert server.request(method, f"{path}%0A").status_code == 404, (method, path)


# --- settings --------------------------------------------------------------------------------------


async def status(settings: Settings, method: str, **headers: str) -> int:
    """What an application behind these settings answers."""
    app = Starlette(routes=[Route("/", lambda _: PlainTextResponse("a"), methods=["GET", "POST"])])
    origins = settings.allowed_origins
    guarded = WebPages(app, hosts=host_names(settings), origins=origins)
    transport = httpx.ASGITransport(guarded)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return (await client.request(method, "/", headers=sent)).status_code


async def test_hosts_are_checked_on_loopback_or_where_they_are_listed():
    everywhere = Settings(host="0.0.0.0")
    assert await status(everywhere, "GET", host="any.example") == 200
    listed = Settings(host="0.0.0.0", allowed_hosts="Graft.example, *.lan,a.example:81")
    for host, expected in (
        ("graft.example:8000", 200),
        ("GRAFT.example.", 200),
        ("one.lan", 200),
        ("a.example:81", 200),
        ("127.0.0.1:8000", 200),
        ("a.example:82", 403),
        ("lan", 403),
        ("evil.example", 403),
        ("", 403),
    ):
        assert await status(listed, "GET", host=host) == expected, host
    local = Settings(allowed_hosts="graft.example")
    assert await status(local, "GET", host="graft.example") == 200
    assert await status(Settings(allowed_hosts="*"), "GET", host="any.example") == 200


async def test_an_allowed_origin_passes_from_another_site():
    settings = Settings(allowed_origins="https://tools.example,http://localhost:3000")
    for origin, expected in (
        ("https://tools.example", 200),
        ("http://localhost:3000", 200),
        ("http://tools.example", 403),
        ("https://tools.example.evil.example", 403),
        ("null", 403),
    ):
        assert (
            await status(settings, "POST", origin=origin, sec_fetch_site="cross-site") == expected
        )
    assert await status(settings, "POST", sec_fetch_site="cross-site") == 403


async def test_a_proxy_may_pass_a_name_without_its_usual_port():
    settings = Settings(host="0.0.0.0")
    assert await status(settings, "POST", host="a.example", origin="https://a.example") == 200
    assert await status(settings, "POST", host="a.example:443", origin="https://a.example") == 200
    assert await status(settings, "POST", host="a.example", origin="https://a.example:8443") == 403


@pytest.mark.parametrize(
    "change",
    [
        {"allowed_hosts": "http://a.example"},
        {"allowed_hosts": "a.*"},
        {"allowed_origins": "a.example"},
        {"allowed_origins": "https://a.example/"},
        {"allowed_origins": "*"},
    ],
)
def test_what_is_no_host_or_origin_is_refused_at_the_start(change):
    with pytest.raises(ValidationError, match="expected"):
        Settings(**change)


# --- content types ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        PLAIN["content-type"],
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded; a=application/json",
        "application/jsonx",
        "multipart/form-data-json; boundary=x",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/train", "/generate", "/v1/completions", "/adapters/combine"])
def test_a_content_type_is_compared_as_a_whole(server, path, kind):
    reply = server.post(path, content=b"{}", headers={"content-type": kind})
    assert reply.status_code == 415, reply.text
    chunked = server.post(path, content=iter([b"{", b"}"]), headers={"content-type": kind})
    assert chunked.status_code == 415, chunked.text


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/a+json"]
)
def test_json_has_more_than_one_name(server, kind):
    body = json.dumps({"inputs": "a"})
    reply = server.post("/tokenize", content=body, headers={"content-type": kind})
    assert reply.status_code == 200, reply.text
