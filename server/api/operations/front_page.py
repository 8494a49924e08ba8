"""`GET /`: what is served, and where to go on; a page for browsers, JSON for other clients."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from html import escape
from importlib.metadata import version

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.html_page import html_page, policy
from server.services import Services, UseServices

router = APIRouter(include_in_schema=False)

_STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; margin: 3rem auto; max-width: 40rem; padding: 0 1rem; }
dt { font-weight: 600; }
dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
"""
# The one style that the browser takes is this one.
_HASH = b64encode(sha256(_STYLE.encode()).digest()).decode()
_POLICY = policy(style_src=f"'sha256-{_HASH}'")
# Relative addresses: a proxy may put a path in front of the routes.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Graftwork</title>
<style>{style}</style>
</head>
<body>
<h1>Graftwork</h1>
<p>Many PEFT adapters on one frozen base model.</p>
<dl>
<dt>State</dt><dd>{state}</dd>
<dt>Base model</dt><dd>{base}</dd>
<dt>Adapters</dt><dd>{adapters}</dd>
<dt>Version</dt><dd>{version}</dd>
</dl>
<ul>
<li><a href="docs">API documentation</a></li>
<li><a href="v1/models">Base model and adapters (JSON)</a></li>
<li><a href="metrics">Metrics (Prometheus)</a></li>
</ul>
</body>
</html>
"""


# For whoever tries the address with curl.
_PATHS = {
    "documentation": "/docs",
    "openapi": "/openapi.json",
    "models": "/v1/models",
    "generate": "POST /generate",
    "openai_base_url": "/v1",
}


@router.api_route("/", methods=["GET", "HEAD"])
async def front_page(request: Request, services: UseServices) -> Response:
    """The page for a browser, its facts as JSON for any other client."""
    number = await anyio.to_thread.run_sync(services.registry.count)
    if not _wants_html(request.headers.get("accept", "")):
        facts = {"server": "Graftwork", "version": version("graftwork"), "state": _state(services)}
        served = {"base": services.base_id, "adapters": number}
        return JSONResponse({**facts, **served, **_PATHS}, headers={"vary": "accept"})
    page = _PAGE.format(
        style=_STYLE,
        state=_state(services),
        base=escape(services.base_id),
        adapters=number,
        version=escape(version("graftwork")),
    )
    return html_page(page, _POLICY)


def _state(services: Services) -> str:
    if services.draining.active:
        return "draining"
    if services.ready:
        return "ready"
    return "starting" if services.failure is None else "not ready: the base model did not load"


def _wants_html(accept: str) -> bool:
    """Whether HTML is accepted by name, as browsers do; `*/*` does not."""
    kinds = (part.partition(";")[0].strip().lower() for part in accept.split(","))
    return "text/html" in kinds
