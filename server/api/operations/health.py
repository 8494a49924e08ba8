"""`/livez`, `/readyz` and `/health`. Knows nothing of generations."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter

from server.api.openapi.refusals import refuses
from server.api.reply_fields import ReplyModel, shows
from server.errors import NotReady
from server.services import Services, UseServices

router = APIRouter(tags=["operations"])


class HealthStatus(ReplyModel):
    """The state of the server."""

    status: Literal["alive", "ready"] = shows("ready", "alive or ready; else the status is 503.")


@router.get(
    "/livez",
    summary="The process answers, and its engine does not hang",
    openapi_extra=refuses(NotReady),
)
async def livez(services: UseServices) -> HealthStatus:
    """503 from an engine that hangs until another one serves, and once there will be no other.

    An engine that ended is started again: 200 meanwhile, and `/readyz` is 503.
    """
    if services.client.lost:
        raise NotReady("not alive: the engine has ended and is not started again")
    if services.client.hung:
        raise NotReady("not alive: the engine hung, and another one is being started")
    return HealthStatus(status="alive")


def _require_ready(services: Services) -> None:
    # Not in `need_generator`: requests that were taken before the drain need it until they end.
    if services.draining.active:
        raise NotReady("not ready: draining")
    services.need_generator()


@router.get(
    "/readyz",
    summary="A generation would be accepted now",
    openapi_extra=refuses(NotReady),
)
async def readyz(services: UseServices) -> HealthStatus:
    """200 when the engine is up and the server does not drain, else 503 with the reason."""
    _require_ready(services)
    return HealthStatus(status="ready")


@router.get(
    "/health",
    summary="As /readyz; the path TGI's and vLLM's clients know",
    openapi_extra=refuses(NotReady),
)
async def health(services: UseServices) -> HealthStatus:
    """200 when the engine is up and the server does not drain, else 503 with the reason."""
    _require_ready(services)
    return HealthStatus(status="ready")
