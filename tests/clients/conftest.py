"""One running server for all clients: a tiny base with a chat template, and adapters made by PEFT.

The adapters are of two methods, `prefix` and `ia3`. Their PEFT models stay at hand, so that what a
client measures can be computed a second time without any of our code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from server.config.settings import Settings
from tests.conformance.peft_oracle import make_adapter
from tests.server.http_server import ServerClient, running_server, save_tiny_base, upload

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ADAPTERS = ("prefix", "ia3")
BASE = "tiny-base"


def make_settings(base: Path, data_dir: Path, **changes) -> Settings:
    return Settings(
        **{
            "base": str(base),
            "base_name": BASE,
            "data_dir": data_dir,
            "dtype": "float32",
            "threads": 1,
            "max_running": 8,
            "kv_mib": 16,
            "log_level": "error",
            **changes,
        }
    )


@dataclass
class World:
    """What a client test needs.

    Attributes:
        base_dir: the base's directory; its tokenizer is what clients load too.
        adapter_dirs: what PEFT saved, by the adapter's name.
        models: transformers' model of the base and PEFT's of each adapter, by the served name.
        tokenizer: the base's.
        client: of the running server.
    """

    base_dir: Path
    adapter_dirs: dict[str, Path]
    models: dict[str, torch.nn.Module]
    tokenizer: PreTrainedTokenizerBase
    client: ServerClient

    @property
    def url(self) -> str:
        """Where the server listens, without a slash at the end."""
        return str(self.client.base_url).rstrip("/")

    def logprobs(self, model: str, ids: list[int]) -> torch.Tensor:
        """Log-probabilities (len(ids) - 1, V) of what follows each token, by transformers or PEFT."""
        with torch.no_grad():
            logits = self.models[model](input_ids=torch.tensor([ids])).logits[0]
        # In double: torch's float32 log_softmax is off by 5e-6 a token on a large vocabulary.
        return logits[: len(ids) - 1].double().log_softmax(-1)


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory) -> Path:
    directory = save_tiny_base(tmp_path_factory.mktemp("chat-base"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def world(chat_base, tmp_path_factory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("clients")
    models: dict[str, torch.nn.Module] = {BASE: _base(chat_base)}
    for name in ADAPTERS:
        models[name] = make_adapter(_base(chat_base), "llama", name, home / name)
    directories = {name: home / name for name in ADAPTERS}
    with running_server(make_settings(chat_base, home / "data")) as client:
        for name, directory in directories.items():
            reply = upload(client, directory, name)
            assert reply.status_code == 201, reply.text
        tokenizer = AutoTokenizer.from_pretrained(chat_base)
        yield World(chat_base, directories, models, tokenizer, client)


def _base(directory: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval().requires_grad_(False)
