"""`GET /`: a page for browsers, and the same as JSON for every other client."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from html import escape
from urllib.parse import urljoin

import pytest

from tests.server.conftest import make_settings
from tests.server.http_server import running_server

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest.mark.parametrize("accept", ["*/*", "application/json", "", "text/plain", "text/html2"])
def test_other_clients_are_told_the_same_as_json(accept, server):
    reply = server.get("/", headers={"accept": accept})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    told = reply.json()
    assert (told["base"], told["state"]) == ("tiny-base", "ready")
    assert told["adapters"] == server.get("/adapters").json()["total"]
    for name in ("documentation", "openapi", "models"):
        assert server.get(told[name]).status_code == 200
    assert "content-security-policy" not in reply.headers


def test_head_and_the_other_methods(server):
    assert server.head("/").status_code == 200
    for method in ("PUT", "DELETE"):
        reply = server.request(method, "/", headers=BROWSER)
        assert (reply.status_code, reply.headers["allow"]) == (405, "GET, POST")
        assert reply.json()["error"] == "Method Not Allowed: this path takes GET and POST"
    said = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
    assert server.post("/", json=said, headers=BROWSER).status_code == 200


def test_a_browser_sees_what_is_served(server):
    page = server.get("/", headers=BROWSER)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    shown = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page.text))
    number = server.get("/adapters").json()["total"]
    assert shown.pop("Version")
    assert shown == {"State": "ready", "Base model": "tiny-base", "Adapters": str(number)}
    links = re.findall(r'href="([^"]*)"', page.text)
    assert links == ["docs", "v1/models", "metrics"]
    for link in links:
        assert server.get(urljoin("/", link)).status_code == 200


def test_the_policy_allows_the_pages_own_style_and_nothing_else(server):
    page = server.get("/", headers=BROWSER)
    [style] = re.findall(r"<style>(.*?)</style>", page.text, re.DOTALL)
    own = b64encode(sha256(style.encode()).digest()).decode()
    said = page.headers["content-security-policy"].split("; ")
    assert said[-1] == f"style-src 'sha256-{own}'"
    assert "default-src 'none'" in said
    assert all(directive.endswith(" 'none'") for directive in said[:-1])
    assert "<script" not in page.text
    assert "//" not in page.text


def test_texts_are_escaped(tiny_base, tmp_path):
    name = "<script>alert(1)</script>&\"'"
    with running_server(make_settings(tiny_base, tmp_path / "data", base_name=name)) as client:
        page = client.get("/", headers=BROWSER).text
    assert "<script" not in page
    assert f"<dd>{escape(name)}</dd>" in page
