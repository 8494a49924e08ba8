"""The headers that name the adapter of a reply. Knows no route."""

from __future__ import annotations

from fastapi import Request

from server.api.middleware.headers import set_headers
from server.services import Services
from server.store.registry import AdapterRecord


def name_adapter(request: Request, services: Services, record: AdapterRecord | None) -> None:
    """Put `x-adapter-id` and `x-adapter-version` on this request's reply; None is the base."""
    set_headers(request, services.adapter_headers(record))
