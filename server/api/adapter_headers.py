"""The headers that name the adapter of a reply. Knows no route."""

from __future__ import annotations

from fastapi import Request

from server.api.middleware.headers import set_headers
from server.services import Services
from server.store.registry import AdapterRecord


def name_adapter(request: Request, services: Services, record: AdapterRecord | None) -> None:
    """Put `x-adapter-id` and `x-adapter-version` on this request's reply.

    The base, None, is named by its id and its digest.
    """
    if record is None:
        name, version = services.base_id, services.client.base.digest[:12]
    else:
        name, version = record.name, str(record.version)
    set_headers(request, {"x-adapter-id": name, "x-adapter-version": version})
