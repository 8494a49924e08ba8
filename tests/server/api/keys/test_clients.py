"""Other people's clients with a key, and what one key finds of another's prompts."""

from __future__ import annotations

import time

import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import OverloadedError, UnknownError

from server.store.key import new_text

CHAT = {"model": "complaints", "prompt": "the tweet is", "max_tokens": 2}


@pytest.fixture
def openai_client(guarded):
    """A maker of OpenAI's clients, by key."""
    made = []

    def make(key: str) -> openai.OpenAI:
        url = f"{guarded.client.base_url}/v1"
        made.append(openai.OpenAI(base_url=url, api_key=key, max_retries=0))
        return made[-1]

    yield make
    for client in made:
        client.close()


def test_openais_client_sends_its_key(guarded, openai_client):
    client = openai_client(guarded.key("generate", adapters=["complaints"]))
    assert client.completions.create(**CHAT).choices[0].text
    chunks = list(client.completions.create(**CHAT, stream=True))
    assert chunks[-1].choices[0].finish_reason
    assert [model.id for model in client.models.list()] == ["tiny-base", "complaints"]


def test_openais_client_raises_its_own_errors(guarded, openai_client):
    nobody = openai_client(new_text())
    with pytest.raises(openai.AuthenticationError) as unknown:
        nobody.completions.create(**CHAT)
    assert (unknown.value.code, unknown.value.type) == ("key_required", "authentication_error")
    with pytest.raises(openai.PermissionDeniedError) as missing:
        openai_client(guarded.key("train")).completions.create(**CHAT)
    assert (missing.value.code, missing.value.type) == ("scope_missing", "permission_error")
    restricted = openai_client(guarded.key("generate", adapters=["other"]))
    with pytest.raises(openai.NotFoundError) as hidden:
        restricted.completions.create(**CHAT)
    assert hidden.value.code == "adapter_not_found"
    seldom = openai_client(guarded.key("generate", rate="1/day"))
    seldom.models.list()
    with pytest.raises(openai.RateLimitError) as limited:
        seldom.models.list()
    assert (limited.value.code, limited.value.type) == ("rate_limited", "rate_limit_error")
    poor = openai_client(guarded.key("generate", tokens="1/day"))
    poor.completions.create(**CHAT)
    with pytest.raises(openai.RateLimitError) as spent:
        poor.completions.create(**CHAT)
    assert spent.value.code == "quota_exceeded"


def test_openais_client_uploads_with_a_key_for_training(guarded, openai_client):
    client = openai_client(guarded.key("train"))
    rows = b'{"prompt": "a", "completion": "b"}\n'
    uploaded = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    assert client.files.content(uploaded.id).read() == rows
    assert [file.id for file in client.files.list()] == [uploaded.id]
    client.files.delete(uploaded.id)


async def test_hugging_faces_clients_send_their_token(guarded):
    url, key = str(guarded.client.base_url), guarded.key("generate")
    client = InferenceClient(url, token=key)
    asked = {"adapter_id": "complaints", "max_new_tokens": 4}
    whole = client.text_generation("the tweet", **asked)
    assert whole == "".join(client.text_generation("the tweet", stream=True, **asked))
    async with AsyncInferenceClient(url, token=key) as later:
        assert await later.text_generation("the tweet", **asked) == whole
    for wrong, status in ((new_text(), 401), (guarded.key("train"), 403)):
        with pytest.raises(UnknownError, match="key") as refused:  # TGI has no word for it
            InferenceClient(url, token=wrong).text_generation("the tweet")
        assert refused.value.__cause__.response.status_code == status
    seldom = InferenceClient(url, token=guarded.key("generate", rate="1/day"))
    seldom.text_generation("the tweet", max_new_tokens=1)
    with pytest.raises(OverloadedError):
        seldom.text_generation("the tweet", max_new_tokens=1)


def hits(guarded, key: str, prompt: str) -> int:
    """Tokens of a prompt whose keys and values were there already."""
    stats = guarded.client.app_services().client

    def total() -> tuple[int, int]:
        return stats.stats.prefix_query_tokens, stats.stats.prefix_hit_tokens

    asked, before = total()
    body = {"inputs": prompt, "parameters": {"max_new_tokens": 1}}
    assert guarded.ask("POST", "/generate", key, json=body).status_code == 200
    end = time.monotonic() + 20
    while total()[0] == asked:  # counts come after tokens
        assert time.monotonic() < end
        time.sleep(0.02)
    return total()[1] - before


def test_a_key_finds_no_prompts_of_another(guarded):
    prompt = "a secret of the first tenant, which is long enough to fill some blocks of the cache"
    first, second = (guarded.key("generate") for _ in range(2))
    assert hits(guarded, first, prompt) == 0
    assert hits(guarded, first, prompt) > 40
    assert hits(guarded, second, prompt) == 0
    assert hits(guarded, second, prompt) > 40


def cached(guarded, key, prompt):
    """Tokens of a prompt that OpenAI's reply says were in the cache."""
    body = {"model": "tiny-base", "prompt": prompt, "max_tokens": 1}
    reply = guarded.ask("POST", "/v1/completions", key, json=body).json()
    return reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_reply_tells_of_no_prompt_of_another_key(guarded):
    prompt = "what one tenant asked is not to be learnt from the usage of what another one asks"
    mine, again = (guarded.key("generate", tenant="mine") for _ in range(2))
    other = guarded.key("generate")
    assert cached(guarded, mine, prompt) == 0
    assert cached(guarded, other, prompt) == 0
    assert cached(guarded, mine, prompt) > 40
    assert cached(guarded, again, prompt) > 40


def test_keys_of_one_tenant_share_their_prompts(guarded):
    prompt = "a system prompt that all keys of the tenant send, and that is computed once for them"
    first, again = (guarded.key("generate", tenant="one") for _ in range(2))
    other = guarded.key("generate", tenant="two")
    assert hits(guarded, first, prompt) == 0
    assert hits(guarded, again, prompt) > 40
    assert hits(guarded, other, prompt) == 0
