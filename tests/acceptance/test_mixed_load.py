"""64 requests at once over HTTP: eight adapters of five methods and the base, streamed and not.

A tiny Llama on disk in float32, adapters that PEFT made on that very base, uploaded as PEFT saved them.
Every request that is not dropped gives the tokens of its solo run, and those of PEFT's `generate`.
(That the weights in the process stay the same bytes is tested with the engine.)
"""

from __future__ import annotations

import hashlib
import random
import time
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.acceptance.http_load import Call, run_load
from tests.conformance.peft_oracle import ask, make_adapter
from tests.conformance.test_grid import same_until_a_tie
from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_tiny_base, upload

# Eight adapters, of all five methods.
ADAPTERS = (
    "prefix",
    "prefix-projection",
    "p-tuning-mlp",
    "p-tuning-lstm",
    "cpt",
    "prompt-tuning",
    "ia3",
    "ia3-output-side",
)
NUM_REQUESTS = 64
TEXT = (
    "the tweet is a complaint, no complaint at all. Übergrößen kosten 5 € — naïve 漢字 🙂 emoji. "
    * 3
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def the_load() -> list[Call]:
    """Nine kinds in turn, so that each comes seven times at least; every eighth is dropped midway."""
    chosen = random.Random(20)
    kinds = [None, *ADAPTERS]
    calls = []
    for index in range(NUM_REQUESTS):
        start, length = chosen.randrange(60), chosen.choice((1, 5, 17, 40, 90, 160))
        dropped = index % 8 == 3 or index % 16 == 4
        streamed = index % 2 == 1
        call = Call(
            name=f"r{index}",
            prompt=TEXT[start : start + length],
            adapter=kinds[index % len(kinds)],
            # Dropped ones want more than they will get.
            max_new_tokens=250 if dropped else chosen.randint(20, 80),
            streamed=streamed,
            delay=chosen.random() * 0.15,
            drop_after=chosen.randint(2, 6) if dropped else None,
        )
        calls.append(call)
    return calls


def digests(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.suffix in {".safetensors", ".json"} and not path.name.startswith("graftwork")
    }


def wait_until_idle(client, seconds=10.0):
    """Dropped requests leave within two steps; their news takes a moment longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        engine = client.get("/info").json()["engine"]
        if engine["num_running"] == engine["num_waiting"] == 0:
            return engine
        time.sleep(0.02)
    raise AssertionError(f"requests are left: {engine}")


def alone(client, call: Call) -> list[int]:
    """Its tokens with nobody else in the engine."""
    query = {} if call.adapter is None else {"adapter": call.adapter}
    reply = client.post("/generate", params=query, json=call.body)
    return [token["id"] for token in reply.json()["details"]["tokens"]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("mixed-load-base"))


@pytest.fixture(scope="module")
def peft_models(tiny, tmp_path_factory):
    """Name -> (model, folder as PEFT left it, README included); None is the base."""
    made = {}
    for name in ADAPTERS:
        folder = tmp_path_factory.mktemp(name)
        model = make_adapter(load(tiny), "llama", name, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder)
        assert (folder / "README.md").is_file()
        made[name] = (model, folder)
    return {None: (load(tiny), None), **made}


def load(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def test_64_at_once_give_what_each_gives_alone_and_what_peft_gives(tiny, peft_models, tmp_path):
    calls = the_load()
    weights_before = digests(tiny)
    settings = make_settings(tiny, tmp_path / "data", max_running=64)
    with running_server(settings) as client:
        for name in ADAPTERS:
            reply = upload(client, peft_models[name][1], name)
            assert reply.status_code == 201, reply.text
            assert reply.json()["ignored_files"] == ["README.md"]
        in_flight = client.app_services().client
        together = run_load(client.base_url, calls, lambda: in_flight.num_in_flight)
        wait_until_idle(client)
        assert in_flight.num_in_flight == 0
        solo = {one.name: alone(client, one) for one in calls if one.drop_after is None}
        assert wait_until_idle(client)["num_running"] == 0
    print(f"\nat most {together.peak} requests in flight at once")
    assert together.peak > NUM_REQUESTS // 3
    assert digests(tiny) == weights_before
    assert len(solo) == NUM_REQUESTS - 12
    assert {name: together.tokens[name] for name in solo} == solo

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for one in calls:
        # Of a stream that was dropped, what came until then is right as well.
        got = together.tokens[one.name]
        prompt = tokenizer(one.prompt)["input_ids"]
        if got:
            oracle = ask(peft_models[one.adapter][0], prompt, len(got))
            assert same_until_a_tie(got, oracle), one


def test_the_adapters_change_the_output(tiny, peft_models):
    prompt = AutoTokenizer.from_pretrained(tiny)(TEXT[:40])["input_ids"]
    outputs = {tuple(ask(model, prompt, 8).token_ids) for model, _ in peft_models.values()}
    assert len(outputs) == len(peft_models)
