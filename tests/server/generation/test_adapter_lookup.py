"""Lookups made for many at once: each answer is of a lookup that began after it was asked for."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import anyio
import pytest

from adapters.errors import AdapterNotFound, StorageUnavailable
from server.generation.adapter_lookup import Lookups
from server.store.caller import UNRESTRICTED, Caller
from tests.server.generation.test_quotas import a_key


class Shelf:
    """Finds names after `opened`; counts how often it was asked, and who asked."""

    def __init__(self) -> None:
        self.there: dict[str, int] = {}
        self.asked: list[tuple[str, Caller]] = []
        self.version: int | None = None
        self.busy = threading.Event()
        self.opened = threading.Event()

    def look_up(self, name: str, caller: Caller) -> int:
        self.asked.append((name, caller))
        found = self.there.get(name)
        self.busy.set()
        assert self.opened.wait(30)
        if name == "stuck":
            raise StorageUnavailable("the database cannot be read")
        if found is None:
            raise AdapterNotFound(f"no {name}")
        return found

    def lookups(self) -> Lookups[int]:
        return Lookups(self.look_up, anyio.CapacityLimiter(4), lambda: self.version)


async def busy(shelf: Shelf, lookups: Lookups[int]) -> asyncio.Task[int]:
    """A lookup that has begun and does not end before `opened`."""
    first = asyncio.create_task(lookups.find("first", UNRESTRICTED))
    assert await asyncio.to_thread(shelf.busy.wait, 30)
    return first


async def asked(
    lookups: Lookups[int], *names: str, caller: Caller = UNRESTRICTED
) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(lookups.find(name, caller)) for name in names]
    await asyncio.sleep(0)
    return tasks


async def test_who_asks_for_the_same_meanwhile_shares_a_lookup():
    shelf = Shelf()
    shelf.there = {"first": 1, "a": 2, "b": 3}
    lookups = shelf.lookups()
    first = await busy(shelf, lookups)
    rest = await asked(lookups, *("a", "b") * 10)
    shelf.opened.set()
    assert await first == 1
    assert await asyncio.gather(*rest) == [2, 3] * 10
    assert [name for name, _ in shelf.asked] == ["first", "a", "b"]


async def test_an_answer_is_never_older_than_its_question():
    shelf = Shelf()
    shelf.there = {"first": 1}
    lookups = shelf.lookups()
    first = await busy(shelf, lookups)
    shelf.there["first"] = 2  # published while the lookup before runs
    [second] = await asked(lookups, "first")
    shelf.opened.set()
    assert (await first, await second) == (1, 2)


async def test_callers_who_see_other_adapters_share_no_result():
    shelf = Shelf()
    shelf.there = {"first": 1, "a": 2}
    lookups = shelf.lookups()
    first = await busy(shelf, lookups)
    anna, ben, also_anna = (
        Caller(replace(a_key(number), adapters=names))
        for number, names in ((1, ("a*",)), (2, ("a",)), (3, ("a*",)))
    )
    tasks = []
    for caller in (anna, ben, also_anna):
        tasks += await asked(lookups, "a", caller=caller)
    shelf.opened.set()
    assert [await first, *await asyncio.gather(*tasks)] == [1, 2, 2, 2]
    assert shelf.asked == [("first", UNRESTRICTED), ("a", anna), ("a", ben)]


async def test_what_was_found_is_cached_until_the_version_changes():
    shelf = Shelf()
    shelf.opened.set()
    shelf.there = {"a": 1, "b": 2}
    shelf.version = 7
    lookups = shelf.lookups()
    assert [await lookups.find(name, UNRESTRICTED) for name in "aabab"] == [1, 1, 2, 1, 2]
    assert [name for name, _ in shelf.asked] == ["a", "b"]
    shelf.there["a"] = 3
    shelf.version = 8
    assert [await lookups.find(name, UNRESTRICTED) for name in "aab"] == [3, 3, 2]
    assert len(shelf.asked) == 4


async def test_without_a_version_nothing_is_cached():
    shelf = Shelf()
    shelf.opened.set()
    shelf.there = {"a": 1}
    lookups = shelf.lookups()
    assert [await lookups.find("a", UNRESTRICTED) for _ in range(3)] == [1, 1, 1]
    assert len(shelf.asked) == 3


async def test_a_result_that_was_read_under_an_older_version_is_not_cached():
    shelf = Shelf()
    shelf.there = {"first": 1}
    shelf.version = 1
    lookups = shelf.lookups()
    first = await busy(shelf, lookups)
    shelf.version = 2
    shelf.there["other"] = 9
    [other] = await asked(lookups, "other")  # sees version 2 while "first" is still being read
    shelf.opened.set()
    assert (await first, await other) == (1, 9)
    shelf.there["first"] = 5
    assert await lookups.find("first", UNRESTRICTED) == 5


async def test_a_refusal_is_not_cached():
    shelf = Shelf()
    shelf.opened.set()
    shelf.version = 1
    lookups = shelf.lookups()
    for _ in range(2):
        with pytest.raises(AdapterNotFound):
            await lookups.find("a", UNRESTRICTED)
    assert len(shelf.asked) == 2


async def test_who_leaves_takes_no_answer_along():
    shelf = Shelf()
    shelf.there = {"first": 1, "a": 2}
    lookups = shelf.lookups()
    first = await busy(shelf, lookups)
    leaving, staying = await asked(lookups, "a", "a")
    leaving.cancel()
    first.cancel()
    shelf.opened.set()
    assert await staying == 2


async def test_a_refusal_is_everybodys_who_asked_and_nobody_elses():
    shelf = Shelf()
    shelf.there = {"first": 1, "b": 3}
    lookups = shelf.lookups()
    first = await busy(shelf, lookups)
    rest = await asked(lookups, "a", "a", "b")
    shelf.opened.set()
    assert await first == 1
    came = await asyncio.gather(*rest, return_exceptions=True)
    assert [type(one) for one in came] == [AdapterNotFound, AdapterNotFound, int]


async def test_a_store_that_cannot_be_read_is_waited_for_once():
    shelf = Shelf()
    shelf.there = {"first": 1, "a": 2}
    lookups = shelf.lookups()
    first = await busy(shelf, lookups)
    rest = await asked(lookups, "stuck", "a")
    shelf.opened.set()
    assert await first == 1
    for task in rest:
        with pytest.raises(StorageUnavailable):
            await task
    assert [name for name, _ in shelf.asked] == ["first", "stuck"]
    assert await lookups.find("a", UNRESTRICTED) == 2


async def test_more_names_than_are_looked_up_in_one_go():
    shelf = Shelf()
    shelf.opened.set()
    shelf.there = {f"{number}": number for number in range(50)}
    lookups = shelf.lookups()
    assert await asyncio.gather(
        *(lookups.find(name, UNRESTRICTED) for name in shelf.there)
    ) == list(range(50))


async def test_who_settles_comes_after_all_who_have_asked():
    """They have done what they do at once with the answer; those who ask later are not waited for."""
    shelf = Shelf()
    lookups = shelf.lookups()
    done: list[str] = []

    async def find(name: str) -> None:
        await lookups.find(name, UNRESTRICTED)
        done.append(name)

    await lookups.settle()  # nobody has asked
    shelf.there = {f"{index}": index for index in range(40)}
    tasks = [asyncio.create_task(find(name)) for name in shelf.there]
    leaving = asyncio.create_task(lookups.find("0", UNRESTRICTED))
    await asyncio.to_thread(shelf.busy.wait, 30)
    settling = asyncio.create_task(lookups.settle())
    await asyncio.sleep(0.01)
    assert not settling.done()
    leaving.cancel()
    shelf.opened.set()
    await settling
    assert sorted(done) == sorted(shelf.there)
    await asyncio.gather(*tasks)
