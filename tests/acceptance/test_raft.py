"""Adapters that PEFT trained on RAFT's twitter_complaints, one a method, on the default base in float32.

A few optimiser steps each: enough to change the answers. Served together, all 50 prompts with every
adapter give PEFT's tokens.
"""

from __future__ import annotations

import csv
import os
import random
import warnings
from pathlib import Path

import peft
import pytest
import torch

from server.base.dtypes import default_dtype
from server.config.settings import Settings
from server.demo.install import DemoMessage
from tests.acceptance.http_load import Call, run_load
from tests.acceptance.peft_training import BUILDERS, TEMPLATE, Trainer, batch_loss
from tests.acceptance.real_base import BASE_DIR, ROOT, needs_base
from tests.conformance.peft_oracle import ask
from tests.conformance.test_grid import same_until_a_tie
from tests.server.http_server import running_server, upload

DATA = Path(os.environ.get("GRAFTWORK_TEST_DATA", ROOT.parent / "shared" / "data"))
TRAIN_CSV = DATA / "raft_twitter_complaints" / "train.csv"
LEARNING_RATES = {
    "prefix_tuning": 4e-3,
    "p_tuning": 1e-3,
    "cpt": 3e-3,
    "prompt_tuning": 3e-2,
    "ia3": 1e-2,
}
METHODS = tuple(LEARNING_RATES)
NUM_STEPS, BATCH_SIZE = 4, 8
NUM_NEW_TOKENS = 8

pytestmark = [
    pytest.mark.slow,
    needs_base,
    pytest.mark.skipif(
        not TRAIN_CSV.is_file(), reason="no RAFT data: GRAFTWORK_TEST_DATA names its folder"
    ),
]


@pytest.fixture(scope="module")
def messages() -> list[DemoMessage]:
    with TRAIN_CSV.open(encoding="utf-8", newline="") as file:
        return [DemoMessage(r["Tweet text"], r["Label"], "train") for r in csv.DictReader(file)]


@pytest.fixture(scope="module")
def folders(messages, tmp_path_factory) -> dict[str, Path]:
    """Method -> folder, as PEFT saved it."""
    # In the dtype that the processor multiplies fastest: how well they learn is not the point.
    trainer = Trainer(BASE_DIR, getattr(torch, default_dtype("cpu")))
    examples = [trainer.example(message) for message in messages]
    out = {}
    for method in METHODS:
        base = trainer.base(trainer.train_dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if method == "cpt":
                model = build_cpt(trainer, base, messages)
            else:
                model = BUILDERS[method](trainer, base)
            train(model, examples, LEARNING_RATES[method])
            out[method] = tmp_path_factory.mktemp(method)
            model.save_pretrained(out[method], save_embedding_layers=False)
    return out


def build_cpt(trainer: Trainer, base: torch.nn.Module, messages: list[DemoMessage]):
    """Two rows as context, one of each label: the oracle runs through it once a prompt."""
    ids: list[int] = []
    types: list[int] = []
    for number, label in enumerate(("complaint", "no complaint")):
        example = trainer.example(
            min((m for m in messages if m.label == label), key=lambda m: len(m.text))
        )
        ids += example.ids
        types += [kind + 4 * number for kind in example.types[:-1]] + [0]
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(ids),
        cpt_token_ids=ids,
        cpt_mask=[1] * len(ids),
        cpt_tokens_type_mask=types,
        opt_projection_epsilon=1.0,
        opt_projection_format_epsilon=1.0,
    )
    return peft.get_peft_model(base, config)


def train(model, examples, learning_rate) -> None:
    torch.manual_seed(0)
    order = random.Random(0).sample(examples, len(examples))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    model.eval()
    for step in range(NUM_STEPS):
        start = step * BATCH_SIZE
        batch_loss(model, order[start : start + BATCH_SIZE]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def prompts(messages) -> list[str]:
    assert len(messages) == 50
    return [TEMPLATE.format(text=message.text) for message in messages]


@pytest.fixture(scope="module")
def served(folders, prompts, tmp_path_factory) -> dict[str, list[list[int]]]:
    """Method (and "base") -> tokens of each prompt: all of them sent at once, adapters mixed."""
    calls = [
        Call(
            name=f"{method}/{index}",
            prompt=prompt,
            adapter=None if method == "base" else method.replace("_", "-"),
            max_new_tokens=NUM_NEW_TOKENS,
            streamed=index % 2 == 0,
        )
        for index, prompt in enumerate(prompts)
        for method in (*METHODS, "base")
    ]
    random.Random(1).shuffle(calls)
    settings = Settings(
        base=str(BASE_DIR),
        data_dir=tmp_path_factory.mktemp("raft") / "data",
        dtype="float32",
        log_level="error",
    )
    with running_server(settings) as client:
        for method, folder in folders.items():
            assert upload(client, folder, method.replace("_", "-")).status_code == 201
        got = run_load(client.base_url, calls).tokens
    return {
        method: [got[f"{method}/{index}"] for index in range(len(prompts))]
        for method in (*METHODS, "base")
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_prompt_gives_pefts_tokens(method, served, folders, prompts):
    trainer = Trainer(BASE_DIR, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = trainer.base(torch.float32)
        model = peft.PeftModel.from_pretrained(base, folders[method]).eval()
    wrong, exact = [], 0
    for prompt, got in zip(prompts, served[method], strict=True):
        oracle = ask(model, trainer.tokenizer(prompt)["input_ids"], NUM_NEW_TOKENS)
        exact += got == oracle.token_ids
        if not same_until_a_tie(got, oracle):
            wrong.append((prompt, got, oracle.token_ids))
    print(f"\n{method}: {exact} of {len(prompts)} outputs equal to the last token")
    assert not wrong
    # Ties are rare: the rule that lets them pass must not carry the test.
    assert exact >= len(prompts) - 2


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_changes_the_answers(method, served):
    changed = sum(a != b for a, b in zip(served[method], served["base"], strict=True))
    assert changed > len(served["base"]) // 2
