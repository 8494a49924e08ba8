"""What is parsed in one turn of the event loop is bounded; between two turns the loop is the others'."""

from __future__ import annotations

import asyncio

import h11
import pytest

from server.config.settings import Settings
from server.errors import BodyTooLarge
from server.http.connection_limits import (
    EVENTS_A_TURN,
    FREE_CHUNKS,
    MIN_CHUNK_BYTES,
    BoundedConnection,
    ConnectionLimits,
)
from server.http.turns import Turns

CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"


def chunks(size: int, number: int) -> bytes:
    return b"%x\r\n%b\r\n" % (size, b"a" * size) * number


def turn(connection: BoundedConnection) -> list[h11.Event]:
    """The events of one turn."""
    connection.begin_turn()
    found = []
    while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
        found.append(event)
    return found


@pytest.fixture
def connection() -> BoundedConnection:
    return BoundedConnection(ConnectionLimits.of(Settings()))


def test_a_turn_has_a_number_of_events_however_much_has_come(connection):
    connection.receive_data(CHUNKED + chunks(1, 10_000) + b"0\r\n\r\n")
    turns = [turn(connection)]
    while connection.is_held:
        turns.append(turn(connection))
    assert {len(events) for events in turns[:-1]} == {EVENTS_A_TURN}
    events = [event for events in turns for event in events]
    assert isinstance(events[0], h11.Request)
    assert isinstance(events[-1], h11.EndOfMessage)
    assert b"".join(bytes(event.data) for event in events[1:-1]) == b"a" * 10_000


def test_a_request_of_the_usual_kind_has_one_turn(connection):
    connection.receive_data(
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 90000\r\n\r\n" + b"a" * 90_000
    )
    assert len(turn(connection)) == 3
    assert not connection.is_held


@pytest.mark.parametrize(("size", "number"), [(1, FREE_CHUNKS), (MIN_CHUNK_BYTES, 3 * FREE_CHUNKS)])
def test_small_chunks_are_taken_up_to_a_number(connection, size, number):
    connection.receive_data(CHUNKED + chunks(size, number) + b"0\r\n\r\n")
    events = turn(connection)
    while connection.is_held:
        events = turn(connection)
    assert isinstance(events[-1], h11.EndOfMessage)


def test_above_that_number_they_are_refused_with_the_path(connection):
    connection.receive_data(CHUNKED + chunks(1, 2 * FREE_CHUNKS))
    while connection.refusal[1] == "":
        try:
            turn(connection)
        except h11.RemoteProtocolError:
            break
    error, path = connection.refusal
    assert isinstance(error, BodyTooLarge)
    assert path == "/v1/completions"


async def test_between_two_turns_the_loop_is_everybodys():
    turns, order = Turns(), []
    loop = asyncio.get_running_loop()
    for number in range(8):
        turns.wait(loop, lambda number=number: order.append(number))
    while len([one for one in order if one != "other"]) < 8:
        order.append("other")
        await asyncio.sleep(0)
    numbers = [one for one in order if one != "other"]
    assert numbers == list(range(8))
    assert all("other" in order[order.index(n) : order.index(n + 1)] for n in range(7))


async def test_a_connection_that_waits_again_is_behind_the_others():
    turns, order, done = Turns(), [], asyncio.Event()
    loop = asyncio.get_running_loop()

    def take(name: str, left: int) -> None:
        order.append(name)
        if left:
            turns.wait(loop, lambda: take(name, left - 1))
        elif len(order) == 6:
            done.set()

    for name in ("a", "b"):
        turns.wait(loop, lambda name=name: take(name, 2))
    await asyncio.wait_for(done.wait(), 30)
    assert order == ["a", "b"] * 3
