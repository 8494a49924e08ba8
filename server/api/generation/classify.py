"""`POST /classify`: which of an adapter's labels fits, by likelihood.

Thin: says which prompts and labels are meant; `server.generation.ranking` does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from typing_extensions import TypedDict

from server.api.adapter_choice import chosen_adapter, only_query, refuse_stray_adapters
from server.api.adapter_headers import name_adapter
from server.api.error_replies import invalid, quoted
from server.api.middleware.headers import set_headers
from server.api.middleware.work import note_work, timing_headers
from server.api.openapi.constraints import NOT_BLANK
from server.api.openapi.refusals import GENERATED, refuses
from server.api.reply_fields import shows
from server.api.schemas import ClassifyBody
from server.errors import Contradiction, RequestInvalid
from server.generation.generator import Generation, Generator, Prompt
from server.generation.ranking import Ranking, encode_labels, rank
from server.http.event_stream import unless_gone
from server.services import UseServices
from server.store.registry import AdapterRecord

router = APIRouter(tags=["generation"])

_ADAPTER = Query(
    None,
    description="Adapter: NAME, NAME@VERSION or NAME@ALIAS; none is the base.",
    json_schema_extra=NOT_BLANK,
)
_INPUTS = ("inputs", "row", "rows")


class Ranked(TypedDict):
    """One input's labels."""

    label: Annotated[str, shows("complaint", "The likeliest.")]
    scores: Annotated[
        Mapping[str, float],
        shows({"complaint": 0.9, "no complaint": 0.1}, "Softmax over the labels that were given."),
    ]
    logprobs: Annotated[
        Mapping[str, float],
        shows(
            {"complaint": -0.2, "no complaint": -2.4},
            "Log-likelihood of each, normalised as asked.",
        ),
    ]


@router.post(
    "/classify",
    summary="Rank labels by their likelihood after a prompt",
    response_model=Ranked | list[Ranked],
    response_description="The labels of every input.",
    openapi_extra=refuses(*GENERATED),
)
async def classify(
    request: Request, services: UseServices, body: ClassifyBody, adapter: str | None = _ADAPTER
) -> Response:
    """One object for a text or a row, a list of them for a list.

    A text fills the adapter's template where that has one column, unless it stands in the template's
    words already, or `raw` is true; a template of several columns takes `row`.

    A label's score is the log-likelihood of separator, label and, where the adapter was trained
    with one, the end-of-sequence token. `scores` is the softmax over the labels given.
    """
    only_query(request, "adapter")
    _check_fields(body)
    generator = services.need_generator()
    record = await generator.resolve(chosen_adapter(adapter, None))
    name_adapter(request, services, record)
    labels = _labels(body, record)
    _check_number(body, labels, services.settings.max_ranked)
    prompts = await _prompts(generator, body, record)
    targets = await encode_labels(generator, labels, record)
    if record is not None:
        services.adapter_use.count(record.name, labels_ranked=len(prompts) * len(targets))
    begun: list[Generation] = []
    note_work(
        request,
        sum(len(prompt.token_ids) for prompt in prompts),
        begun,
        labels_ranked=len(prompts) * len(targets),
    )
    work = rank(
        generator,
        prompts,
        targets,
        record,
        normalization=body.normalization or "sum",
        max_parallel=services.settings.max_running,
        on_begun=begun.append,
    )
    replies = [_reply(one) for one in await unless_gone(request.receive, work)]
    set_headers(request, timing_headers(*begun))
    several = isinstance(body.inputs, list) or body.rows is not None
    return JSONResponse(replies if several else replies[0])


def _check_fields(body: ClassifyBody) -> None:
    extras = [*(body.model_extra or {})]
    refuse_stray_adapters(extras, also=("model",))
    known = ", ".join(repr(name) for name in type(body).model_fields)
    if extras:
        raise RequestInvalid(
            f"unknown field {quoted(extras[0])}; this route takes {known}",
            field=quoted(extras[0]),
            expected=known,
            came=quoted(extras[0]),
        )
    given = [name for name in _INPUTS if getattr(body, name) is not None]
    if len(given) > 1:
        raise Contradiction(
            f"{' and '.join(given)} are both given; send one of them",
            field=given[1],
            expected="inputs, row or rows",
            came=" and ".join(given),
        )
    if not given:
        raise invalid("inputs", "a text, a list of texts, a row or rows", "nothing")
    if body.raw and body.inputs is None:
        raise Contradiction(
            f"raw is given with {given[0]}, which the adapter's template renders; send raw with inputs",
            field="raw",
            expected="inputs",
            came=given[0],
        )


def _check_number(body: ClassifyBody, labels: list[str], most: int) -> None:
    """Hold inputs times labels to their limit, before anything is tokenised."""
    given = body.inputs if isinstance(body.inputs, list) else body.rows
    number = 1 if given is None else len(given)
    if number * len(labels) > most:
        raise RequestInvalid(
            f"{number} inputs with {len(labels)} labels each are {number * len(labels)} to rank; "
            f"at most {most} are taken at once",
            field="inputs",
            expected=f"at most {most}",
            came=str(number * len(labels)),
        )


def _labels(body: ClassifyBody, record: AdapterRecord | None) -> list[str]:
    if body.labels is None:
        if record is not None and record.labels:
            return list(record.labels)
        whose = "the base" if record is None else f"the adapter {record.name!r}"
        raise RequestInvalid(
            f"labels: {whose} has no stored labels; send them",
            field="labels",
            expected="a list of texts",
            came="nothing",
        )
    if len(set(body.labels)) != len(body.labels):
        raise invalid("labels", "different texts", quoted(body.labels))
    return body.labels


async def _prompts(
    generator: Generator, body: ClassifyBody, record: AdapterRecord | None
) -> list[Prompt]:
    if body.inputs is not None:
        texts = body.inputs if isinstance(body.inputs, list) else [body.inputs]
        if body.raw:
            return await generator.encode_all(texts)
        return await generator.encode_inputs(texts, record)
    rows = body.rows if body.rows is not None else [body.row or {}]
    return await generator.encode_rows(rows, record)


def _reply(ranking: Ranking) -> Ranked:
    return {"label": ranking.label, "scores": ranking.scores, "logprobs": ranking.logprobs}
