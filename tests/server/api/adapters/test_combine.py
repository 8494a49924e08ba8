"""POST /adapters/combine on a running server: what comes out, what is inherited, what is refused."""

from __future__ import annotations

import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from tests.adapters.methods.oracle import no_peft_warnings, peft_save
from tests.server.http_server import save_prefix_adapter, upload

PROMPT = {"inputs": "Tweet text : my parcel is late Label :", "parameters": {"max_new_tokens": 8}}


def save_ia3(base: Path, folder: Path, targets: list[str], seed: int) -> Path:
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        feedforward_modules=[name for name in targets if name == "down_proj"],
    )
    peft_save(AutoModelForCausalLM.from_pretrained(base), config, folder, seed)
    return folder


@pytest.fixture(scope="module")
def ia3(server, tiny_base, tmp_path_factory) -> list[Path]:
    """Two IA3 adapters, `scales-a` and `scales-b`, that share one target."""
    home = tmp_path_factory.mktemp("ia3")
    targets = {"a": ["k_proj", "down_proj"], "b": ["v_proj", "down_proj"]}
    folders = []
    for seed, (name, modules) in enumerate(targets.items(), 1):
        folders.append(save_ia3(tiny_base, home / name, modules, seed))
        assert upload(server, folders[-1], f"scales-{name}").status_code == 201
    return folders


def combine(server, **body):
    return server.post("/adapters/combine", json=body)


def tensors(server, name: str) -> dict[str, torch.Tensor]:
    archive = server.get(f"/adapters/{name}/download").content
    return load(zipfile.ZipFile(io.BytesIO(archive)).read("adapter_model.safetensors"))


def peft_model(base: Path, folders: list[Path]):
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(folders[0]), adapter_name="a"
    )
    model.load_adapter(str(folders[1]), adapter_name="b")
    return model.eval()


def test_the_sum_is_pefts_and_so_are_its_tokens(server, tiny_base, ia3):
    reply = combine(
        server, adapters=["scales-a", "scales-b@1"], weights=[0.7, 0.6], name="sum-linear"
    )
    assert reply.status_code == 201, reply.text
    assert reply.headers["location"] == "/adapters/sum-linear"
    assert reply.headers["x-adapter-id"] == "sum-linear"
    made = reply.json()
    assert (made["name"], made["version"], made["source"]) == ("sum-linear", 1, "combined")
    assert made["ignored_files"] == []
    parents = [server.get(f"/adapters/scales-{name}").json() for name in "ab"]
    assert server.get("/adapters/sum-linear").json()["recipe"] == {
        "combination_type": "linear",
        "adapters": [
            {"name": f"scales-{name}", "version": 1, "digest": parent["digest"], "weight": weight}
            for name, parent, weight in zip("ab", parents, (0.7, 0.6), strict=True)
        ],
    }
    with no_peft_warnings():
        model = peft_model(tiny_base, ia3)
        model.add_weighted_adapter(["a", "b"], [0.7, 0.6], "sum")
        model.set_adapter("sum")
        want = {
            name.replace(".ia3_l.sum", ".ia3_l"): parameter
            for name, parameter in model.named_parameters()
            if name.endswith("ia3_l.sum")
        }
    ours = tensors(server, "sum-linear")
    assert ours.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(ours[name], tensor), name
    tokens = server.post("/tokenize", json={"prompt": PROMPT["inputs"]}).json()["tokens"]
    ids = torch.tensor([tokens])
    with torch.no_grad(), no_peft_warnings():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
    text = server.post("/detokenize", json={"tokens": out[0, ids.shape[1] :].tolist()}).json()
    served = server.post("/generate", params={"adapter": "sum-linear"}, json=PROMPT).json()
    assert served["generated_text"] == text["prompt"].replace("</s>", "")


def test_delta_and_linear_differ_where_a_module_is_missing(server, ia3):
    reply = combine(
        server,
        adapters=["scales-a", "scales-b"],
        weights=[1, -0.5],
        name="sum-delta",
        combination_type="delta",
    )
    assert reply.status_code == 201, reply.text
    ours, a = tensors(server, "sum-delta"), tensors(server, "scales-a")
    only_a = [name for name in ours if "k_proj" in name]
    assert only_a
    for name in only_a:
        assert torch.allclose(ours[name], a[name], atol=1e-6)


def test_prefixes_add_and_serve(server, tmp_path):
    for seed, name in ((5, "sum-p1"), (6, "sum-p2")):
        upload(server, save_prefix_adapter(tmp_path / name, seed=seed), name)
    reply = combine(server, adapters=["sum-p1", "sum-p2"], weights=[0.5, 0.5], name="sum-prefix")
    assert reply.status_code == 201, reply.text
    rows = [tensors(server, name)["prompt_embeddings"] for name in ("sum-p1", "sum-p2")]
    assert torch.equal(
        tensors(server, "sum-prefix")["prompt_embeddings"], rows[0] * 0.5 + rows[1] * 0.5
    )
    reply = server.post("/generate", params={"adapter": "sum-prefix"}, json=PROMPT)
    assert reply.status_code == 200
    assert reply.headers["x-adapter-id"] == "sum-prefix"


