"""LangChain's clients against a real server."""

from __future__ import annotations

import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI

from tests.server.api.generation.openai.conftest import BASE, chat, complete


@pytest.fixture
async def settings(chatting):
    # LangChain keeps clients of its own open for ever.
    http, async_http = openai.DefaultHttpxClient(), openai.DefaultAsyncHttpxClient()
    yield {
        "base_url": f"{chatting.base_url}/v1",
        "api_key": "any",
        "temperature": 0,
        "max_tokens": 8,
        "http_client": http,
        "http_async_client": async_http,
    }
    http.close()
    await async_http.aclose()


def test_chat(chatting, settings):
    model = ChatOpenAI(model="complaints", **settings)
    want = chat(chatting, "late again", model="complaints").json()
    reply = model.invoke("late again")
    assert reply.content == want["choices"][0]["message"]["content"]
    assert reply.usage_metadata["total_tokens"] == want["usage"]["total_tokens"]
    assert reply.response_metadata["finish_reason"] == "length"
    streamed = list(model.stream("late again"))
    assert "".join(part.content for part in streamed) == reply.content
    batch = model.batch(["late again", "thank you", "late again"])
    assert [one.content for one in batch][::2] == [reply.content] * 2
    assert batch[1].content != reply.content


async def test_async_chat_of_a_conversation(chatting, settings):
    model = ChatOpenAI(model=BASE, **settings)
    messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Go on")]
    reply = await model.ainvoke(messages)
    assert "".join([part.content async for part in model.astream(messages)]) == reply.content
    written = [{"role": role, "content": content} for role, content in messages]
    want = chat(chatting, messages=written).json()["choices"][0]["message"]["content"]
    assert reply.content == want


def test_completions(chatting, settings):
    model = OpenAI(model="complaints", **settings)
    want = [
        complete(chatting, model="complaints", prompt=prompt, max_tokens=8).json()
        for prompt in ("late again", "thank you")
    ]
    texts = [one["choices"][0]["text"] for one in want]
    assert model.invoke("late again") == texts[0]
    assert "".join(model.stream("late again")) == texts[0]
    assert model.batch(["late again", "thank you"]) == texts
