"""huggingface_hub's chat_completion, sync, async and as the openai client's double."""

from __future__ import annotations

import asyncio
import json

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.clients.conftest import ADAPTERS, BASE
from tests.conformance.peft_oracle import ask

MODELS = (None, *ADAPTERS)
MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Is the tweet a complaint?"},
]


@pytest.fixture(scope="module")
def hub(world) -> InferenceClient:
    return InferenceClient(world.url)


def expected_text(world, model: str | None, count: int) -> str:
    ids = world.tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    tokens = ask(world.models[model or BASE], ids, count).token_ids
    if world.tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(world.tokenizer.eos_token_id)]
    return world.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("model", MODELS)
def test_a_message_and_its_stream(world, hub, model):
    whole = hub.chat_completion(MESSAGES, model=model, max_tokens=12, temperature=0.0)
    text = expected_text(world, model, 12)
    [choice] = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == text
    assert choice.finish_reason in ("length", "stop")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        hub.chat_completion(
            MESSAGES,
            model=model,
            max_tokens=12,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].choices == []
    # The second found the first's prompt in the cache.
    told, first = (dict(usage) for usage in (chunks[-1].usage, whole.usage))
    cached = told.pop("prompt_tokens_details")["cached_tokens"]
    assert 0 <= first.pop("prompt_tokens_details")["cached_tokens"] <= cached
    assert cached < whole.usage.prompt_tokens
    assert told == first
    finished = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [reason for reason in finished if reason] == [choice.finish_reason]


async def test_async_all_at_once(world):
    async with AsyncInferenceClient(world.url) as client:

        async def streamed(model: str | None) -> str:
            chunks = await client.chat_completion(
                MESSAGES, model=model, max_tokens=10, temperature=0.0, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in chunks])

        answers = await asyncio.gather(*(streamed(model) for model in MODELS))
    assert answers == [expected_text(world, model, 10) for model in MODELS]
    assert len(set(answers)) == len(MODELS)


def test_the_openai_clients_double(world):
    hub = InferenceClient(base_url=f"{world.url}/v1", api_key="unused")
    whole = hub.chat.completions.create(
        model="ia3", messages=MESSAGES, max_tokens=8, temperature=0.0
    )
    assert whole.choices[0].message.content == expected_text(world, "ia3", 8)
    assert whole.model == "ia3"


def test_logprobs_seed_and_stop(hub):
    asked = {"model": "prefix", "max_tokens": 10, "temperature": 1.2, "seed": 4}
    first = hub.chat_completion(MESSAGES, logprobs=True, top_logprobs=2, **asked)
    tokens = first.choices[0].logprobs.content
    assert len(tokens) == first.usage.completion_tokens
    assert all(len(token.top_logprobs) >= 2 for token in tokens)
    assert all(token.logprob <= 0 for token in tokens)
    text = first.choices[0].message.content
    again = hub.chat_completion(MESSAGES, **asked)
    assert again.choices[0].message.content == text
    stop = text[3:6]
    cut = hub.chat_completion(MESSAGES, stop=[stop], **asked)
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    two = hub.chat_completion(MESSAGES, n=2, **asked)
    assert [choice.index for choice in two.choices] == [0, 1]


SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["complaint", "no complaint"]}},
    "required": ["label"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_by_a_schema(hub, model):
    # The client rewrites this into TGI's {"type": "json_object", "value": schema}.
    shape = {"type": "json_schema", "json_schema": {"name": "label", "schema": SCHEMA}}
    whole = hub.chat_completion(MESSAGES, model=model, max_tokens=64, response_format=shape)
    assert json.loads(whole.choices[0].message.content)["label"] in ("complaint", "no complaint")
    assert whole.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("asked", "status", "words"),
    [
        ({"model": "nobody"}, 404, "nobody"),
        ({"model": "nobody", "stream": True}, 404, "nobody"),
        ({"model": "prefix@9"}, 404, "9"),
        ({"max_tokens": 100_000}, 422, "max_tokens"),
        ({"temperature": -1.0}, 422, "temperature"),
        ({"extra_body": {"adapter_id": "prefix"}}, 400, "adapter_id"),
    ],
)
def test_refusals(hub, asked, status, words):
    with pytest.raises(HfHubHTTPError, match=words) as refused:
        list(hub.chat_completion(MESSAGES, **asked))
    assert refused.value.response.status_code == status
    assert words in refused.value.response.json()["error"]["message"]
