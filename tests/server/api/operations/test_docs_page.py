"""`/docs` works without another host, under a policy that allows no script in the page."""

from __future__ import annotations

import re
import shutil
import subprocess
from urllib.parse import urljoin

import pytest

FILES = {
    "favicon.png": "image/png",
    "swagger-ui.css": "text/css; charset=utf-8",
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "start.js": "text/javascript; charset=utf-8",
}


def directives(reply) -> dict[str, str]:
    parts = (part.split(maxsplit=1) for part in reply.headers["content-security-policy"].split(";"))
    return {part[0]: part[1] for part in parts}


def test_the_page_names_only_its_own_files_and_no_other_host(server):
    page = server.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert set(named) == {f"docs/{file}" for file in FILES} | {"openapi.json"}
    for address in named:
        assert server.get(urljoin("/docs", address)).status_code == 200
    assert "//" not in page.text
    # No script and no style stands in the page itself.
    assert re.findall(r"<script[^>]*>(.*?)</script>", page.text, re.DOTALL) == ["", ""]
    assert not re.search(r"<style|style=|\son[a-z]+=|javascript:", page.text, re.IGNORECASE)


@pytest.mark.parametrize("path", ["/docs", *(f"/docs/{file}" for file in FILES)])
def test_the_policy_allows_this_server_alone(path, server):
    reply = server.get(path)
    allowed = directives(reply)
    assert allowed.pop("img-src") == "'self' data:"
    for name in ("connect-src", "script-src", "style-src"):
        assert allowed.pop(name) == "'self'"
    assert set(allowed.values()) == {"'none'"}
    assert "default-src" in allowed
    assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(("file", "media_type"), FILES.items())
def test_the_files_come_from_the_server(file, media_type, server):
    reply = server.get(f"/docs/{file}")
    assert reply.headers["content-type"] == media_type
    assert len(reply.content) > 100
    head = server.head(f"/docs/{file}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == reply.headers["content-length"]


def test_there_is_no_other_file_and_no_other_page(server):
    others = ("redoc.standalone.js", "core.py", "..%2fcore.py", "%2e%2e", "oauth2-redirect")
    for path in (*(f"/docs/{name}" for name in others), "/redoc"):
        assert server.get(path).status_code == 404


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_the_script_starts_swagger_ui_on_this_servers_openapi(server, tmp_path):
    frame = """
    globalThis.document = {baseURI: "https://example.test/proxy/docs"};
    const bundle = (options) => console.log(JSON.stringify(options));
    bundle.presets = {apis: null};
    globalThis.SwaggerUIBundle = bundle;
    """
    (tmp_path / "start.js").write_text(frame + server.get("/docs/start.js").text)
    ran = subprocess.run(
        ["node", str(tmp_path / "start.js")], capture_output=True, text=True, check=True
    )
    assert '"url":"https://example.test/proxy/openapi.json"' in ran.stdout
    assert '"validatorUrl":null' in ran.stdout
