"""lorax-client 0.6.3, sync and async, against the running server.

It asks for versions of certifi and huggingface_hub that nobody else here could use, and imports
neither: it is installed without dependencies and put on the path for these tests alone.
"""

from __future__ import annotations

import asyncio
import json
from types import ModuleType

import pytest

from tests.clients.conftest import ADAPTERS
from tests.clients.standalone import require

# The client's own way with pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:The `dict` method is deprecated")

PROMPT = "the tweet is a complaint"
MODELS = (None, *ADAPTERS)


@pytest.fixture
def lorax(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(require("lorax")))
    import lorax
    import lorax.errors

    return lorax


def test_every_model_whole_and_streamed(world, lorax):
    client = lorax.Client(world.url)
    texts = set()
    for name in MODELS:
        asked = {"adapter_id": name, "max_new_tokens": 10, "ignore_eos_token": True}
        output = client.generate(PROMPT, **asked)
        assert output.details.generated_tokens == len(output.details.tokens) == 10
        assert output.details.finish_reason == "length"
        assert output.details.prompt_tokens == len(world.tokenizer(PROMPT).input_ids)
        texts.add(output.generated_text)
        pieces = list(client.generate_stream(PROMPT, **asked))
        assert pieces[-1].generated_text == output.generated_text
        assert [p.token.id for p in pieces] == [t.id for t in output.details.tokens]
        assert pieces[-1].details.generated_tokens == 10
        assert pieces[-1].details.prompt_tokens == output.details.prompt_tokens
        body = {
            "inputs": PROMPT,
            "parameters": {"max_new_tokens": 10, "ignore_eos": True, "adapter_id": name},
        }
        ours = world.client.post("/generate", json=body).json()
        assert output.generated_text == ours["generated_text"]
    assert len(texts) == len(MODELS)


async def test_async_all_at_once(world, lorax):
    client = lorax.AsyncClient(world.url)

    async def streamed(name: str | None) -> str:
        asked = {"adapter_id": name, "max_new_tokens": 8}
        return [piece async for piece in client.generate_stream(PROMPT, **asked)][-1].generated_text

    whole = [client.generate(PROMPT, adapter_id=name, max_new_tokens=8) for name in MODELS]
    answers = await asyncio.gather(*whole, *(streamed(name) for name in MODELS))
    texts = [getattr(answer, "generated_text", answer) for answer in answers]
    assert texts[: len(MODELS)] == texts[len(MODELS) :]
    with pytest.raises(lorax.errors.ValidationError, match="nobody"):
        await client.generate(PROMPT, adapter_id="nobody")


def test_what_lorax_calls_otherwise(world, lorax):
    client = lorax.Client(world.url)
    output = client.generate(
        PROMPT,
        adapter_id="ia3",
        max_new_tokens=4,
        return_k_alternatives=3,
        decoder_input_details=True,
        return_full_text=True,
    )
    assert output.generated_text.startswith(PROMPT)
    assert [token.id for token in output.details.prefill] == world.tokenizer(PROMPT).input_ids
    for token in output.details.tokens:
        assert len(token.alternative_tokens) == 3
        assert token.alternative_tokens[0].id == token.id
        assert token.alternative_tokens[0].logprob == token.logprob


def test_sampling_and_best_of(world, lorax):
    client = lorax.Client(world.url)
    sampled = {
        "max_new_tokens": 8,
        "do_sample": True,
        "temperature": 1.3,
        "top_p": 0.9,
        "top_k": 50,
    }
    first = client.generate(PROMPT, seed=5, **sampled)
    assert client.generate(PROMPT, seed=5, **sampled) == first
    assert first.details.seed == 5
    best = client.generate(PROMPT, best_of=2, **sampled)
    assert len(best.details.best_of_sequences) == 1
    stop = first.generated_text[2:5]
    stopped = client.generate(PROMPT, seed=5, stop_sequences=[stop], **sampled)
    assert stopped.generated_text.endswith(stop)
    assert stopped.details.finish_reason == "stop_sequence"


def test_an_answer_by_a_schema(world, lorax):
    schema = {
        "type": "object",
        "properties": {"label": {"enum": ["complaint", "no complaint"]}},
        "required": ["label"],
        "additionalProperties": False,
    }
    output = lorax.Client(world.url).generate(
        PROMPT,
        adapter_id="prefix",
        max_new_tokens=64,
        response_format={"type": "json_object", "schema": schema},
    )
    assert json.loads(output.generated_text)["label"] in ("complaint", "no complaint")
    assert output.details.finish_reason == "eos_token"


def test_refusals(world, lorax):
    client = lorax.Client(world.url)
    with pytest.raises(lorax.errors.ValidationError, match="nobody"):
        client.generate(PROMPT, adapter_id="nobody")
    with pytest.raises(lorax.errors.ValidationError, match="nobody"):
        list(client.generate_stream(PROMPT, adapter_id="nobody"))
    # An adapter that is meant in a way that is not understood here never becomes the base.
    with pytest.raises(lorax.errors.ValidationError, match="adapter_source"):
        client.generate(PROMPT, adapter_id="ia3", adapter_source="hub")
    merged = lorax.MergedAdapters(ids=["ia3", "prefix"], weights=[0.5, 0.5], density=1.0)
    with pytest.raises(lorax.errors.ValidationError, match="merged_adapters"):
        client.generate(PROMPT, merged_adapters=merged)
    with pytest.raises(lorax.errors.ValidationError, match="max_new_tokens"):
        client.generate(PROMPT, max_new_tokens=100_000)
