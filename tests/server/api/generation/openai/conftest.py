"""A server whose tiny base can chat, with adapters of every kind of template."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from tests.server.conftest import TEMPLATE, make_settings
from tests.server.http_server import (
    running_server,
    save_prefix_adapter,
    save_tiny_base,
    upload,
)

BASE = "tiny-base"
# Refuses what SmolLM2's does not, so that a refusal can be seen.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and loop.first %}"
    "{{ raise_exception('the user speaks first') }}{% endif %}"
    "{{ '<s>' + message['role'] + ': ' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
ADAPTERS: dict[str, dict[str, str]] = {
    "complaints": {"template": TEMPLATE, "labels": '["complaint", "no complaint"]'},
    "plain": {},
    "pairs": {"template": "{first} and {second} :"},
}


def save_chatting_base(directory: Path) -> Path:
    """The tiny base with a chat template, as transformers saves one; texts begin with `<s>`."""
    save_tiny_base(directory, bos=True)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def chatting_base(tmp_path_factory) -> Path:
    return save_chatting_base(tmp_path_factory.mktemp("chatting-base"))


@pytest.fixture(scope="session")
def chatting(chatting_base, tmp_path_factory):
    """An HTTP client of a server with `ADAPTERS`."""
    home = tmp_path_factory.mktemp("chatting")
    with running_server(make_settings(chatting_base, home / "data")) as client:
        for seed, (name, fields) in enumerate(ADAPTERS.items(), start=1):
            folder = save_prefix_adapter(home / name, seed=seed)
            assert upload(client, folder, name, **fields).status_code == 201
        yield client


@pytest.fixture
def client(chatting):
    """OpenAI's own client, which does not try again."""
    with openai.OpenAI(base_url=f"{chatting.base_url}/v1", api_key="any", max_retries=0) as one:
        yield one


@pytest.fixture
async def async_client(chatting):
    url = f"{chatting.base_url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as one:
        yield one


def post(server, path, body):
    """As JSON in ASCII, which can say what is no text."""
    headers = {"content-type": "application/json"}
    return server.post(path, content=json.dumps(body), headers=headers)


def complete(server, **fields):
    """POST /v1/completions with little typing."""
    body = {"model": BASE, "prompt": "the tweet", "temperature": 0, **fields}
    return post(server, "/v1/completions", body)


def chat(server, *contents, **fields):
    """POST /v1/chat/completions; the contents are the user's."""
    messages = [{"role": "user", "content": content} for content in contents]
    body = {"model": BASE, "messages": messages, "temperature": 0, "max_tokens": 8, **fields}
    return post(server, "/v1/chat/completions", body)


def near(one, other) -> bool:
    """Whether two replies are the same: who else is in a batch shows in a number's seventh digit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(near, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-4
    return one == other


def frames(reply) -> list[dict]:
    """Every frame of a stream that ended well, without the last."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("data: [DONE]\n\n")
    found = reply.text.split("\n\n")[:-2]
    assert all(frame.startswith("data: {") for frame in found)
    return [json.loads(frame.removeprefix("data: ")) for frame in found]
