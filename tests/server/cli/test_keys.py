"""`graftwork keys`, on a data directory."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from server.store.key import id_in
from server.store.keys import KeyStore
from tests.server.cli.runner import refusal, run, run_json


def test_a_key_is_made_shown_once_listed_and_revoked(tmp_path):
    place = ("--data-dir", tmp_path / "new")
    result = run("keys", "create", "--name", "web [b]", "--scope", "generate", *place)
    assert result.exit_code == 0, result.output
    text = result.stdout.strip()  # nothing else: it can be put into a variable
    key_id = id_in(text)
    assert key_id is not None
    assert f"{key_id}; the key itself is shown this once" in result.stderr
    for words in (["list"], ["list", "--json"], ["revoke", key_id]):
        said = run("keys", *words, *place).output
        assert key_id in said
        assert text[20:] not in said
    said = run("keys", "list", *place).output
    assert "web [b]" in said
    assert "revoked 20" in said


def test_everything_about_a_key_can_be_said(tmp_path):
    place = ("--data-dir", tmp_path)
    made = run_json(
        "keys", "create", "--name", "a", "-s", "train", "-s", "generate", "-a", "b", "-a", "team-*",
        "--tenant", "acme", "--rate", "60/minute", "--tokens", "100000/day", "--expires", "30d",
        *place,
    )  # fmt: skip
    text = made.pop("key")
    assert id_in(text) == made["id"]
    said = {"name": "a", "scopes": ["generate", "train"], "adapters": ["b", "team-*"],
            "tenant": "acme", "rate": "60 per 1 minute", "tokens": "100000 per 1 day",
            "last_used_at": None, "revoked_at": None}  # fmt: skip
    assert made == made | said
    lasts = datetime.fromisoformat(made["expires_at"]) - datetime.fromisoformat(made["created_at"])
    assert lasts == timedelta(days=30)
    assert run_json("keys", "list", *place) == [made]
    revoked = run_json("keys", "revoke", made["id"], *place)
    assert revoked | {"revoked_at": None} == made
    assert revoked["revoked_at"] is not None
    store = KeyStore(tmp_path)
    assert [key.id for key in store.list()] == [made["id"]]
    store.close()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--scope", "everything"], "scope: expected one or more of generate, adapters:read"),
        (["--scope", "generate", "--rate", "often"], "rate: expected a number from 1 to 100000"),
        (["--scope", "generate", "--expires", "soon"], "--expires: expected a number and one of"),
        (["--scope", "generate", "--expires", "0d"], "--expires: expected a number and one of"),
        (["--scope", "generate", "--expires", "9999999w"], "expires: expected a time from now on"),
        (["--scope", "generate", "--adapter", "../x"], "adapter: expected an adapter's name"),
        (["--scope", "admin", "--adapter", "x"], "adapter: expected none beside the scope admin"),
    ],
)
def test_a_key_that_cannot_be_made_is_told_in_a_sentence(words, sentence, tmp_path):
    said = refusal("keys", "create", "--name", "a", *words, "--data-dir", tmp_path)
    assert said.startswith(sentence)
    store = KeyStore(tmp_path)
    assert store.list() == []
    store.close()


def test_a_place_without_keys_is_told(tmp_path):
    for words in (["list"], ["revoke", "key-000000000000"]):
        said = refusal("keys", *words, "--data-dir", tmp_path / "none")
        assert "is no data directory" in said
    assert not (tmp_path / "none").exists()
    run("keys", "create", "--name", "a", "-s", "train", "-d", tmp_path)
    assert refusal("keys", "revoke", "key-0", "-d", tmp_path) == "there is no key 'key-0'"
