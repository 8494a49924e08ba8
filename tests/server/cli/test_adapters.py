"""`graftwork adapters` on a data directory and on a running server: the same words, the same results."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters.checkpoint.folder import digest_of
from adapters.training.provenance import Provenance
from server.base.convert import DEFAULT_BASE_DIGEST
from server.demo.install import demo_adapters
from tests.server.cli.runner import refusal, run, run_json
from tests.server.http_server import HIDDEN, LAYERS, save_prefix_adapter
from tests.server.jobs.examples import a_job

FILES = {"adapter_config.json", "adapter_model.safetensors"}
RECORD = {"name", "version", "digest", "peft_type", "status", "residency", "aliases", "template"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Three prefix adapters in one folder, beside a file that is none."""
    home = tmp_path_factory.mktemp("folders")
    for seed, name in enumerate(("one", "two", "three"), start=10):
        (save_prefix_adapter(home / name, seed=seed) / "README.md").unlink()
    (home / "notes.txt").write_text("not an adapter")
    return home


@pytest.fixture(params=["directory", "server"])
def where(request, tiny_base, tmp_path) -> list[object]:
    """The options that name a place with no adapter of the names used here."""
    if request.param == "directory":
        return ["--data-dir", tmp_path / "data", "--base", tiny_base]
    server = request.getfixturevalue("server")
    kept = {"complaints", "other"}
    for one in server.get("/adapters").json()["adapters"]:
        if one["name"] not in kept:
            server.delete(f"/adapters/{one['name']}")
    return ["--url", server.base_url]


@pytest.fixture
def place(where) -> list[object]:
    """As `where`, for commands that need no base."""
    return where[:2]


def test_several_folders_are_added_and_one_failure_stops_no_other(folders, where, place):
    paths = sorted(folders.iterdir())
    added = run("adapters", "add", *paths, *where)
    assert added.exit_code == 1
    assert [line.split()[0] for line in added.stdout.splitlines()] == ["one@1", "three@1", "two@1"]
    assert "notes.txt: expected adapter_config.json" in added.stderr
    again = run("adapters", "add", *paths, *where, "--json")
    told = {Path(one["path"]).name: one for one in json.loads(again.stdout)}
    assert [told[name]["created"] for name in ("one", "two", "three")] == [False] * 3
    assert set(told["notes.txt"]) == {"path", "error"}
    listed = {one["name"]: one for one in run_json("adapters", "list", *place)}
    assert {"one", "two", "three"} <= listed.keys()
    assert listed["one"].keys() >= RECORD
    assert listed["one"]["digest"] == digest_of(folders / "one")


def test_a_zip_is_added_under_its_own_name(where, tmp_path):
    save_prefix_adapter(tmp_path / "saved" / "inside")
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "saved")
    (added,) = run_json("adapters", "add", archive, *where)
    assert (added["name"], added["ignored_files"]) == ("zipped", ["inside/README.md"])


def test_words_are_stored_and_shown(folders, where, place):
    words = ["--template", "Tweet : {text} Label : ", "--labels", "yes,no", "--description", "é"]
    run_json("adapters", "add", folders / "one", "--name", "worded", *words, *where)
    shown = run_json("adapters", "show", "worded", *place)
    assert (shown["labels"], shown["target_separator"]) == (["yes", "no"], " ")
    assert shown["config"]["peft_type"] == "PREFIX_TUNING"
    text = run("adapters", "show", "worded", *place).output
    assert "Tweet : {text} Label :" in text
    assert "version 1" in text


def test_versions_aliases_rollback_and_remove(folders, where, place):
    for name in ("one", "two"):
        run_json("adapters", "add", folders / name, "--name", "versioned", *where)
    assert run_json("adapters", "show", "versioned", *place)["version"] == 2
    record = run_json("adapters", "alias", "versioned", "old", 1, *place)
    assert (record["version"], record["aliases"]) == (1, ["old"])
    run_json("adapters", "alias", "versioned", "older", 1, *place)
    record = run_json("adapters", "alias", "versioned", "older", "--remove", *place)
    assert (record["version"], record["aliases"]) == (1, ["old"])
    back = run("adapters", "rollback", "versioned", 1, *place)
    assert "versioned@1 is what a bare name means now" in back.output
    assert run_json("adapters", "show", "versioned", *place)["version"] == 1
    by_alias = run_json("adapters", "show", "versioned@old", *place)
    assert by_alias["digest"] == digest_of(folders / "one")
    assert [one["version"] for one in by_alias["versions"]] == [1, 2]
    gone = run_json("adapters", "remove", "versioned@old", "--yes", *place)
    assert gone["deleted_versions"] == [1]
    assert run_json("adapters", "show", "versioned", *place)["version"] == 2


