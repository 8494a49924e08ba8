"""`/tokenize`, `/detokenize`, `/tokenizer_info`: the base's tokenizer over HTTP.

Virtual tokens never appear here. Knows nothing of adapters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.adapter_choice import only_query
from server.api.schemas import DetokenizeBody, TokenizeBody
from server.errors import Contradiction, RequestInvalid
from server.services import UseServices
from server.text.tokenizer import TokenSpan

router = APIRouter(tags=["tokenizer"])


@router.post("/tokenize", summary="Text to token ids, in TGI's or vLLM's shape")
async def tokenize(request: Request, services: UseServices, body: TokenizeBody) -> Any:
    """A list of tokens for `inputs` (TGI), an object with `tokens` for `prompt` (vLLM)."""
    only_query(request)
    generator = services.need_generator()
    if body.inputs is not None and body.prompt is not None:
        raise Contradiction(
            "inputs and prompt are both given; send one of them",
            field="prompt",
            expected="inputs or prompt",
            came="both",
        )
    text = body.inputs if body.inputs is not None else body.prompt
    if text is None:
        raise RequestInvalid(
            "inputs: expected a text, came nothing",
            field="inputs",
            expected="a text",
            came="nothing",
        )
    with_special = body.add_special_tokens is not False
    field = "inputs" if body.inputs is not None else "prompt"
    spans = await generator.spans(text, add_special_tokens=with_special, field=field)
    if body.inputs is not None:
        written = await anyio.to_thread.run_sync(_written, spans)
        return Response(written, media_type="application/json")
    ids = [span.id for span in spans]
    return JSONResponse(
        {"count": len(ids), "max_model_len": generator.max_sequence_tokens, "tokens": ids}
    )


def _written(spans: Sequence[TokenSpan]) -> str:
    """A list of tokens as JSON, one after another: others may run in between."""
    return "[" + ",".join(json.dumps(asdict(span), ensure_ascii=False) for span in spans) + "]"


@router.post("/detokenize", summary="Token ids to text, in vLLM's shape")
async def detokenize(
    request: Request, services: UseServices, body: DetokenizeBody
) -> dict[str, str]:
    """Special tokens are kept by name."""
    only_query(request)
    tokenizer = services.need_generator().tokenizer
    if (largest := max(body.tokens, default=0)) >= tokenizer.vocab_size:
        raise RequestInvalid(
            f"tokens: {largest} is not in the vocabulary of {tokenizer.vocab_size} tokens",
            field="tokens",
            expected=f"ids from 0 to {tokenizer.vocab_size - 1}",
            came=str(largest),
        )
    return {"prompt": await anyio.to_thread.run_sync(tokenizer.decode, body.tokens)}


@router.get("/tokenizer_info", summary="Special tokens and chat template, in vLLM's shape")
async def tokenizer_info(request: Request, services: UseServices) -> dict[str, Any]:
    """What a client needs that renders prompts itself."""
    only_query(request)
    return services.need_generator().tokenizer.info
