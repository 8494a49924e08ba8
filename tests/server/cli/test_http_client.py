"""The client of our own routes, against the running server and against servers that are none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from server.cli.http_client import RemoteServer, ServerRefused, error_of, uses_proxy


@contextlib.contextmanager
def something(status: int, body: bytes, content_type: str = "text/html") -> Iterator[str]:
    """A server that is no Graftwork: the same reply to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def answer(self) -> None:
            self.send_response(status)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    other = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=other.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{other.server_port}"
    finally:
        other.shutdown()
        other.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/adapters/nobody", 404, "adapter_not_found"),  # our shape
        ("/v1/nothing", 404, "route_not_found"),  # OpenAI's
        ("/generate", 405, None),  # TGI's
    ],
)
def test_refusals_of_every_shape_are_told_in_the_server_s_words(server, path, status, code):
    with RemoteServer(str(server.base_url)) as remote, pytest.raises(ServerRefused) as refused:
        remote.get(path)
    body = server.get(path).json()
    assert refused.value.message == error_of(body)[0]
    assert (refused.value.status, refused.value.code) == (status, code)


def test_a_path_before_the_routes_is_kept(server):
    with RemoteServer(f"{server.base_url}/") as remote:
        assert remote.get("/health") == {"status": "ready"}
    with (
        RemoteServer(f"{server.base_url}/behind/a/proxy") as remote,
        pytest.raises(ServerRefused) as refused,
    ):
        remote.get("/health")
    assert refused.value.status == 404


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://", "http://h:port"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ServerRefused, match="expected http://HOST:PORT"):
        RemoteServer(url)


def test_nothing_there_says_what_to_do():
    with RemoteServer("http://127.0.0.1:9") as remote, pytest.raises(ServerRefused) as refused:
        remote.get("/health")
    assert "nothing answers at http://127.0.0.1:9" in refused.value.message
    assert "graftwork serve" in refused.value.message
    assert refused.value.status is None


@pytest.mark.parametrize(
    ("status", "body"), [(502, b"<h1>Bad Gateway</h1>"), (200, b"<h1>Hello</h1>"), (404, b"[1]")]
)
def test_another_server_is_taken_for_none_of_ours(status, body):
    with something(status, body) as url, RemoteServer(url) as remote:
        with pytest.raises(ServerRefused, match="is it a Graftwork server"):
            remote.get("/adapters")
        with pytest.raises(ServerRefused, match="is it a Graftwork server"):
            remote.post("/adapters/combine", {})


def test_a_proxy_is_never_asked_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with RemoteServer(str(server.base_url)) as remote:
        assert remote.get("/health") == {"status": "ready"}
    assert not uses_proxy("http://localhost:1")
    assert not uses_proxy("http://[::1]:1")
    assert uses_proxy("http://example.org")


def test_a_server_that_loads_its_base_is_waited_for():
    answers = [
        (503, b'{"error": "not ready: the base model is still loading", "code": "not_ready"}')
    ]
    answers += [(200, b'{"status": "ready"}'), (200, b'{"name": "x"}')]
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            status, body = answers.pop(0)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    loading = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=loading.serve_forever, daemon=True)
    thread.start()
    told: list[str] = []
    url = f"http://127.0.0.1:{loading.server_port}"
    with RemoteServer(url, on_loading=lambda: told.append("waits")) as remote:
        assert remote.get("/adapters/x") == {"name": "x"}
    loading.shutdown()
    loading.server_close()
    thread.join()
    assert (paths, told) == (["/readyz", "/readyz", "/adapters/x"], ["waits"])
