"""`POST /adapters/combine`: a weighted sum of adapters becomes an adapter, served at once.

Thin: `server.store.combining` does it, off the event loop. Refuses what it does not know.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from adapters.combine import MAX_ADAPTERS
from adapters.errors import CombineInvalid
from adapters.metadata import SETTABLE_FIELDS
from server.api.adapter_choice import only_query
from server.api.adapter_headers import name_adapter
from server.api.adapters.management import residency_of
from server.api.adapters.versions import CombinedVersion, VersionWithRecipe
from server.api.error_replies import invalid
from server.api.openapi.constraints import NAME, NOT_BLANK, constrained
from server.api.openapi.refusals import CHECKPOINT, SERVED, refuses
from server.api.schemas import Labels, Text
from server.services import UseServices
from server.store.combining import combine_stored

router = APIRouter(prefix="/adapters", tags=["adapters"])

_EXAMPLE: dict[str, Any] = {
    "adapters": ["complaints", "refunds@2"],
    "weights": [0.7, 0.3],
    "name": "both",
    "combination_type": "linear",
}


class CombineBody(BaseModel):
    """Body of `POST /adapters/combine`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra=constrained(
            properties={
                "name": NAME,
                "labels": {"uniqueItems": True, "items": NOT_BLANK},
            },
            examples=[_EXAMPLE],
        ),
    )

    adapters: Annotated[list[Text], Field(min_length=1, max_length=MAX_ADAPTERS)] = Field(
        description="NAME, NAME@VERSION or NAME@ALIAS each, of one method. One may stand there "
        "several times."
    )
    weights: Annotated[list[float], Field(min_length=1, max_length=MAX_ADAPTERS)] = Field(
        description="A weight for each adapter, of any sign."
    )
    name: Text = Field(description="Of the new adapter; a name in use is refused.")
    combination_type: Literal["linear", "delta"] = Field(
        "linear",
        description="linear: the weighted sum; a module that an IA3 adapter lacks counts 0, as in "
        "PEFT. delta: for IA3, 1 + the weighted sum of distances from 1.",
    )
    description: Text | None = Field(None, description="Free text.")
    template: Text | None = Field(
        None, description="Template of its prompts. Left out, that of the adapters if they agree."
    )
    labels: Labels | None = Field(
        None, description="What it may answer. Left out, those of the adapters if they agree."
    )
    target_separator: Text | None = Field(
        None,
        description="Left out: where a template is given, white space that it ends with, else one "
        "space; or that of the adapters if they agree.",
    )
    append_eos: bool | None = Field(
        None, description="Whether targets ended with the end-of-sequence token."
    )
    tokenization: Literal["boundary", "as_written"] | None = Field(
        None, description="Where white space at the template's end goes."
    )


@router.post(
    "/combine",
    status_code=201,
    summary="Add up adapters of one method",
    response_model=CombinedVersion,
    response_description="The new adapter.",
    openapi_extra=refuses(*SERVED, CombineInvalid, *CHECKPOINT),
)
async def combine_adapters(request: Request, services: UseServices, body: CombineBody) -> Response:
    """The reply is that of an upload; `recipe` of the new adapter says what was added.

    Template, labels, separator, tokenization and append_eos are inherited where the adapters
    agree; where they differ they are left out, with a warning.
    """
    only_query(request)
    base = services.need_base()
    _check_labels(body.labels)
    given = body.model_dump(include=set(SETTABLE_FIELDS))
    published = await anyio.to_thread.run_sync(
        functools.partial(
            combine_stored,
            services.registry,
            base,
            body.adapters,
            body.weights,
            body.name,
            combination_type=body.combination_type,
            given=given,
            base_names=(services.base_id, services.settings.base),
        )
    )
    record = published.record
    name_adapter(request, services, record)
    version = VersionWithRecipe.of(record, residency_of(services, record))
    reply = CombinedVersion(**dict(version), ignored_files=[])
    location = {"location": f"/adapters/{record.name}"}
    return JSONResponse(reply.model_dump(by_alias=True), 201, location)


def _check_labels(labels: list[str] | None) -> None:
    if labels is None:
        return
    if len(set(labels)) != len(labels) or not all(label.strip() for label in labels):
        raise invalid(
            "labels",
            "different texts that are not empty",
            "an empty or repeated label",
        )