def test_remove_asks_and_takes_no_for_an_answer(folders, where, place):
    run_json("adapters", "add", folders / "one", "--name", "asked", *where)
    kept = run("adapters", "remove", "asked", *place, text="n\n")
    assert (kept.exit_code, "nothing was removed" in kept.output) == (1, True)
    silent = run("adapters", "remove", "asked", *place, text="")
    assert (silent.exit_code, "say --yes" in silent.stderr) == (2, True)
    assert run("adapters", "remove", "asked", *place, text="y\n").exit_code == 0
    assert "no adapter 'asked'" in refusal("adapters", "show", "asked", *place)


def test_download_gives_the_same_bytes_as_a_folder_and_a_zip(folders, where, place, tmp_path):
    for name in ("one", "two"):
        run_json("adapters", "add", folders / name, "--name", "loaded", *where)
    out = tmp_path / "out" / "folder"
    told = run_json("adapters", "download", "loaded@1", "--out", out, *place)
    assert (told["version"], told["out"]) == (1, str(out))
    assert {path.name for path in out.iterdir()} == FILES
    assert digest_of(out) == digest_of(folders / "one")
    archive = tmp_path / "out" / "two.zip"
    run_json("adapters", "download", "loaded", "--out", archive, *place)
    assert set(zipfile.ZipFile(archive).namelist()) == FILES
    for taken in (out, archive):
        assert "there already" in refusal("adapters", "download", "loaded", "--out", taken, *place)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"folder", "two.zip"}


def test_combine_is_the_weighted_sum(folders, where, place, tmp_path):
    run("adapters", "add", folders / "one", folders / "two", *where)
    parts = ["one:0.25", "two:-2"]
    made = run_json("adapters", "combine", *parts, "--name", "both", "--labels", "a,b", *where)
    assert (made["name"], made["version"], made["labels"]) == ("both", 1, ["a", "b"])
    run_json("adapters", "download", "both", "--out", tmp_path / "both", *place)
    one, two, both = (
        load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        for folder in (folders / "one", folders / "two", tmp_path / "both")
    )
    torch.testing.assert_close(both, 0.25 * one - 2 * two)
    assert "both" in refusal("adapters", "combine", *parts, "--name", "both", *where)
    assert "NAME:WEIGHT" in refusal("adapters", "combine", "one", "--name", "c", *where)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "nobody"], "no adapter 'nobody'"),
        (["show", "one@9"], "no version or alias '9'"),
        (["rollback", "one", "9"], "no version or alias '9'"),
        (["alias", "one", "7", "1"], "'7' cannot be an alias"),
        (["alias", "one", "none", "--remove"], "no version or alias 'none'"),
        (["alias", "one", "stable", "1", "--remove"], "or --remove; came both"),
        (["alias", "one", "stable"], "or --remove; came neither"),
        (["download", "nobody", "--out", "nowhere"], "no adapter 'nobody'"),
        (["remove", "nobody", "--yes"], "no adapter 'nobody'"),
        (["remove", "..", "--yes"], "no adapter '..'"),
        (["show", "one/download"], "no adapter 'one/download'"),
    ],
)
def test_refusals_are_one_line(folders, where, place, words, said):
    run_json("adapters", "add", folders / "one", *where)
    assert said in refusal("adapters", *words, *place)


def test_names_with_brackets_are_told_as_they_came(folders, where):
    told = refusal("adapters", "add", folders / "one", "--name", "Bad[red]", *where)
    assert "'Bad[red]' cannot be an adapter's name: expected 1 to 63 lower-case letters" in told
    assert told.endswith("try 'bad-red'")


def test_one_name_for_several_folders_is_refused(folders, where):
    paths = [folders / "one", folders / "two"]
    assert "--name is for one" in refusal("adapters", "add", *paths, "--name", "x", *where)
    missing = refusal("adapters", "add", folders / "thre", *where)
    assert "thre: expected a folder that PEFT saved; there is no such" in missing
    assert f"did you mean {folders / 'three'}?" in missing
    assert "--name is for one" in refusal("adapters", "add", folders, "--name", "x", *where)


