"""`graftwork doctor`: what is whole is ok, and every fault is found with what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from server.cli.doctor import environment, machine, read_settings, stores
from server.cli.doctor.finding import Finding, guarded
from server.config.settings import Settings
from server.store.registry import Registry
from server.store.schema import HEAD
from tests.server.cli.runner import run, run_json
from tests.server.cli.test_http_client import something
from tests.server.conftest import make_settings
from tests.server.http_server import save_prefix_adapter

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def filled(tiny_base, tmp_path_factory) -> Path:
    """A data directory with two versions of one adapter."""
    home = tmp_path_factory.mktemp("doctor")
    for seed in (1, 2):
        folder = save_prefix_adapter(home / "mine", seed=seed)
        run_json("adapters", "add", folder, "--base", tiny_base, "--data-dir", home / "data")
    return home / "data"


@pytest.fixture
def data_dir(filled, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(filled, tmp_path / "data"))


@pytest.fixture
def settings(tiny_base, data_dir) -> Settings:
    return make_settings(tiny_base, data_dir, port=0)


def failed(findings) -> list[str]:
    return [one.message for one in findings if one.status == "fail"]


def test_a_sound_installation_has_nothing_to_say(tiny_base, filled, server):
    words = ["--base", tiny_base, "--data-dir", filled, "--port", 0]
    found = run_json("doctor", *words)
    assert [one for one in found if one["status"] == "fail"] == []
    checks = ["python", "packages", "imports", "settings", "device", "disk", "port"]
    assert {*checks, "data directory", "database", "blobs", "base", "adapters"} == {
        one["check"] for one in found
    }
    adapters = next(one for one in found if one["check"] == "adapters")
    assert adapters["message"] == "2 versions of adapters fit the base"
    text = run("doctor", *words, "--deep").output
    assert "2 hashed and found intact" in text
    assert "0 failed" in text
    url = ["--url", server.base_url]
    told = [one for one in run_json("doctor", *words, *url) if one["check"] == "server"]
    assert "serves tiny-base" in told[0]["message"]


def test_nothing_is_made_and_nothing_is_changed(tiny_base, filled, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in filled.rglob("*") if path.is_file()}
    run("doctor", "--base", tiny_base, "--data-dir", filled, "--deep", "--port", 0)
    after = {path: path.stat().st_mtime_ns for path in filled.rglob("*") if path.is_file()}
    kept = {path: at for path, at in before.items() if not path.name.endswith(("-shm", "-wal"))}
    assert kept.items() <= after.items()
    run("doctor", "--base", tiny_base, "--data-dir", tmp_path / "none", "--port", 0)
    assert not (tmp_path / "none").exists()


def test_a_failure_is_the_exit_status(tmp_path):
    told = run("doctor", "--base", tmp_path, "--data-dir", tmp_path / "data", "--port", 0)
    assert told.exit_code == 1
    assert "it has no config.json" in told.output
    assert "1 failed" in told.output


# --- environment ----------------------------------------------------------------------------


def test_python_is_held_against_what_is_declared():
    assert [one.status for one in environment.check_python("3.12.1")] == ["ok"]
    (old,) = environment.check_python("3.9.2")
    assert (old.status, "expected >=3.11" in old.message) == ("fail", True)


def test_packages_are_held_against_what_is_declared():
    declared = ["torch>=2.13", "httpx", "peft==0.21.2; extra == 'test'", "gone>=1"]
    installed = {"torch": "2.9.0", "httpx": "0.28"}
    found = list(environment.check_packages(declared, installed))
    assert failed(found) == [
        "torch: expected >=2.13, came version 2.9.0",
        "gone: expected >=1, came not installed",
    ]
    assert found[0].hint == "pip install 'torch>=2.13'"
    (fine,) = environment.check_packages(["torch>=2"], {"torch": "2.13.0+cpu"})
    assert (fine.status, fine.message) == ("ok", "1 packages as declared")


def test_a_hidden_package_is_found(tmp_path):
    """AdapterHub's `adapters` before ours, in a Python of its own."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "__init__.py").write_text("")
    (tmp_path / "adapters-1.2.0.dist-info").mkdir()
    (tmp_path / "adapters-1.2.0.dist-info" / "METADATA").write_text(
        "Name: adapters\nVersion: 1.2.0\n"
    )
    (tmp_path / "adapters-1.2.0.dist-info" / "top_level.txt").write_text("adapters\n")
    (tmp_path / "adapters-1.2.0.dist-info" / "RECORD").write_text("adapters/__init__.py,,\n")
    # No finder of an editable installation may find ours nevertheless.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        f"sys.path = [{str(tmp_path)!r}, *sys.path, {str(REPOSITORY)!r}];"
        "sys.argv = ['graftwork', 'adapters', 'list'];"
        "from server.__main__ import main; main()"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )
    assert told.returncode == 1
    assert "Traceback" not in told.stderr
    assert f"`import adapters` finds {tmp_path / 'adapters' / '__init__.py'}" in told.stdout
    assert "pip uninstall adapters" in told.stdout