def test_words_are_inherited_where_the_adapters_agree(server, tmp_path):
    said = {"template": "{x} :", "labels": '["a", "b"]', "append_eos": "true"}
    for seed, name, fields in (
        (7, "words-1", said),
        (8, "words-2", said),
        (9, "words-3", {**said, "template": "{y} ->", "append_eos": "false"}),
    ):
        upload(server, save_prefix_adapter(tmp_path / name, seed=seed), name, **fields)
    same = combine(
        server, adapters=["words-1", "words-2"], weights=[1, 1], name="words-same", description="d"
    ).json()
    assert (same["template"], same["labels"], same["append_eos"]) == ("{x} :", ["a", "b"], True)
    assert same["description"] == "d"
    assert not [warning for warning in same["warnings"] if "agree" in warning]
    differ = combine(
        server, adapters=["words-1", "words-3"], weights=[1, 1], name="words-differ"
    ).json()
    assert (differ["template"], differ["labels"], differ["append_eos"]) == (None, ["a", "b"], None)
    told = [warning.split(":")[0] for warning in differ["warnings"] if "agree" in warning]
    assert told == ["template", "append_eos"]
    given = combine(
        server,
        adapters=["words-1", "words-3"],
        weights=[1, 1],
        name="words-given",
        template="{z} =\n",
        labels=["c"],
        append_eos=False,
    ).json()
    assert (given["template"], given["labels"]) == ("{z} =\n", ["c"])
    assert (given["target_separator"], given["append_eos"]) == ("\n", False)
    assert not [warning for warning in given["warnings"] if "agree" in warning]


def test_cpt_contexts_that_differ_add_with_a_warning(server, tiny_base, tmp_path):
    for seed, ids in enumerate(([5, 9, 11], [5, 9, 12])):
        config = peft.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=ids,
            cpt_mask=[1] * 3,
            cpt_tokens_type_mask=[1, 2, 4],
            num_virtual_tokens=3,
        )
        base = AutoModelForCausalLM.from_pretrained(tiny_base)
        peft_save(base, config, tmp_path / str(seed), seed)
        assert upload(server, tmp_path / str(seed), f"cpt-{seed}").status_code == 201
    for second, differ in (("cpt-0", 0), ("cpt-1", 1)):
        reply = combine(
            server, adapters=["cpt-0", second], weights=[0.5, 0.5], name=f"sum-of-{second}"
        )
        assert reply.status_code == 201, reply.text
        assert sum("contexts differ" in one for one in reply.json()["warnings"]) == differ
    shown = server.get("/adapters/sum-of-cpt-1").json()
    assert shown["config"]["cpt_token_ids"] == [5, 9, 11]


def test_of_two_sums_with_one_name_one_is_made(server, ia3):
    body = {"adapters": ["scales-a", "scales-b"], "name": "sum-race"}
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda w: combine(server, **body, weights=[w, 1]), range(4)))
    assert sorted(reply.status_code for reply in replies) == [201, 412, 412, 412]
    assert len(server.get("/adapters/sum-race").json()["versions"]) == 1


def test_damaged_bytes_are_not_added(server, tmp_path):
    upload(server, save_prefix_adapter(tmp_path / "p", seed=50), "sum-damaged")
    services = server.app_services()
    digest = server.get("/adapters/sum-damaged").json()["digest"]
    blob = services.registry.blob_path(digest)
    (blob / "adapter_model.safetensors").write_bytes(b"damaged")
    services.registry.verify(digest)
    reply = combine(server, **{**GOOD, "adapters": ["complaints", "sum-damaged"]})
    assert (reply.status_code, reply.json()["code"]) == (424, "adapter_corrupt")
    server.delete("/adapters/sum-damaged")


GOOD = {"adapters": ["complaints", "other"], "weights": [1, 1], "name": "sum-bad"}


@pytest.mark.parametrize(
    ("change", "status", "code", "field"),
    [
        ({"name": "complaints"}, 412, "adapter_exists", "name"),
        ({"name": "Not A Name"}, 422, "name_invalid", "name"),
        ({"name": "tiny-base"}, 422, "name_invalid", "name"),
        ({"adapters": ["complaints", "nobody"]}, 404, "adapter_not_found", "adapter"),
        ({"adapters": ["complaints@9", "other"]}, 404, "version_not_found", "adapter"),
        ({"adapters": ["complaints", "scales-a"]}, 422, "combine_invalid", "adapters"),
        ({"adapters": []}, 422, "invalid", "adapters"),
        ({"adapters": ["complaints"] * 65, "weights": [1] * 65}, 422, "invalid", "adapters"),
        ({"weights": [1]}, 422, "combine_invalid", "weights"),
        ({"weights": [1, "1"]}, 422, "invalid", "weights.1"),
        ({"weights": [1, True]}, 422, "invalid", "weights.1"),
        ({"weights": [1, 1e300]}, 422, "combine_invalid", "weights"),
        ({"weights": [1, 10**400]}, 422, "invalid", "weights.1"),
        ({"combination_type": "svd"}, 422, "invalid", "combination_type"),
        ({"combination_type": "delta"}, 422, "combine_invalid", "combination_type"),
        ({"template": "{"}, 422, "template_invalid", "template"),
        ({"labels": ["a", "a"]}, 422, "invalid", "labels"),
        ({"adapter_name": "x"}, 422, "invalid", "adapter_name"),
    ],
)
def test_what_is_refused_is_told_and_leaves_nothing(server, ia3, change, status, code, field):
    reply = combine(server, **{**GOOD, **change})
    assert (reply.status_code, reply.json()["code"]) == (status, code), reply.text
    assert reply.json()["field"] == field
    assert server.get("/adapters/sum-bad").status_code == 404


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "1e400"])
def test_numbers_that_json_should_not_have(server, weight):
    body = json.dumps(GOOD).replace("[1, 1]", f"[1, {weight}]")
    reply = server.post(
        "/adapters/combine", content=body, headers={"content-type": "application/json"}
    )
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid")


def test_an_adapter_may_be_called_combine(server, tmp_path):
    assert upload(server, save_prefix_adapter(tmp_path / "p", seed=3), "combine").status_code == 201
    assert server.get("/adapters/combine").json()["name"] == "combine"
    assert server.delete("/adapters/combine").status_code == 200
