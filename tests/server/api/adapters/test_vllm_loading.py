"""vLLM's load and unload routes, and the watched directory, on running servers."""

from __future__ import annotations

import io
import os
import shutil
import time
import zipfile
from pathlib import Path

import openai
import pytest

from server.config.settings import Settings
from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_prefix_adapter, upload

BODY = {"inputs": "Label :", "parameters": {"max_new_tokens": 4}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`allowed` with the adapters a and b, `watched` with early, and `secret` beside them."""
    home = tmp_path_factory.mktemp("folders")
    for seed, path in enumerate(("allowed/a", "allowed/b", "watched/early", "secret")):
        save_prefix_adapter(home / path, seed=10 + seed)
    return home


@pytest.fixture(scope="module")
def managed(tiny_base, folders, tmp_path_factory):
    """A server that may load from `allowed` and watches `watched`."""
    settings = make_settings(
        tiny_base,
        tmp_path_factory.mktemp("managed") / "data",
        load_dirs=[folders / "allowed"],
        adapter_dir=folders / "watched",
        adapter_dir_seconds=0.1,
    )
    with running_server(settings) as client:
        yield client


def load(client, name: str, path: Path | str, **more):
    return client.post(
        "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more}
    )


def unload(client, name: str, **more):
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name, **more})


def models(client) -> list[str]:
    return [model["id"] for model in client.get("/v1/models").json()["data"]]


def generated(client, name: str):
    return client.post("/generate", params={"adapter": name}, json=BODY)


def test_load_and_unload_as_vllm_does(managed, folders):
    reply = load(managed, "loaded", folders / "allowed" / "a")
    assert reply.status_code == 200, reply.text
    assert reply.text == "Success: LoRA adapter 'loaded' added successfully."
    assert reply.headers["content-type"].startswith("text/plain")
    assert reply.headers["x-adapter-id"] == "loaded"
    assert "loaded" in models(managed)
    assert generated(managed, "loaded").status_code == 200
    record = managed.get("/adapters/loaded").json()
    assert record["source"] == "loaded"
    assert str(folders) not in str(record)  # a client learns no path of the server
    reply = unload(managed, "loaded")
    assert (reply.status_code, reply.text) == (
        200,
        "Success: LoRA adapter 'loaded' removed successfully.",
    )
    assert "loaded" not in models(managed)
    assert generated(managed, "loaded").status_code == 404


def test_a_path_may_be_relative_and_a_name_may_be_loaded_in_place(managed, folders):
    assert load(managed, "inplace", "a").status_code == 200
    reply = load(managed, "inplace", "b")
    assert reply.status_code == 412
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("adapter_exists", "lora_name")
    assert "already been loaded" in error["message"]
    assert load(managed, "inplace", "b", load_inplace=True).status_code == 200
    assert load(managed, "inplace", "b", load_inplace=True).status_code == 200
    versions = managed.get("/adapters/inplace").json()["versions"]
    assert [one["version"] for one in versions] == [1, 2]
    assert unload(managed, "inplace", lora_int_id=3).status_code == 200


def test_what_may_not_be_loaded_is_not_told_apart(managed, folders):
    (folders / "allowed" / "link").symlink_to(folders / "secret")
    replies = [
        load(managed, "x", path)
        for path in (
            folders / "secret",
            folders / "nowhere",
            "../secret",
            "link",
            "/etc",
            "/etc/passwd",
            "somebody/on-the-hub",
            "a\0",
        )
    ]
    bodies = {reply.text for reply in replies}
    assert len(bodies) == 1
    assert {reply.status_code for reply in replies} == {404}
    assert replies[0].json()["error"]["code"] == "folder_not_found"
    assert replies[0].json()["error"]["type"] == "not_found_error"
    assert "x" not in models(managed)


@pytest.mark.parametrize(
    ("name", "spoil", "status", "code"),
    [
        ("Not A Name", None, 422, "name_invalid"),
        ("tiny-base", None, 422, "name_invalid"),
        ("broken", lambda p: (p / "adapter_config.json").write_text("{"), 422, "config_invalid"),
        ("broken", lambda p: (p / "adapter_model.safetensors").unlink(), 422, "file_set_invalid"),
        (
            "broken",
            lambda p: (p / "adapter_model.safetensors").rename(p / "adapter_model.bin"),
            415,
            "unsupported_file",
        ),
        ("broken", lambda p: (p / "graftwork.json").write_text("{}"), 422, "config_invalid"),
        (
            "broken",
            lambda p: [
                (p / "adapter_model.safetensors").unlink(),
                os.mkfifo(p / "adapter_model.safetensors"),
            ],
            404,
            "folder_not_found",
        ),
    ],
)
def test_the_checks_are_those_of_an_upload(managed, folders, name, spoil, status, code):
    folder = folders / "allowed" / "spoilt"
    shutil.rmtree(folder, ignore_errors=True)
    save_prefix_adapter(folder, seed=20)
    if spoil is not None:
        spoil(folder)
    reply = load(managed, name, folder)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), reply.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "", "lora_path": "a"}, "lora_name"),
        ({"lora_name": "x", "lora_path": ["a"]}, "lora_path"),
        ({"lora_name": "x", "lora_path": "a", "load_inplace": "yes"}, "load_inplace"),
    ],
)
def test_a_body_that_is_wrong_names_its_field(managed, body, param):
    reply = managed.post("/v1/load_lora_adapter", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, param)


def test_other_fields_of_vllm_are_taken_and_named(managed):
    reply = load(managed, "extras", "a", is_3d_lora_weight=False)
    assert reply.headers["x-ignored-parameters"] == "is_3d_lora_weight"
    assert unload(managed, "extras").status_code == 200


def test_what_was_uploaded_is_neither_replaced_nor_unloaded(managed, tmp_path):
    upload(managed, save_prefix_adapter(tmp_path / "mine", seed=30), "mine")
    for in_place in (False, True):
        assert load(managed, "mine", "a", load_inplace=in_place).status_code == 412
    reply = unload(managed, "mine")
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "not_loaded")
    assert "uploaded" in reply.json()["error"]["message"]
    # A version that is uploaded on top of a loaded one keeps the name.
    assert load(managed, "both", "a").status_code == 200
    upload(managed, save_prefix_adapter(tmp_path / "mine", seed=30), "both")
    assert unload(managed, "both").status_code == 400
    assert len(managed.get("/adapters/both").json()["versions"]) == 2
    assert unload(managed, "nobody").status_code == 404


def test_openais_client_sees_a_loaded_adapter(managed):
    client = openai.OpenAI(base_url=str(managed.base_url) + "/v1", api_key="none", max_retries=0)
    load(managed, "for-openai", "b")
    ask = {"model": "for-openai", "prompt": "Label :", "max_tokens": 4, "temperature": 0}
    answer = client.completions.create(**ask)
    assert answer.choices[0].text == generated(managed, "for-openai").json()["generated_text"]
    unload(managed, "for-openai")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**ask)
    client.close()


def test_a_server_without_the_setting_says_which_it_is(server, folders):
    for reply in (load(server, "x", folders / "allowed" / "a"), unload(server, "complaints")):
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "loading_disabled")
        assert "load_dirs" in reply.json()["error"]["message"]
    assert "complaints" in models(server)


# --- the watched directory -------------------------------------------------------------------


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_what_lay_there_is_served_from_the_first_request_on(tiny_base, folders, tmp_path):
    settings = make_settings(
        tiny_base,
        tmp_path / "data",
        adapter_dir=folders / "watched",
        adapter_dir_seconds=3600,  # no look but those of the start
    )
    with running_server(settings) as client:
        reply = generated(client, "early")
        assert (reply.status_code, reply.headers["x-adapter-version"]) == (200, "1")
        assert client.get("/adapters/early").json()["source"] == "watched"


def test_folders_come_change_and_go_while_it_runs(managed, folders):
    save_prefix_adapter(folders / "new", seed=40)
    shutil.copytree(folders / "new", folders / "watched" / "later")
    wait_for(lambda: "later" in models(managed))
    first = generated(managed, "later").json()["generated_text"]
    other = save_prefix_adapter(folders / "other", seed=41)
    for file in other.iterdir():
        shutil.copy(file, folders / "watched" / "later")
    wait_for(lambda: managed.get("/adapters/later").json()["version"] == 2)
    assert generated(managed, "later@1").json()["generated_text"] == first
    archive = managed.get("/adapters/later/download").content
    tensors = zipfile.ZipFile(io.BytesIO(archive)).read("adapter_model.safetensors")
    assert tensors == (other / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folders / "watched" / "later")
    wait_for(lambda: "later" not in models(managed))
    assert "early" in models(managed)
    # It is nobody's to load over or to unload.
    assert load(managed, "early", "a", load_inplace=True).status_code == 412
    assert unload(managed, "early").status_code == 400


def test_the_settings_say_which_directory_is_missing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="adapter_dir"):
        Settings(adapter_dir=tmp_path / "nowhere")
    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.setenv("GRAFTWORK_LOAD_DIRS", f"{tmp_path / 'a'}:{tmp_path / 'b'}:")
    assert Settings().load_dirs == (tmp_path / "a", tmp_path / "b")
    monkeypatch.setenv("GRAFTWORK_LOAD_DIRS", f"{tmp_path / 'c'}")
    with pytest.raises(ValueError, match="load_dirs"):
        Settings()
    monkeypatch.setenv("GRAFTWORK_LOAD_DIRS", "")
    assert Settings().load_dirs == ()