def test_a_distribution_that_shares_a_name_is_a_warning(monkeypatch):
    owners = {"adapters": ["graftwork", "pip"], "server": ["graftwork"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: owners)
    adapters, ours = environment.check_shadowed()
    assert (adapters.status, ours.status) == ("warning", "ok")
    assert adapters.hint.startswith("pip uninstall pip")


def test_variables_with_a_wrong_letter_are_found():
    said = {"GRAFTWORK_PROT": "1", "graftwork_port": "1", "GRAFTWORK_XYZZY": "", "PATH": ""}
    found = list(environment.check_variables(said, ["port", "host"]))
    assert [(one.status, one.hint) for one in found] == [
        ("warning", "did you mean GRAFTWORK_PORT?"),
        ("warning", "graftwork settings lists all of them"),
    ]


def test_a_setting_that_cannot_be_read_is_told_and_the_rest_is_left(monkeypatch):
    monkeypatch.setenv("GRAFTWORK_PORT", "many")
    settings, found = read_settings({})
    assert settings is None
    assert "GRAFTWORK_PORT: expected a whole number, came 'many'" in failed(found)[0]
    told = run("doctor")
    assert (told.exit_code, "GRAFTWORK_PORT" in told.output) == (1, True)
    assert read_settings({"port": 1})[0].port == 1


# --- machine --------------------------------------------------------------------------------


def test_devices(settings):
    (fine, crowd) = machine.check_device(settings.model_copy(update={"threads": 4096}))
    assert (fine.status, crowd.status) == ("ok", "warning")
    (none,) = machine.check_device(settings.model_copy(update={"device": "abacus"}))
    assert none.status == "fail"


def test_free_space(tmp_path):
    (found,) = machine.check_disk(tmp_path / "not" / "there" / "yet")
    assert (found.check, str(tmp_path) in found.message) == ("disk", True)


def test_a_port_that_is_free_or_ours_or_somebody_else_s(server):
    assert [one.status for one in machine.check_port("127.0.0.1", 0)] == ["ok"]
    (ours,) = machine.check_port("127.0.0.1", server.base_url.port)
    assert (ours.status, "serves tiny-base" in ours.message) == ("ok", True)
    with something(200, b"<h1>Hello</h1>") as url:
        (theirs,) = machine.check_port("127.0.0.1", int(url.rpartition(":")[2]))
    assert (theirs.status, "no Graftwork server answers" in theirs.message) == ("fail", True)
    (unknown,) = machine.check_port("192.0.2.1", 0)
    assert unknown.status == "fail"


def test_a_port_held_by_one_that_says_nothing(monkeypatch):
    monkeypatch.setattr(machine, "_PATIENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (taken,) = machine.check_port("127.0.0.1", silent.getsockname()[1])
    assert (taken.status, "is in use" in taken.message) == ("fail", True)


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("host", "host")]
)
def test_hosts_as_a_client_writes_them(host, url):
    assert machine.reachable(host) == url


def test_a_server_that_is_none():
    with something(200, b'{"router": "tgi"}', "application/json") as url:
        (other,) = machine.check_server(url, None)
    assert other.status == "fail"
    (gone,) = machine.check_server("http://127.0.0.1:9", None)
    assert "nothing answers" in gone.message


# --- stores ---------------------------------------------------------------------------------


