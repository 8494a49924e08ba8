"""`GET /docs`: Swagger UI over `/openapi.json`, without the internet.

The files of Swagger UI come from the package fastapi-offline; nothing else of it is used. The script
that starts it is a file of its own, since the page's policy allows no script in the page. Addresses
are relative: a proxy may put a path in front of the routes.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response
from starlette.exceptions import HTTPException

from server.api.html_page import html_page, page_headers, policy

router = APIRouter(include_in_schema=False)

# Swagger UI's pictures are data: addresses in its style sheet.
_POLICY = policy(
    connect_src="'self'", img_src="'self' data:", script_src="'self'", style_src="'self'"
)
_MEDIA = {
    "favicon.png": "image/png",
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Graftwork API</title>
<link rel="icon" href="docs/favicon.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<noscript>This page needs JavaScript. <a href="openapi.json">openapi.json</a> has the same
content.</noscript>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# `validatorUrl: null`: else the page would ask another host to check openapi.json.
_START = """"use strict";
SwaggerUIBundle({
  url: new URL("openapi.json", document.baseURI).href,
  dom_id: "#swagger-ui",
  deepLinking: true,
  layout: "BaseLayout",
  presets: [SwaggerUIBundle.presets.apis],
  validatorUrl: null,
});
"""


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs() -> HTMLResponse:
    """The page."""
    return html_page(_PAGE, _POLICY)


@router.api_route("/docs/{file}", methods=["GET", "HEAD"])
async def docs_file(file: str) -> Response:
    """What the page loads."""
    headers = page_headers(_POLICY) | {"cache-control": "private, max-age=3600"}
    if file == "start.js":
        return Response(_START, media_type="text/javascript", headers=headers)
    if file not in _MEDIA:
        raise HTTPException(404)
    return FileResponse(_assets() / file, media_type=_MEDIA[file], headers=headers)


@functools.cache
def _assets() -> Path:
    spec = find_spec("fastapi_offline")  # found, not imported
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package fastapi-offline is not installed")
    return Path(spec.origin).parent / "static"
