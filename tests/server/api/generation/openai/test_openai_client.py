"""OpenAI's own client against a real server: sync and async, streams, retries, errors."""

from __future__ import annotations

import asyncio
import json
import random
import time

import openai
import pydantic
import pytest

from tests.server.api.generation.openai.conftest import ADAPTERS, BASE, chat, complete, near
from tests.server.api.generation.test_streams import LONG, engine, raw_post, wait_until
from tests.server.conftest import make_settings
from tests.server.http_server import running_server

USER = [{"role": "user", "content": "the tweet"}]


def test_models(client):
    names = [model.id for model in client.models.list()]
    assert names == [BASE, *sorted(ADAPTERS)]
    assert client.models.retrieve("complaints").id == "complaints"
    assert client.models.retrieve(BASE).id == BASE
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_a_completion_with_every_field(chatting, client):
    fields = {
        "best_of": 3,
        "echo": True,
        "frequency_penalty": 0.5,
        "logit_bias": {"5": 2},
        "logprobs": 2,
        "max_tokens": 9,
        "n": 2,
        "presence_penalty": 0.5,
        "seed": 4,
        "stop": ["never there"],
        "temperature": 1.2,
        "top_p": 0.9,
    }
    made = client.completions.create(
        model="complaints", prompt=["the tweet", "Label"], user="somebody", **fields
    )
    want = complete(chatting, model="complaints", prompt=["the tweet", "Label"], **fields).json()
    assert near([choice.model_dump() for choice in made.choices], want["choices"])
    assert counted(made.usage.model_dump(exclude_none=True)) == counted(want["usage"])
    assert made.object == "text_completion"
    assert made.system_fingerprint == want["system_fingerprint"]


def test_a_chat_completion_with_every_field(chatting, client):
    fields = {
        "frequency_penalty": 0.5,
        "logit_bias": {"5": 2},
        "logprobs": True,
        "max_completion_tokens": 9,
        "n": 2,
        "presence_penalty": 0.5,
        "response_format": {"type": "text"},
        "seed": 4,
        "stop": "never there",
        "temperature": 1.2,
        "tool_choice": "none",
        "top_logprobs": 2,
        "top_p": 0.9,
    }
    made = client.chat.completions.create(
        model="plain",
        messages=USER,
        **fields,
        metadata={"a": "b"},
        parallel_tool_calls=False,
        reasoning_effort="low",
        service_tier="default",
        store=False,
        user="somebody",
        extra_body={"top_k": 7},
    )
    want = chat(chatting, "the tweet", model="plain", **fields, top_k=7, max_tokens=None).json()
    for choice, wanted in zip(made.choices, want["choices"], strict=True):
        assert choice.message.content == wanted["message"]["content"]
        assert choice.finish_reason == wanted["finish_reason"]
        assert near(choice.logprobs.model_dump(), wanted["logprobs"])
    assert counted(made.usage.model_dump(exclude_none=True)) == counted(want["usage"])


def test_headers_say_who_answered(client):
    raw = client.chat.completions.with_raw_response.create(
        model="complaints", messages=USER, max_tokens=2, user="somebody"
    )
    assert raw.headers["x-adapter-id"] == "complaints"
    assert raw.headers["x-ignored-parameters"] == "user"
    assert raw.parse().choices[0].message.role == "assistant"
    assert raw.parse()._request_id == raw.headers["x-request-id"]


def counted(usage):
    """Without what depends on who asked before: the prompt's tokens that were in the cache."""
    return {key: value for key, value in usage.items() if key != "prompt_tokens_details"}


