"""`graftwork generate`: an engine of its own and a running server give the same texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import AdapterError
from server.cli.backend import Backend, GenerationInput
from server.cli.found_adapters import find_adapters
from server.cli.http_client import RemoteServer, ServerRefused
from server.cli.in_process import PrivateEngine
from server.errors import RequestRefused
from tests.server.cli.runner import refusal, run, run_json
from tests.server.conftest import TEMPLATE, make_settings
from tests.server.http_server import save_prefix_adapter

LENGTH = ["--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def data_dir(tiny_base, tmp_path_factory) -> Path:
    """A data directory with the `complaints` of the running server."""
    home = tmp_path_factory.mktemp("generate")
    folder = save_prefix_adapter(home / "complaints", seed=1)
    words = ["--template", TEMPLATE, "--base", tiny_base, "--data-dir", home / "data"]
    run_json("adapters", "add", folder, *words)
    return home / "data"


@pytest.fixture
def offline(tiny_base, data_dir) -> list[object]:
    own = ["--base", tiny_base, "--dtype", "float32", "--threads", "1", "--data-dir", data_dir]
    return [*own, *LENGTH]


@pytest.fixture
def online(server) -> list[object]:
    return ["--url", server.base_url, *LENGTH]


@pytest.fixture(scope="module")
def places(server, tiny_base, data_dir) -> Iterator[tuple[Backend, Backend]]:
    """`complaints` in an engine of its own, and at the running server."""
    settings = make_settings(tiny_base, data_dir)
    here = PrivateEngine(settings, find_adapters(["complaints"], settings)[0])
    there = Backend(RemoteServer(str(server.base_url)))
    yield here, there
    here.close()
    there.close()


def lines(*arguments: object, **options) -> list[dict]:
    result = run("generate", *arguments, "--json", **options)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_both_places_say_what_the_route_says(server, offline, online):
    prompts = ["-p", "Label : ", "-p", "Übergrößen 🙂", "-a", "complaints"]
    here, there = lines(*prompts, *offline), lines(*prompts, *online)
    assert here == there
    assert [one["prompt"] for one in here] == ["Label : ", "Übergrößen 🙂"]
    parameters = {"max_new_tokens": 12, "details": True}
    for one in here:
        body = {"inputs": one["prompt"], "parameters": parameters}
        reply = server.post("/generate?adapter=complaints", json=body).json()
        assert reply["generated_text"] == one["generated_text"]
        assert reply["details"]["finish_reason"] == one["finish_reason"]
        assert reply["details"]["generated_tokens"] == one["num_tokens"]


@pytest.mark.parametrize(
    "prompt",
    [
        GenerationInput(row={"Tweet text": "my parcel never came </s>"}),
        GenerationInput(text="my parcel never came </s>"),
        GenerationInput(text="Übergrößen 🙂"),
    ],
)
@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 40, "ignore_eos": True},
        {"max_new_tokens": 20, "temperature": 0.8, "top_k": 20, "seed": 7},
        {"max_new_tokens": 20, "repetition_penalty": 1.3, "truncate": 3},
        {},
    ],
)
def test_both_places_give_the_same(places, prompt, parameters):
    here, there = (
        list(place.answers("complaints", [prompt, prompt], parameters)) for place in places
    )
    assert here == there
    assert here[0] == here[1]
    for place in places:
        streamed = "".join(place.pieces("complaints", prompt, parameters))
        assert here[0].text == streamed


def test_stop_strings_end_both(places):
    prompt = GenerationInput(text="the tweet")
    for place in places:
        (free,) = place.answers("complaints", [prompt], {"max_new_tokens": 12})
        stop = free.text[3:5]
        (cut,) = place.answers("complaints", [prompt], {"max_new_tokens": 12, "stop": [stop]})
        assert cut.finish_reason == "stop_sequence"
        assert free.text.startswith(cut.text)
        assert cut.text.endswith(stop)


def test_outputs_without_a_seed_differ(places):
    for place in places:
        answers = place.answers(
            "complaints", [GenerationInput(text="the tweet")] * 4, {"temperature": 5.0}
        )
        assert len({(answer.text, answer.seed) for answer in answers}) == 4


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (GenerationInput(row={"a": "b"}), "missing: 'Tweet text'; unknown: 'a'"),
        (GenerationInput(text="word " * 600), "at most 513 fit in all"),
    ],
)
def test_both_places_refuse_with_the_same_words(places, prompt, said):
    for place in places:
        for work in (
            place.answers("complaints", [prompt], {}),
            place.pieces("complaints", prompt, {}),
        ):
            with pytest.raises((AdapterError, RequestRefused, ServerRefused), match=said):
                list(work)


def test_a_stream_is_printed_and_a_folder_serves_without_a_server(tmp_path, offline, online):
    folder = save_prefix_adapter(tmp_path / "complaints", seed=1)
    asked = ["-p", "Label : ", "--stream"]
    here = run("generate", "-a", folder, *asked, *offline)
    there = run("generate", "-a", "complaints", *asked, *online)
    (whole,) = lines("-a", "complaints", "-p", "Label : ", *online)
    assert here.stdout == there.stdout == f"{whole['generated_text']}\n"
    assert "add it to the server" in refusal("generate", "-a", folder, "-p", "x", *online)


def test_lines_of_standard_input_are_prompts(online):
    asked = lines("-p", "one", "-p", "two", *online)
    assert lines(*online, text="one\n\ntwo\n") == asked
    plain = run("generate", *online, text="one\ntwo\n").stdout
    assert plain == "".join(f"{one['generated_text']}\n" for one in asked)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["-p", "x", "--temperature", "-1"],
            "--temperature: expected a number greater than 0, came -1.0",
        ),
        (["-p", "x", "--parameters", '{"max_token": 1}'], "did you mean 'max_new_tokens'?"),
        (
            ["-p", "x", "--parameters", '{"return_full_text": true}'],
            "unknown parameter 'return_full_text'; known are",
        ),
        (["-p", "x", "--parameters", "[]"], "expected a JSON object"),
        (["-p", "x", "--parameters", '{"max_new_tokens": 3}'], "max_new_tokens is given twice"),
        (["--row", '{"Text": "hi you"}'], "write --row 'Text=hi you'"),
        (["-p", "x", "--row", "a=b"], "--prompt and --row are both given"),
        (["-p", "x", "-p", "y", "--stream"], "--stream is for one prompt"),
        (["-p", "x", "--stream", "--json"], "--stream and --json"),
        ([], "came none"),
    ],
)
def test_refusals_before_anything_is_started(words, said):
    assert said in refusal("generate", *words, *LENGTH, text="")


def test_an_adapter_that_is_not_there_is_never_the_base(offline, online):
    for place in (offline, online):
        assert "nobody" in refusal("generate", "-a", "nobody", "-p", "x", *place)
    assert "no stored template" in refusal("generate", "--row", "a=b", *online)


def test_a_base_that_cannot_be_served_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    told = refusal("generate", "-p", "x", "--base", tmp_path)
    assert "expected safetensors weights" in told
