"""At the last position of a base, on every generating route: the last new token takes none."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tests.server.conftest import make_settings
from tests.server.http_server import byte_level_tokenizer, running_server, upload

POSITIONS = 64


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A base of 64 learned positions, with prefixes of 30 and 63 virtual tokens."""
    home = tmp_path_factory.mktemp("short")
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    with running_server(make_settings(home / "base", home / "data", train_workers=0)) as client:
        for count in (30, 63):
            folder = home / f"p{count}"
            folder.mkdir()
            fields = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "token_dim": 32}
            (folder / "adapter_config.json").write_text(
                json.dumps({**fields, "num_virtual_tokens": count})
            )
            rows = torch.randn(count, 2 * 2 * 32)
            save_file({"prompt_embeddings": rows}, folder / "adapter_model.safetensors")
            reply = upload(client, folder, folder.name)
            assert reply.status_code == 201, reply.text
        yield client


def complete(server, model, prompt, **options):
    body = {"model": model, "prompt": [5] * prompt, "temperature": 0, "ignore_eos": True, **options}
    return server.post("/v1/completions", json=body)


@pytest.mark.parametrize(("model", "virtual"), [("tiny-base", 0), ("p30", 30), ("p63", 63)])
def test_prompts_that_fill_every_position_get_one_token(server, model, virtual):
    room = POSITIONS - virtual
    reply = complete(server, model, room, max_tokens=1)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == 1
    for prompt, new in ((room, 2), (room + 1, 1)):
        refused = complete(server, model, prompt, max_tokens=new)
        assert refused.status_code == 422
        assert f"at most {POSITIONS + 1} fit in all" in refused.text
    echoed = complete(server, model, room, max_tokens=0, echo=True, logprobs=1)
    assert len(echoed.json()["choices"][0]["logprobs"]["tokens"]) == room


def test_a_length_that_is_left_out_is_what_fits(server):
    messages = [{"role": "user", "content": "abcdefgh"}]
    body = {"model": "p30", "messages": messages, "temperature": 0, "ignore_eos": True}
    usage = server.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["completion_tokens"] == POSITIONS + 1 - 30 - usage["prompt_tokens"]
    parameters = {"details": True, "ignore_eos": True}
    tgi = server.post("/generate?adapter=p63", json={"inputs": "a", "parameters": parameters})
    assert tgi.json()["details"]["generated_tokens"] == 1
    info = server.get("/info").json()
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (POSITIONS, POSITIONS + 1)


def test_labels_are_ranked_up_to_the_last_position(server):
    def rank(letters):
        body = {"inputs": "z" * letters, "labels": ["q", "j"]}
        return server.post("/classify?adapter=p30", json=body)

    # A label is its separator and one letter here, all single tokens.
    size = next(n for n in range(POSITIONS, 0, -1) if rank(n).status_code == 200)
    ids = server.post("/tokenize", json={"prompt": "z" * size + " q"}).json()["count"]
    assert 30 + ids == POSITIONS
