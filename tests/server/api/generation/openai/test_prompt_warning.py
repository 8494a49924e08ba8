"""`x-prompt-warning`: said once, in the header and the log, where a prompt is unlike the training."""

from __future__ import annotations

import json

import pytest

from adapters.metadata import AdapterMetadata
from server.generation.prompt_form import PromptForm
from server.generation.sent_warnings import SentWarnings
from server.logs import configure
from tests.server.conftest import TEMPLATE
from tests.server.http_server import save_prefix_adapter, upload

WARNING = "x-prompt-warning"
SHORT = {"parameters": {"max_new_tokens": 1}}


@pytest.fixture
def fresh(chatting, tmp_path):
    """Adapters that nobody has been warned of, each with a template."""
    names = ["fresh-1", "fresh-2", "fresh-3", "fresh-4"]
    for name in names:
        folder = save_prefix_adapter(tmp_path / name, seed=7)
        assert upload(chatting, folder, name, template=TEMPLATE).status_code == 201
    yield names
    for name in names:
        chatting.delete(f"/adapters/{name}")


def test_it_is_said_once_for_each_adapter_and_on_every_route(chatting, fresh, capsys):
    configure("json", "warning")
    try:
        for time in range(2):
            said = [
                chatting.post(f"/generate?adapter={fresh[0]}", json={"inputs": "zebra", **SHORT}),
                chatting.post(f"/generate_stream?adapter={fresh[1]}", json={"inputs": "x", **SHORT}),
                chatting.post("/v1/completions", json={"model": fresh[2], "prompt": ["a", "zebra"]}),
                chatting.post("/v1/completions", json={"model": fresh[3], "prompt": "x", "stream": True}),
            ]  # fmt: skip
            assert all(reply.status_code == 200 for reply in said)
            assert [WARNING in reply.headers for reply in said] == [time == 0] * 4
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        configure("console", "error")
    warned = [line for line in lines if line["event"] == "prompt_unlike_training"]
    assert [(line["adapter"], line["difference"]) for line in warned] == [
        (name, "template") for name in fresh
    ]
    assert "zebra" not in str(warned)


def test_it_is_not_said_of_a_prompt_as_in_training(chatting, fresh):
    name = fresh[0]
    row = {"Tweet text": "late"}
    asks = [
        ("/generate?adapter=" + name, {"inputs": "Tweet text : late Label :", **SHORT}),
        ("/generate?adapter=" + name, {"row": row, **SHORT}),
        ("/generate?adapter=plain", {"inputs": "anything ", **SHORT}),
        ("/generate", {"inputs": "anything", **SHORT}),
        ("/v1/completions", {"model": name, "row": row, "max_tokens": 1}),
        ("/v1/completions", {"model": name, "prompt": [5, 6], "max_tokens": 1}),
        ("/v1/chat/completions",
         {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ("/classify?adapter=" + name, {"inputs": "late", "labels": ["a", "b"]}),
    ]  # fmt: skip
    for path, body in asks:
        reply = chatting.post(path, json=body)
        assert reply.status_code == 200, reply.text
        assert WARNING not in reply.headers, (path, body)
    spaced = chatting.post(asks[0][0], json={"inputs": "Tweet text : late Label : ", **SHORT})
    assert "white space" in spaced.headers[WARNING]


def test_the_differences(chatting):
    form = PromptForm(chatting.app_services().need_generator().tokenizer.chat_template)
    chat_trained = AdapterMetadata(recipe={"prompts": "chat"})
    assert form.difference(chat_trained, "plain text") == "chat"
    assert form.difference(chat_trained, "<s>user: hello</s><s>assistant:") is None
    assert form.difference(AdapterMetadata(), "plain text") is None
    assert form.difference(AdapterMetadata(template="{text}"), "plain text") is None
    as_written = AdapterMetadata(template="T {text} L: ", tokenization="as_written")
    assert form.difference(as_written, "T x L: ") is None
    assert PromptForm(None).difference(chat_trained, "plain text") is None


def test_what_was_said_is_remembered_within_bounds():
    sent = SentWarnings(most=2)
    sent.add("a", "1")
    assert not sent.is_new("a", "1")
    sent.add("b", "1")
    sent.add("c", "1")
    assert sent.is_new("a", "1")
    assert len(sent) == 2