def test_an_unknown_adapter_is_told_with_the_one_that_was_meant(folders, where, place):
    run_json("adapters", "add", folders / "three", *where)
    said = refusal("adapters", "show", "thre", *place)
    assert said == "there is no adapter 'thre'; did you mean 'three'?"
    assert "three" in refusal("adapters", "show", "qqqq", *place)


def test_a_folder_of_folders_adds_them_all(folders, where, place, tmp_path):
    home = tmp_path / "runs"
    shutil.copytree(folders, home, ignore=shutil.ignore_patterns("notes.txt"))
    (home / "two").rename(home / "Zwei Größen")
    (home / "three").rename(home / "checkpoint-10")
    added = run("adapters", "add", home, *where)
    assert added.exit_code == 0, added.output
    assert [line.split("@")[0] for line in added.stdout.splitlines()] == ["zwei-grossen", "one"]
    assert "found 2 adapters: zwei-grossen and one" in added.stderr
    assert run_json("adapters", "show", "zwei-grossen", *place)["description"] == "Zwei Größen"
    # A file of one means its folder.
    again = run_json("adapters", "add", home / "one" / "adapter_model.safetensors", *where)
    assert [(one["name"], one["created"]) for one in again] == [("one", False)]


def test_a_folder_of_folders_names_the_one_without_a_config(folders, where, tmp_path):
    home = tmp_path / "runs"
    shutil.copytree(folders, home)
    (home / "two" / "adapter_config.json").unlink()
    added = run("adapters", "add", home, *where)
    assert added.exit_code == 1, added.output
    assert sorted(one.split("@")[0] for one in added.stdout.splitlines()) == ["one", "three"]
    assert f"{home / 'two'} holds adapter_model.safetensors and no adapter_config" in added.stderr


