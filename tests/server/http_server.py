"""A real server for tests: uvicorn on a loopback port, a tiny random Llama, a byte-level tokenizer.

Nothing is patched: the engine runs in its own process, requests go over TCP.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from server.api.error_replies import refusal_reply
from server.app import create_app
from server.config.settings import Settings
from server.http.protocol import uvicorn_options
from server.logs import configure
from server.services import Services

SPECIAL = ["<pad>", "<s>", "</s>"]
TRAINING_TEXT = [
    "the tweet is a complaint, no complaint at all",
    "Label : complaint",
    "Übergrößen kosten 5 € — naïve 漢字 🙂 emoji",
] * 3
LAYERS, KV_HEADS, HEAD_DIM, HIDDEN = 2, 2, 8, 32


def byte_level_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 320 tokens; every text is encodable."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_tiny_base(directory: Path, *, bos: bool = False) -> Path:
    """A Llama that answers gibberish, but always the same gibberish."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer(bos=bos)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_prefix_adapter(directory: Path, *, seed: int = 0, n: int = 4) -> Path:
    """A prefix-tuning folder as PEFT writes one, README included."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, LAYERS * 2 * KV_HEADS * HEAD_DIM, generator=generator)
    save_file({"prompt_embeddings": rows}, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "/home/somebody/base",
        "inference_mode": True,
        "num_virtual_tokens": n,
        "token_dim": KV_HEADS * HEAD_DIM,
        "num_transformer_submodules": 1,
        "num_attention_heads": KV_HEADS,
        "num_layers": LAYERS,
        "prefix_projection": False,
        "encoder_hidden_size": KV_HEADS * HEAD_DIM,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "README.md").write_text("# an adapter\n")
    return directory


class ServerClient(httpx.Client):
    """An HTTP client that also knows the server's inside, to watch it."""

    app: FastAPI

    def app_services(self) -> Services:
        return self.app.state.services


@contextmanager
def running_server(settings: Settings, **options: Any) -> Iterator[ServerClient]:
    """A client of a server that is ready; the server ends with the block.

    `options` go to `create_app`.
    """
    configure(settings.log_format, settings.log_level)
    app = create_app(settings, **options)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            log_config=None,
            access_log=False,
            **uvicorn_options(settings, refusal_reply),
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        _wait(lambda: server.started, 30)
        port = server.servers[0].sockets[0].getsockname()[1]
        with ServerClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            client.app = app
            _wait(lambda: client.get("/readyz").status_code == 200, 90)
            yield client
    finally:
        server.should_exit = True
        thread.join(30)


def upload(client: httpx.Client, directory: Path, name: str, **fields: str) -> httpx.Response:
    """POST /adapters, as curl does it."""
    paths = [path for path in sorted(directory.iterdir()) if path.is_file()]
    files = [("files", (path.name, path.read_bytes())) for path in paths]
    return client.post("/adapters", data={"name": name, **fields}, files=files)


def _wait(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the server did not come up")
        time.sleep(0.02)
