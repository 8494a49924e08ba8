"""A server that trains, and the real client of it."""

from __future__ import annotations

import json
import time

import pytest
from openai import OpenAI

from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_tiny_base

WORDS = [("late", 0), ("broken", 0), ("lost", 0), ("great", 1), ("lovely", 1), ("quick", 1)]
LABELS = ["complaint", "no complaint"]
PAIRS = [
    {"prompt": f"it was {word} {when} ->", "completion": f" {LABELS[which]}"}
    for when in ("today", "again")
    for word, which in WORDS
]

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "{% if loop.first and message.role == 'assistant' %}"
    "{{ raise_exception('the user speaks first') }}{% endif %}"
    "<s>{{ message.role }}\n{{ message.content }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def lines(objects) -> bytes:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects).encode()


def openai_of(server) -> OpenAI:
    url = f"{str(server.base_url).rstrip('/')}/v1"
    return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


def upload(client, objects, name="rows.jsonl"):
    content = objects if isinstance(objects, bytes) else lines(objects)
    return client.files.create(file=(name, content), purpose="fine-tune")


def ended(client, job):
    """The job, once it has ended."""
    end = time.monotonic() + 120
    while job.status in ("validating_files", "queued", "running"):
        assert time.monotonic() < end, job
        time.sleep(0.1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


@pytest.fixture(scope="package")
def tuning_server(tmp_path_factory):
    """Its base has a chat template, and a tokenizer that adds a token to every text."""
    home = tmp_path_factory.mktemp("tuning")
    base = save_tiny_base(home / "base", bos=True)
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = make_settings(
        base,
        home / "data",
        train_threads=1,
        train_nice=0,  # the tests wait for it
        max_data_mib=1,
        max_files_mib=2,
        max_body_mib=1,
    )
    with running_server(settings) as client:
        yield client


@pytest.fixture(scope="package")
def client(tuning_server):
    with openai_of(tuning_server) as client:
        yield client