def test_a_zip_of_several_adapters_says_what_to_do(folders, where, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", folders)
    told = refusal("adapters", "add", archive, *where)
    assert "all.zip holds 3 adapters: one, three and two; unzip it, and add the folder" in told


def test_a_warning_is_told_once_and_none_of_one_folder_under_two_paths(tiny_base, tmp_path):
    for number in range(2):
        folder = save_prefix_adapter(tmp_path / "other" / f"o{number}", seed=number)
        _name_base(folder, "nobody/base")
        _name_base(
            save_prefix_adapter(tmp_path / "same" / f"s{number}", seed=number + 2),
            f"{tiny_base.parent}/./{tiny_base.name}",
        )
    options = ["--data-dir", tmp_path / "data", "--base", tiny_base]
    assert run("adapters", "add", tmp_path / "other", *options).stderr.count("nobody/base") == 1
    assert "names the base" not in run("adapters", "add", tmp_path / "same", *options).stderr


def _name_base(folder: Path, name: str) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": name}))


def test_a_folder_of_checkpoints_asks_which(folders, where, tmp_path):
    home = tmp_path / "run"
    shutil.copytree(folders / "one", home / "checkpoint-9")
    (added,) = run_json("adapters", "add", home, *where)
    assert added["name"] == "run"
    shutil.copytree(folders / "two", home / "checkpoint-10")
    said = refusal("adapters", "add", home, *where)
    assert "2 checkpoints of one adapter: checkpoint-9 and checkpoint-10" in said
    assert said.endswith(f"graftwork adapters add {home / 'checkpoint-10'} --name run")


def test_a_folder_without_adapters_is_told_what_it_holds(folders, where, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "it is empty" in refusal("adapters", "add", tmp_path / "empty", *where)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "it is a whole model" in refusal("adapters", "add", tmp_path / "model", *where)
    assert "it holds empty/ and model/" in refusal("adapters", "add", tmp_path, *where)


def test_two_folders_of_one_name_are_refused_before_any_is_added(folders, where, place, tmp_path):
    for name in ("Same Name", "same-name"):
        shutil.copytree(folders / "one", tmp_path / name)
    assert "would both be named 'same-name'" in refusal("adapters", "add", tmp_path, *where)


def test_a_folder_that_was_trained_elsewhere_is_refused(folders, where, tmp_path):
    folder = tmp_path / "trained"
    shutil.copytree(folders / "one", folder)
    Provenance(a_job(), {}, {}).write(folder)
    told = refusal("adapters", "add", folder, *where)
    assert "trained on the base 'somebody/base' (digest bbbbbbbbbbbb)" in told
    assert len(told) < 200


def test_the_default_base_is_not_made_for_a_folder_of_another(folders, tmp_path):
    folder = tmp_path / "trained"
    shutil.copytree(folders / "one", folder)
    Provenance(a_job(), {}, {}).write(folder)
    cache = {"GRAFTWORK_CACHE_DIR": str(tmp_path / "cache")}
    told = refusal("adapters", "add", folder, "--data-dir", tmp_path / "data", **cache)
    assert "'somebody/base'" in told
    assert "--base" in told
    assert not (tmp_path / "cache").exists()
    assert {one.job.base_digest for one in demo_adapters()} == {DEFAULT_BASE_DIGEST}


def test_preload_and_unload_are_a_server_s(server, tmp_path):
    told = run("adapters", "preload", "complaints", "--url", server.base_url)
    assert "complaints@1 is on its way to the device" in told.output
    record = run_json("adapters", "unload", "complaints@1", "--url", server.base_url)
    assert record["name"] == "complaints"
    for verb in ("preload", "unload"):
        assert "needs a running server" in refusal("adapters", verb, "complaints")


# --- where ----------------------------------------------------------------------------------


def test_a_place_is_named_once(server, tmp_path):
    url, data = str(server.base_url), str(tmp_path / "data")
    both = refusal("adapters", "list", "--url", url, "--data-dir", data)
    assert "--url and --data-dir are both given" in both
    in_environment = {"GRAFTWORK_URL": url, "GRAFTWORK_DATA_DIR": data}
    assert "GRAFTWORK_URL and GRAFTWORK_DATA_DIR" in refusal("adapters", "list", **in_environment)
    # An option wins over the environment, whichever it is.
    names = {one["name"] for one in run_json("adapters", "list", "--url", url, **in_environment)}
    assert {"complaints", "other"} <= names
    named = ["--data-dir", data]
    assert "no data directory" in refusal("adapters", "list", *named, **in_environment)
    assert run_json("adapters", "list", GRAFTWORK_URL=url)


def test_a_folder_that_is_no_data_directory_is_left_alone(tmp_path):
    told = refusal("adapters", "list", "--data-dir", tmp_path)
    assert "holds no registry.db" in told
    assert "--url" in told
    assert list(tmp_path.iterdir()) == []


# --- merge ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ia3(tmp_path_factory) -> Path:
    """An IA3 adapter of the tiny base, as PEFT writes it."""
    from adapters.checkpoint.folder import write_checkpoint

    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somebody/base",
        "target_modules": ["q_proj"],
        "feedforward_modules": [],
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }
    scales = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.ia3_l": torch.full(
            (HIDDEN, 1), 2.0
        )
        for layer in range(LAYERS)
    }
    directory = tmp_path_factory.mktemp("ia3") / "doubled"
    directory.mkdir()
    write_checkpoint(directory, config, scales)
    return directory


def test_merge_writes_a_base_of_its_own(ia3, where, place, tiny_base, tmp_path):
    run_json("adapters", "add", ia3, *where)
    out = tmp_path / "merged"
    base = ["--base", tiny_base]
    told = run_json("adapters", "merge", "doubled", "--out", out, "--safe-merge", *place, *base)
    assert (told["adapter"], told["num_modules"]) == ("doubled@1", LAYERS)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_base, out))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(after[name], 2 * before[name])
    assert torch.equal(
        after["model.layers.0.self_attn.k_proj.weight"],
        before["model.layers.0.self_attn.k_proj.weight"],
    )
    again = refusal("adapters", "merge", "doubled", "--out", out, *place, *base)
    assert "there already" in again


def test_merge_takes_a_folder_and_refuses_what_is_not_ia3(ia3, folders, tiny_base, tmp_path):
    base = ["--base", tiny_base, "--data-dir", tmp_path / "data"]
    told = run("adapters", "merge", ia3, "--out", tmp_path / "merged", *base)
    assert "graftwork serve --base" in told.output
    assert "IA3" in refusal("adapters", "merge", folders / "one", "--out", tmp_path / "no", *base)


def test_merge_refuses_another_base_than_the_server_s(ia3, server, tmp_path):
    from tests.server.base.tiny import save_tiny

    url = ["--url", server.base_url]
    run("adapters", "add", ia3, *url)
    other = save_tiny(tmp_path / "other")
    told = refusal("adapters", "merge", "doubled", "--out", tmp_path / "m", *url, "--base", other)
    assert "belongs to another base (digest" in told
