"""`/tokenize`, `/detokenize`, `/tokenizer_info`: the base's tokenizer over HTTP.

Virtual tokens never appear here. Knows nothing of adapters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from typing_extensions import TypedDict

from server.api.adapter_choice import only_query
from server.api.error_replies import both_given, invalid
from server.api.openapi.refusals import refuses
from server.api.reply_fields import ReplyModel, shows
from server.api.schemas import DetokenizeBody, TokenizeBody
from server.errors import NotReady
from server.services import UseServices
from server.text.tokenizer import TokenSpan

router = APIRouter(tags=["tokenizer"])

_LONG_TOKENS = 20_000


class SpannedToken(TypedDict):
    """A token and where it stands."""

    id: Annotated[int, shows(19161, "Id in the vocabulary.")]
    text: Annotated[str, shows("Tweet", "The characters that it covers.")]
    start: Annotated[int, shows(0, "Its first character.")]
    stop: Annotated[int, shows(5, "The character behind its last.")]


class TokenIds(TypedDict):
    """Tokens in vLLM's shape."""

    count: Annotated[int, shows(2, "How many.")]
    max_model_len: Annotated[int, shows(8192, "Positions that prompt and output may take.")]
    tokens: Annotated[list[int], shows([19161, 2], "Their ids.")]


class Detokenized(ReplyModel):
    """A text in vLLM's shape."""

    prompt: str = shows("Tweet text", "The text; special tokens by name.")


class TokenizerInfo(ReplyModel):
    """The base's tokenizer, in vLLM's shape."""

    tokenizer_class: str = shows("PreTrainedTokenizerFast", "transformers' name of it.")
    bos_token: str | None = shows("<|im_start|>", "Begins a text, where there is one.")
    eos_token: str | None = shows("<|im_end|>", "Ends a sequence.")
    pad_token: str | None = shows("<|im_end|>", "Fills up batches elsewhere.")
    unk_token: str | None = shows(None, "Stands for what the vocabulary lacks.")
    chat_template: str | dict[str, Any] | None = shows(
        "{% for message in messages %}…", "Jinja, as the base has it."
    )


@router.post(
    "/tokenize",
    summary="Text to token ids, in TGI's or vLLM's shape",
    response_model=list[SpannedToken] | TokenIds,
    openapi_extra=refuses(NotReady),
)
async def tokenize(request: Request, services: UseServices, body: TokenizeBody) -> Response:
    """A list of tokens for `inputs` (TGI), an object with `tokens` for `prompt` (vLLM)."""
    only_query(request)
    generator = services.need_generator()
    if body.inputs is not None and body.prompt is not None:
        raise both_given("inputs", "prompt")
    text = body.inputs if body.inputs is not None else body.prompt
    if text is None:
        raise invalid("inputs", "a text", "nothing")
    with_special = body.add_special_tokens is not False
    field = "inputs" if body.inputs is not None else "prompt"
    spans = await generator.spans(text, add_special_tokens=with_special, field=field)
    if body.inputs is not None:
        written = await generator.run_aside(
            lambda: _written(spans), is_long=len(spans) > _LONG_TOKENS
        )
        return Response(written, media_type="application/json")
    reply: TokenIds = {
        "count": len(spans),
        "max_model_len": generator.max_sequence_tokens,
        "tokens": [span.id for span in spans],
    }
    return JSONResponse(reply)


def _written(spans: Sequence[TokenSpan]) -> str:
    """A list of tokens as JSON, one after another: others may run in between."""
    return "[" + ",".join(json.dumps(asdict(span), ensure_ascii=False) for span in spans) + "]"


@router.post(
    "/detokenize",
    summary="Token ids to text, in vLLM's shape",
    openapi_extra=refuses(NotReady),
)
async def detokenize(request: Request, services: UseServices, body: DetokenizeBody) -> Detokenized:
    """Special tokens are kept by name."""
    only_query(request)
    generator = services.need_generator()
    tokenizer = generator.tokenizer
    if (largest := max(body.tokens, default=0)) >= tokenizer.vocab_size:
        raise invalid("tokens", f"ids from 0 to {tokenizer.vocab_size - 1}", largest)
    text = await generator.run_aside(
        lambda: tokenizer.decode(body.tokens), is_long=len(body.tokens) > _LONG_TOKENS
    )
    return Detokenized(prompt=text)


@router.get(
    "/tokenizer_info",
    summary="Special tokens and chat template, in vLLM's shape",
    openapi_extra=refuses(NotReady),
)
async def tokenizer_info(request: Request, services: UseServices) -> TokenizerInfo:
    """What a client needs that renders prompts itself."""
    only_query(request)
    return TokenizerInfo(**services.need_generator().tokenizer.info)
