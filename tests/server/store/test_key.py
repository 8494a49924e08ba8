"""Keys as they are made and kept."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from server.errors import KeyInvalid, KeyNotFound
from server.store.key import digest_of, id_in, is_text_of, new_text
from server.store.keys import KeyStore

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


class Clock:
    now = NOW.timestamp()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path):
    store = KeyStore(tmp_path, clock=Clock())
    yield store
    store.close()


def test_a_key_has_256_random_bits_and_says_its_id():
    texts = {new_text() for _ in range(100)}
    assert len({id_in(text) for text in texts}) == len(texts)
    for text in texts:
        start, secret = text.rsplit("-", 1)
        assert len(bytes.fromhex(secret)) * 8 == 256
        assert start.replace("gw-", "key-") == id_in(text)


@pytest.mark.parametrize("change", [str.upper, lambda text: text[:-1], lambda text: text + "0",
                                    lambda text: text + "\n", lambda text: " " + text,
                                    lambda text: text.replace("gw-", "sk-")])  # fmt: skip
def test_what_is_no_key_has_no_id(change):
    assert id_in(change(new_text())) is None


def test_only_the_whole_text_is_the_key(store):
    made = store.create("a", ["generate"])
    assert is_text_of(made.text, made.key)
    wrong = made.text[:-1] + ("0" if made.text[-1] != "0" else "1")
    assert id_in(wrong) == made.key.id
    assert not is_text_of(wrong, made.key)
    assert not is_text_of(made.text, None)
    # No text has the digest that a missing key is compared with.
    assert made.key.digest == digest_of(made.text) != bytes(32)


def test_a_key_comes_back_as_it_was_made_but_for_its_text(store, tmp_path):
    made = store.create(
        "web ä",
        ["train", "generate"],
        adapters=["b", "a*", "b"],
        tenant="acme",
        rate="60/minute",
        tokens="1000 per 2 hours",
        expires_in=timedelta(days=30),
    )
    key = made.key
    assert store.list() == [key]
    assert (key.name, key.scopes, key.adapters) == ("web ä", {"generate", "train"}, ("a*", "b"))
    assert (key.rate, key.tokens, key.tenant) == ("60 per 1 minute", "1000 per 2 hour", "acme")
    assert (key.created_at, key.expires_at) == (NOW, NOW + timedelta(days=30))
    assert (key.last_used_at, key.revoked_at) == (None, None)
    database = sqlite3.connect(tmp_path / "registry.db")
    said = "\n".join(database.iterdump())
    database.close()
    assert key.id in said
    secret = made.text.rsplit("-", 1)[1]
    stored = said + "".join(path.read_bytes().decode("latin-1") for path in tmp_path.iterdir())
    assert secret not in stored
    assert secret.upper() not in stored.upper()
    assert key.digest.hex() in said


def test_revoked_and_expired_keys_are_good_no_more(store):
    short = store.create("short", ["generate"], expires_in=timedelta(seconds=10)).key
    assert short.is_good(NOW + timedelta(seconds=9))
    assert not short.is_good(NOW + timedelta(seconds=10))
    revoked = store.revoke(short.id)
    assert revoked.revoked_at == NOW
    assert not revoked.is_good(NOW)
    Clock.now += 5
    assert store.revoke(short.id) == revoked
    assert store.list() == [revoked]
    Clock.now = NOW.timestamp()


def test_what_was_used_is_noted(store):
    first, second = (store.create(name, ["generate"]).key for name in "ab")
    store.note_used({second.id: NOW, "key-000000000000": NOW})
    assert {key.id: key.last_used_at for key in store.list()} == {first.id: None, second.id: NOW}


def test_an_unknown_id_is_refused(store):
    with pytest.raises(KeyNotFound, match="no key 'key-1'"):
        store.revoke("key-1")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a" * 101}, "name"),
        ({"name": "\ud800"}, "name"),
        ({"scopes": []}, "scope"),
        ({"scopes": ["generate", "all"]}, "scope"),
        ({"adapters": []}, "adapter"),
        ({"adapters": ["*"]}, "adapter"),
        ({"adapters": ["a*b"]}, "adapter"),
        ({"adapters": ["A"]}, "adapter"),
        ({"adapters": ["a..b"]}, "adapter"),
        ({"scopes": ["admin"], "adapters": ["a"]}, "adapter"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": "a:b"}, "tenant"),
        ({"rate": "fast"}, "rate"),
        ({"rate": "0/minute"}, "rate"),
        ({"rate": "10/minute;100/day"}, "rate"),
        ({"rate": "100001/day"}, "rate"),
        ({"rate": "5/0minute", "tokens": "x"}, "tokens"),
        ({"tokens": "-1/day"}, "tokens"),
        ({"tokens": "1e9/day"}, "tokens"),
        ({"expires_in": timedelta()}, "expires"),
        ({"expires_in": timedelta(days=-1)}, "expires"),
        ({"expires_in": timedelta(days=999_999_999)}, "expires"),
    ],
)
def test_a_key_that_cannot_be_is_refused(change, field, store):
    asked = {"name": "a", "scopes": ["generate"], **change}
    with pytest.raises(KeyInvalid, match=f"^{field}: expected") as caught:
        store.create(asked.pop("name"), asked.pop("scopes"), **asked)
    assert caught.value.field == field
    assert store.list() == []
