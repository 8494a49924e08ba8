"""Debian's nginx with the configuration that is shipped, in front of a real server."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from contextlib import closing

import httpx
import pytest

from tests.docker.files import DOCKER
from tests.server.http_server import save_prefix_adapter, upload

CONF = DOCKER / "nginx" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

GENERATE = {"inputs": "Tweet text : hello", "parameters": {"max_new_tokens": 6, "ignore_eos": True}}


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def configuration(folder, port, upstream):
    """What is shipped, with the places of this machine and a second for a slow header."""
    text = CONF.read_text()
    for old, new in (
        ("worker_processes auto", "daemon off;\nworker_processes 1"),
        ("/run/nginx.pid", f"{folder}/pid"),
        ("/dev/stderr warn", f"{folder}/error.log warn"),
        ("/dev/stdout", f"{folder}/access.log"),
        ("server:8000", upstream),
        ("listen 8080", f"listen 127.0.0.1:{port}"),
        ("client_header_timeout 10s", "client_header_timeout 1s"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"    {kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    return text.replace("http {\n", f"http {{\n{places}", 1)


@pytest.fixture(scope="module")
def proxy(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nginx")
    port = free_port()
    upstream = str(server.base_url).removeprefix("http://").rstrip("/")
    conf = folder / "nginx.conf"
    # Its workers are another user where it is started by root.
    folder.chmod(0o755)
    conf.write_text(configuration(folder, port, upstream))
    command = [NGINX, "-c", str(conf), "-e", f"{folder}/error.log", "-p", str(folder)]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen(command)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(200):
                try:
                    client.get("/livez")
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
            yield client
    finally:
        process.terminate()
        process.wait(30)
    log = (folder / "access.log").read_text()
    assert '"path":"/generate"' in log
    assert "Tweet text" not in log


def test_a_generation_and_an_upload_pass(proxy, server, tmp_path):
    body = {**GENERATE, "parameters": {**GENERATE["parameters"], "do_sample": False}}
    assert proxy.post("/generate", json=body).json() == server.post("/generate", json=body).json()
    made = upload(proxy, save_prefix_adapter(tmp_path / "a", seed=77), "through-the-proxy")
    assert made.status_code == 201, made.text
    reply = proxy.post("/generate", params={"adapter": "through-the-proxy"}, json=body)
    assert reply.headers["x-adapter-id"] == "through-the-proxy"
    assert server.delete("/adapters/through-the-proxy").status_code < 300


def test_a_stream_is_not_held_back(proxy):
    body = {**GENERATE, "parameters": {"max_new_tokens": 300, "ignore_eos": True}}
    with proxy.stream("POST", "/generate_stream", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        pieces = list(reply.iter_raw())
    # Nothing collects them, such as a compressor would.
    assert sum(map(len, pieces)) > 8192
    assert len(pieces) > 50


def test_what_is_for_the_operator_is_not_to_be_had(proxy, server):
    assert server.get("/metrics").status_code == 200
    for path in ("/metrics", "/drain", "//metrics", "/%6detrics", "/x/../metrics"):
        reply = proxy.build_request("GET", "/")
        reply.url = reply.url.copy_with(raw_path=path.encode())
        answer = proxy.send(reply)
        assert (answer.status_code, answer.json()["code"]) == (404, "route_not_found"), path


def test_a_body_that_is_too_large_is_refused_in_our_words(proxy):
    reply = proxy.post("/generate", json={"inputs": "x" * (10 << 20)})
    assert reply.status_code == 413
    assert reply.json()["code"] == "body_too_large"


def test_a_slow_header_is_cut(proxy):
    with closing(socket.create_connection((proxy.base_url.host, proxy.base_url.port))) as slow:
        slow.settimeout(30)
        slow.sendall(b"POST /generate HTTP/1.1\r\nhost: localhost\r\nx-slow: ")
        try:
            came = slow.recv(4096)
        except ConnectionResetError:
            came = b""
    assert came == b""


def test_a_server_that_is_gone_is_told_in_our_words(tmp_path):
    port, nobody = free_port(), free_port()
    conf = tmp_path / "nginx.conf"
    conf.write_text(configuration(tmp_path, port, f"127.0.0.1:{nobody}"))
    command = [NGINX, "-c", str(conf), "-e", f"{tmp_path}/error.log", "-p", str(tmp_path)]
    process = subprocess.Popen(command)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            for _ in range(200):
                try:
                    reply = client.post("/generate", json=GENERATE)
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
        assert reply.status_code == 503
        assert reply.json()["code"] == "not_ready"
        assert reply.headers["retry-after"] == "5"
    finally:
        process.terminate()
        process.wait(30)


def test_limits_agree_with_the_server():
    from server.config.settings import Settings

    sizes = [int(size) for size in re.findall(r"client_max_body_size (\d+)m", CONF.read_text())]
    defaults = Settings.model_fields
    assert sizes[0] > defaults["max_body_mib"].default
    assert sizes[1] > max(defaults[f"max_{what}_mib"].default for what in ("upload", "data"))
