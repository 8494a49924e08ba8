"""`/drain`, and the gate that refuses new work meanwhile. Knows neither signals nor the engine."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.adapter_choice import only_query
from server.api.error_replies import reply_to
from server.api.middleware.route_scopes import is_one_of
from server.api.reply_fields import ReplyModel, shows
from server.config.settings import is_loopback
from server.errors import NotReady, ScopeMissing
from server.services import Services, UseServices

router = APIRouter(tags=["operations"])
MAX_SECONDS = 3600
# Checks of the server are no work; a drain would wait for a job's events until the job ends.
_UNCOUNTED = frozenset({"/livez", "/readyz", "/health", "/metrics", "/drain"})
_WORK = frozenset({"POST", "PUT"})
# A job may be cancelled at any time: that is less work, not more.
_LESS_WORK = (("POST", "/train/{job_id}/cancel"), ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"))
_FOLLOWS_A_JOB = (("GET", "/train/{job_id}/events"),)


class DrainGate:
    """Middleware: counts what runs, and takes no new work while the server drains."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app, or refuse."""
        if scope["type"] != "http" or scope["path"] in _UNCOUNTED:
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        services: Services = scope["app"].state.services
        draining = services.draining
        is_work = method in _WORK and not is_one_of(_LESS_WORK, method, path)
        if draining.active and is_work:
            await reply_to(NotReady("not ready: draining"), path)(scope, receive, send)
            return
        if is_one_of(_FOLLOWS_A_JOB, method, path):
            await self._app(scope, receive, send)
            return
        with draining.run():
            await self._app(scope, receive, send)


class DrainStatus(ReplyModel):
    """The progress of a drain."""

    status: Literal["draining", "drained", "ready"] = shows("drained", "ready: no drain.")
    running: int = shows(0, "Requests that still run.")


@router.post(
    "/drain",
    summary="Take no new work, and wait until what runs has ended",
)
async def drain(
    request: Request,
    services: UseServices,
    seconds: Annotated[
        int | None,
        Query(ge=0, le=MAX_SECONDS, description="How long to wait; left out, shutdown_seconds."),
    ] = None,
) -> DrainStatus:
    """For a preStop hook. `/readyz` is 503 from now on; the process goes on.

    `status` is `drained` once nothing runs, else `draining`.
    """
    only_query(request, "seconds")
    _require_operator(request, services)
    services.draining.begin()
    wait = services.settings.shutdown_seconds if seconds is None else seconds
    await services.draining.idle(wait)
    return _status(services)


@router.delete("/drain", summary="Take work again")
async def undrain(request: Request, services: UseServices) -> DrainStatus:
    """Ends what `POST /drain` began; a signal is not taken back."""
    only_query(request)
    _require_operator(request, services)
    services.draining.end()
    return _status(services)


def _require_operator(request: Request, services: Services) -> None:
    """Without keys anyone who reaches the server could drain it, so only loopback clients may."""
    if services.keys is not None or request.client is None:
        return
    if not is_loopback(request.client.host):
        raise ScopeMissing(
            "scope admin is missing: a server without keys is drained from a loopback address only, "
            f"this came from {request.client.host}"
        )


def _status(services: Services) -> DrainStatus:
    draining = services.draining
    status: Literal["draining", "drained", "ready"]
    status = "ready" if not draining.active else "draining" if draining.running else "drained"
    return DrainStatus(status=status, running=draining.running)