def test_streams(client):
    asked = {"model": "complaints", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(prompt="the tweet", **asked)
    options = {"include_usage": True}
    parts = list(
        client.completions.create(prompt="the tweet", **asked, stream=True, stream_options=options)
    )
    assert "".join(part.choices[0].text for part in parts[:-1]) == whole.choices[0].text
    assert counted(parts[-1].usage.model_dump()) == counted(whole.usage.model_dump())
    text = client.chat.completions.create(messages=USER, **asked).choices[0].message.content
    with client.chat.completions.stream(messages=USER, stop=text[9:12], **asked) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == text[: text.index(text[9:12])]
    assert final.choices[0].message.content == "".join(deltas)
    assert final.choices[0].finish_reason == "stop"


async def test_async_streams(async_client):
    asked = {"model": "plain", "max_tokens": 20, "temperature": 0}
    whole = await async_client.completions.create(prompt="the tweet", **asked)
    text = ""
    async for part in await async_client.completions.create(
        prompt="the tweet", **asked, stream=True
    ):
        text += part.choices[0].text
    assert text == whole.choices[0].text
    whole = await async_client.chat.completions.create(messages=USER, **asked)
    text = ""
    async for part in await async_client.chat.completions.create(
        messages=USER, **asked, stream=True
    ):
        text += part.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content


async def test_many_at_once_give_what_each_gives_alone(async_client):
    chosen = random.Random(0)
    cases = [
        {
            "model": chosen.choice([BASE, *ADAPTERS]),
            "prompt": "the tweet"[: chosen.randint(1, 9)] * chosen.randint(1, 4),
            "max_tokens": chosen.randint(1, 30),
            "temperature": chosen.choice([0, 1.3]),
            "seed": chosen.randint(0, 99),
        }
        for _ in range(10)
    ]

    async def ask(case, stream):
        if not stream:
            return (await async_client.completions.create(**case)).choices[0].text
        parts = await async_client.completions.create(**case, stream=True)
        return "".join([part.choices[0].text async for part in parts])

    alone = [await ask(case, False) for case in cases]
    together = await asyncio.gather(
        *(ask(case, stream) for stream in (False, True) for case in cases)
    )
    assert together == alone * 2


def test_a_model_for_the_reply(client):
    class Verdict(pydantic.BaseModel):
        complaint: bool

    parsed = client.chat.completions.parse(
        model=BASE, messages=USER, response_format=Verdict, max_tokens=60, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Verdict)


def test_guided_choice_in_the_extra_body(client):
    made = client.completions.create(
        model=BASE, prompt="x", extra_body={"guided_choice": ["yes", "yes and no"]}, max_tokens=40
    )
    assert made.choices[0].text in ("yes", "yes and no")
    assert made.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "nobody"}, openai.NotFoundError),
        ({"extra_body": {"adapter": "complaints"}}, openai.BadRequestError),
        ({"temperature": 5}, openai.UnprocessableEntityError),
        ({"stream": True, "max_tokens": 9_999}, openai.UnprocessableEntityError),
    ],
)
def test_errors_have_their_classes(client, fields, kind):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": BASE, "messages": USER, **fields})
    assert caught.value.body.keys() == {"message", "type", "param", "code"}
    assert caught.value.code
    assert caught.value.request_id


@pytest.mark.parametrize("send", ["completions", "chat"])
def test_a_stream_that_is_closed_frees_its_row(chatting, client, send):
    asked = {"model": BASE, "max_tokens": 400, "extra_body": {"ignore_eos": True}, "stream": True}
    if send == "chat":
        stream = client.chat.completions.create(messages=USER, n=2, **asked)
    else:
        stream = client.completions.create(prompt=["a", "b"], **asked)
    next(iter(stream))
    assert engine(chatting)["num_running"] > 0
    stream.close()
    wait_until(lambda: engine(chatting)["num_running"] + engine(chatting)["num_waiting"] == 0)
    wait_until(lambda: chatting.app_services().client.num_in_flight == 0)


async def test_a_request_that_is_cancelled_frees_its_row(chatting, async_client):
    work = asyncio.create_task(
        async_client.completions.create(
            model=BASE, prompt="x", n=3, max_tokens=400, extra_body={"ignore_eos": True}
        )
    )
    in_flight = chatting.app_services().client
    while not in_flight.num_in_flight:
        await asyncio.sleep(0.01)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    await asyncio.to_thread(wait_until, lambda: in_flight.num_in_flight == 0)


