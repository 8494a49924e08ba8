"""Outputs that follow a grammar: in the engine's own process, with a tiny random model.

What it says is gibberish, so whatever has a shape has it from the grammar.
"""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from server.engine.engine import Engine
from server.engine.grammar_compiler import Vocabulary
from server.engine.request import FailedEvent, Grammar, TokenEvent
from tests.engine_tools import TINY, request
from tests.server.http_server import byte_level_tokenizer
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


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


def tiny_llama(tokenizer):
    """The tiny Llama of the other tests, with the tokenizer's vocabulary and three rows of nothing."""
    config = LlamaConfig.from_dict({**CONFIGS["llama"].to_dict(), "vocab_size": len(tokenizer) + 3})
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def start(tokenizer):
    """Makes engines that are closed in the end."""
    engines = []

    def make(**changes):
        model = tiny_llama(tokenizer)
        engine = Engine(
            model,
            tiny_spec(model),
            dataclasses.replace(TINY, **changes),
            lambda digest: None,
            lambda: Vocabulary(tokenizer, (EOS,)),
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def guided(
    request_id, kind, text, max_new_tokens=200, adapter=None, prompt=range(5, 14), **sampling
):
    text = text if isinstance(text, str) else json.dumps(text)
    options = {"eos_token_ids": (EOS,), "grammar": Grammar(kind, text), **sampling}
    return request(request_id, prompt, adapter, max_new_tokens, **options)


def finished(engine, load):
    """Each request's events, once nothing is left to do."""
    events = {one.request_id: [] for one in load}
    for one in load:
        assert not engine.submit(one)
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, (TokenEvent, FailedEvent)):
                events[event.request_id].append(event)
        engine.scheduler.check_integrity()
    return events


def said(tokenizer, events):
    """The text of an output that ended by itself."""
    assert events[-1].finish_reason == "eos", events[-1]
    assert events[-1].token_id == EOS
    return tokenizer.decode([event.token_id for event in events[:-1]])


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3}])
def test_an_output_has_the_shape_that_was_asked_for(start, tokenizer, sampling):
    load = [
        guided("schema", "json_schema", PERSON, **sampling),
        guided("regex", "regex", r"[a-c]{3}-\d{2}|x+y", **sampling),
        guided("choice", "choice", ["a", "ab", "abc"], **sampling),
    ]
    texts = {key: said(tokenizer, one) for key, one in finished(start(), load).items()}
    person = json.loads(texts["schema"])
    assert person.keys() == PERSON["properties"].keys()
    assert re.fullmatch(r"[a-c]{3}-[0-9]{2}|x+y", texts["regex"])
    assert texts["choice"] in ("a", "ab", "abc")
