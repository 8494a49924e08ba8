"""huggingface_hub's InferenceClient and AsyncInferenceClient against the running server."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import (
    OverloadedError,
    UnknownError,
    ValidationError,
)

from tests.clients.conftest import ADAPTERS, BASE, make_settings
from tests.conformance.peft_oracle import ask
from tests.server.http_server import running_server

PROMPT = "the tweet is a complaint"
MODELS = (None, *ADAPTERS)
LONG = 400


@pytest.fixture(scope="module")
def hub(world) -> InferenceClient:
    return InferenceClient(world.url)


def operator(url: str) -> InferenceClient:
    """The client asks an endpoint about itself only where it believes in the provider."""
    return InferenceClient(url, provider="hf-inference")


@pytest.mark.parametrize("adapter", MODELS)
def test_tokens_are_those_of_transformers_and_peft(world, hub, adapter):
    ids = world.tokenizer(PROMPT).input_ids
    expected = ask(world.models[adapter or BASE], ids, 16).token_ids
    output = hub.text_generation(PROMPT, adapter_id=adapter, max_new_tokens=16, details=True)
    came = [token.id for token in output.details.tokens]
    assert came == expected[: len(came)]
    assert output.details.finish_reason == ("length" if len(came) == 16 else "eos_token")
    assert output.details.generated_tokens == len(came)
    plain = hub.text_generation(PROMPT, adapter_id=adapter, max_new_tokens=16)
    assert plain == output.generated_text
    assert plain == "".join(t.text for t in output.details.tokens if not t.special)


@pytest.mark.parametrize("adapter", MODELS)
def test_a_stream_says_the_same(hub, adapter):
    asked = {"adapter_id": adapter, "max_new_tokens": 12}
    whole = hub.text_generation(PROMPT, details=True, **asked)
    events = list(hub.text_generation(PROMPT, details=True, stream=True, **asked))
    assert [event.token.id for event in events] == [t.id for t in whole.details.tokens]
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert [event.details for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].generated_text == whole.generated_text
    assert events[-1].details.finish_reason == whole.details.finish_reason
    assert events[-1].details.generated_tokens == len(events)
    assert events[-1].details.input_length == whole.details.prompt_tokens
    texts = list(hub.text_generation(PROMPT, stream=True, **asked))
    assert all(isinstance(text, str) for text in texts)
    assert "".join(e.token.text for e in events) == "".join(texts)


async def test_the_async_client_gets_what_the_other_gets(world, hub):
    wanted = [hub.text_generation(PROMPT, adapter_id=name, max_new_tokens=12) for name in MODELS]
    async with AsyncInferenceClient(world.url) as client:

        async def streamed(name: str | None) -> str:
            pieces = await client.text_generation(
                PROMPT, adapter_id=name, max_new_tokens=12, details=True, stream=True
            )
            return [piece async for piece in pieces][-1].generated_text

        whole = [
            client.text_generation(PROMPT, adapter_id=name, max_new_tokens=12) for name in MODELS
        ]
        # All at once: the base and both adapters in one batch, streamed and not.
        answers = await asyncio.gather(*whole, *(streamed(name) for name in MODELS))
        with pytest.raises(ValidationError, match="nobody"):
            await client.text_generation(PROMPT, adapter_id="nobody")
    assert answers == [*wanted, *wanted]
    assert len(set(wanted)) == len(MODELS)


def test_details_of_prompt_and_alternatives(world, hub):
    output = hub.text_generation(
        PROMPT,
        adapter_id="ia3",
        max_new_tokens=4,
        details=True,
        decoder_input_details=True,
        top_n_tokens=3,
    )
    details = output.details
    ids = world.tokenizer(PROMPT).input_ids
    assert [token.id for token in details.prefill] == ids
    assert details.prefill[0].logprob is None
    logprobs = world.logprobs("ia3", ids)
    for position, token in enumerate(details.prefill[1:]):
        assert token.logprob == pytest.approx(float(logprobs[position, token.id]), abs=1e-3)
    for token, top in zip(details.tokens, details.top_tokens, strict=True):
        assert len(top) == 3
        # the client leaves lists in lists as they came
        assert (top[0]["id"], top[0]["logprob"]) == (token.id, token.logprob)
        values = [one["logprob"] for one in top]
        assert values == sorted(values, reverse=True)


def test_what_shapes_the_output(hub):
    text = hub.text_generation(PROMPT, max_new_tokens=24)
    stop = text[6:9]
    stopped = hub.text_generation(PROMPT, max_new_tokens=24, stop=[stop], details=True)
    assert stopped.generated_text == text[: text.index(stop) + len(stop)]
    assert stopped.details.finish_reason == "stop_sequence"
    whole = hub.text_generation(PROMPT, max_new_tokens=24, return_full_text=True)
    assert whole == PROMPT + text
    cut = hub.text_generation(
        PROMPT, max_new_tokens=2, truncate=3, details=True, decoder_input_details=True
    )
    assert len(cut.details.prefill) == 3
    repeated = hub.text_generation(PROMPT, max_new_tokens=24, repetition_penalty=3.0)
    assert repeated != text
    assert hub.text_generation(PROMPT, max_new_tokens=24, frequency_penalty=2.0) != text
    # no watermark is made, and x-ignored-parameters says so
    assert hub.text_generation(PROMPT, max_new_tokens=24, watermark=True) == text


def test_the_same_seed_gives_the_same_sample(hub):
    sampled = {
        "max_new_tokens": 16,
        "do_sample": True,
        "temperature": 1.5,
        "top_k": 40,
        "top_p": 0.95,
        "typical_p": 0.9,
        "details": True,
    }
    first = hub.text_generation(PROMPT, seed=7, **sampled)
    assert first.details.seed == 7
    assert hub.text_generation(PROMPT, seed=7, **sampled) == first
    assert hub.text_generation(PROMPT, seed=8, **sampled).generated_text != first.generated_text
    unasked = hub.text_generation(PROMPT, **sampled)
    assert hub.text_generation(PROMPT, seed=unasked.details.seed, **sampled) == unasked


def test_best_of(hub):
    output = hub.text_generation(
        PROMPT,
        adapter_id="prefix",
        max_new_tokens=6,
        do_sample=True,
        seed=3,
        best_of=3,
        details=True,
    )
    others = output.details.best_of_sequences
    assert {output.details.seed, *(other.seed for other in others)} == {3, 4, 5}
    assert all(other.generated_tokens == len(other.tokens) for other in others)


SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["complaint", "no complaint"]}, "sure": {"type": "boolean"}},
    "required": ["label", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("adapter", MODELS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_shapes_the_output(hub, adapter, stream):
    asked = {"adapter_id": adapter, "max_new_tokens": 64, "stream": stream}
    regex = {"type": "regex", "value": "(no )?complaint[!?]"}
    text = "".join(hub.text_generation(PROMPT, grammar=regex, **asked))
    # TGI streams the end of sequence by its name, and the client passes it on.
    assert re.fullmatch(regex["value"], text.removesuffix("</s>"))
    grammar = {"type": "json", "value": SCHEMA}
    text = "".join(hub.text_generation(PROMPT, grammar=grammar, **asked))
    value = json.loads(text.removesuffix("</s>"))
    assert value["label"] in ("complaint", "no complaint")
    assert value.keys() == {"label", "sure"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"grammar": {"type": "regex", "value": "(unclosed"}}, "unclosed"),
        ({"grammar": {"type": "json", "value": {"type": "nothing"}}}, "nothing"),
        ({"grammar": {"type": "poem", "value": "x"}}, "grammar.type"),
        ({"adapter_id": "nobody"}, "nobody"),
        ({"adapter_id": "prefix@9"}, "9"),
        ({"max_new_tokens": 100_000}, "max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "do_sample": True, "stream": True}, "best_of"),
        ({"decoder_input_details": True, "details": True, "stream": True}, "decoder_input_details"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_refusals_are_validation_errors(hub, asked, words):
    with pytest.raises(ValidationError, match=words):
        list(hub.text_generation(PROMPT, **asked))


def test_an_empty_prompt_is_a_validation_error(hub):
    with pytest.raises(ValidationError, match="inputs"):
        hub.text_generation("")


def test_endpoint_info_and_health(world):
    hub = operator(world.url)
    info = hub.get_endpoint_info()
    assert info["model_id"] == BASE
    assert info["max_total_tokens"] == info["max_input_tokens"] + 1
    assert info["model_dtype"] == "float32"
    assert hub.health_check() is True


def fails(hub: InferenceClient) -> None:
    with pytest.raises(UnknownError, match="ended unexpectedly; try again"):
        hub.text_generation(PROMPT)


def test_a_full_queue_a_broken_stream_and_a_server_without_engine(chat_base, tmp_path):
    settings = make_settings(chat_base, tmp_path / "data", max_running=1, max_queued=1)
    with running_server(settings) as client:
        hub = InferenceClient(str(client.base_url))
        running = hub.text_generation(PROMPT, max_new_tokens=LONG, stream=True, details=True)
        next(running)
        waiting = threading.Thread(target=fails, args=(hub,), daemon=True)
        waiting.start()
        end = time.monotonic() + 10
        while client.app_services().client.num_in_flight < 2:
            assert time.monotonic() < end, "the second request never arrived"
            time.sleep(0.01)
        with pytest.raises(OverloadedError):
            hub.text_generation(PROMPT)
        client.app_services().client._engine.kill()
        with pytest.raises(UnknownError, match="ended unexpectedly; try again"):
            list(running)
        waiting.join(10)
        with pytest.raises(UnknownError, match="not ready"):
            hub.text_generation(PROMPT)
        assert operator(str(client.base_url)).health_check() is False
