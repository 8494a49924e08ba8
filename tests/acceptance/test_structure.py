"""The default base answers in the shape that was asked for, and says something in it."""

from __future__ import annotations

import json

import pytest

from server.engine.offline import GenerationFailed, OfflineEngine
from server.engine.request import Grammar
from tests.acceptance.real_base import BASE_DIR, needs_base
from tests.server.engine.guided import PERSON, conforms

pytestmark = [needs_base, pytest.mark.slow]

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "weather": {"enum": ["sunny", "cloudy", "rainy"]},
        "degrees": {"type": "integer", "minimum": -60, "maximum": 60},
    },
    "required": ["city", "weather", "degrees"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine():
    offline = OfflineEngine(BASE_DIR, dtype="float32", threads=1, kv_bytes=1 << 28)
    yield offline
    offline.close()


def ask(engine, question, kind, text, **options):
    messages = [{"role": "user", "content": question}]
    prompt = engine.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    grammar = Grammar(kind, text if isinstance(text, str) else json.dumps(text))
    [answer] = engine.generate([(None, prompt)], grammar=grammar, max_new_tokens=200, **options)
    return answer


def test_a_schema_is_filled_with_sense(engine):
    question = "It is raining in Paris, at 12 degrees. Describe the weather in JSON."
    answer = json.loads(ask(engine, question, "json_schema", WEATHER))
    assert conforms(answer, WEATHER)
    assert answer["city"] == "Paris"
    assert answer["degrees"] == 12


def test_samples_of_a_schema_conform(engine):
    for seed in range(3):
        options = {"do_sample": True, "seed": seed, "temperature": 1.3}
        answer = ask(engine, "Describe somebody in JSON.", "json_schema", PERSON, **options)
        assert conforms(json.loads(answer), PERSON)


def test_a_choice_and_a_regex(engine):
    choice = Grammar("choice", '[" London", " Paris", " Rome"]')
    year = Grammar("regex", r" \d{4}")
    prompts = {"The capital of France is": choice, "World War II ended in the year": year}
    answers = [
        engine.generate([(None, prompt)], grammar=grammar, max_new_tokens=9)
        for prompt, grammar in prompts.items()
    ]
    assert answers == [[" Paris"], [" 1945"]]


def test_what_is_too_much_for_fifty_thousand_tokens_is_refused(engine):
    with pytest.raises(GenerationFailed, match="too many expressions"):
        ask(engine, "Go on.", "regex", "(a{1000}){1000}")