# --- overload ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(chatting_base, tmp_path_factory):
    """A server of one row and one place in its queue."""
    data = tmp_path_factory.mktemp("small") / "data"
    with running_server(make_settings(chatting_base, data, max_running=1, max_queued=1)) as one:
        yield one


def fill(server) -> list:
    busy = [raw_post(server, "/generate", {"inputs": "x", "parameters": LONG}) for _ in range(2)]
    wait_until(lambda: server.app_services().client.num_in_flight == 2)
    return busy


def free(server, busy) -> None:
    for connection in busy:
        connection.close()
    wait_until(lambda: server.app_services().client.num_in_flight == 0)


def test_an_overload_is_a_rate_limit(small):
    busy = fill(small)
    url = f"{small.base_url}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model=BASE, prompt="x", stream=stream)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert caught.value.code == "overloaded"
    free(small, busy)


class Seen:
    """Notes when requests were sent and what came back; makes room after the first refusal."""

    def __init__(self, server):
        self.server = server
        self.busy = fill(server)
        self.sent: list[float] = []
        self.replies: list[tuple[int, str | None]] = []

    def request(self, _request):
        self.sent.append(time.monotonic())

    def response(self, response):
        self.replies.append((response.status_code, response.headers.get("retry-after")))
        busy, self.busy = self.busy, []
        free(self.server, busy)

    async def async_request(self, request):
        self.request(request)

    async def async_response(self, response):
        await asyncio.to_thread(self.response, response)

    def check(self):
        """One refusal, one success, and no sooner than the server said."""
        assert [status for status, _ in self.replies] == [429, 200]
        wait = int(self.replies[0][1])
        # without the header the client would wait half a second
        assert wait >= 1
        assert self.sent[1] - self.sent[0] >= wait


def test_a_retry_waits_as_long_as_it_was_told(small):
    seen = Seen(small)
    hooks = {"request": [seen.request], "response": [seen.response]}
    http = openai.DefaultHttpxClient(event_hooks=hooks)
    url = f"{small.base_url}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=2, http_client=http) as client:
        made = client.completions.create(model=BASE, prompt="x", max_tokens=2)
    assert made.usage.completion_tokens == 2
    seen.check()


async def test_an_async_retry_of_a_stream_waits_too(small):
    seen = Seen(small)
    hooks = {"request": [seen.async_request], "response": [seen.async_response]}
    http = openai.DefaultAsyncHttpxClient(event_hooks=hooks)
    url = f"{small.base_url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="any", http_client=http) as client:
        stream = await client.chat.completions.create(
            model=BASE, messages=USER, max_tokens=2, stream=True
        )
        assert [part async for part in stream]
    seen.check()


def test_one_request_of_many_sequences_waits_for_itself(small):
    prompts = ["a", "b", "c", "d", "e"]
    many = complete(small, prompt=prompts, n=2, max_tokens=3).json()
    alone = [complete(small, prompt=one, max_tokens=3).json()["choices"][0] for one in prompts]
    assert [choice["text"] for choice in many["choices"]] == [
        one["text"] for one in alone for _ in range(2)
    ]


def test_an_error_inside_a_stream(chatting_base, tmp_path):
    with running_server(make_settings(chatting_base, tmp_path / "data")) as server:
        url = f"{server.base_url}/v1"
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            stream = client.completions.create(
                model=BASE,
                prompt=["x", "y"],
                max_tokens=400,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            next(stream)
            server.app_services().client._engine.kill()
            with pytest.raises(openai.APIError) as caught:
                list(stream)
            assert caught.value.code == "engine_unavailable"
            assert caught.value.body["type"] == "server_error"
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model=BASE, prompt="x")
            assert caught.value.status_code == 503
        raw = server.post("/v1/completions", json={"model": BASE, "prompt": "x", "stream": True})
        assert raw.status_code == 503
        assert json.loads(raw.text)["error"]["code"] == "not_ready"
