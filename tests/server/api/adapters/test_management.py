"""Management routes on a real server."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import time
import zipfile

import pytest

from adapters.metadata import AdapterMetadata
from server.app import create_app
from server.engine.request import SamplingParams
from server.generation.generator import Options
from tests.server.conftest import make_settings
from tests.server.http_server import HIDDEN, running_server, save_prefix_adapter, upload


def zipped(directory, folder="") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in directory.iterdir():
            archive.write(path, folder + path.name)
        archive.writestr("__MACOSX/._x", b"junk")
    return buffer.getvalue()


def test_upload_look_download_and_delete(server, tmp_path):
    folder = save_prefix_adapter(tmp_path / "a", seed=11)
    reply = upload(server, folder, "life", template="{x} :", labels='["a", "b"]', description="d")
    assert reply.status_code == 201
    body = reply.json()
    assert body["version"] == 1
    assert body["peft_type"] == "PREFIX_TUNING"
    assert body["num_virtual_tokens"] == 4
    assert body["ignored_files"] == ["README.md"]
    assert body["labels"] == ["a", "b"]
    assert any("/home/somebody/base" in warning for warning in body["warnings"])
    assert reply.headers["location"] == "/adapters/life"
    assert (reply.headers["x-adapter-id"], reply.headers["x-adapter-version"]) == ("life", "1")

    again = upload(server, folder, "life", template="{x} :", labels='["a", "b"]', description="d")
    assert (again.status_code, again.json()["version"]) == (200, 1)
    new = upload(server, save_prefix_adapter(tmp_path / "b", seed=12), "life")
    assert (new.status_code, new.json()["version"]) == (201, 2)

    detail = server.get("/adapters/life").json()
    assert detail["version"] == 2
    assert [one["version"] for one in detail["versions"]] == [1, 2]
    assert detail["config"]["peft_type"] == "PREFIX_TUNING"
    unused = {"requests": 0, "labels_ranked": 0, "last_used_at": None}
    assert detail["counters"] == unused
    listed = {one["name"]: one for one in server.get("/adapters").json()["adapters"]}
    assert listed["life"]["counters"] == unused
    assert len(server.get("/adapters?limit=1").json()["adapters"]) == 1

    server.post("/generate?adapter=life", json={"inputs": "x"})
    several = {"model": "life@1", "prompt": ["x", "y"], "n": 2, "max_tokens": 1}
    server.post("/v1/completions", json=several)
    server.post("/classify?adapter=life", json={"inputs": ["x", "y"], "labels": ["a", "b", "c"]})
    server.post("/generate?adapter=life", json={"inputs": ""})  # refused
    used = server.get("/adapters/life").json()["counters"]
    assert (used["requests"], used["labels_ranked"]) == (3, 6)
    assert used["last_used_at"] > detail["created_at"]
    listed = {one["name"]: one for one in server.get("/adapters").json()["adapters"]}
    assert listed["life"]["counters"] == used

    for query, source in (("?version=1", folder), ("", tmp_path / "b")):
        download = server.get(f"/adapters/life/download{query}")
        with zipfile.ZipFile(io.BytesIO(download.content)) as archive:
            names = {name.rpartition("/")[2]: name for name in archive.namelist()}
            weights = archive.read(names["adapter_model.safetensors"])
            assert weights == (source / "adapter_model.safetensors").read_bytes()

    rolled = server.post("/adapters/life/rollback", json={"version": 1})
    assert rolled.json()["is_default"] is True
    assert server.put("/adapters/life/aliases/prod", json={"version": 2}).json()["aliases"] == [
        "prod"
    ]
    body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
    for name, version in (("life", "1"), ("life@2", "2"), ("life@prod", "2"), ("prod", "2")):
        reply = server.post(f"/generate?adapter={name}", json=body)
        assert reply.headers["x-adapter-version"] == version
    assert server.get("/adapters/life").json()["residency"] in ("host", "device")
    assert server.post("/adapters/life/preload?version=2").status_code == 202
    assert server.post("/adapters/life/unload").status_code == 202

    one = server.delete("/adapters/life?version=1")
    assert one.json() == {"name": "life", "deleted_versions": [1]}
    assert server.delete("/adapters/life").json()["deleted_versions"] == [2]
    for path in ("/adapters/life", "/adapters/life/download"):
        gone = server.get(path)
        assert gone.status_code == 404
        assert gone.json()["code"] == "adapter_not_found"
    assert server.delete("/adapters/life").status_code == 404


def test_a_config_as_people_have_it_is_served_as_the_plain_one(server, tmp_path):
    """Numbers of all heads, fields of another version, a byte order mark, a tokenizer with more tokens."""
    plain = upload(server, save_prefix_adapter(tmp_path / "a", seed=71), "plain-config")
    folder = save_prefix_adapter(tmp_path / "b", seed=71)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"token_dim": HIDDEN, "num_attention_heads": 4, "inference_mode": None}
    config |= {"use_dora": False, "future_field": None}
    (folder / "adapter_config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())
    tokens = {"added_tokens_decoder": {"0": {"content": "<sep>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    found = upload(server, folder, "peoples-config")
    assert (plain.status_code, found.status_code) == (201, 201)
    warnings = found.json()["warnings"]
    for words in (
        "tokens that the base's does not have: '<sep>'",
        "token_dim is 32, this base has",
    ):
        assert any(words in one for one in warnings), warnings
    assert any("future_field (null), use_dora (false)" in one for one in warnings)
    told = [
        server.post(f"/generate?adapter={name}", json={"inputs": "a tweet"}).json()
        for name in ("plain-config", "peoples-config")
    ]
    assert told[0] == told[1]
    with zipfile.ZipFile(
        io.BytesIO(server.get("/adapters/peoples-config/download").content)
    ) as archive:
        (name,) = [one for one in archive.namelist() if one.endswith("adapter_config.json")]
        assert json.loads(archive.read(name)) == config  # PEFT reads no byte order mark


@pytest.mark.parametrize(
    ("fields", "separator", "prompt"),
    [
        ({"template": "{x} :"}, " ", "a :"),
        ({"template": "{x} :\n"}, "\n", "a :"),
        ({"template": "{x} : ", "target_separator": ""}, "", "a :"),
        ({"template": "{x} : ", "tokenization": "as_written"}, "", "a : "),
        (
            {"template": "{x} :", "tokenization": "as_written", "target_separator": "->"},
            "->",
            "a :",
        ),
    ],
)
def test_white_space_at_the_end_of_a_template(server, tmp_path, fields, separator, prompt):
    folder = save_prefix_adapter(tmp_path / "w", seed=14)
    uploaded = upload(server, folder, "white", **fields).json()
    assert uploaded["target_separator"] == separator
    assert uploaded["tokenization"] == fields.get("tokenization", "boundary")
    assert uploaded["job_id"] is uploaded["metrics"] is None
    assert server.get("/adapters/white").json()["recipe"] is None
    parameters = {"max_new_tokens": 1, "decoder_input_details": True}
    body = {"row": {"x": "a"}, "parameters": parameters}
    details = server.post("/generate?adapter=white", json=body).json()["details"]
    assert "".join(token["text"] for token in details["prefill"]) == prompt
    server.delete("/adapters/white")


def test_a_zip_one_folder_down(server, tmp_path):
    data = zipped(save_prefix_adapter(tmp_path / "z", seed=13), "checkpoint-7/")
    files = {"files": ("adapter.zip", data)}
    reply = server.post("/adapters", data={"name": "zipped"}, files=files)
    assert reply.status_code == 201, reply.text
    assert "__MACOSX/._x" in reply.json()["ignored_files"]
    server.delete("/adapters/zipped")


def test_create_only(server, tmp_path):
    folder = save_prefix_adapter(tmp_path / "c")
    files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
    for name, status in (("complaints", 412), ("fresh", 201)):
        reply = server.post(
            "/adapters", data={"name": name}, files=files, headers={"if-none-match": "*"}
        )
        assert reply.status_code == status
    server.delete("/adapters/fresh")
    odd = server.post("/adapters", data={"name": "x"}, files=files, headers={"if-none-match": "1"})
    assert odd.status_code == 422


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"name": "Bad Name"}, 422, "name_invalid"),
        ({"name": "tiny-base"}, 422, "name_invalid"),
        ({}, 422, "invalid"),
        ({"name": "x", "template": "{"}, 422, "template_invalid"),
        ({"name": "x", "template": "Tweet text"}, 422, "template_invalid"),
        ({"name": "x", "template": ""}, 422, "template_invalid"),
        ({"name": "x", "labels": "[1]"}, 422, "invalid"),
        ({"name": "x", "labels": '["complaint"]'}, 422, "invalid"),
        ({"name": "x", "labels": "[oops"}, 422, "invalid"),
        ({"name": "x", "labels": "[]"}, 422, "invalid"),
        ({"name": "x", "append_eos": "yes"}, 422, "invalid"),
        ({"name": "x", "tokenization": "other"}, 422, "config_invalid"),
        ({"name": "x", "adapter": "y"}, 422, "invalid"),
        ({"name": ["x", "y"]}, 422, "invalid"),
    ],
)
def test_a_form_that_is_wrong_is_refused_with_its_field(server, tmp_path, fields, status, code):
    folder = save_prefix_adapter(tmp_path / "f")
    files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
    reply = server.post("/adapters", data=fields, files=files)
    assert (reply.status_code, reply.json()["code"]) == (status, code), reply.text
    assert reply.json()["field"]


def test_labels_as_one_text_with_commas_are_shown_as_the_list_that_may_be_meant(server, tmp_path):
    folder = save_prefix_adapter(tmp_path / "l")
    reply = upload(server, folder, "listed", labels="complaint,no complaint, complaint")
    assert reply.status_code == 422
    said = reply.json()["error"]
    meant = said.partition("send labels=")[2]
    assert meant == '["complaint", "no complaint"]'
    assert upload(server, folder, "listed", labels=meant).json()["labels"] == json.loads(meant)
    one = upload(server, folder, "listed", labels="complaint")
    assert (one.status_code, "send labels=" in one.json()["error"]) == (422, False)
    server.delete("/adapters/listed")


def test_what_people_really_try(server, tmp_path):
    lora = save_prefix_adapter(tmp_path / "lora")
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    reply = upload(server, lora, "lora")
    assert (reply.status_code, reply.json()["code"]) == (422, "method_unsupported")

    pickle = {"files": ("adapter_model.bin", b"PK\x03\x04")}
    reply = server.post("/adapters", data={"name": "p"}, files=pickle)
    assert reply.status_code in (415, 422)
    assert "safetensors" in reply.json()["error"]

    reply = server.post("/adapters", json={"name": "x"})
    assert (reply.status_code, reply.json()["code"]) == (415, "wrong_content_type")
    reply = server.post("/adapters", data={"name": "x"}, files={"other": b"1"})
    assert reply.status_code == 422
    empty = server.post("/adapters", files={"name": (None, "x")})
    assert (empty.status_code, empty.json()["field"]) == (422, "files")


def test_a_broken_form(server):
    def post(body, boundary="b"):
        kind = f"multipart/form-data; boundary={boundary}"
        return server.post("/adapters", content=body, headers={"content-type": kind})

    part = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n'
    for body in (b"", b"nonsense", part + b"x", part + b"\xff\r\n--b--\r\n", b"--b--\r\n"):
        reply = post(body)
        assert reply.status_code == 422, body
        assert reply.json()["error"]
    assert post(part + b"x\r\n--b--\r\n", "x" * 500).status_code == 422
    huge = post(part + b"x" * 70_000 + b"\r\n--b--\r\n")
    assert (huge.status_code, huge.json()["field"]) == (422, "name")


def test_unknown_things_are_refused(server):
    assert server.get("/adapters?limit=0").status_code == 422
    assert server.get("/adapters?page=2").status_code == 400
    assert server.delete("/adapters/complaints?verzion=1").status_code == 400
    assert server.post("/adapters/complaints/rollback", json={"version": 9}).status_code == 404
    extra = server.post("/adapters/complaints/rollback", json={"version": 1, "x": 1})
    assert (extra.status_code, extra.json()["field"]) == (422, "x")
    assert server.put("/adapters/complaints/aliases/7", json={"version": 1}).status_code == 422


def test_models_info_and_methods(server):
    models = server.get("/v1/models").json()["data"]
    assert models[0]["id"] == "tiny-base"
    assert models[0]["parent"] is None
    by_id = {model["id"]: model for model in models}
    assert by_id["complaints"]["parent"] == "tiny-base"
    assert by_id["complaints"]["peft_type"] == "PREFIX_TUNING"
    info = server.get("/info").json()
    assert info["model_id"] == "tiny-base"
    assert info["max_total_tokens"] > info["max_input_tokens"]
    methods = {one["peft_type"]: one for one in server.get("/methods").json()["methods"]}
    assert {"PREFIX_TUNING", "P_TUNING", "IA3", "CPT", "PROMPT_TUNING"} <= methods.keys()
    properties = methods["PREFIX_TUNING"]["config"]["properties"]
    assert properties["prefix_projection"]["default"] is False


def test_tokenizer_routes(server):
    spans = server.post("/tokenize", json={"inputs": "the tweet"}).json()
    assert "".join(span["text"] for span in spans) == "the tweet"
    tokens = server.post("/tokenize", json={"prompt": "the tweet"}).json()
    assert tokens["tokens"] == [span["id"] for span in spans]
    assert tokens["count"] == len(spans)
    back = server.post("/detokenize", json={"tokens": tokens["tokens"]})
    assert back.json() == {"prompt": "the tweet"}
    assert server.post("/detokenize", json={"tokens": [10**9]}).status_code == 422
    assert server.post("/detokenize", json={"tokens": [-1]}).status_code == 422
    assert server.post("/tokenize", json={}).status_code == 422
    assert server.get("/tokenizer_info").json()["eos_token"] == "</s>"


def test_health_and_docs(server):
    for path in ("/livez", "/readyz", "/health", "/docs", "/openapi.json"):
        reply = server.get(path)
        assert reply.status_code == 200
        assert reply.headers["x-request-id"]


def test_an_upload_over_the_limit_is_refused_and_leaves_nothing(tiny_base, tmp_path):
    settings = make_settings(tiny_base, tmp_path / "data", max_upload_mib=1)

    def chunks():
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="f"\r\n\r\n'
        for _ in range(48):
            yield b"x" * 65_536

    with running_server(settings) as client:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        reply = client.post("/adapters", content=chunks(), headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (413, "body_too_large")
        left = [path for path in (tmp_path / "data").rglob("*") if path.stat().st_size > 500_000]
        assert left == []


def test_a_damaged_adapter_shows_as_corrupt_and_can_be_put_right(server, tmp_path):
    folder = save_prefix_adapter(tmp_path / "d", seed=31)
    digest = upload(server, folder, "damaged").json()["digest"]
    weights = server.app_services().registry.blob_path(digest) / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    body = {"inputs": "x", "parameters": {"max_new_tokens": 2}}
    reply = server.post("/generate?adapter=damaged", json=body)
    assert reply.status_code == 424
    assert "digest" in reply.json()["error"]
    assert server.get("/adapters/damaged").json()["status"] == "corrupt"
    listed = {one["name"]: one["status"] for one in server.get("/adapters").json()["adapters"]}
    assert (listed["damaged"], listed["complaints"]) == ("corrupt", "ok")
    again = server.post("/generate?adapter=damaged", json=body)
    assert again.status_code == 424
    assert "upload it again" in again.json()["error"]
    upload(server, folder, "damaged")
    assert server.get("/adapters/damaged").json()["status"] == "ok"
    assert server.post("/generate?adapter=damaged", json=body).status_code == 200
    server.delete("/adapters/damaged")


def test_an_adapter_trained_on_another_base_is_refused_by_name(server, tmp_path):
    services = server.app_services()
    other = dataclasses.replace(services.client.base, digest="e" * 64)
    folder = save_prefix_adapter(tmp_path / "o", seed=32)
    (folder / "README.md").unlink()
    services.registry.publish("foreign", folder, other, AdapterMetadata(base_digest=other.digest))
    body = {"inputs": "x", "parameters": {"max_new_tokens": 2}}
    for path in ("/generate", "/generate_stream"):
        reply = server.post(f"{path}?adapter=foreign", json=body)
        assert reply.status_code == 422
        assert "e" * 12 in reply.json()["error"]
    assert server.get("/adapters/foreign").json()["status"] == "ok"
    server.delete("/adapters/foreign")


async def test_what_was_deleted_leaves_the_disk_once_nobody_needs_it(tiny_base, tmp_path):
    app = create_app(make_settings(tiny_base, tmp_path / "data"), collect_seconds=0.05)
    async with app.router.lifespan_context(app):
        services = app.state.services
        await until(lambda: services.ready)
        registry, client = services.registry, services.client
        paths = []
        for seed in (41, 42):
            folder = save_prefix_adapter(tmp_path / str(seed), seed=seed)
            (folder / "README.md").unlink()
            record = registry.publish(f"a{seed}", folder, client.base).record
            paths.append(registry.blob_path(record.digest))
        idle, used = paths
        generator = services.generator
        record = await generator.resolve("a42")
        options = Options(SamplingParams(ignore_eos=True), 400)
        prompt = await generator.encode("x")
        registry.delete("a41")
        registry.delete("a42")
        await until(lambda: not idle.exists())
        # Resolved before it was deleted: whatever the engine has to read is still there.
        request = generator.prepare(prompt, record, options, "r")
        generation = generator.submit(request, options)
        pieces = [piece async for piece in generation]
        assert len(pieces) == 400
        assert used.exists()
        generator._resolved_at.clear()  # a minute later
        await until(lambda: not used.exists())


async def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.01)
