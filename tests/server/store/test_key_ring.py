"""Keys in memory follow those in the database."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from datetime import timedelta
from itertools import pairwise

import anyio
import anyio.to_thread
import pytest

from server.errors import NotReady
from server.store.key_ring import KeyRing
from server.store.keys import KeyStore


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def places(tmp_path):
    """A ring on a store of its own, and another store, as the command line has one."""
    clock = Clock()
    outside = KeyStore(tmp_path, clock=clock)
    first = outside.create("first", ["generate"])
    ring = KeyRing(KeyStore(tmp_path, clock=clock), clock=clock)
    yield ring, outside, first, clock
    ring.close()
    outside.close()


async def test_a_key_is_found_by_its_whole_text(places):
    ring, _, first, _ = places
    assert await ring.find(first.text) == first.key
    wrong = first.text[:-4] + "".join("1" if c == "0" else "0" for c in first.text[-4:])
    for text in (wrong, "", "gw-", first.key.id, first.text + "0", "\ud800", "gw-" + "0" * 77):
        assert await ring.find(text) is None


async def test_a_key_that_was_revoked_elsewhere_is_known_within_a_second(places):
    ring, outside, first, clock = places
    second = outside.create("second", ["train"])
    assert await ring.find(second.text) == second.key
    outside.revoke(second.key.id)
    clock.now += 1.1
    assert await ring.find(second.text) is None
    assert await ring.find(first.text) == first.key


async def test_a_key_is_found_while_every_common_thread_is_busy(places):
    ring, _, first, clock = places
    released = threading.Event()
    busy = anyio.to_thread.current_default_thread_limiter()
    async with anyio.create_task_group() as group:
        for _ in range(int(busy.total_tokens)):
            group.start_soon(anyio.to_thread.run_sync, released.wait)
        try:
            while busy.available_tokens:
                await asyncio.sleep(0.01)
            clock.now += 1.1  # it has to look
            with anyio.fail_after(20):
                assert await ring.find(first.text) == first.key
        finally:
            released.set()


async def test_an_expired_key_is_found_no_more(places):
    ring, outside, _, clock = places
    made = outside.create("short", ["generate"], expires_in=timedelta(seconds=5))
    clock.now += 4
    assert await ring.find(made.text) == made.key
    clock.now += 1
    assert await ring.find(made.text) is None


async def test_a_key_is_known_as_soon_as_it_is_made(places):
    ring, outside, _, _ = places
    for number in range(3):  # whatever was read a moment ago
        made = outside.create(str(number), ["train"])
        assert await ring.find(made.text) == made.key


async def test_all_who_try_unknown_keys_share_their_looks(tmp_path):
    store = KeyStore(tmp_path)
    ring = KeyRing(store)
    reads = []
    listed = store.list
    store.list = lambda: reads.append(time.monotonic()) or listed()  # counts, and is the real one
    for _ in range(3):
        tries = [ring.find(f"gw-{number:012x}-" + "0" * 64) for number in range(50)]
        assert set(await asyncio.gather(*tries)) == {None}
    assert 3 <= len(reads) <= 6
    assert min(after - before for before, after in pairwise(reads)) >= 0.09
    ring.close()


async def test_use_is_noted_about_once_a_minute_and_at_the_end(places, tmp_path):
    ring, outside, first, clock = places

    def noted():
        at = outside.list()[0].last_used_at
        return None if at is None else at.timestamp()

    for _ in range(58):
        clock.now += 1.01
        await ring.find(first.text)
    assert noted() is None
    clock.now += 2
    await ring.find(first.text)
    assert noted() == pytest.approx(clock.now - 2, abs=0.1)  # what was used before this look
    ring._note()
    assert noted() == pytest.approx(clock.now)


async def test_a_database_that_cannot_be_read_closes_the_door_after_a_minute(places, tmp_path):
    ring, _, first, clock = places
    database = sqlite3.connect(tmp_path / "registry.db")
    database.execute("ALTER TABLE keys RENAME TO elsewhere")
    clock.now += 30
    assert await ring.find(first.text) == first.key
    clock.now += 31
    with pytest.raises(NotReady, match="keys cannot be read"):
        await ring.find(first.text)
    database.execute("ALTER TABLE elsewhere RENAME TO keys")
    database.close()
    assert await ring.find(first.text) == first.key


async def test_whether_there_is_any_key(tmp_path):
    store = KeyStore(tmp_path)
    ring = KeyRing(store)
    assert ring.is_empty()
    made = store.create("a", ["generate"])
    ring._read()
    assert not ring.is_empty()
    store.revoke(made.key.id)
    ring._read()
    assert ring.is_empty()
    ring.close()
