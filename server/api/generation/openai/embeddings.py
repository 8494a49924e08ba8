"""`POST /v1/embeddings`: refused, with the kind of base that makes them.

A route of its own, as clients that find none take it for a wrong address.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.adapter_choice import only_query, refuse_stray_adapters
from server.api.generation.openai.model import chosen_model
from server.api.schemas import OpenBody, Text
from server.errors import NoEmbeddings
from server.services import UseServices

router = APIRouter(tags=["generation"])


class EmbeddingsBody(OpenBody):
    """Body of `/v1/embeddings`."""

    model: Text
    input: Any = None


@router.post("/v1/embeddings", include_in_schema=False)
async def embeddings(request: Request, services: UseServices, body: EmbeddingsBody) -> Response:
    """Refused; `model` is looked up first, so that a wrong name gets its own error."""
    only_query(request)
    refuse_stray_adapters(body.model_extra or {}, place="model")
    await chosen_model(request, services, body.model)
    kind = services.client.base.model_type
    raise NoEmbeddings(
        f"embeddings come from an encoder, such as a BERT or XLM-RoBERTa base; the base here, "
        f"{services.base_id!r} ({kind}), is a decoder, which generates text. This version serves "
        "decoders only: send embeddings to a server of an encoder",
        field="model",
        expected="a base that is an encoder",
        came=f"{services.base_id} ({kind})",
    )
