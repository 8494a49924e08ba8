"""Every file in examples/ runs as its first lines say."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_prefix_adapter, save_tiny_base, upload

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.name for path in (ROOT / "examples").glob("*.py")}
CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message.content }}</s>{% endfor %}"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = save_tiny_base(tmp_path_factory.mktemp("base"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_prefix_adapter(tmp_path_factory.mktemp("adapters") / "tweets")


@pytest.fixture(scope="module")
def url(base, folder, tmp_path_factory):
    with running_server(make_settings(base, tmp_path_factory.mktemp("data"))) as client:
        assert upload(client, folder, "complaints").status_code == 201
        yield str(client.base_url).rstrip("/")


def run(name: str, *arguments: str | Path) -> str:
    """What an example prints."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ran = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_peft_folder_to_served_adapter(url, folder):
    told = run("peft_folder_to_served_adapter.py", folder, "--name", "mine", "--url", url)
    first, adapter, base = told.splitlines()
    assert first == "mine is version 1, PREFIX_TUNING"
    assert adapter.split(":", 1)[1].strip() != base.split(":", 1)[1].strip()


def test_train_and_classify(url):
    told = run("train_and_classify.py", "--epochs", "1", "--url", url)
    assert told.startswith("my-complaints is version 1\n")
    assert told.count("complaint") >= 4


def test_openai_client(url):
    told = run("openai_client.py", "--url", url)
    assert told.startswith("models: tiny-base, complaints")
    for part in ("\ncompletion: ", "\nstream:", "\nchat: "):
        assert part in told


def test_huggingface_hub_client(url):
    told = run("huggingface_hub_client.py", "--url", url)
    assert told.startswith("adapter: ")
    assert "\nbase: " in told
    assert "\nended by: " in told


def test_engine_without_http(base, folder):
    told = run("engine_without_http.py", "--base", base, folder)
    base_line, adapter_line = told.splitlines()
    assert base_line.startswith("base: ")
    assert adapter_line.startswith("tweets: ")
    assert base_line.split(": ", 1)[1] != adapter_line.split(": ", 1)[1]


def test_twitter_complaints_trains_by_the_published_recipe(base, tmp_path):
    data, out = tmp_path / "train.csv", tmp_path / "adapter"
    with data.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "Tweet text", "Label"])
        for i in range(6):
            writer.writerow([i, f"message {i}", "complaint" if i % 2 else "no complaint"])
    told = run(
        "twitter_complaints.py", "--base", base, "--data", data, "--out", out, "--epochs", "2"
    )
    assert told.count("expected ") == 6
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", 20)
    job = json.loads((out / "graftwork.json").read_text())["job"]
    assert job["template"] == "Tweet text : {Tweet text} Label : "
    assert (job["max_length"], job["tokenization"]) == (64, "as_written")
    asked = {"learning_rate": 3e-2, "epochs": 2, "batch_size": 8, "lr_scheduler_type": "linear"}
    assert job["hyperparameters"].items() >= {**asked, "optimizer": "adamw"}.items()


def test_every_example_has_a_test():
    own = Path(__file__).read_text(encoding="utf-8")
    assert EXAMPLES
    assert {name for name in EXAMPLES if f'"{name}"' not in own} == set()
