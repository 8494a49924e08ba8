"""lm-eval's local-completions and local-chat-completions against the running server.

What it measures over our routes is computed a second time from transformers' and PEFT's own
logits, in float32. lm-eval runs once, in a process of its own, for all of the tests here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.clients.conftest import ADAPTERS, BASE, World

pytestmark = pytest.mark.clients

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "tests/clients/lm_eval_tasks"
ROWS = [json.loads(line) for line in (TASKS / "messages.jsonl").read_text().splitlines()]
MODELS = (BASE, *ADAPTERS)
ALL_TASKS = ("graftwork_choice", "graftwork_generate", "graftwork_rolling")
MAX_LENGTH = 512
# Shorter than the longest text of the tasks, which is then scored in windows.
SHORT = 64
TOLERANCE = 1e-3
NUM_LABELS = 2


@dataclass(frozen=True)
class Way:
    """One way of asking: how prompts are sent, how many together, how many at once."""

    name: str
    batch_size: int = 1
    num_concurrent: int = 1
    max_length: int = MAX_LENGTH
    tokenizer_backend: str | None = "huggingface"
    tokenized_requests: bool = True
    tasks: tuple[str, ...] = ALL_TASKS

    def plan(self, world: World, model: str) -> dict[str, object]:
        arguments = {
            "model": model,
            "base_url": f"{world.url}/v1/completions",
            "tokenized_requests": self.tokenized_requests,
            "num_concurrent": self.num_concurrent,
            "max_length": self.max_length,
            "max_retries": 1,
        }
        if self.tokenizer_backend is not None:
            arguments["tokenizer_backend"] = self.tokenizer_backend
        if self.tokenizer_backend == "huggingface":
            arguments["tokenizer"] = str(world.base_dir)
        return {
            "model": "local-completions",
            "model_args": arguments,
            "tasks": list(self.tasks),
            "batch_size": self.batch_size,
        }


WAYS = (
    Way("ids"),
    Way("ids-batched", batch_size=4),
    Way("ids-batched-at-once", batch_size=2, num_concurrent=4),
    Way("ids-in-windows", batch_size=8, max_length=SHORT, tasks=("graftwork_rolling",)),
    Way("strings", tokenized_requests=False),
    Way("strings-batched-at-once", batch_size=3, num_concurrent=3, tokenized_requests=False),
    # What lm-eval does where nobody says anything: it asks the server for its tokenizer.
    Way("tokenizer-of-the-server", tokenizer_backend=None, batch_size=4),
    Way("no-tokenizer", tokenizer_backend="none", batch_size=4, tasks=("graftwork_generate",)),
)


@dataclass(frozen=True)
class Sample:
    """One request of lm-eval and what it made of the answer."""

    task: str
    arguments: list
    answer: object
    text: str


@pytest.fixture(scope="module")
def samples(world, tmp_path_factory) -> Iterator[dict[tuple[str, str], list[Sample]]]:
    """By way and model; `chat` is a way too."""
    home = tmp_path_factory.mktemp("lm-eval")
    plans = {(way.name, model): way.plan(world, model) for way in WAYS for model in MODELS}
    for model in MODELS:
        plans["chat", model] = {
            "model": "local-chat-completions",
            "model_args": {
                "model": model,
                "base_url": f"{world.url}/v1/chat/completions",
                "num_concurrent": 2,
                "max_retries": 1,
            },
            "tasks": ["graftwork_generate"],
            "apply_chat_template": True,
        }
    environment = {
        **os.environ,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.clients.lm_eval_runs", str(home / "out.json")],
        cwd=ROOT,
        env=environment,
        input=json.dumps(list(plans.values())),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    runs = json.loads((home / "out.json").read_text())
    return {key: [Sample(**sample) for sample in run] for key, run in zip(plans, runs, strict=True)}


def of_task(samples, way: str, model: str, task: str) -> list[Sample]:
    return [sample for sample in samples[way, model] if sample.task == task]


def ways_with(task: str) -> list[str]:
    return [way.name for way in WAYS if task in way.tasks]


def score(world: World, model: str, context: list[int], target: list[int]) -> tuple[float, bool]:
    """Log-likelihood of the target after the context, and whether it is the greedy one."""
    logprobs = world.logprobs(model, context + target)[-len(target) :]
    ids = torch.tensor(target)
    chosen = logprobs.gather(1, ids[:, None]).sum()
    return float(chosen), bool((logprobs.argmax(-1) == ids).all())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", ways_with("graftwork_choice"))
def test_labels_are_as_likely_as_in_transformers_and_peft(world, samples, way, model):
    found = of_task(samples, way, model, "graftwork_choice")
    assert len(found) == NUM_LABELS * len(ROWS)
    for sample in found:
        context, target = sample.arguments
        whole, before = (world.tokenizer(t).input_ids for t in (context + target, context))
        assert whole[: len(before)] == before
        expected, greedy = score(world, model, before, whole[len(before) :])
        value, is_greedy = sample.answer
        assert value == pytest.approx(expected, abs=TOLERANCE)
        assert is_greedy is greedy


def greedy_continuation(world: World, model: str, ids: list[int], count: int) -> list[int]:
    out = list(ids)
    for _ in range(count):
        out.append(int(world.logprobs(model, [*out, 0])[-1].argmax()))
    return out[len(ids) :]


@pytest.mark.parametrize("model", MODELS)
def test_what_is_greedy_is_told_so(world, model):
    """The tasks' labels are never greedy on a random model: here is a target that is.

    As lm-eval reads it: of every token the number must be that of the likeliest, to the last bit.
    """
    prompt = world.tokenizer("Übergröße 漢字 :").input_ids
    target = greedy_continuation(world, model, prompt, 6)
    unlikely = [*target[:-1], (target[-1] + 1) % len(world.tokenizer)]
    body = {
        "model": model,
        "prompt": [prompt + target, prompt + unlikely],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
    }
    choices = world.client.post("/v1/completions", json=body).json()["choices"]
    greedy = []
    for choice in choices:
        values = choice["logprobs"]["token_logprobs"]
        assert len(values) == len(prompt) + len(target) + 1
        assert values[0] is None
        tops = choice["logprobs"]["top_logprobs"]
        inside = slice(len(prompt), -1)
        greedy.append(
            [v == max(t.values()) for v, t in zip(values[inside], tops[inside], strict=True)]
        )
    assert greedy == [[True] * 6, [True] * 5 + [False]]


def windows(ids: list[int], first: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Context and target of every window of a long text, which starts after one token `first`."""
    yield [first], ids[:length]
    for start in range(length, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[end - length - 1 : start], ids[start:end]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", ways_with("graftwork_rolling"))
def test_whole_texts_are_as_likely_as_in_transformers_and_peft(world, samples, way, model):
    found = of_task(samples, way, model, "graftwork_rolling")
    assert [sample.text for sample in found] == [row["text"] for row in ROWS]
    room = next(one.max_length for one in WAYS if one.name == way) - 2
    lengths = []
    for sample in found:
        ids = world.tokenizer(sample.text).input_ids
        parts = list(windows(ids, world.tokenizer.bos_token_id, room))
        lengths.append(len(parts))
        expected = sum(score(world, model, *part)[0] for part in parts)
        assert sample.answer == pytest.approx(expected, abs=TOLERANCE * len(parts))
    assert (max(lengths) > 1) == (way == "ids-in-windows")


@pytest.mark.parametrize("model", MODELS)
def test_every_way_generates_the_same(world, samples, model):
    texts = {
        way: [sample.answer for sample in of_task(samples, way, model, "graftwork_generate")]
        for way in ways_with("graftwork_generate")
    }
    assert len({tuple(one) for one in texts.values()}) == 1
    for row, text in zip(ROWS, texts["ids"], strict=True):
        prompt = world.tokenizer(f"Tweet text : {row['text']} Label :").input_ids
        ids = greedy_continuation(world, model, prompt, 8)
        if world.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(world.tokenizer.eos_token_id)]
        plain = world.tokenizer.decode(ids, skip_special_tokens=True)
        assert text == plain.split("\n")[0]


@pytest.mark.parametrize("model", MODELS)
def test_chat_generates_what_the_template_asks(world, samples, model):
    found = samples["chat", model]
    assert len(found) == len(ROWS)
    for row, sample in zip(ROWS, found, strict=True):
        message = {"role": "user", "content": f"Tweet text : {row['text']} Label :"}
        body = {
            "model": model,
            "prompt": world.tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True
            ),
            "max_tokens": 8,
            "temperature": 0,
            "stop": ["\n", "</s>"],
        }
        whole = world.client.post("/v1/completions", json=body).json()
        assert sample.answer == whole["choices"][0]["text"]
