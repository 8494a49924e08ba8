"""Bodies of the TGI routes and of the management routes.

TGI's bodies take unknown fields, which are named in `x-ignored-parameters`; the management routes
refuse them. A value out of range is refused with its field. Nothing here knows the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from adapters.training.rows import DataLimits
from server.api.adapter_choice import LORAX_FIELDS
from server.api.bounds import AtMost
from server.api.openapi.constraints import (
    ADAPTERS,
    CLOSED,
    NOT_BLANK,
    NULL,
    OBJECT,
    SOME_LIST,
    SOME_TEXT,
    TEXT,
    TYPED,
    constrained,
    either,
    one_of,
)

MAX_TOP_TOKENS = 20
_TGI_EXAMPLE: dict[str, Any] = {
    "inputs": "Tweet text : Late again. Label :",
    "parameters": {"max_new_tokens": 8, "details": True, "adapter_id": "complaints"},
}
_CLASSIFY_EXAMPLE: dict[str, Any] = {
    "inputs": ["Tweet text : Late again. Label :", "Tweet text : Lovely! Label :"],
    "labels": ["complaint", "no complaint"],
}


def _encodable(text: str) -> str:
    # JSON can say "\\ud800", which is no text: no tokenizer, database or reply could take it.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("expected text, came a lone surrogate") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
StopString = Annotated[
    Text, StringConstraints(min_length=1), AtMost("max_stop_characters", "string")
]
LabelText = Annotated[Text, StringConstraints(min_length=1, max_length=10_000)]
RowValue = Text | bool | int | float
Labels = Annotated[list[LabelText], Field(min_length=1, fail_fast=True), AtMost("max_labels")]
BodyRow = Annotated[dict[Text, RowValue], Field(max_length=DataLimits.max_columns)]


class OpenBody(BaseModel):
    """A body of other people's protocol: unknown fields are taken."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class ClosedBody(BaseModel):
    """A body of our own: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class GenerateParameters(OpenBody):
    """TGI's `parameters`, and LoRAX's. A null means the same as a field left out."""

    model_config = ConfigDict(
        json_schema_extra=constrained(
            propertyNames={
                "anyOf": [
                    {"enum": ["adapter_id", *LORAX_FIELDS]},
                    {"not": {"pattern": f"{ADAPTERS}|^model$"}},
                ]
            },
            allOf=[
                {
                    "properties": {
                        name: {**NULL, "description": "Null, as LoRAX's client sends it."}
                        for name in LORAX_FIELDS
                    }
                }
            ],
            properties={"adapter_id": NOT_BLANK, "grammar": TYPED, "response_format": TYPED},
        )
    )

    adapter_id: Text | None = Field(None, description="Adapter: NAME, NAME@VERSION or NAME@ALIAS.")
    best_of: int | None = Field(
        None, ge=1, description="Sample so many and return the one with the best mean logprob."
    )
    decoder_input_details: bool | None = Field(None, description="Also report the prompt's tokens.")
    details: bool | None = Field(None, description="Report tokens, logprobs and finish reason.")
    do_sample: bool | None = Field(
        None,
        description="Sample. Left out, it follows from temperature, top_k, top_p, typical_p or "
        "min_p being given; false is greedy whatever else is given.",
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken from a token's logit for each time it was put out."
    )
    grammar: dict[str, Any] | None = Field(
        None,
        description="The output's shape: an object with type (json, json_object, json_schema, regex) "
        "and value (a JSON Schema, or the expression that the whole output matches).",
        examples=[{"type": "regex", "value": "(yes|no)"}],
    )
    ignore_eos: bool | None = Field(None, description="Go on to max_new_tokens regardless.")
    ignore_eos_token: bool | None = Field(None, description="LoRAX's name of ignore_eos.")
    max_new_tokens: int | None = Field(None, ge=1, description="64 if left out.")
    min_p: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Keep tokens of at least this share of the likeliest one's probability.",
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken from the logit of every token that was put out."
    )
    repetition_penalty: float | None = Field(
        None, gt=0, description="Divides logits of tokens in prompt and output; 1 changes nothing."
    )
    response_format: dict[str, Any] | None = Field(
        None, description="LoRAX's and OpenAI's form of grammar."
    )
    return_full_text: bool | None = Field(None, description="Put the prompt before the output.")
    return_k_alternatives: int | None = Field(
        None,
        ge=1,
        le=MAX_TOP_TOKENS,
        description="LoRAX's name of top_n_tokens; each token carries its alternative_tokens.",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Of the draws. Left out, one is drawn and reported."
    )
    stop: Annotated[list[StopString], AtMost("max_stops")] | None = Field(
        None,
        description="Texts that end the output; the one that did is part of it.",
    )
    temperature: float | None = Field(None, gt=0, description="Divides the logits.")
    top_k: int | None = Field(
        None, ge=0, description="Keep so many of the likeliest tokens; 0 keeps all."
    )
    top_n_tokens: int | None = Field(
        None, ge=0, le=MAX_TOP_TOKENS, description="Likeliest tokens to report beside each."
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Keep the likeliest tokens that together have this probability.",
    )
    truncate: int | None = Field(None, ge=1, description="Keep the last so many prompt tokens.")
    typical_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Keep the most typical tokens that together have this probability.",
    )


class GenerateBody(OpenBody):
    """Body of `/generate`, `/generate_stream` and `/`: `inputs`, or a `row` for the template."""

    model_config = ConfigDict(
        json_schema_extra=constrained(
            anyOf=one_of(inputs=SOME_TEXT, row=OBJECT),
            propertyNames={"not": {"pattern": f"{ADAPTERS}|^model$"}},
            examples=[_TGI_EXAMPLE],
        )
    )

    inputs: Text | None = Field(None, description="The prompt.")
    row: BodyRow | None = Field(None, description="Columns for the adapter's stored template.")
    parameters: GenerateParameters | None = Field(
        None, description="How to generate; all of it may be left out."
    )
    stream: bool | None = Field(
        None, description="Answer as server-sent events; false if left out."
    )


class ClassifyBody(OpenBody):
    """Body of `/classify`: texts, or rows for the adapter's stored template."""

    model_config = ConfigDict(
        json_schema_extra=constrained(
            **CLOSED,
            anyOf=one_of(inputs={"type": ["string", "array"]}, row=OBJECT, rows=SOME_LIST),
            allOf=[
                either({"inputs": {"type": ["string", "array"]}}, {"raw": {"enum": [False, None]}})
            ],
            examples=[_CLASSIFY_EXAMPLE],
        )
    )

    inputs: Annotated[
        Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)] | None,
        AtMost("max_ranked"),
    ] = Field(
        None,
        description="A text, or a list of them. It fills the adapter's template where that has one "
        "column; a text in the template's words is a prompt as it is.",
    )
    raw: bool | None = Field(
        None,
        description="Take inputs as prompts, whatever the adapter's template; false if left out.",
    )
    row: BodyRow | None = Field(None, description="Columns for the adapter's stored template.")
    rows: (
        Annotated[list[BodyRow], Field(min_length=1, fail_fast=True), AtMost("max_ranked")] | None
    ) = Field(None, description="Several of them.")
    labels: Labels | None = Field(
        None, description="What to choose from. Left out: the labels stored with the adapter."
    )
    normalization: Literal["sum", "token_mean"] | None = Field(
        None,
        description="Sum of a label's log-probabilities, or their mean a token; sum if left out.",
    )


