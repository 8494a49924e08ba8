"""An engine whose tokens are text, and what a small schema asks of a value.

The model is random: what it says is gibberish, so an output that has a shape has it from its grammar.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters.checkpoint.folder import load_serving_form
from adapters.checkpoint.limits import CheckpointLimits
from server.engine.engine import Engine
from server.engine.grammar_compiler import Vocabulary
from server.engine.request import (
    AdapterRef,
    FailedEvent,
    GenerationRequest,
    Grammar,
    TokenEvent,
)
from tests.engine_tools import TINY, request
from tests.tiny_models import CONFIGS, tiny_spec

EOS = 2
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "größe": {"type": "integer", "minimum": 0, "maximum": 300},
        "tags": {"type": "array", "items": {"enum": ["a", "漢字", "🙂"]}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "größe", "tags", "ok"],
    "additionalProperties": False,
}


def guided_engine(
    tokenizer: PreTrainedTokenizerFast,
    folders: dict[str, Path] | None = None,
    eos_token_ids: tuple[int, ...] = (EOS,),
    **changes: object,
) -> Engine:
    """The tiny Llama of the other tests, but with this vocabulary and three rows beyond it."""
    config = LlamaConfig.from_dict({**CONFIGS["llama"].to_dict(), "vocab_size": len(tokenizer) + 3})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    spec = tiny_spec(model)
    return Engine(
        model,
        spec,
        dataclasses.replace(TINY, **changes),  # type: ignore[arg-type]
        lambda digest: load_serving_form((folders or {})[digest], spec, CheckpointLimits()),
        lambda: Vocabulary(tokenizer, eos_token_ids),
    )


def guided(
    request_id: str,
    kind: str,
    text: object,
    max_new_tokens: int = 200,
    adapter: AdapterRef | None = None,
    prompt: Iterable[int] = range(5, 14),
    **sampling: object,
) -> GenerationRequest:
    """A greedy request with a grammar; a text that is no string is written as JSON."""
    grammar = Grammar(kind, text if isinstance(text, str) else json.dumps(text))  # type: ignore[arg-type]
    options = {"eos_token_ids": (EOS,), "grammar": grammar, **sampling}
    return request(request_id, prompt, adapter, max_new_tokens, **options)


def finished(
    engine: Engine, load: Iterable[GenerationRequest]
) -> dict[str, list[TokenEvent | FailedEvent]]:
    """Each request's events, once nothing is left to do; audits the scheduler after each step."""
    events: dict[str, list[TokenEvent | FailedEvent]] = {}
    for one in load:
        assert not engine.submit(one)
        events[one.request_id] = []
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokenEvent | FailedEvent):
                events[event.request_id].append(event)
        engine.scheduler.check_integrity()
    return events


def said(tokenizer: PreTrainedTokenizerFast, events: list[TokenEvent | FailedEvent]) -> str:
    """The text of an output that ended by itself."""
    last = events[-1]
    assert isinstance(last, TokenEvent), last
    assert (last.finish_reason, last.token_id) == ("eos", EOS)
    assert all(event.finish_reason is None for event in events[:-1])
    return tokenizer.decode([event.token_id for event in events[:-1]])


def conforms(value: object, schema: dict) -> bool:
    """Whether a value satisfies a schema of the few keywords that the tests use."""
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    if "anyOf" in schema:
        return any(conforms(value, one) for one in schema["anyOf"])
    match schema["type"]:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            known = isinstance(value, int) and not isinstance(value, bool)
            return known and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "array":
            known = isinstance(value, list) and len(value) <= schema["maxItems"]
            return known and all(conforms(one, schema["items"]) for one in value)
    if not isinstance(value, dict) or not value.keys() <= schema["properties"].keys():
        return False
    required = all(name in value for name in schema["required"])
    return required and all(conforms(one, schema["properties"][n]) for n, one in value.items())
