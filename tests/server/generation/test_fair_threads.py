"""Long work runs on few threads, and whose turn it is depends on who waits."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace

import pytest

from server.generation.fair_threads import FairThreads
from server.store.caller import UNRESTRICTED, Caller
from tests.server.generation.test_quotas import a_key


def caller(owner: str) -> Caller:
    return Caller(replace(a_key(), tenant=owner))


class Works:
    """Works that end when `open` is set, and the order in which they began."""

    def __init__(self, num_threads: int = 1) -> None:
        self.threads = FairThreads(num_threads)
        self.open = threading.Event()
        self.began: list[str] = []

    def start(self, name: str, who: Caller = UNRESTRICTED, **options) -> asyncio.Task[str]:
        def work() -> str:
            self.began.append(name)
            assert self.open.wait(30)
            return name

        return asyncio.create_task(self.threads.run(who, work, **options))

    async def first(self, *names: str, who: Caller = UNRESTRICTED) -> list[asyncio.Task[str]]:
        """Works that hold the threads."""
        tasks = [self.start(name, who) for name in names]
        while len(self.began) < len(names):
            await asyncio.sleep(0.001)
        return tasks


async def test_callers_take_turns_however_many_works_each_has():
    works, many, few = Works(), caller("many"), caller("few")
    tasks = await works.first("held", who=many)
    tasks += [works.start(f"many-{number}", many) for number in range(6)]
    tasks += [works.start(f"few-{number}", few) for number in range(2)]
    await asyncio.sleep(0)
    works.open.set()
    assert await asyncio.gather(*tasks)
    order = ["held", "many-0", "few-0", "many-1", "few-1"]
    assert works.began == [*order, "many-2", "many-3", "many-4", "many-5"]


async def test_a_short_work_waits_for_one_long_one_at_most():
    works = Works()
    tasks = await works.first("held")
    tasks += [works.start(f"long-{number}", is_long=True) for number in range(4)]
    tasks.append(works.start("short"))
    await asyncio.sleep(0)
    works.open.set()
    await asyncio.gather(*tasks)
    assert works.began[:3] == ["held", "long-0", "short"]


async def test_no_more_run_than_there_are_threads():
    works = Works(3)
    tasks = await works.first("a", "b", "c")
    tasks += [works.start(f"later-{number}") for number in range(20)]
    await asyncio.sleep(0.02)
    assert sorted(works.began) == ["a", "b", "c"]
    works.open.set()
    assert len(await asyncio.gather(*tasks)) == 23


async def test_works_that_are_given_up_at_any_moment_block_nobody():
    threads, chosen = FairThreads(2), random.Random(0)

    async def given_up(number: int) -> None:
        task = asyncio.create_task(threads.run(caller(str(number % 3)), lambda: None))
        for _ in range(chosen.randrange(6)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    await asyncio.gather(*(given_up(number) for number in range(300)))
    works = Works()
    works.threads = threads
    tasks = await works.first("a", "b")  # both threads are free
    works.open.set()
    assert await asyncio.gather(*tasks) == ["a", "b"]


async def test_what_a_work_raises_is_raised_and_the_thread_is_free_again():
    works = Works()
    with pytest.raises(ZeroDivisionError):
        await works.threads.run(UNRESTRICTED, lambda: 1 / 0)
    assert await works.threads.run(UNRESTRICTED, lambda: 1) == 1
