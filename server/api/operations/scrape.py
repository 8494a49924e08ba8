"""`GET /metrics`: the server's counters as Prometheus' text. Knows no generation."""

from __future__ import annotations

from importlib.metadata import version

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.adapter_choice import only_query
from server.api.openapi.responses import plain
from server.services import Services, UseServices
from server.telemetry.exposition import encode
from server.telemetry.metrics import Now

router = APIRouter(tags=["operations"])


@router.get(
    "/metrics",
    summary="Counters and histograms, in Prometheus' text format",
    response_class=Response,
    responses={
        200: plain(
            "text/plain",
            "Every metric.",
            'vllm:num_requests_running{engine="0",model_name="base"} 0.0\n',
        )
    },
)
async def metrics(request: Request, services: UseServices) -> Response:
    """vLLM's names where the meaning is the same, ours begin with `graftwork_`.

    OpenMetrics where the `accept` header asks for it. Answers before the engine is up, too.
    """
    only_query(request)
    now = await anyio.to_thread.run_sync(_look, services)
    # Copied here, where they are counted; written out beside the loop, for that takes a while.
    samples = services.metrics.samples(now)
    accept, engine_pid = request.headers.get("accept", ""), services.client.pid
    text, content_type = await anyio.to_thread.run_sync(encode, samples, accept, engine_pid)
    return Response(text, headers={"content-type": content_type})


def _look(services: Services) -> Now:
    """The values that are read for each scrape; reads the database."""
    base = getattr(services.client, "base", None)  # unknown until the engine has started
    return Now(
        base_id=services.base_id,
        stats=services.client.stats,
        num_restarts=services.client.num_restarts,
        jobs={} if services.jobs is None else services.jobs.count_by_state(),
        num_adapters=services.registry.count(),
        build=(
            version("graftwork"),
            services.base_id,
            "" if base is None else base.digest,
            "" if base is None else base.dtype,
            services.settings.device,
        ),
    )