class TokenizeBody(OpenBody):
    """TGI's `{"inputs"}`, answered with a list, or vLLM's `{"prompt"}`, answered with an object."""

    model_config = ConfigDict(
        json_schema_extra=constrained(
            anyOf=one_of(inputs=TEXT, prompt=TEXT), examples=[{"prompt": "Tweet text"}]
        )
    )

    inputs: Text | None = Field(
        None, description="A text, as TGI calls it; the answer is a list of tokens."
    )
    prompt: Text | None = Field(
        None, description="A text, as vLLM calls it; the answer is an object."
    )
    add_special_tokens: bool | None = Field(None, description="true if left out.")


class DetokenizeBody(OpenBody):
    """vLLM's `{"tokens"}`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [65, 66]}]})

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)] = Field(
        description="Ids of the vocabulary."
    )


class RollbackBody(ClosedBody):
    """Body of `POST /adapters/{name}/rollback`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 1}]})

    version: int = Field(ge=1, lt=2**63, description="The version that the bare name is to mean.")


class AliasBody(ClosedBody):
    """Body of `PUT /adapters/{name}/aliases/{alias}`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 1}]})

    version: int = Field(ge=1, lt=2**63, description="The version that gets the name.")


def set_extras(model: BaseModel | None) -> list[str]:
    """Names of the unknown fields that were given a value."""
    extra: dict[str, Any] = (model.model_extra if model is not None else None) or {}
    return [name for name, value in extra.items() if value is not None]
