"""What lm-eval asks for, on the default base in float32: 30 layers and a vocabulary of 49,152.

The tests on tiny bases say that the right numbers are in the right places. Here is whether they are
still transformers' and PEFT's where rounding has room to add up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.acceptance.real_base import BASE_DIR, ROOT, needs_base
from tests.clients.conftest import BASE, make_settings
from tests.server.http_server import ServerClient, running_server, upload

pytestmark = [pytest.mark.slow, pytest.mark.clients, needs_base]

DEMO = ROOT / "server/demo/adapters"
ADAPTERS = ("complaints", "complaints-ia3")
TASK_ROWS = ROOT / "tests/clients/lm_eval_tasks/messages.jsonl"
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerClient]:
    home = tmp_path_factory.mktemp("real-base")
    with running_server(make_settings(BASE_DIR, home / "data", kv_mib=128)) as client:
        for name in ADAPTERS:
            assert upload(client, DEMO / name, name).status_code == 201
        yield client


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    texts = [json.loads(line)["text"] for line in TASK_ROWS.read_text().splitlines()]
    labelled = [f"Tweet text : {text} Label : no complaint" for text in texts]
    return [tokenizer(text).input_ids for text in [*labelled, " ".join(texts)]]


def reference(model: str) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    if model == BASE:
        return base.eval()
    return PeftModel.from_pretrained(base, DEMO / model).eval()


# PEFT asks the model under a name that transformers is about to retire.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("model", [BASE, *ADAPTERS])
def test_whole_texts_are_as_likely_as_in_transformers_and_peft(server, prompts, model):
    body = {
        "model": model,
        "prompt": prompts,
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
    }
    reply = server.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    expected = reference(model)
    for ids, choice in zip(prompts, reply.json()["choices"], strict=True):
        with torch.no_grad():
            # Soft prompts have logits of their own, before the text's.
            logits = expected(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]
        logprobs = logits[:-1].double().log_softmax(-1)
        wanted = logprobs.gather(1, torch.tensor(ids[1:])[:, None]).sum()
        values = choice["logprobs"]["token_logprobs"]
        assert len(values) == len(ids) + 1
        assert sum(values[1:-1]) == pytest.approx(float(wanted), abs=TOLERANCE)