def test_bases(settings, tmp_path):
    (fine,), spec = stores.check_base(settings, deep=True)
    assert (fine.status, spec.num_layers) == ("ok", 2)
    broken = Path(shutil.copytree(settings.base, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    changed = settings.model_copy(update={"base": str(broken)})
    (found,), spec = stores.check_base(changed, deep=False)
    assert (found.status, spec) == ("fail", None)
    assert "before its tensors do" in found.message
    gone = settings.model_copy(update={"base": str(tmp_path / "gone")})
    assert "expected a directory" in failed(stores.check_base(gone, deep=False)[0])[0]


def test_a_default_base_that_is_not_made_yet_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFTWORK_CACHE_DIR", str(tmp_path))
    (found,), spec = stores.check_base(Settings(), deep=False)
    assert (found.status, spec) == ("warning", None)
    (tmp_path / "base").mkdir()
    (found,), _ = stores.check_base(Settings(), deep=False)
    assert (found.status, "not whole" in found.message) == ("fail", True)


def test_a_changed_byte_is_found_by_looking_deep(settings):
    with_registry = Registry(settings.data_dir)
    digest = with_registry.lookup("mine@1").digest
    with_registry.close()
    weights = settings.data_dir / "blobs" / digest / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert failed(stores.check_data_dir(settings, deep=False)) == []
    (found,) = failed(stores.check_data_dir(settings, deep=True))
    assert found.startswith(f"mine@1: the stored bytes of {digest[:12]}")
    weights.unlink()
    assert len(failed(stores.check_data_dir(settings, deep=False))) == 1
    _, spec = stores.check_base(settings, deep=False)
    assert failed(stores.check_adapters(settings, spec))[0].startswith("mine@1: ")


def test_an_adapter_of_another_base_is_found(settings):
    from tests.adapters.checkpoints import BASE

    found = failed(stores.check_adapters(settings, BASE))
    assert [one.split(":")[0] for one in found] == ["mine@1", "mine@2"]


@pytest.mark.parametrize(
    ("revision", "status"), [("0001", "warning"), ("9999", "fail"), (HEAD, "ok")]
)
def test_a_database_of_another_version_is_not_touched(settings, revision, status):
    database = settings.data_dir / "registry.db"
    link = sqlite3.connect(database)
    link.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    link.commit()
    link.close()
    found = [one for one in stores.check_data_dir(settings, deep=False) if one.check == "database"]
    assert [one.status for one in found] == [status]
    link = sqlite3.connect(database)
    assert link.execute("SELECT version_num FROM alembic_version").fetchone() == (revision,)
    link.close()
    assert stores.has_adapters(settings) is (status == "ok")


def test_what_is_no_database_is_told(settings):
    (settings.data_dir / "registry.db").write_bytes(b"nonsense" * 1000)
    for rest in settings.data_dir.glob("registry.db-*"):
        rest.unlink()
    (found,) = failed(stores.check_data_dir(settings, deep=False))
    assert "cannot be read" in found


def test_a_file_where_the_data_directory_belongs(settings, tmp_path):
    (tmp_path / "file").write_text("")
    changed = settings.model_copy(update={"data_dir": tmp_path / "file"})
    assert failed(stores.check_data_dir(changed, deep=False)) == [
        f"{tmp_path / 'file'} is not a folder"
    ]


def test_what_no_version_uses_is_mentioned(settings):
    registry = Registry(settings.data_dir)
    registry.delete("mine", 1)
    registry.close()
    found = stores.check_data_dir(settings, deep=False)
    assert any("1 that no version uses" in one.message for one in found)


def test_a_check_that_breaks_is_a_finding():
    def broken():
        yield Finding("x", "ok", "fine")
        raise KeyError("what nobody foresaw")

    (found,) = guarded("x", broken)
    assert (found.status, found.message) == ("fail", "KeyError: 'what nobody foresaw'")


def test_json_is_the_same_findings(tmp_path):
    words = ["--base", tmp_path, "--data-dir", tmp_path / "data", "--port", 0]
    found = json.loads(run("doctor", *words, "--json").stdout)
    assert all(one.keys() == {"check", "status", "message", "hint"} for one in found)
