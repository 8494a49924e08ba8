"""schemathesis over the page: every route, every check, examples, coverage, fuzzing and chains of requests.

The server is a process of its own that asks for keys. What is excluded stands in
`tests/hostile/schemathesis`, each with its reason. A longer run, its options being those of
`schemathesis run`, and the last of the same name counting:

    GRAFTWORK_SCHEMATHESIS="--max-examples 300 --seed 7" python -m pytest tests/hostile/test_schemathesis.py
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from server.store.keys import KeyStore
from tests.server.http_server import save_prefix_adapter, save_tiny_base, upload
from tests.soak.server_process import serving

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).parent / "schemathesis" / "config.toml"
HOOKS = "tests.hostile.schemathesis.hooks"
# The names in the page's examples.
BASE_NAME = "SmolLM2-135M-Instruct"
ADAPTERS = ("complaints", "refunds", "refunds")
CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message.content }}</s>{% endfor %}"
TEMPLATE = "Tweet text : {text} Label :"
LABELS = '["complaint", "no complaint"]'
# After it nothing is served any more; the tests of shutdown ask for it.
NOT_ASKED = ("/drain",)
LONGER = shlex.split(os.environ.get("GRAFTWORK_SCHEMATHESIS", ""))


@dataclass(frozen=True)
class Guarded:
    """A server that asks for keys.

    Attributes:
        url: where it is.
        key: one that may do everything.
    """

    url: str
    key: str


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[Guarded]:
    home: Path = tmp_path_factory.mktemp("schemathesis")
    base = save_tiny_base(home / "base")
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name in ("data", "runs"):
        (home / name).mkdir()
    store = KeyStore(home / "data")
    key = store.create("schemathesis", ["admin"]).text
    store.close()
    settings = {
        "BASE_NAME": BASE_NAME,
        "REQUIRE_KEYS": "true",
        "LOAD_DIRS": str(home / "runs"),
        # Jobs wait: what is asked for them is looked at, and nothing is trained.
        "TRAIN_WORKERS": "0",
        "MAX_FILES": "100000",
    }
    with serving(base, home / "data", home / "log", **settings) as (_, url):
        with httpx.Client(base_url=url, headers={"x-api-key": key}, timeout=60) as client:
            for seed, name in enumerate(ADAPTERS):
                folder = save_prefix_adapter(home / f"made-{seed}", seed=seed)
                reply = upload(client, folder, name, template=TEMPLATE, labels=LABELS)
                assert reply.status_code == 201, reply.text
        yield Guarded(url, key)


@pytest.mark.timeout(3600)
def test_every_check_on_every_route(guarded, tmp_path):
    page = httpx.get(f"{guarded.url}/openapi.json", headers={"x-api-key": guarded.key}).json()
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(page))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run"]
    command += [str(file), "--url", guarded.url, "--no-color", "--generation-database", "none"]
    for path in NOT_ASKED:
        command += ["--exclude-path", path]
    command += ["--max-examples", "20", "--seed", "6", *LONGER]
    environment = os.environ | {
        "GRAFTWORK_API_KEY": guarded.key,
        "SCHEMATHESIS_HOOKS": HOOKS,
        "PYTHONPATH": str(ROOT),
    }
    # In a folder of its own: it writes a cache beside itself.
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = " ".join(done.stdout.split())
    routes = sum(len(methods) for methods in page["paths"].values())
    asked = routes - sum(len(page["paths"][path]) for path in NOT_ASKED)
    assert f"Selected: {asked}/{routes} Tested: {asked}" in told
    for phase in ("Examples", "Coverage", "Fuzzing", "Stateful"):
        assert f"✅ {phase}" in told
