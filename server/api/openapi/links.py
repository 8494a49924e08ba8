"""Where one reply leads: OpenAPI's links, from what a route made to the routes that it can be given to.

Knows paths and the names of their parameters, and no route's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Route = tuple[str, str]

_NAME = "$response.body#/name"
_ID = "$response.body#/id"
_VERSION = "$response.body#/version"


@dataclass(frozen=True)
class Link:
    """One step from a reply to a request.

    Attributes:
        target: method and path of the route that it leads to.
        parameters: its parameters, as expressions over the reply.
        body: of its body, likewise.
    """

    target: Route
    parameters: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None


_JOB = {"job_id": _ID}
_FILE = {"file_id": _ID}
_ADAPTER = {"name": _NAME}
_PINNED = {"name": _NAME, "version": _VERSION}

_FROM_ADAPTER: dict[str, Link] = {
    "look": Link(("GET", "/adapters/{name}"), _ADAPTER),
    "model": Link(("GET", "/v1/models/{name}"), _ADAPTER),
    "download": Link(("GET", "/adapters/{name}/download"), _PINNED),
    "preload": Link(("POST", "/adapters/{name}/preload"), _PINNED),
    "unload": Link(("POST", "/adapters/{name}/unload"), _PINNED),
    "rollback": Link(("POST", "/adapters/{name}/rollback"), _ADAPTER, {"version": _VERSION}),
    "alias": Link(("PUT", "/adapters/{name}/aliases/{alias}"), _ADAPTER, {"version": _VERSION}),
    "combine": Link(
        ("POST", "/adapters/combine"), body={"adapters": [_NAME, _NAME], "weights": [0.5, 0.5]}
    ),
    "generate": Link(("POST", "/generate"), {"adapter": _NAME}),
    "complete": Link(("POST", "/v1/completions"), body={"model": _NAME}),
    "chat": Link(("POST", "/v1/chat/completions"), body={"model": _NAME}),
    "classify": Link(("POST", "/classify"), {"adapter": _NAME}),
    "delete": Link(("DELETE", "/adapters/{name}"), _ADAPTER),
}
_FROM_JOB: dict[str, Link] = {
    "look": Link(("GET", "/train/{job_id}"), _JOB),
    "events": Link(("GET", "/train/{job_id}/events"), _JOB),
    "log": Link(("GET", "/train/{job_id}/log"), _JOB),
    "cancel": Link(("POST", "/train/{job_id}/cancel"), _JOB),
    "delete": Link(("DELETE", "/train/{job_id}"), _JOB),
}
_FROM_TUNING: dict[str, Link] = {
    "look": Link(("GET", "/v1/fine_tuning/jobs/{job_id}"), _JOB),
    "events": Link(("GET", "/v1/fine_tuning/jobs/{job_id}/events"), _JOB),
    "checkpoints": Link(("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"), _JOB),
    "cancel": Link(("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"), _JOB),
    "train": Link(("GET", "/train/{job_id}"), _JOB),
}
_FROM_FILE: dict[str, Link] = {
    "look": Link(("GET", "/v1/files/{file_id}"), _FILE),
    "content": Link(("GET", "/v1/files/{file_id}/content"), _FILE),
    "tune": Link(("POST", "/v1/fine_tuning/jobs"), body={"training_file": _ID}),
    "delete": Link(("DELETE", "/v1/files/{file_id}"), _FILE),
}

# By route and status of the reply.
LINKS: Mapping[tuple[str, str, int], Mapping[str, Link]] = {
    ("POST", "/adapters", 201): _FROM_ADAPTER,
    ("POST", "/adapters", 200): _FROM_ADAPTER,
    ("POST", "/adapters/combine", 201): _FROM_ADAPTER,
    ("POST", "/train", 202): _FROM_JOB,
    ("POST", "/train/{job_id}/cancel", 200): {"delete": _FROM_JOB["delete"]},
    ("POST", "/v1/files", 200): _FROM_FILE,
    ("POST", "/v1/fine_tuning/jobs", 200): _FROM_TUNING,
}


def put_in(paths: dict[str, Any]) -> None:
    """Write the links into a page's paths, but for links to a route that the page lacks."""
    for (method, path, status), links in LINKS.items():
        operation = paths.get(path, {}).get(method.lower())
        if operation is not None:
            operation["responses"][str(status)]["links"] = {
                name: written for name, link in links.items() if (written := _written(link, paths))
            }


def _written(link: Link, paths: dict[str, Any]) -> dict[str, Any] | None:
    method, path = link.target
    target = paths.get(path, {}).get(method.lower())
    if target is None:
        return None
    written: dict[str, Any] = {"operationId": target["operationId"]}
    if link.parameters:
        written["parameters"] = dict(link.parameters)
    if link.body is not None:
        written["requestBody"] = dict(link.body)
    return written
